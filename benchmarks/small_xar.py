"""Neon on a small xAR of Fashion-MNIST (squares of pixels as latents), from training to scores over three seed blocks.

    python benchmarks/small_xar.py prepare                        # data, features, base: 15 minutes, resumable
    python benchmarks/small_xar.py study --cfg 2 --flow_steps 8   # one sampler: S, self-training, every w

Every step is one of the project's programs. `study` writes benchmarks/results/small_xAR.json, one entry per
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

RUN = ROOT / "runs" / "small_xar"
BASE = ASSETS / "small_xar_base.safetensors"
RESULTS = Path(__file__).parent / "results" / "small_xAR.json"


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make data, feature network and base; what is there is not made again."""

    data: Path = DEBIAN_FOLDER
    """folder with the four Fashion-MNIST files"""
    base_images: int = 120_000
    """budget of the base"""

    def __call__(self) -> None:
        torch.set_num_threads(1)
        prepare_data(self.data)
        if not BASE.exists():
            program(
                "xAR",
                "finetune",
                f"--data {DATA}/train.zip --outdir {RUN}/base --model xar_small --pixel_patch 2 --grid 8 "
                "--classes 10 --batch 64 --batch_gpu 64 --lr 1e-3 --warmup_epochs 0 --ema_rate 0.999 "
                "--attn_dropout 0 --proj_dropout 0 --no_mirror --save_interval 60000 "
                f"--total_images {self.base_images}",
            )
            # The raw weights: after so few steps the average still holds some of the random start.
            last = last_snapshot(RUN / "base")
            keep_model(last.with_name(f"raw-{last.name}"), BASE)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sample S, self-train, and score every w on three seed blocks, with one sampler."""

    cfg: float = 1.0
    """guidance of the last cell"""
    flow_steps: int = 8
    """network evaluations per cell"""
    deterministic: bool = False
    """follow the flow without fresh noise"""
    num_synthetic: int = 2000
    """size of S"""
    steps: int = 100
    """self-training steps of 64 images"""
    lr: float = 1e-4
    """constant learning rate of the self-training"""
    w: tuple[float, ...] = (-1.0, 0.0, 0.5, 1.0, 1.5)
    """merge weights"""

    def __call__(self) -> None:
        sampler = f"--cfg {self.cfg} --flow_steps {self.flow_steps} {'--deterministic' * self.deterministic}"
        kind = "ode" if self.deterministic else "sde"
        name = f"cfg{self.cfg:g}-{kind}{self.flow_steps}-{self.num_synthetic}-{self.steps}-{self.lr:g}"
        run, model = RUN / f"study-{name}", f"--model_ckpt {BASE}"
        program(
            "xAR",
            "sample",
            f"{model} {sampler} --outdir {run}/S.zip --num_images {self.num_synthetic} --batch_size 100 --fresh",
        )
        program(
            "xAR",
            "finetune",
            f"{model} --data {run}/S.zip --outdir {run}/self --batch 64 --batch_gpu 64 --lr {self.lr} "
            f"--warmup_epochs 0 --ema_rate 0 --attn_dropout 0 --proj_dropout 0 --no_mirror "
            f"--total_images {64 * self.steps} --save_interval 100000000",
        )
        merge = f"--self_trained {last_snapshot(run / 'self')} --w {' '.join(f'{w:g}' for w in self.w)}"
        for seed in range(BLOCKS):
            output = f"--seed {seed} --json {run}/block{seed}.json"
            program("xAR", "calculate_fid", f"{model} {sampler} {merge} {scoring_flags()} {output}")
        record_study(RESULTS, name, run, self.w)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"prepare": Prepare, "study": Study}, description=__doc__)()
