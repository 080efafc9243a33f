"""FID, Inception Score, precision and recall of an xAR transformer, or of merges of two.

    PYTHONPATH=xAR torchrun --standalone --nproc_per_node=8 xAR/calculate_fid.py --model xar_base \\
        --model_ckpt checkpoints/Neon_xARB_imagenet256.pth --cfg 3.8 --vae_path xAR/pretrained/kl16.ckpt \\
        --num_images 50000 --batch_size 32 --flow_steps 40 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz

The last line of the output begins with `FID=`. The score depends neither on the number of processes nor
on restarts: a killed evaluation goes on where it was.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from neon.command_line import run_program
from neon.distributed import processes
from neon.noise import Purpose
from neon.scoring import Sampling, ScoringFlags, score_network
from xAR.flags import ALIASES, ImageFlags


@dataclass(frozen=True, kw_only=True)
class CalculateFID(ImageFlags, ScoringFlags):
    """FID, Inception Score, precision and recall of an xAR transformer, or of merges of two. --N is --num_images."""

    images_for: Literal["report", "selection"] = "report"
    """selection: other images than those of the report, to choose w, cfg or the budget with"""

    def __call__(self) -> None:
        self.check()
        with processes(self.device) as group:
            path, model = self.load(group)
            purpose = Purpose.REPORT if self.images_for == "report" else Purpose.SELECTION
            sampling = Sampling(
                seeds=self.seeds(purpose),
                seeds_text=f"{self.images_for} images of seed {self.seed}",
                settings=self.settings(model),
                label=self.labels(model),
                batch_size=self.batch_size,
                facts=self.facts(group, model),
            )
            score_network(path, model, sampling, self, group)


if __name__ == "__main__":
    sys.exit(run_program(CalculateFID, ALIASES))
