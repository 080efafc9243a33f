"""FID, Inception Score, precision and recall of a VAR transformer, or of merges of two.

    torchrun --standalone --nproc_per_node=8 VAR/calculate_fid.py --var_ckpt checkpoints/Neon_VARd16_imagenet256.pth \\
        --num_images 50000 --batch_size 64 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz
    python VAR/calculate_fid.py --var_ckpt base.safetensors --vae_ckpt tokenizer.safetensors --num_images 2000 \\
        --self_trained tuned.safetensors --w 0 0.5 1 --ref real.npz --images_for selection

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
from VAR.flags import VARImageFlags


@dataclass(frozen=True, kw_only=True)
class ScoreVAR(VARImageFlags, NumberedScoreProgram):
    """FID, Inception Score, precision and recall of a VAR transformer, or of merges of two.

    Example: python VAR/calculate_fid.py --var_ckpt var_d16.pth --num_images 50000 --ref adm_in256_stats.npz
    """

    refused: ClassVar[Mapping[str, str]] = SCORES


if __name__ == "__main__":
    sys.exit(run_program(ScoreVAR))
