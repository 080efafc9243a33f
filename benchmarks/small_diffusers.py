"""Neon on a small diffusers pipeline: a class-conditional UNet2DModel of Fashion-MNIST, trained by diffusers alone.

    python benchmarks/small_diffusers.py prepare     # the base: half an hour of one core, resumable
    python benchmarks/small_diffusers.py samplers    # the base by two schedulers, with few steps and many
    python benchmarks/small_diffusers.py improve     # `neon improve` in full and by LoRA, three seeds each

`prepare` uses nothing of neon but the images (14 x 14, those of the demo, whose feature networks serve here, too): it
writes a folder as users of diffusers have them. The others run commands of `neon` on it, and put what comes out into
benchmarks/results/small_diffusers.json.
"""

import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from machine import machine
from small_study import ASSETS, IMAGES, ROOT, neon, write_zip
from torch import Tensor

from neon.demo.assets import FEATURES, SECOND_FEATURES
from neon.demo.fashion import DEBIAN_FOLDER, load_fashion
from neon.runtime.files import atomic_write, write_json

RUN = ROOT / "runs" / "small_diffusers"
BASE = ASSETS / "small_diffusers"
STATE = RUN / "training-state.pt"
RESULTS = Path(__file__).parent / "results"
COMPARED = f"--features {FEATURES} {SECOND_FEATURES}"
UNET = {
    "sample_size": 14,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "num_class_embeds": 10,
}
SAVE_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Train the base, or what is left of it, and write it as a DDIMPipeline; if it is there, do nothing."""

    data: Path = DEBIAN_FOLDER
    """folder with the four Fashion-MNIST files"""
    num_steps: int = 2000
    """optimiser steps"""
    batch: int = 128
    """images of a step"""
    lr: float = 1e-3
    """the highest learning rate: after 100 steps of warm-up, before it falls to 0 along a cosine"""

    def __call__(self) -> None:
        if (BASE / "model_index.json").exists():
            return
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_cosine_schedule_with_warmup
        from diffusers.training_utils import EMAModel

        torch.set_num_threads(1)
        torch.manual_seed(0)
        unet, scheduler = UNet2DModel(**UNET), DDPMScheduler()
        average = EMAModel(unet.parameters(), use_ema_warmup=True, power=3 / 4)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=self.lr)
        rates = get_cosine_schedule_with_warmup(optimizer, 100, self.num_steps)
        parts = {"unet": unet, "average": average, "optimizer": optimizer, "rates": rates}
        done, seconds, losses = self._resume(parts)
        images, labels = self._examples()
        while done < self.num_steps:
            begun = time.process_time()
            # Each step's draws are its own, so that a run that was killed ends with the same weights.
            generator = torch.Generator().manual_seed(done)
            chosen = torch.randint(len(images), (self.batch,), generator=generator)
            clean, noise = images[chosen], torch.randn(self.batch, *images.shape[1:], generator=generator)
            times = torch.randint(scheduler.config.num_train_timesteps, (self.batch,), generator=generator)
            predicted = unet(scheduler.add_noise(clean, noise, times), times, labels[chosen]).sample
            loss = F.mse_loss(predicted, noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rates.step()
            average.step(unet.parameters())
            done += 1
            seconds += time.process_time() - begun
            losses.append(loss.item())
            if done % SAVE_EVERY == 0:
                self._save(parts, done, seconds, losses)
                recent = sum(losses[-SAVE_EVERY:]) / SAVE_EVERY
                print(f"step {done}: loss {recent:.4f}, {done * self.batch / seconds:.0f} images/s", flush=True)
        average.copy_to(unet.parameters())
        DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler.from_config(scheduler.config)).save_pretrained(BASE)
        found = {
            "weights": sum(p.numel() for p in unet.parameters()),
            "images_seen": done * self.batch,
            "processor_seconds": round(seconds),
            "loss_of_last_steps": sum(losses[-SAVE_EVERY:]) / SAVE_EVERY,
        }
        record("prepare", found)

    def _examples(self) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1], float32 [60000, 1, 14, 14], and their classes."""
        training = load_fashion(self.data, "train")
        assert training.labels is not None
        return training.images / 127.5 - 1, training.labels

    def _resume(self, parts: dict[str, Any]) -> tuple[int, float, list[float]]:
        """Steps done, seconds taken and losses of a run that was stopped, whose state is put into `parts`."""
        if not STATE.exists():
            return 0, 0.0, []
        state = torch.load(STATE)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["done"], state["seconds"], state["losses"]

    def _save(self, parts: dict[str, Any], done: int, seconds: float, losses: list[float]) -> None:
        STATE.parent.mkdir(parents=True, exist_ok=True)
        states = {name: part.state_dict() for name, part in parts.items()}
        with atomic_write(STATE) as file:
            torch.save({**states, "done": done, "seconds": seconds, "losses": losses}, file)


