"""Images of a VAR transformer, every class equally often: the synthetic set S, as pixels or as tokens.

    torchrun --standalone --nproc_per_node=8 VAR/sample.py --var_ckpt var_d16.pth --outdir synthetic.zip \\
        --num_images 750000 --cfg 1.25
    torchrun --standalone --nproc_per_node=8 VAR/sample.py --var_ckpt var_d16.pth --outdir synthetic --tokens \\
        --num_images 750000 --cfg 1.25

Tokens take about a hundredth of the space of PNGs, and training on them needs no tokenizer passes. A killed
run goes on where it was.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from neon.cli.command_line import run_program
from neon.cli.flags import recorded
from neon.cli.programs import SampleProgram
from neon.cli.refused import DEVICE, PLACE
from neon.errors import RequestError
from VAR.flags import VARImageFlags

if TYPE_CHECKING:
    import torch

    from neon.runtime.distributed import Processes


@dataclass(frozen=True, kw_only=True)
class SampleVAR(VARImageFlags, SampleProgram):
    """Sample images of a VAR transformer into a PNG folder or a zip, with their classes, or as tokens.

    Example: python VAR/sample.py --var_ckpt var_d16.pth --outdir synthetic --tokens --num_images 10000
    """

    refused: ClassVar[Mapping[str, str]] = {"temp_dir": PLACE, "cuda": DEVICE}

    tokens: bool = False
    """keep tokens instead of pixels, in a folder"""

    def __call__(self) -> None:
        if not self.tokens:
            super().__call__()
            return
        from neon.runtime.distributed import processes
        from neon.sampling import check_enough

        self.check()
        if self.more_smooth:
            raise RequestError("--tokens: images of --more_smooth are no tokens; leave one of them out")
        if self.outdir.suffix == ".zip":
            raise RequestError(f"{self.outdir}: tokens are kept in a folder; leave .zip off")
        with processes(self.device) as group:
            check_enough(self.num_images, group)
            path, model, settings = self.start(group)
            facts = self.facts(model, group)
            identity = group.on_main(lambda: recorded(path, self, settings, facts))
            self.write_tokens(model, settings, identity, group)
            if group.is_main:
                print(f"{self.outdir}: {self.num_images} images")

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        return {**super().facts(model, group), "tokens": self.tokens}

    def write_tokens(self, model: Any, settings: Any, identity: dict[str, Any], group: "Processes") -> None:
        """Sample the tokens of all images into the output, or what is missing of them."""
        from neon.data.encoded import write_examples
        from neon.noise import ImageNoise, Purpose
        from neon.runtime.run_folder import held_by_main
        from neon.sampling import block_labels
        from VAR.model import TOKENS, token_dtype

        seeds, labels = self.seeds_of(Purpose.SYNTHETIC), self.labels(model)
        dtype = token_dtype(model.tokenizer)

        def compute(block: range) -> "tuple[torch.Tensor, torch.Tensor | None]":
            noise = ImageNoise([seeds[i] for i in block], group.device)
            of_block = block_labels(model, block, noise, labels)
            with model.precision.allowed_on(group.device):
                return model.sample_tokens(noise, of_block, settings).to(dtype), of_block

        with held_by_main(self.outdir, identity, group, fresh=self.fresh):
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


if __name__ == "__main__":
    sys.exit(run_program(SampleVAR))
