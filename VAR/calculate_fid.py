"""FID, Inception Score, precision and recall of a VAR transformer, or of merges of two.

    torchrun --standalone --nproc_per_node=8 VAR/calculate_fid.py --var_ckpt checkpoints/Neon_VARd16_imagenet256.pth \\
        --num_images 50000 --batch_size 64 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz
    python VAR/calculate_fid.py --var_ckpt base.safetensors --vae_ckpt tokenizer.safetensors --num_images 2000 \\
        --self_trained tuned.safetensors --w 0 0.5 1 --ref real.npz --images_for selection

The last line of the output begins with `FID=`. The score depends neither on the number of processes nor
on restarts: a killed evaluation goes on where it was.
"""

import sys
from dataclasses import dataclass

from neon.cli.command_line import run_program
from neon.cli.flags import ScoredImages
from neon.cli.score import score_network
from neon.runtime.distributed import processes
from VAR.flags import ALIASES, ImageFlags


@dataclass(frozen=True, kw_only=True)
class CalculateFID(ImageFlags, ScoredImages):
    """FID, Inception Score, precision and recall of a VAR transformer, or of merges of two."""

    def __call__(self) -> None:
        self.check()
        with processes(self.device) as group:
            path, model = self.load(group)
            sampling = self.sampling(model, self.settings(model), self.facts(group))
            score_network(path, model, sampling, self, group)


def main() -> int:
    """Run the program; the folders VAR_imagenet_256 and VAR_imagenet_512 call this too."""
    return run_program(CalculateFID, ALIASES)


if __name__ == "__main__":
    sys.exit(main())
