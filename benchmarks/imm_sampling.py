"""Images per second of IMM's DiT-XL/2 and of its autoencoder's decoder (random weights), by precision and compilation.

    python benchmarks/imm_sampling.py                                # one image on one thread
    python benchmarks/imm_sampling.py --device cuda --batch 64 --precisions tf32 bf16 --modes eager compiled graphs

Guidance is on, as published: every image is computed twice. tf32 is the published precision. Each variant is timed
alternately with the others; the share of the device's matrix multiplication speed, in the same precision, is measured
beside it.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from two_stages import DTYPES, Mode, Precision, Variant, compare, compile_parts

from imm.model import IMM
from imm.published import PUBLISHED
from imm.sampler import generate
from imm.vae import Codec
from neon.noise import ImageNoise

CONFIG = "imagenet256_ts_a2"


class IMMVariant(Variant):
    """The published DiT with the autoencoder of Stable Diffusion."""

    def __init__(self, mode: str, precision: str, device: torch.device, batch: int) -> None:
        from diffusers.models import AutoencoderKL

        super().__init__(precision, device, batch)
        self.settings = PUBLISHED[CONFIG].settings
        torch.manual_seed(0)
        with device:
            self.network = IMM({"network": PUBLISHED[CONFIG].network}).network.eval().requires_grad_(False)
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                sample_size=256,
            )
        # The decoder is in float16 on a GPU in any case, as published.
        self.codec = Codec(vae).to(device, torch.float16 if device.type == "cuda" else torch.float32)
        self.codec.eval().requires_grad_(False)
        self.network.mixed_precision = None if self.dtype == torch.float32 else DTYPES[precision]
        transformer: Any = self.network.model
        compile_parts([*transformer.blocks, vae.decoder], mode)
        self.latents = torch.randn(batch, 4, 32, 32, device=device)

    def sample(self) -> None:
        noise = ImageNoise(range(self.batch), self.device)
        labels = torch.eye(1000, device=self.device)[: self.batch]
        generate(self.network, 0.5 * noise.normal(4, 32, 32), labels, self.settings)

    def decode(self) -> None:
        with torch.no_grad():
            self.codec.decode(self.latents)


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    batch: int = 1,
    precisions: tuple[Precision, ...] = ("fp32",),
    modes: tuple[Mode, ...] = ("eager",),
    repeats: int = 3,
    threads: int = 1,
    json_file: Path | None = None,
) -> None:
    """Measure sampling with 8 steps.

    Args:
        device: Where to compute.
        batch: Images at once.
        precisions: What the DiT computes in.
        modes: eager; compiled blocks and decoder; compiled with CUDA graphs.
        repeats: Timed repeats of each variant after one warm-up, in turn; medians are reported.
        threads: CPU threads.
        json_file: Where the figures go; by default benchmarks/results/imm_<device>.json.
    """
    torch.set_num_threads(threads)
    place = torch.device(device)
    variants = {f"{m}, {p}": IMMVariant(m, p, place, batch) for m in modes for p in precisions}
    json_file = json_file or Path(__file__).parent / "results" / f"imm_{device}.json"
    compare(CONFIG, variants, repeats=repeats, threads=threads, json_file=json_file)


if __name__ == "__main__":
    tyro.cli(main)
