"""Images of an IMM network, every class equally often: the synthetic set S.

    torchrun --standalone --nproc_per_node=8 imm/sample.py --network_pkl imagenet256_ts_a2.pkl --outdir synthetic.zip \\
        --per_class_count 30

A killed run goes on where it was.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from imm.flags import CONFIGURED, IMMImageFlags
from neon.cli.command_line import run_program
from neon.cli.programs import SampleProgram


@dataclass(frozen=True, kw_only=True)
class SampleIMM(IMMImageFlags, SampleProgram):
    """Sample images of an IMM network into a PNG folder or a zip, with their classes.

    Example: python imm/sample.py --network_pkl base.pkl --outdir synthetic.zip --per_class_count 30
    """

    refused: ClassVar[Mapping[str, str]] = {**CONFIGURED}


if __name__ == "__main__":
    sys.exit(run_program(SampleIMM))
