"""Images of a VAR transformer, every class equally often: the synthetic set S, as pixels or as tokens.

    torchrun --standalone --nproc_per_node=8 VAR/sample.py --var_ckpt var_d16.pth --outdir synthetic.zip \\
        --num_images 750000 --cfg 1.25
    torchrun --standalone --nproc_per_node=8 VAR/sample.py --var_ckpt var_d16.pth --outdir synthetic --tokens \\
        --num_images 750000 --cfg 1.25

Tokens take about a hundredth of the space of PNGs, and training on them needs no tokenizer passes. A killed
run goes on where it was.
"""

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import torch

from neon.cli.command_line import run_program
from neon.cli.flags import SampledImages
from neon.data.encoded import write_examples
from neon.errors import RequestError
from neon.noise import ImageNoise, Purpose
from neon.runtime.distributed import Processes, processes
from neon.runtime.run_folder import run_folder
from neon.sampling import block_labels, check_enough, check_label
from VAR.flags import ALIASES, ImageFlags
from VAR.model import TOKENS, VARModel, token_dtype
from VAR.sampler import VARSettings


@dataclass(frozen=True, kw_only=True)
class Sample(ImageFlags, SampledImages):
    """Sample images of a VAR transformer into a PNG folder or a zip, with their classes, or as tokens."""

    tokens: bool = False
    """keep tokens instead of pixels, in a folder"""

    def __call__(self) -> None:
        self.check()
        if self.tokens and self.more_smooth:
            raise RequestError("--tokens: images of --more_smooth are no tokens; leave one of them out")
        if self.tokens and self.outdir.suffix == ".zip":
            raise RequestError(f"{self.outdir}: tokens are kept in a folder; leave .zip off")
        with processes(self.device) as group:
            check_enough(self.num_images, group)
            path, model = self.load(group)
            check_label(model, self.class_)
            settings = self.settings(model)
            facts = {**self.facts(group), "tokens": self.tokens}
            write = self.write_tokens if self.tokens else self.write
            write(model, settings, self.identity(path, settings, facts, group), group)

    def write_tokens(self, model: VARModel, settings: VARSettings, identity: dict[str, Any], group: Processes) -> None:
        """The same with tokens in place of images."""
        assert model.tokenizer is not None
        seeds, labels = self.seeds(Purpose.SYNTHETIC), self.labels(model)
        dtype = token_dtype(model.tokenizer)

        def compute(block: range) -> tuple[torch.Tensor, torch.Tensor | None]:
            noise = ImageNoise([seeds[i] for i in block], group.device)
            of_block = block_labels(model, block, noise, labels)
            return model.sample_tokens(noise, of_block, settings).to(dtype), of_block

        with contextlib.ExitStack() as stack:
            group.on_main(lambda: stack.enter_context(run_folder(self.outdir, identity, fresh=self.fresh)))
            write_examples(
                compute,
                self.num_images,
                self.outdir,
                kind=TOKENS,
                image_shape=model.image_shape,
                batch_size=self.batch_size,
                processes=group,
                title="sampling tokens",
            )
        if group.is_main:
            print(f"{self.outdir}: {self.num_images} images")


if __name__ == "__main__":
    sys.exit(run_program(Sample, ALIASES))
