"""Latents of images, made once: for training many epochs without the autoencoder's work.

    python imm/encode.py --data images.zip --outdir latents

What is kept of an image are the means and standard deviations of the autoencoder's posterior; training samples it
afresh at every visit. That is the same training as on the images. As published, the encoder computes in float32 here.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from neon.cli.command_line import run_program
from neon.cli.programs import EncodeProgram, ImageEncoder
from neon.errors import RequestError

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes


@dataclass(frozen=True, kw_only=True)
class EncodeForIMM(EncodeProgram):
    """Encode images as means and deviations of latents.

    Example: python imm/encode.py --data images.zip --outdir latents
    """

    refused: ClassVar[Mapping[str, str]] = {
        "source": "name the images with --data",
        "dest": "name the folder with --outdir",
        "model_url": "name the folder of the autoencoder with --vae_path",
        "max_images": "all images of --data are encoded; leave it out",
        **dict.fromkeys(("transform", "resolution"), "resize images before: they are encoded as they are"),
    }

    vae_path: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """autoencoder; by default sd-vae-ft-ema in imm/pretrained/, pretrained/, checkpoints/ or the cache of Hugging
    Face, as diffusers keeps it"""
    img_size: int = 256
    """side of the images"""

    def encoder(self, group: "Processes") -> ImageEncoder:
        import torch

        from imm.latents import MOMENTS
        from imm.vae import load_codec, weights_file
        from neon.runtime.files import sha256_file

        codec = load_codec(self.vae_path, group.device, torch.float32)
        if self.img_size < 1 or self.img_size % codec.downsampling:
            raise RequestError(f"--img_size {self.img_size}: expected a multiple of {codec.downsampling}")
        identity = {"vae_sha256": group.on_main(lambda: sha256_file(weights_file(self.vae_path)))}
        return ImageEncoder(encode=codec.moments, kind=MOMENTS, side=self.img_size, identity=identity)


if __name__ == "__main__":
    sys.exit(run_program(EncodeForIMM))
