"""What the studies of small models share: Fashion-MNIST in colour, a feature network, and tables of scores."""

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine

from neon.data.images import ArrayDataset, ImageDataset, pack_set, write_images, write_labels
from neon.demo.fashion import load_fashion
from neon.metrics import FrechetReference, Statistics
from neon.metrics.features import features_of
from neon.metrics.small import SmallFeatures, classes_of, fit_classifier, load_features
from neon.model import load_model, save_model
from neon.runtime.files import write_json

ROOT = Path(__file__).parent.parent
DATA = ROOT / "runs" / "small_data"
ASSETS = Path(__file__).parent / "assets"
FEATURES = ASSETS / "fashion_rgb64.safetensors"
METRIC = "fd_fashion_rgb64"
BLOCKS, IMAGES = 3, 2000


def program(architecture: str, name: str, flags: str) -> None:
    """Run a program of an architecture on one thread."""
    _run([str(ROOT / architecture / f"{name}.py"), *shlex.split(flags)])


def neon(name: str, flags: str) -> None:
    """Run a command of `neon` on one thread."""
    _run(["-m", "neon.cli", name, *shlex.split(flags)])


def _run(arguments: list[str]) -> None:
    command = [sys.executable, *arguments]
    print(shlex.join(command), file=sys.stderr)
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})


def colour_images(split: str, source: Path) -> ArrayDataset:
    """Fashion-MNIST at 14 x 14 with a black frame of one pixel, three equal channels: 3 x 16 x 16."""
    grey = load_fashion(source, split)
    return ArrayDataset(F.pad(grey.images, (1, 1, 1, 1)).expand(-1, 3, -1, -1).contiguous(), grey.labels, source)


def write_zip(path: Path, images: torch.Tensor, labels: Sequence[int] | None) -> None:
    """Write a set of images, unless it is there."""
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            write_images(folder, range(len(images)), images)
            write_labels(folder, labels, len(images))
            pack_set(folder, path)


def write_data(splits: Mapping[str, ArrayDataset], folder: Path, features: Path, epochs: int) -> None:
    """Write each split as a zip, and its statistics; train the feature network on "train" if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, dataset in splits.items():
        assert dataset.labels is not None
        write_zip(folder / f"{split}.zip", dataset.images, dataset.labels.tolist())
    if not features.exists():
        train = splits["train"]
        torch.manual_seed(0)
        extractor = SmallFeatures(features.stem, train.image_shape, 64, 10)
        fit_classifier(extractor, classes_of(train), torch.arange(len(train)), epochs)
        features.parent.mkdir(exist_ok=True)
        extractor.save(features)
    for split, dataset in splits.items():
        if not (folder / f"{split}.npz").exists():
            found = features_of(load_features(features), dataset.images)
            Statistics.from_features(found).save(folder / f"{split}.npz")


def prepare_data(source: Path) -> None:
    """Write train.zip, test.zip, 2,000 test images, and statistics; train the feature network if there is none."""
    splits = {split: colour_images(split, source) for split in ("train", "test")}
    write_data(splits, DATA, FEATURES, epochs=3)
    write_zip(DATA / "test2000.zip", splits["test"].images[:IMAGES], None)


def scoring_flags() -> str:
    """Flags of a calculate_fid.py that score one block."""
    return (
        f"--ref {DATA}/test.npz --features {FEATURES} --num_images {IMAGES} --batch_size 100 "
        f"--precision_recall {DATA}/test2000.zip"
    )


def last_snapshot(folder: Path) -> Path:
    """The snapshot with the most training in `folder`."""
    return max(folder.glob("snapshot-*.safetensors"))


def keep_model(snapshot: Path, asset: Path) -> None:
    """Write the network of `snapshot` to `asset`, without the record of its run, which names folders of a machine."""
    save_model(asset, load_model(snapshot))


def record_study(results: Path, name: str, run: Path, ws: Sequence[float], *, blocks_of: str = "") -> None:
    """Put the sweeps `run`/block0.json ... and the losses of `run`/self into `results`, and print them.

    `blocks_of` stands before the names of the sweeps.
    """
    blocks = [json.loads((run / f"{blocks_of}block{seed}.json").read_text())["sweep"] for seed in range(BLOCKS)]
    losses = [json.loads(line)["loss"] for line in (run / "self" / "training.jsonl").read_text().splitlines()]
    table = {
        f"{w:g}": {
            "distance": mean(block[i][METRIC] for block in blocks),
            "spread": stdev(block[i][METRIC] for block in blocks),
            "precision": mean(block[i]["precision"] for block in blocks),
            "recall": mean(block[i]["recall"] for block in blocks),
        }
        for i, w in enumerate(ws)
    }
    record: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    record.setdefault("studies", {})[name] = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "loss_of_self_training": {"first_10_steps": mean(losses[:10]), "last_10_steps": mean(losses[-10:])},
        "w": table,
    }
    record |= {"machine": machine(), "metric": METRIC, "blocks": BLOCKS, "num_images": IMAGES, "floor": floor()}
    write_json(results, record)
    for w, row in table.items():
        print(f"w = {w:>5}  {row['distance']:8.2f} +- {row['spread']:.2f}  {row['precision']:.2f} {row['recall']:.2f}")
    print(f"real images  {record['floor']:8.2f}")


def floor() -> float:
    """The distance of 2,000 real training images to the test images."""
    training, _ = ImageDataset(DATA / "train.zip").load(range(IMAGES))
    real = Statistics.from_features(features_of(load_features(FEATURES), training))
    return FrechetReference(Statistics.load(DATA / "test.npz")).distance(real)
