"""Tokens of images, made once: for training many epochs without the tokenizer's work.

    python VAR/encode.py --vae_ckpt tokenizer.safetensors --data images.zip --outdir tokens --patch_nums 1 2 4 8

Images are encoded as they are, without the crops of `VAR/finetune.py`, and must have the tokenizer's size.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neon.cli.command_line import run_program
from neon.cli.flags import FileOrURL
from neon.cli.programs import EncodeProgram, ImageEncoder

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes


@dataclass(frozen=True, kw_only=True)
class EncodeForVAR(EncodeProgram):
    """Encode images as tokens.

    Example: python VAR/encode.py --vae_ckpt tokenizer.safetensors --data images.zip --outdir tokens
    """

    vae_ckpt: FileOrURL
    """the tokenizer"""
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """side lengths of the scales"""

    def encoder(self, group: "Processes") -> ImageEncoder:
        from neon.data.images import from_uint8
        from neon.runtime.download import shared_file
        from neon.runtime.files import sha256_file
        from VAR.model import TOKENS, load_tokenizer, token_dtype

        path = shared_file(self.vae_ckpt, group)
        tokenizer = load_tokenizer(path, self.patch_nums).to(group.device)
        return ImageEncoder(
            encode=lambda images: tokenizer.tokens(from_uint8(images)).to(token_dtype(tokenizer)),
            kind=TOKENS,
            side=tokenizer.image_side,
            identity={"tokenizer_sha256": group.on_main(lambda: sha256_file(path)), "patch_nums": self.patch_nums},
        )


if __name__ == "__main__":
    sys.exit(run_program(EncodeForVAR))
