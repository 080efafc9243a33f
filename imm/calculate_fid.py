"""FID, Inception Score, precision and recall of an IMM network, or of merges of two.

    PYTHONPATH=imm torchrun --standalone --nproc_per_node=8 imm/calculate_fid.py \\
        --network_pkl checkpoints/Neon_imm_imagenet256.pkl --fid_stats fid_stats/adm_in256_stats.npz \\
        --num_steps 8 --cfg_scale 1.8
    python imm/calculate_fid.py --network_pkl base.pkl --self_trained snapshot.safetensors --w 0 1.2 1.8 \\
        --per_class_count 10 --images_for selection --fid_stats fid_stats/adm_in256_stats.npz

The last line of the output begins with `FID=`. The score depends neither on the number of processes nor
on restarts: a killed evaluation goes on where it was.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from imm.flags import CONFIGURED, IMMImageFlags
from neon.cli.command_line import run_program
from neon.cli.programs import NumberedScoreProgram
from neon.cli.refused import SCORES


@dataclass(frozen=True, kw_only=True)
class ScoreIMM(IMMImageFlags, NumberedScoreProgram):
    """FID, Inception Score, precision and recall of an IMM network, or of merges of two.

    Example: python imm/calculate_fid.py --network_pkl base.pkl --ref adm_in256_stats.npz --num_steps 8 --cfg_scale 1.5
    """

    refused: ClassVar[Mapping[str, str]] = {**SCORES, **CONFIGURED}


if __name__ == "__main__":
    sys.exit(run_program(ScoreIMM))
