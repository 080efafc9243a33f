"""Tokens of images, made once: for training many epochs without the tokenizer's work.

    python VAR/encode.py --vae_ckpt tokenizer.safetensors --data images.zip --outdir tokens --patch_nums 1 2 4 8

Images are encoded as they are, without the crops of `VAR/finetune.py`, and must have the tokenizer's size.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from neon import __version__
from neon.command_line import run_program
from neon.dataset import ImageDataset
from neon.distributed import processes
from neon.download import shared_file
from neon.errors import RequestError
from neon.examples import write_examples
from neon.files import sha256_file
from neon.runs import run_folder
from VAR.model import TOKENS, load_tokenizer, token_dtype
from VAR.preprocess import as_input


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Encode images as tokens."""

    vae_ckpt: Annotated[str, tyro.conf.arg(metavar="FILE|URL")]
    """the tokenizer"""
    data: Path
    """folder or zip of images"""
    outdir: Path
    """folder of the tokens"""
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """side lengths of the scales"""
    batch_size: int = 64
    """images per forward pass of one process"""
    fresh: bool = False
    """replace what the output holds"""
    device: Literal["cpu", "cuda"] | None = None
    """by default a GPU where there is one"""

    def __call__(self) -> None:
        with processes(self.device) as group:
            path = shared_file(self.vae_ckpt, group)
            tokenizer = load_tokenizer(path, self.patch_nums).to(group.device)
            dataset = ImageDataset(self.data)
            shape = (3, tokenizer.image_side, tokenizer.image_side)
            if dataset.image_shape != shape:
                raise RequestError(
                    f"{self.data}: images are {dataset.image_shape} (C, H, W); the tokenizer reads {shape}"
                )

            def compute(block: range) -> tuple[torch.Tensor, torch.Tensor | None]:
                images, labels = dataset.load(block)
                tokens = tokenizer.tokens(as_input(images.to(group.device)))
                return tokens.to(token_dtype(tokenizer)), labels

            record = {
                "neon": __version__,
                "tokenizer_sha256": group.on_main(lambda: sha256_file(path)),
                "data": str(self.data),
                "patch_nums": self.patch_nums,
                "batch_size": self.batch_size,
            }
            with contextlib.ExitStack() as stack:
                group.on_main(lambda: stack.enter_context(run_folder(self.outdir, record, fresh=self.fresh)))
                write_examples(
                    compute,
                    len(dataset),
                    self.outdir,
                    kind=TOKENS,
                    image_shape=shape,
                    batch_size=self.batch_size,
                    processes=group,
                    title="encoding",
                )
            if group.is_main:
                print(f"{self.outdir}: {len(dataset)} images")


if __name__ == "__main__":
    sys.exit(run_program(Encode, {}))