@dataclass(frozen=True, kw_only=True)
class Samplers:
    """Score the base by several schedulers and numbers of steps, of one network call each; what is there stays."""

    data: Path = DEBIAN_FOLDER
    """folder with the four Fashion-MNIST files"""
    schedulers: tuple[str, ...] = ("DDIMScheduler", "UniPCMultistepScheduler")
    """the folder's own, and the best of few steps"""
    num_steps: tuple[int, ...] = (5, 10, 20, 50)

    def __call__(self) -> None:
        write_statistics(self.data)
        rows: dict[str, Any] = {}
        for scheduler, steps in product(self.schedulers, self.num_steps):
            file = RUN / f"{scheduler}-{steps}.json"
            score(f"--network {BASE} --set scheduler={scheduler} num_steps={steps}", file)
            rows[f"{scheduler}, {steps} steps"] = distances(file)
        record("samplers", {"num_images": IMAGES, "rows": rows})


@dataclass(frozen=True, kw_only=True)
class Improve:
    """Improve the base from every seed, in full and by LoRA; what is done of a run is not done again."""

    data: Path = DEBIAN_FOLDER
    """folder with the four Fashion-MNIST files"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of whole runs"""
    ways: tuple[Literal["full", "lora"], ...] = ("full", "lora")
    """how it is self-trained"""
    num_steps: int = 5
    """of the sampler that is asked for"""
    lora_rank: int = 8
    """of the LoRA"""
    lr: tuple[float, float] = (1e-4, 1e-3)
    """learning rate of each way; that of a LoRA, whose factors start at nothing, is the higher one"""
    images: int = 1000
    """of a synthetic set, behind each point of the choice, and in each block of the report"""

    def __call__(self) -> None:
        write_statistics(self.data)
        for way in self.ways:
            for seed in self.seeds:
                self._improve(way, seed)
            record(way, self._found(way))

    def _run(self, way: str, seed: int) -> Path:
        return RUN / f"{way}-{seed}"

    def _improve(self, way: str, seed: int) -> None:
        trained = {"full": f"--lr {self.lr[0]}", "lora": f"--lr {self.lr[1]} --lora_rank {self.lora_rank}"}[way]
        neon(
            "improve",
            f"{BASE} --real {RUN}/train.npz --report_real {RUN}/test.npz {COMPARED} --num_steps {self.num_steps} "
            f"--num_synthetic {self.images} --training_images 6400 --batch 128 --batch_gpu 64 {trained} --lr_rampup 0 "
            f"--ema 0 --snapshots 1 --w 0 3 --select_images {self.images} --batch_size 100 --limit 6 "
            f"--sampler_scores 8 --no_baselines --device cpu --processes 1 --seed {seed} --out {self._run(way, seed)}",
        )
        score(f"--network {self._run(way, seed)}/improved.safetensors", self._run(way, seed) / "improved.json")

    def _found(self, way: str) -> dict[str, Any]:
        """Every row of the report: its distance and w from each seed, and the mean over them.

        `written` is what `improved.safetensors` of each seed scores, opened again by `neon evaluate`.
        """
        runs = [json.loads((self._run(way, seed) / "scores.json").read_text()) for seed in self.seeds]
        names = dict.fromkeys(name for run in runs for name in run["rows"])
        return {
            "seeds": self.seeds,
            "summary": [run["summary"] for run in runs],
            "beside": [run["beside"] for run in runs],
            "written": [distances(self._run(way, seed) / "improved.json") for seed in self.seeds],
            "rows": {name: _over_seeds([run["rows"][name] for run in runs if name in run["rows"]]) for name in names},
        }


def _over_seeds(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of one name, from several seeds, as one."""
    distances = [row["distance"] for row in rows]
    kept = ("w", "distance", "difference", "interval", "settings")
    return {
        "name": rows[0]["name"].partition(" (w =")[0],
        "network_calls": rows[0]["network_calls"],
        "mean": mean(distances),
        "deviation": stdev(distances) if len(distances) > 1 else 0.0,
        **{key: [row.get(key) for row in rows] for key in kept},
    }


def write_statistics(source: Path) -> None:
    """Training and test images, and what both feature networks make of them, unless they are there."""
    RUN.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        if not (statistics := RUN / f"{split}.npz").exists():
            write_zip(RUN / f"{split}.zip", load_fashion(source, split).images, None)
            neon("stats", f"{RUN / split}.zip {statistics} {COMPARED} --device cpu")


def score(sampled: str, file: Path) -> None:
    """Compare images that `sampled` asks for, report images of seed 0, with the test images, unless that was done."""
    if not file.exists():
        scored = f"--ref {RUN}/test.npz {COMPARED} --num_images {IMAGES} --batch_size 100 --device cpu"
        neon("evaluate", f"{sampled} {scored} --json {file}")


def distances(file: Path) -> dict[str, float]:
    """What `score` wrote: the distance in each feature space."""
    found = json.loads(file.read_text())
    return {metric: found[metric] for metric in ("fd_fashion64", "fd_rotation64")}


def record(name: str, found: Any) -> None:
    """Put what was found into the file of results, beside what is there."""
    file = RESULTS / "small_diffusers.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    command = shlex.join(["python", "benchmarks/small_diffusers.py", *sys.argv[1:]])
    write_json(file, {**results, name: {"command": command, "machine": machine(), "found": found}})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"prepare": Prepare, "samplers": Samplers, "improve": Improve}, description=__doc__
    )()
