"""Latents of images, made once: for training many epochs without the autoencoder's work.

    python xAR/encode.py --vae_path xAR/pretrained/kl16.ckpt --data images.zip --outdir latents

What is kept of an image are the moments of the autoencoder's posterior, as it is and mirrored; training takes one of
the two and samples the posterior afresh. That is the same training as on the images, which is the published way.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neon.cli.command_line import run_program
from neon.cli.flags import FileOrURL
from neon.cli.programs import EncodeProgram, ImageEncoder

if TYPE_CHECKING:
    import torch

    from neon.runtime.distributed import Processes


@dataclass(frozen=True, kw_only=True)
class EncodeForXAR(EncodeProgram):
    """Encode images as moments of latents.

    Example: python xAR/encode.py --vae_path xAR/pretrained/kl16.ckpt --data images.zip --outdir latents
    """

    vae_path: FileOrURL
    """the autoencoder"""
    img_size: int = 256
    """side of the images"""

    def encoder(self, group: "Processes") -> ImageEncoder:
        import torch

        from neon.data.images import from_uint8
        from neon.runtime.download import shared_file
        from neon.runtime.files import sha256_file
        from xAR.model import MOMENTS, load_vae

        path = shared_file(self.vae_path, group)
        vae = load_vae(path).to(group.device)

        def encode(images: "torch.Tensor") -> "torch.Tensor":
            return torch.stack([vae.moments(from_uint8(side)) for side in (images, images.flip(3))], dim=1)

        identity = {"vae_sha256": group.on_main(lambda: sha256_file(path))}
        return ImageEncoder(encode=encode, kind=MOMENTS, side=self.img_size, identity=identity)


if __name__ == "__main__":
    sys.exit(run_program(EncodeForXAR))
