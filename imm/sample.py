"""Images of an IMM network, every class equally often: the synthetic set S.

    torchrun --standalone --nproc_per_node=8 imm/sample.py --network_pkl imagenet256_ts_a2.pkl --outdir synthetic.zip \\
        --per_class_count 30

A killed run goes on where it was.
"""

import sys
from dataclasses import dataclass

from imm.flags import ALIASES, ImageFlags, use_tensor_cores
from neon.cli.command_line import run_program
from neon.cli.flags import SampledImages
from neon.runtime.distributed import processes
from neon.sampling import check_enough, check_label


@dataclass(frozen=True, kw_only=True)
class Sample(ImageFlags, SampledImages):
    """Sample images of an IMM network into a PNG folder or a zip, with their classes."""

    def __call__(self) -> None:
        self.check()
        with processes(self.device) as group:
            use_tensor_cores()
            path, model = self.load(group)
            images = self.counted(model)
            check_enough(images.num_images, group)
            check_label(model, self.class_)
            settings = self.settings(model)
            images.write(model, settings, images.identity(path, settings, self.facts(group, model), group), group)


if __name__ == "__main__":
    sys.exit(run_program(Sample, ALIASES))
