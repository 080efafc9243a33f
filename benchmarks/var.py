"""Images per second of a published VAR (random weights): transformer and decoder apart, by precision and compilation.

    python benchmarks/var.py                                                      # d16 at 256 px, one thread, one image
    python benchmarks/var.py --config var_d16 --device cuda --batch 64            # one GPU
    python benchmarks/var.py --config var_d36 --device cuda --batch 16

Guidance is on, as published: every image is computed twice. Each variant is timed alternately with the others;
the share of the device's matrix multiplication speed, in the same precision, is measured beside it.
"""

from pathlib import Path
from typing import Literal

import torch
import tyro
from two_stages import Mode, Precision, Variant, compare, compile_parts

from neon.noise import ImageNoise
from VAR.published import PUBLISHED, TOKENIZER, Published
from VAR.sampler import generate_tokens
from VAR.transformer import VAR
from VAR.vqvae import VQVAE


class VARVariant(Variant):
    """A VAR with its tokenizer."""

    def __init__(self, row: Published, mode: str, precision: str, device: torch.device, batch: int) -> None:
        super().__init__(precision, device, batch)
        self.settings = row.settings
        torch.manual_seed(0)
        with device:
            self.transformer = VAR(**row.transformer).eval().requires_grad_(False)
            self.tokenizer = VQVAE(**TOKENIZER, patch_nums=row.transformer["patch_nums"]).eval().requires_grad_(False)
        self.tokenizer.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch._dynamo.config.recompile_limit = 64  # every scale has its own size
        compile_parts([*self.transformer.blocks, self.tokenizer.decoder], mode)
        self.feature_map = torch.randn_like(self.tokenizer.quantize.empty_map(batch))

    def sample(self) -> None:
        with self.cast():
            noise = ImageNoise(range(self.batch), self.device)
            labels = torch.arange(self.batch, device=self.device)
            generate_tokens(self.transformer, self.tokenizer, labels, noise, self.settings)

    def decode(self) -> None:
        with self.cast(), torch.no_grad():
            self.tokenizer.decode(self.feature_map)


def main(
    config: str = "var_d16",
    device: Literal["cpu", "cuda"] = "cpu",
    batch: int = 1,
    precisions: tuple[Precision, ...] = ("fp32",),
    modes: tuple[Mode, ...] = ("eager",),
    repeats: int = 3,
    threads: int = 1,
    json_file: Path | None = None,
) -> None:
    """Measure sampling.

    Args:
        config: Name of a published transformer.
        device: Where to compute.
        batch: Images at once.
        precisions: What to compute in.
        modes: eager; compiled blocks and decoder; compiled with CUDA graphs.
        repeats: Timed repeats of each variant after one warm-up, in turn; medians are reported.
        threads: CPU threads.
        json_file: Where the figures go; by default benchmarks/results/<config>_<device>.json.
    """
    torch.set_num_threads(threads)
    place, row = torch.device(device), PUBLISHED[config]
    variants = {f"{m}, {p}": VARVariant(row, m, p, place, batch) for m in modes for p in precisions}
    json_file = json_file or Path(__file__).parent / "results" / f"{config}_{device}.json"
    compare(config, variants, repeats=repeats, threads=threads, json_file=json_file)


if __name__ == "__main__":
    tyro.cli(main)
