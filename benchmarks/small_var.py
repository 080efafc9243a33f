"""Neon on a small VAR of Fashion-MNIST, from training the tokenizer to scores over three seed blocks.

    python benchmarks/small_var.py prepare                   # data, features, tokenizer, base: about an hour, resumable
    python benchmarks/small_var.py study --cfg 1 --top_k 0   # one sampler: S, self-training, every w: minutes

Every step is one of the project's programs. `study` writes benchmarks/results/small_VAR.json, one entry per
sampler, beside the floor: real training images scored against the test images.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from machine import machine

from neon.dataset import ArrayDataset, pack_set, write_images, write_labels
from neon.demo.fashion import DEBIAN_FOLDER, load_fashion
from neon.demo.train import fit_classifier
from neon.files import write_json
from neon.metrics import FrechetReference, Statistics
from neon.metrics.features import SmallFeatures, features_of, load_features

ROOT = Path(__file__).parent.parent
RUN = ROOT / "runs" / "small_var"
ASSETS = Path(__file__).parent / "assets"
TOKENIZER, BASE, FEATURES = (ASSETS / f"small_var_{name}.safetensors" for name in ("tokenizer", "base", "features"))
RESULTS = Path(__file__).parent / "results" / "small_VAR.json"
PATCH_NUMS = "1 2 4 8"
BLOCKS, IMAGES = 3, 2000


def program(name: str, flags: str) -> None:
    """Run a program of VAR on one thread."""
    command = [sys.executable, str(ROOT / "VAR" / f"{name}.py"), *shlex.split(flags)]
    print(shlex.join(command), file=sys.stderr)
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})


def colour_images(split: str, data: Path) -> ArrayDataset:
    """Fashion-MNIST at 14 x 14 with a black frame of one pixel, three equal channels: 3 x 16 x 16."""
    grey = load_fashion(data, split)
    return ArrayDataset(F.pad(grey.images, (1, 1, 1, 1)).expand(-1, 3, -1, -1).contiguous(), grey.labels, data)


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make data, feature network, tokenizer and base; what is there is not made again."""

    data: Path = DEBIAN_FOLDER
    """folder with the four Fashion-MNIST files"""
    tokenizer_images: int = 64_000
    """budget of the tokenizer"""
    base_images: int = 300_000
    """budget of the base"""

    def __call__(self) -> None:
        torch.set_num_threads(1)
        RUN.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            if not (RUN / f"{split}.zip").exists():
                images = colour_images(split, self.data)
                with tempfile.TemporaryDirectory() as folder:
                    write_images(folder, range(len(images)), images.images)
                    assert images.labels is not None
                    write_labels(folder, images.labels.tolist(), len(images))
                    pack_set(folder, RUN / f"{split}.zip")
        if not FEATURES.exists():
            self.train_features()
        if not TOKENIZER.exists():
            program(
                "train_tokenizer",
                f"--data {RUN}/train.zip --outdir {RUN}/tokenizer --vocab 64 --code_channels 8 --base_channels 32 "
                f"--channel_mult 1 1 --patch_nums {PATCH_NUMS} --batch 32 --total_images {self.tokenizer_images}",
            )
            TOKENIZER.write_bytes(last_snapshot(RUN / "tokenizer").read_bytes())
        if not BASE.exists():
            tokens = f"--vae_ckpt {TOKENIZER} --data {RUN}/train.zip --outdir {RUN}/tokens --patch_nums {PATCH_NUMS}"
            program("encode", f"{tokens} --batch_size 100")
            program(
                "finetune",
                f"--vae_ckpt {TOKENIZER} --data {RUN}/tokens --outdir {RUN}/base --depth 4 --width 64 --heads 2 "
                f"--classes 10 --patch_nums {PATCH_NUMS} --constant_lr --target_lr 1e-3 --batch 64 "
                f"--total_images {self.base_images} --save_interval 100000",
            )
            BASE.write_bytes(last_snapshot(RUN / "base").read_bytes())

    def train_features(self) -> None:
        """The feature network, and statistics of both splits."""
        torch.manual_seed(0)
        training, test = (colour_images(split, self.data) for split in ("train", "test"))
        assert training.labels is not None
        extractor = SmallFeatures("fashion_rgb64", (3, 16, 16), 64, 10)
        fit_classifier(extractor, training.images, training.labels, 3)
        ASSETS.mkdir(exist_ok=True)
        for split, images in (("train", training), ("test", test)):
            Statistics.from_features(features_of(extractor, images.images)).save(RUN / f"{split}.npz")
        extractor.save(FEATURES)


