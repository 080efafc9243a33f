"""Neon on a small VAR of Fashion-MNIST, from training the tokenizer to scores over three seed blocks.

    python benchmarks/small_var.py prepare             # data, features, tokenizer, base: forty minutes, resumable
    python benchmarks/small_var.py study --cfg 1.5     # one sampler: S, self-training, every w: three minutes

Every step is one of the project's programs. `study` writes benchmarks/results/small_VAR.json, one entry per
sampler, beside the floor: real training images scored against the test images.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from small_study import (
    ASSETS,
    BLOCKS,
    DATA,
    ROOT,
    keep_model,
    last_snapshot,
    prepare_data,
    program,
    record_study,
    scoring_flags,
)

from neon.demo.fashion import DEBIAN_FOLDER

RUN = ROOT / "runs" / "small_var"
TOKENIZER, BASE = (ASSETS / f"small_var_{name}.safetensors" for name in ("tokenizer", "base"))
RESULTS = Path(__file__).parent / "results" / "small_VAR.json"
PATCH_NUMS = "1 2 4 8"


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make data, feature network, tokenizer and base; what is there is not made again."""

    data: Path = DEBIAN_FOLDER
    """folder with the four Fashion-MNIST files"""
    tokenizer_images: int = 64_000
    """budget of the tokenizer"""
    base_images: int = 300_000
    """budget of the base"""
    base: Path = BASE
    """where the base goes"""
    seed: int = 0
    """of the base: initial weights, data order and noise"""

    def __call__(self) -> None:
        torch.set_num_threads(1)
        prepare_data(self.data)
        if not TOKENIZER.exists():
            program(
                "VAR",
                "train_tokenizer",
                f"--data {DATA}/train.zip --outdir {RUN}/tokenizer --vocab 64 --code_channels 8 --base_channels 32 "
                f"--channel_mult 1 1 --patch_nums {PATCH_NUMS} --batch 32 --total_images {self.tokenizer_images}",
            )
            TOKENIZER.write_bytes(last_snapshot(RUN / "tokenizer").read_bytes())
        if not self.base.exists():
            run = RUN / ("base" if self.seed == 0 else f"base-{self.seed}")
            tokens = f"--vae_ckpt {TOKENIZER} --data {DATA}/train.zip --outdir {RUN}/tokens --patch_nums {PATCH_NUMS}"
            program("VAR", "encode", f"{tokens} --batch_size 100")
            program(
                "VAR",
                "finetune",
                f"--vae_ckpt {TOKENIZER} --data {RUN}/tokens --outdir {run} --seed {self.seed} --depth 4 --width 64 "
                f"--heads 2 --classes 10 --patch_nums {PATCH_NUMS} --constant_lr --target_lr 1e-3 --batch 64 "
                f"--total_images {self.base_images} --save_interval 100000",
            )
            keep_model(last_snapshot(run), self.base)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sample S, self-train, and score every w on three seed blocks, with one sampler."""

    cfg: float = 0.0
    """guidance"""
    top_k: int = 0
    """draw among the likeliest codes"""
    top_p: float = 0.0
    """draw among the likeliest codes of this share"""
    temperature: float = 1.0
    """of the draw"""
    kind: str = "tokens"
    """how S is kept: tokens or pixels"""
    num_synthetic: int = 2000
    """size of S"""
    steps: int = 100
    """self-training steps of 64 images"""
    lr: float = 1e-4
    """constant learning rate of the self-training"""
    w: tuple[float, ...] = (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
    """merge weights"""

    def __call__(self) -> None:
        sampler = f"--cfg {self.cfg} --top_k {self.top_k} --top_p {self.top_p} --temperature {self.temperature}"
        slug = f"cfg{self.cfg:g}-k{self.top_k}-p{self.top_p:g}-t{self.temperature:g}-{self.kind}"
        name = f"{slug}-{self.num_synthetic}-{self.steps}-{self.lr:g}"
        run, model = RUN / f"study-{name}", f"--var_ckpt {BASE} --vae_ckpt {TOKENIZER}"
        kept = "--tokens" if self.kind == "tokens" else ""
        images = f"--num_images {self.num_synthetic} --batch_size 100 {kept}"
        program("VAR", "sample", f"{model} {sampler} --outdir {run}/S {images}")
        program(
            "VAR",
            "finetune",
            f"{model} --data {run}/S --outdir {run}/self --batch 64 --target_lr {self.lr} --constant_lr --mid_reso 1 "
            f"--total_images {64 * self.steps} --save_interval 100000000",
        )
        merge = f"--self_trained {last_snapshot(run / 'self')} --w {' '.join(f'{w:g}' for w in self.w)}"
        for seed in range(BLOCKS):
            output = f"--seed {seed} --json {run}/block{seed}.json"
            program("VAR", "calculate_fid", f"{model} {sampler} {merge} {scoring_flags()} {output}")
        record_study(RESULTS, name, run, self.w)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"prepare": Prepare, "study": Study}, description=__doc__)()
