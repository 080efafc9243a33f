"""Images of an xAR transformer, every class equally often: the synthetic set S.

    torchrun --standalone --nproc_per_node=8 xAR/sample.py --model_ckpt xAR-B.pth --outdir synthetic.zip \\
        --num_images 750000 --cfg 2.7 --flow_steps 40

A killed run goes on where it was.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from neon import __version__
from neon.command_line import run_program
from neon.distributed import processes
from neon.files import sha256_file
from neon.noise import Purpose
from neon.sampling import check_enough, check_label, sample_set
from xAR.flags import ALIASES, ImageFlags


@dataclass(frozen=True, kw_only=True)
class Sample(ImageFlags):
    """Sample images of an xAR transformer into a PNG folder or a zip, with their classes."""

    outdir: Path
    """folder of the images, or a name that ends in .zip"""
    fresh: bool = False
    """replace what the output holds"""

    def __call__(self) -> None:
        self.check()
        with processes(self.device) as group:
            check_enough(self.num_images, group)
            path, model = self.load(group)
            check_label(model, self.class_)
            settings = self.settings(model)
            identity = {
                "neon": __version__,
                "network_sha256": group.on_main(lambda: sha256_file(path)),
                "num_images": self.num_images,
                "seed": self.seed,
                "class": self.class_,
                "batch_size": self.batch_size,
                "settings": asdict(settings),
                **self.facts(group, model),
            }
            sample_set(
                model,
                self.seeds(Purpose.SYNTHETIC),
                settings,
                self.outdir,
                batch_size=self.batch_size,
                processes=group,
                identity=identity,
                label=self.labels(model),
                fresh=self.fresh,
            )
            if group.is_main:
                print(f"{self.outdir}: {self.num_images} images")


if __name__ == "__main__":
    sys.exit(run_program(Sample, ALIASES))
