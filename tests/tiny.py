"""Small models, weights and image sets, built in the test, that behave like large ones."""

import math
from pathlib import Path
from typing import Any

import torch

from edm.model import EDM
from imm.model import IMM
from imm.published import canonical
from imm.vae import Codec
from neon.data.images import ArrayDataset
from neon.precision import FP32, Precision
from VAR.model import VARModel
from VAR.vqvae import VQVAE
from xAR.model import XARModel
from xAR.vae import AutoencoderKL

CONFIG: dict[str, Any] = {
    "network": {
        "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 8,
        "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0,
    },
    "label_dropout": 0.2,
}  # fmt: skip


def tiny_edm(seed: int = 0, precision: Precision = FP32, **network: object) -> EDM:
    """An untrained class-conditional EDM of 1 x 8 x 8 images whose output depends on everything."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = EDM({**CONFIG, "network": {**CONFIG["network"], **network}}, precision=precision)
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tiny_images(count: int = 40, seed: int = 0) -> ArrayDataset:
    """uint8 images 1 x 8 x 8 of three classes, each bright in another half, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    bright = torch.zeros(3, 1, 8, 8)
    bright[0, :, :, :4] = bright[1, :, :, 4:] = bright[2, :, :4] = 200
    noise = torch.randint(0, 40, (count, 1, 8, 8), generator=generator)
    return ArrayDataset((bright[labels] + noise).to(torch.uint8), labels, Path("tiny images"))


def pair(dtype: torch.dtype, shape: tuple[int, ...] = (100,), step: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Base weights and self-trained ones a `step` away."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    return base.to(dtype), (base + step * torch.randn(shape, generator=generator)).to(dtype)


def toy_state(step: float = 0.0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A state dict with weights, a mask of -inf and a counter; `step` leads from the base (0) to self-trained (1)."""
    base, self_trained = pair(torch.float32, (40, 30))
    return {
        "net.weight": (base + step * (self_trained - base)).to(dtype),
        "net.bias": torch.full((30,), 1 + step).to(dtype),
        "mask": torch.full((4, 4), -math.inf).triu(1).to(dtype),
        "steps": torch.tensor(5 + int(10 * step)),
    }


def tiny_var(seed: int = 0, precision: Precision = FP32, **transformer: object) -> VARModel:
    """An untrained VAR of 3 x 8 x 8 images of three classes with its tokenizer, whose output depends on everything."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        keywords = {
            "classes": 3, "depth": 2, "width": 32, "heads": 2, "patch_nums": [1, 2, 4], "vocab": 16, "code_channels": 4,
        }  # fmt: skip
        model = VARModel({"transformer": {**keywords, **transformer}}, precision=precision)
        for parameter in model.network.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.set_tokenizer(tiny_tokenizer())
    return model.eval().requires_grad_(False)


def tiny_tokenizer(**changes: object) -> VQVAE:
    """An untrained tokenizer of 3 x 8 x 8 images: 21 tokens in three scales."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        keywords = {"vocab": 16, "code_channels": 4, "base_channels": 32, "channel_mult": [1, 2]}
        tokenizer = VQVAE(**{**keywords, "patch_nums": [1, 2, 4], **changes})  # type: ignore[arg-type]
        torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    return tokenizer.eval().requires_grad_(False)


def tiny_colour_images(count: int = 40) -> ArrayDataset:
    """`tiny_images` with three channels."""
    grey = tiny_images(count)
    return ArrayDataset(grey.images.expand(-1, 3, -1, -1).contiguous(), grey.labels, "tiny images")


def tiny_xar(seed: int = 0, precision: Precision = FP32, **transformer: object) -> XARModel:
    """An untrained xAR of 3 x 8 x 8 images of three classes with its autoencoder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        keywords = {"classes": 3, "width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "latent_channels": 4}
        model = XARModel({"transformer": {**keywords, "grid": 4, **transformer}}, precision=precision)
    model.set_vae(tiny_vae())
    return model.eval().requires_grad_(False)


def tiny_vae() -> AutoencoderKL:
    """An untrained autoencoder that halves images: four channels."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        vae = AutoencoderKL(embed_dim=4, ch_mult=(1, 1), ch=32)
    return vae.eval().requires_grad_(False)


def tiny_imm(seed: int = 0, precision: Precision = FP32, loss: dict[str, Any] | None = None, **network: object) -> IMM:
    """An untrained IMM of three classes whose output depends on everything: latents of 3 x 16 x 16 images."""
    keywords = {
        "img_resolution": 2, "img_channels": 4, "label_dim": 3, "model_type": "DiT", "patch_size": 1, "hidden_size": 64,
        "depth": 1, "num_heads": 1, "num_classes": 3, "temb_type": "stride",
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = IMM({"network": canonical({**keywords, **network})}, precision=precision, loss=loss)
        for parameter in model.network.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tiny_sd_vae(levels: int = 4) -> Codec:
    """An untrained autoencoder as IMM's, of images whose side divides by 2^(levels - 1): by 8, as published."""
    from diffusers.models import AutoencoderKL  # takes seconds

    with torch.random.fork_rng():
        torch.manual_seed(7)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(8,) * levels,
            norm_num_groups=4,
        )
    return Codec(vae).eval().requires_grad_(False)


def save_sd_vae(folder: Path, codec: Codec | None = None) -> None:
    """Write an autoencoder (by default `tiny_sd_vae()`) as diffusers keeps it: a config and safetensors."""
    (codec or tiny_sd_vae()).vae.save_pretrained(folder)