def last_snapshot(folder: Path) -> Path:
    """The snapshot with the most training in `folder`."""
    return max(folder.glob("snapshot-*.safetensors"))


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
        run = RUN / f"study-{slug}-{self.num_synthetic}-{self.steps}-{self.lr:g}"
        model = f"--var_ckpt {BASE} --vae_ckpt {TOKENIZER}"
        kept = "--tokens" if self.kind == "tokens" else ""
        program(
            "sample", f"{model} {sampler} --outdir {run}/S --num_images {self.num_synthetic} --batch_size 100 {kept}"
        )
        program(
            "finetune",
            f"{model} --data {run}/S --outdir {run}/self --batch 64 --target_lr {self.lr} --constant_lr --mid_reso 1 "
            f"--total_images {64 * self.steps} --save_interval 100000000",
        )
        weights = " ".join(f"{w:g}" for w in self.w)
        blocks = []
        for seed in range(BLOCKS):
            program(
                "calculate_fid",
                f"{model} {sampler} --self_trained {last_snapshot(run / 'self')} --w {weights} --ref {RUN}/test.npz "
                f"--features {FEATURES} --num_images {IMAGES} --batch_size 100 --seed {seed} --precision_recall "
                f"{real_part()} --json {run}/block{seed}.json",
            )
            blocks.append(json.loads((run / f"block{seed}.json").read_text())["sweep"])
        losses = [json.loads(line)["loss"] for line in (run / "self" / "training.jsonl").read_text().splitlines()]
        metric = "fd_fashion_rgb64"
        table = {
            f"{w:g}": {
                "distance": mean(block[i][metric] for block in blocks),
                "spread": stdev(block[i][metric] for block in blocks),
                "precision": mean(block[i]["precision"] for block in blocks),
                "recall": mean(block[i]["recall"] for block in blocks),
            }
            for i, w in enumerate(self.w)
        }
        results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results.setdefault("studies", {})[run.name.removeprefix("study-")] = {
            "command": shlex.join(["python", "benchmarks/small_var.py", *sys.argv[1:]]),
            "loss_of_self_training": {"first_10_steps": mean(losses[:10]), "last_10_steps": mean(losses[-10:])},
            "w": table,
        }
        results |= {"machine": machine(), "metric": metric, "blocks": BLOCKS, "num_images": IMAGES, "floor": floor()}
        write_json(RESULTS, results)
        for w, row in table.items():
            print(
                f"w = {w:>5}  {row['distance']:8.2f} +- {row['spread']:.2f}  {row['precision']:.2f} {row['recall']:.2f}"
            )
        print(f"floor        {results['floor']:8.2f}")


def real_part() -> Path:
    """2,000 test images, for precision and recall."""
    part = RUN / "test2000.zip"
    if not part.exists():
        images = colour_images("test", DEBIAN_FOLDER)
        with tempfile.TemporaryDirectory() as folder:
            write_images(folder, range(IMAGES), images.images[:IMAGES])
            write_labels(folder, None, IMAGES)
            pack_set(folder, part)
    return part


def floor() -> float:
    """The distance of 2,000 real training images to the test images."""
    extractor = load_features(FEATURES)
    training = colour_images("train", DEBIAN_FOLDER).images[:IMAGES]
    real = Statistics.from_features(features_of(extractor, training))
    return FrechetReference(Statistics.load(RUN / "test.npz")).distance(real)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"prepare": Prepare, "study": Study}, description=__doc__)()
