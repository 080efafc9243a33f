"""A small EDM of scikit-learn's digits (8 x 8): the data is few images, of which half are kept from training.

    pip install scikit-learn                     # of which only the images are used
    python benchmarks/small_digits.py prepare    # data, features, base: ten minutes, resumable
    python benchmarks/small_digits.py study      # the base by several samplers, against both halves: two minutes

Every step is one of the project's programs. `study` writes benchmarks/results/small_digits.json: whether the base
draws new digits or those that it was trained on, beside the distance of the halves to each other.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
import tyro
from machine import machine
from small_study import ASSETS, BLOCKS, ROOT, keep_model, last_snapshot, program, write_data

from edm.settings import EDMSettings
from neon.data.images import ArrayDataset
from neon.metrics import Statistics, frechet_distance
from neon.metrics.features import features_of
from neon.metrics.small import load_features
from neon.model import load_model
from neon.noise import Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.runtime.files import write_json
from neon.sampling import sample_block

DATA, RUN = ROOT / "runs" / "small_digits_data", ROOT / "runs" / "small_digits"
BASE, FEATURES = ASSETS / "small_digits_base.safetensors", ASSETS / "digits64.safetensors"
RESULTS = Path(__file__).parent / "results" / "small_digits.json"
SAMPLERS = {"5 Euler steps": EDMSettings(solver="euler", num_steps=5), "18 Heun steps": EDMSettings(num_steps=18)}


def halves() -> dict[str, ArrayDataset]:
    """The 1,797 digits, shuffled, as halves "train" and "test": uint8 [899, 1, 8, 8] and [898, 1, 8, 8]."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ModuleNotFoundError as error:
        raise SystemExit(f"small_digits: {error}; the images are scikit-learn's: pip install scikit-learn") from error
    found = load_digits()
    images = (torch.from_numpy(found.images) * (255 / 16)).round().to(torch.uint8)[:, None]  # shades 0 to 16
    labels = torch.from_numpy(found.target).to(torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = zip(("train", "test"), order.tensor_split(2), strict=True)
    return {split: ArrayDataset(images[part], labels[part], Path("digits")) for split, part in parts}


def prepare_data() -> None:
    """Write train.zip, test.zip and their statistics; train the feature network if there is none."""
    # More epochs would pull the training images' features apart from those of the test images.
    write_data(halves(), DATA, FEATURES, epochs=10)


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make data, feature network and base; what is there is not made again."""

    base_images: int = 384_000
    """budget of the base"""

    def __call__(self) -> None:
        torch.set_num_threads(1)
        prepare_data()
        if not BASE.exists():
            program(
                "edm",
                "finetune",
                f"--data {DATA}/train.zip --outdir {RUN}/base --cond --cbase 20 --cres 1 1 --num_blocks 1 "
                "--attn_resolutions 4 --label_dropout 0.1 --dropout 0.1 --augment 0 --batch 64 --batch_gpu 64 "
                "--lr 1e-3 --lr_rampup 0.01 --ema 0.05 --tick 32 --snap 1 --device cpu "
                f"--duration {self.base_images / 1e6}",
            )
            keep_model(last_snapshot(RUN / "base"), BASE)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Score as many images of the base as there are in a half, three times by each sampler, against both halves."""

    base: Path = BASE
    """weights to score"""

    def __call__(self) -> None:
        torch.set_num_threads(1)
        prepare_data()
        model, extractor = load_model(self.base), load_features(FEATURES)
        references = {split: Statistics.load(DATA / f"{split}.npz") for split in ("train", "test")}
        count = len(halves()["train"])

        def sampled(settings: EDMSettings, block: int) -> Statistics:
            seeds = image_seeds(Purpose.REPORT, 0, count, start=block * count)
            images, _ = sample_block(model, range(count), seeds, settings, Processes())
            return Statistics.from_features(features_of(extractor, images))

        blocks = {name: [sampled(settings, block) for block in range(BLOCKS)] for name, settings in SAMPLERS.items()}
        rows: dict[str, dict[str, float]] = {
            "training images": {"test": frechet_distance(references["train"], references["test"])}
        }
        for name, scored in blocks.items():
            rows[name] = {}
            for split, reference in references.items():
                distances = [frechet_distance(block, reference) for block in scored]
                rows[name] |= {split: mean(distances), f"{split}_spread": stdev(distances)}
        record = {
            "command": "python benchmarks/small_digits.py study",
            "machine": machine(),
            "metric": extractor.score_name,
            "blocks": BLOCKS,
            "num_images": count,
            "distance_to": rows,
        }
        write_json(RESULTS, record)
        for name, row in rows.items():
            print(f"{name:<16}", "  ".join(f"{split} {distance:6.2f}" for split, distance in row.items()))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"prepare": Prepare, "study": Study}, description=__doc__)()
