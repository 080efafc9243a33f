"""Latents of images, made once: for training many epochs without the autoencoder's work.

    python xAR/encode.py --vae_path xAR/pretrained/kl16.ckpt --data images.zip --outdir latents

What is kept of an image are the moments of the autoencoder's posterior, as it is and mirrored; training takes one of
the two and samples the posterior afresh. That is the same training as on the images, which is the published way.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from neon.cli.command_line import run_program
from neon.cli.flags import EncodeFlags
from neon.runtime.distributed import processes
from neon.runtime.download import shared_file
from neon.runtime.files import sha256_file
from xAR.model import MOMENTS, load_vae
from xAR.vae import as_input


@dataclass(frozen=True, kw_only=True)
class Encode(EncodeFlags):
    """Encode images as moments of latents."""

    vae_path: Annotated[str, tyro.conf.arg(metavar="FILE|URL")]
    """the autoencoder"""
    img_size: int = 256
    """side of the images"""

    def __call__(self) -> None:
        with processes(self.device) as group:
            path = shared_file(self.vae_path, group)
            vae = load_vae(path).to(group.device)

            def encode(images: torch.Tensor) -> torch.Tensor:
                return torch.stack([vae.moments(as_input(side)) for side in (images, images.flip(3))], dim=1)

            identity = {"vae_sha256": group.on_main(lambda: sha256_file(path))}
            self.write(encode, kind=MOMENTS, side=self.img_size, identity=identity, processes=group)


if __name__ == "__main__":
    sys.exit(run_program(Encode, {}))
