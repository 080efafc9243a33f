"""Latents of images, made once: for training many epochs without the autoencoder's work.

    python imm/encode.py --data images.zip --outdir latents

What is kept of an image are the means and standard deviations of the autoencoder's posterior; training samples it
afresh at every visit. That is the same training as on the images. As published, the encoder computes in float32 here.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from imm.latents import MOMENTS
from imm.vae import load_codec, weights_file
from neon.cli.command_line import run_program
from neon.cli.flags import EncodeFlags
from neon.errors import RequestError
from neon.runtime.distributed import processes
from neon.runtime.files import sha256_file


@dataclass(frozen=True, kw_only=True)
class Encode(EncodeFlags):
    """Encode images as means and deviations of latents."""

    vae_path: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """autoencoder; by default sd-vae-ft-ema in imm/pretrained/, pretrained/, checkpoints/ or the cache of Hugging
    Face, as diffusers keeps it"""
    img_size: int = 256
    """side of the images"""

    def __call__(self) -> None:
        with processes(self.device) as group:
            codec = load_codec(self.vae_path, group.device, torch.float32)
            if self.img_size < 1 or self.img_size % codec.downsampling:
                raise RequestError(f"--img_size {self.img_size}: expected a multiple of {codec.downsampling}")
            self.write(
                codec.moments,
                kind=MOMENTS,
                side=self.img_size,
                identity={"vae_sha256": group.on_main(lambda: sha256_file(weights_file(self.vae_path)))},
                processes=group,
            )


if __name__ == "__main__":
    sys.exit(run_program(Encode, {}))
