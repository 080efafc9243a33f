"""Images of an xAR transformer, every class equally often: the synthetic set S.

    torchrun --standalone --nproc_per_node=8 xAR/sample.py --model_ckpt xAR-B.pth --outdir synthetic.zip \\
        --num_images 750000 --cfg 2.7 --flow_steps 40

A killed run goes on where it was.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from neon.cli.command_line import run_program
from neon.cli.programs import SampleProgram
from neon.cli.refused import CLASSES, DEVICE, TORCHRUN
from xAR.flags import XARImageFlags


@dataclass(frozen=True, kw_only=True)
class SampleXAR(XARImageFlags, SampleProgram):
    """Sample images of an xAR transformer into a PNG folder or a zip, with their classes.

    Example: python xAR/sample.py --model_ckpt xAR-B.pth --outdir synthetic.zip --num_images 10000
    """

    refused: ClassVar[Mapping[str, str]] = {
        "class_num": CLASSES,
        "class_map": "classes are numbers, written to dataset.json; leave it out",
        "cuda": DEVICE,
        **TORCHRUN,
    }


if __name__ == "__main__":
    sys.exit(run_program(SampleXAR))
