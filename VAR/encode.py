"""Tokens of images, made once: for training many epochs without the tokenizer's work.

    python VAR/encode.py --vae_ckpt tokenizer.safetensors --data images.zip --outdir tokens --patch_nums 1 2 4 8

Images are encoded as they are, without the crops of `VAR/finetune.py`, and must have the tokenizer's size.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from neon import __version__
from neon.command_line import run_program
from neon.dataset import ImageDataset
from neon.distributed import processes
from neon.download import shared_file
from neon.examples import encode_set
from neon.files import sha256_file
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
            encode_set(
                lambda images: tokenizer.tokens(as_input(images)).to(token_dtype(tokenizer)),
                ImageDataset(self.data),
                self.outdir,
                kind=TOKENS,
                image_shape=(3, tokenizer.image_side, tokenizer.image_side),
                batch_size=self.batch_size,
                processes=group,
                identity={
                    "neon": __version__,
                    "tokenizer_sha256": group.on_main(lambda: sha256_file(path)),
                    "patch_nums": self.patch_nums,
                },
                fresh=self.fresh,
            )


if __name__ == "__main__":
    sys.exit(run_program(Encode, {}))
