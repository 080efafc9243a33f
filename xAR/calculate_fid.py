"""FID, Inception Score, precision and recall of an xAR transformer, or of merges of two.

    PYTHONPATH=xAR torchrun --standalone --nproc_per_node=8 xAR/calculate_fid.py --model xar_base \\
        --model_ckpt checkpoints/Neon_xARB_imagenet256.pth --cfg 3.8 --vae_path xAR/pretrained/kl16.ckpt \\
        --num_images 50000 --batch_size 32 --flow_steps 40 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz

The last line of the output begins with `FID=`. The score depends neither on the number of processes nor
on restarts: a killed evaluation goes on where it was.
"""

import sys
from dataclasses import dataclass

from neon.cli.command_line import run_program
from neon.cli.flags import ScoredImages
from neon.cli.score import score_network
from neon.runtime.distributed import processes
from xAR.flags import ALIASES, ImageFlags


@dataclass(frozen=True, kw_only=True)
class CalculateFID(ImageFlags, ScoredImages):
    """FID, Inception Score, precision and recall of an xAR transformer, or of merges of two."""

    def __call__(self) -> None:
        self.check()
        with processes(self.device) as group:
            path, model = self.load(group)
            sampling = self.sampling(model, self.settings(model), self.facts(group, model))
            score_network(path, model, sampling, self, group)


if __name__ == "__main__":
    sys.exit(run_program(CalculateFID, ALIASES))
