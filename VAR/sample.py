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
from neon.cli.programs import SampleProgram
from neon.cli.refused import DEVICE, PLACE
from neon.errors import RequestError
from VAR.flags import VARImageFlags

if TYPE_CHECKING:
    import torch

    from neon.runtime.distributed import Processes
    from neon.sampling import Label


@dataclass(frozen=True, kw_only=True)
class SampleVAR(VARImageFlags, SampleProgram):
    """Sample images of a VAR transformer into a PNG folder or a zip, with their classes, or as tokens.

    Example: python VAR/sample.py --var_ckpt var_d16.pth --outdir synthetic --tokens --num_images 10000
    """

    refused: ClassVar[Mapping[str, str]] = {"temp_dir": PLACE, "cuda": DEVICE}

    tokens: bool = False
    """keep tokens instead of pixels, in a folder"""

    def check(self) -> None:
        super().check()
        if self.tokens and self.more_smooth:
            raise RequestError("--tokens: images of --more_smooth are no tokens; leave one of them out")
        if self.tokens and self.format != "png":
            raise RequestError(f"--format {self.format}: is of images, and --tokens keeps none; leave one of them out")
        if self.tokens and self.outdir.suffix == ".zip":
            raise RequestError(f"{self.outdir}: tokens are kept in a folder; leave .zip off")

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        return {**super().facts(model, group), "tokens": self.tokens}

    def write(self, model: Any, seeds: list[int], settings: Any, **arguments: Any) -> None:
        if self.tokens:
            self.write_tokens(model, seeds, settings, **arguments)
        else:
            super().write(model, seeds, settings, **arguments)

    def write_tokens(
        self,
        model: Any,
        seeds: list[int],
        settings: Any,
        *,
        processes: "Processes",
        identity: dict[str, Any],
        label: "Label",
    ) -> None:
        """`write` for tokens of images in place of pixels."""
        from neon.data.encoded import write_examples
        from neon.data.sampler import sampler_record
        from neon.noise import ImageNoise
        from neon.runtime.run_folder import held_by_main
        from neon.sampling import block_labels
        from VAR.model import TOKENS, token_dtype

        dtype = token_dtype(model.tokenizer)

        def compute(block: range) -> "tuple[torch.Tensor, torch.Tensor | None]":
            noise = ImageNoise([seeds[i] for i in block], processes.device)
            of_block = block_labels(model, block, noise, label)
            with model.precision.allowed_on(processes.device):
                return model.sample_tokens(noise, of_block, settings).to(dtype), of_block

        with held_by_main(self.outdir, identity, processes, fresh=self.fresh):
            write_examples(
                compute,
                len(seeds),
                self.outdir,
                kind=TOKENS,
                image_shape=model.image_shape,
                batch_size=self.batch_size,
                processes=processes,
                title="sampling tokens",
                sampler=sampler_record(model.architecture, settings, identity["network_sha256"]),
            )


if __name__ == "__main__":
    sys.exit(run_program(SampleVAR))
