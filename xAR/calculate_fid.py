"""FID, Inception Score, precision and recall of an xAR transformer, or of merges of two.

    PYTHONPATH=xAR torchrun --standalone --nproc_per_node=8 xAR/calculate_fid.py --model xar_base \\
        --model_ckpt checkpoints/Neon_xARB_imagenet256.pth --cfg 3.8 --vae_path xAR/pretrained/kl16.ckpt \\
        --num_images 50000 --batch_size 32 --flow_steps 40 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz

The last line of the output begins with `FID=`. The score depends neither on the number of processes nor
on restarts: a killed evaluation goes on where it was.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from neon.cli.command_line import run_program
from neon.cli.programs import NumberedScoreProgram
from neon.cli.refused import SCORES
from xAR.flags import XARImageFlags


@dataclass(frozen=True, kw_only=True)
class ScoreXAR(XARImageFlags, NumberedScoreProgram):
    """FID, Inception Score, precision and recall of an xAR transformer, or of merges of two.

    Example: python xAR/calculate_fid.py --model_ckpt xAR-B.pth --num_images 50000 --ref adm_in256_stats.npz
    """

    refused: ClassVar[Mapping[str, str]] = SCORES


if __name__ == "__main__":
    sys.exit(run_program(ScoreXAR))
