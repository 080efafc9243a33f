"""Images of an xAR transformer, every class equally often: the synthetic set S.

    torchrun --standalone --nproc_per_node=8 xAR/sample.py --model_ckpt xAR-B.pth --outdir synthetic.zip \\
        --num_images 750000 --cfg 2.7 --flow_steps 40

A killed run goes on where it was.
"""

import sys
from dataclasses import dataclass

from neon.cli.command_line import run_program
from neon.cli.flags import SampledImages
from neon.runtime.distributed import processes
from neon.sampling import check_enough, check_label
from xAR.flags import ALIASES, ImageFlags


@dataclass(frozen=True, kw_only=True)
class Sample(ImageFlags, SampledImages):
    """Sample images of an xAR transformer into a PNG folder or a zip, with their classes."""

    def __call__(self) -> None:
        self.check()
        with processes(self.device) as group:
            check_enough(self.num_images, group)
            path, model = self.load(group)
            check_label(model, self.class_)
            settings = self.settings(model)
            self.write(model, settings, self.identity(path, settings, self.facts(group, model), group), group)


if __name__ == "__main__":
    sys.exit(run_program(Sample, ALIASES))
