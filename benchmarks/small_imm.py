"""Neon on a small IMM of Fashion-MNIST in pixels: training, then scores at 1, 2, 4 and 8 steps over three seed blocks.

    python benchmarks/small_imm.py prepare          # data, features, base: half an hour, resumable
    python benchmarks/small_imm.py study --cfg 1.5  # S, self-training, every w at every number of steps
    python benchmarks/small_imm.py precision        # how far lower precisions move the images

Every step is one of the project's programs. `study` writes benchmarks/results/small_imm.json, one entry per guidance
and number of steps, beside the floor: real training images scored against the test images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine
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

from imm.model import IMM
from neon.demo.fashion import DEBIAN_FOLDER
from neon.model import load_model
from neon.noise import ImageNoise
from neon.runtime.files import write_json

RUN = ROOT / "runs" / "small_imm"
BASE = ASSETS / "small_imm_base.safetensors"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make data, feature network and base; what is there is not made again."""

    data: Path = DEBIAN_FOLDER
    """folder with the four Fashion-MNIST files"""
    base_images: int = 150_000
    """budget of the base"""

    def __call__(self) -> None:
        torch.set_num_threads(1)
        prepare_data(self.data)
        if not BASE.exists():
            program(
                "imm",
                "finetune",
                f"--data {DATA}/train.zip --outdir {RUN}/base --model SongUNet --width 32 --depth 1 --channel_mult 1 2 "
                # k: larger steps than the published 2^-12 and 2^-15, for a short training
                "--attn_resolutions 8 --f_type simple_edm --eps 0.006 --temb_type identity --k 8 --batch 64 "
                f"--batch_gpu 64 --lr 1e-3 --ema_rate 0.998 --save_interval 50000 --total_images {self.base_images}",
            )
            keep_model(last_snapshot(RUN / "base"), BASE)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sample S in 8 steps, self-train, and score every w on three seed blocks at every number of steps."""

    cfg: float = 1.0
    """guidance"""
    num_synthetic: int = 2000
    """size of S"""
    steps: int = 100
    """self-training steps of 64 images"""
    lr: float = 1e-4
    """learning rate of the self-training"""
    w: tuple[float, ...] = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
    """merge weights"""
    num_steps: tuple[int, ...] = (1, 2, 4, 8)
    """network evaluations per image"""

    def __call__(self) -> None:
        name = f"cfg{self.cfg:g}-{self.num_synthetic}-{self.steps}-{self.lr:g}"
        run, model = RUN / f"study-{name}", f"--network_pkl {BASE} --cfg_scale {self.cfg}"
        program(
            "imm",
            "sample",
            f"{model} --num_steps 8 --outdir {run}/S.zip --num_images {self.num_synthetic} --batch_size 100 --fresh",
        )
        program(
            "imm",
            "finetune",
            f"--network_pkl {BASE} --data {run}/S.zip --outdir {run}/self --batch 64 --batch_gpu 64 "
            f"--lr {self.lr} --ema_rate 0 --total_images {64 * self.steps} --save_interval 100000000",
        )
        merge = f"--self_trained {last_snapshot(run / 'self')} --w {' '.join(f'{w:g}' for w in self.w)}"
        for steps in self.num_steps:
            for seed in range(BLOCKS):
                output = f"--seed {seed} --json {run}/steps{steps}-block{seed}.json"
                program("imm", "calculate_fid", f"{model} --num_steps {steps} {merge} {scoring_flags()} {output}")
            record_study(
                RESULTS / "small_imm.json", f"{name}-{steps}steps", run, self.w, blocks_of=f"steps{steps}-"
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Sample the same images in float32, bfloat16 and float16, and compare pixels."""

    num_images: int = 200
    """how many"""
    num_steps: tuple[int, ...] = (1, 8)
    """network evaluations per image"""

    def __call__(self) -> None:
        torch.set_num_threads(1)
        model = load_model(BASE)
        assert isinstance(model, IMM)
        seeds, labels = range(self.num_images), torch.arange(self.num_images) % model.num_classes
        moved: dict[str, dict[str, float]] = {}
        for steps in self.num_steps:
            settings = type(model.default_settings)(num_steps=steps, guidance=1.5)
            images = {}
            for name in ("fp32", "bf16", "fp16"):
                model = load_model(BASE, precision=name)
                images[name] = model.sample(ImageNoise(seeds), labels, settings).float()
            for name in ("bf16", "fp16"):
                difference = (images[name] - images["fp32"]).abs()
                row = {"mean_grey_levels": difference.mean().item(), "largest": difference.max().item()}
                moved[f"{name}, {steps} steps"] = row
                print(f"{name}, {steps} steps: {row['mean_grey_levels']:.3f} grey levels, at most {row['largest']:.0f}")
        record: dict[str, Any] = {
            "command": "python benchmarks/small_imm.py precision",
            "machine": machine(),
            "moved": moved,
        }
        write_json(RESULTS / "precision_imm.json", record)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"prepare": Prepare, "study": Study, "precision": Precision}, description=__doc__
    )()
