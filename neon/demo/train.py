"""Make what the demo embeds: the base model and the feature networks, from Fashion-MNIST's training images.

    python -m neon.demo.train features              # 1 minute: both feature networks
    python -m neon.demo.train base --seed 0         # 20 minutes on one core
    python -m neon.demo.train images --output fashion.zip   # the training images, for edm/finetune.py

All read the Debian package dataset-fashion-mnist, or --data FOLDER with the four original files.
Each is seeded and runs on one thread, so that one machine makes the same weights again. They go below runs/, or where
--output says; the embedded ones stay as they are.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro

from neon.checkpoint import load_state
from neon.data.fingerprint import fingerprint
from neon.data.images import ArrayDataset, pack_set, write_images, write_labels
from neon.demo.assets import (
    BASE,
    FEATURES,
    REAL_IMAGES,
    SECOND_FEATURES,
    SECOND_TEST_STATISTICS,
    TEST_STATISTICS,
    TRAIN_STATISTICS,
)
from neon.demo.fashion import DEBIAN_FOLDER, load_fashion
from neon.errors import RequestError, WorkError
from neon.metrics import Statistics
from neon.metrics.features import features_of
from neon.metrics.small import Lesson, SmallFeatures, accuracy, classes_of, fit_classifier, quarter_turns
from neon.model import architecture, load_weights, save_model
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.runtime.files import atomic_write, check_writable
from neon.runtime.signals import Stopped, answered
from neon.selftrain import train

ARCHITECTURE = "edm"
CONFIG = {
    "network": {
        "img_resolution": 14,
        "img_channels": 1,
        "label_dim": 10,
        "model_type": "SongUNet",
        "model_channels": 32,
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [7],
        "dropout": 0.0,
    },
    "label_dropout": 0.1,
}
RECIPE = Recipe(batch_size=128, lr=1e-3, lr_rampup_kimg=10, ema_halflife_kimg=50, ema_rampup_ratio=0.05)
MICRO_BATCH = 32
NUM_FEATURES = 64
NUM_REAL_IMAGES = 2000
SECOND = {"stride": 2, "width": 32}
"""of the second feature network: a fifth of the first one's weights"""
MADE = Path("runs/demo-assets")


@dataclass(frozen=True, kw_only=True)
class TrainBase:
    """Train the base model through the project's own training loop; continues where it was if killed."""

    data: Path = DEBIAN_FOLDER
    """folder with the four Fashion-MNIST files"""
    seed: int = 0
    """of initial weights, data order and noise"""
    num_steps: int = 4000
    """optimiser steps of 128 images"""
    run: Path = Path("runs/demo-base")
    """folder of snapshots, state and log; the seed is appended"""
    output: Path = MADE / BASE.name
    """file of the averaged weights"""

    def __call__(self) -> None:
        torch.manual_seed(self.seed)
        model = architecture(ARCHITECTURE)(CONFIG)
        snapshots = train(
            model,
            load_fashion(self.data, "train"),
            self.run.with_name(f"{self.run.name}-{self.seed}"),
            num_steps=self.num_steps,
            snapshot_steps=range(0, self.num_steps, 1000)[1:],
            recipe=RECIPE,
            seed=self.seed,
            processes=Processes(),
            micro_batch=MICRO_BATCH,
            title=f"base, seed {self.seed}",
            identity={"data_fingerprint": fingerprint(self.data)},
        )
        state = load_state(snapshots[-1].path)
        load_weights(model.network, state, snapshots[-1].path)
        facts = {"trained_on": "Fashion-MNIST, training images", "images_seen": str(snapshots[-1].images_seen)}
        save_model(self.output, model, state, {**facts, "seed": str(self.seed)})
        print(f"{self.output}: {sum(t.numel() for t in state.values()):,} weights")


@dataclass(frozen=True, kw_only=True)
class TrainFeatures:
    """Train the feature networks; write them, the statistics of their features and 2,000 test images."""

    data: Path = DEBIAN_FOLDER
    """folder with the four Fashion-MNIST files"""
    seed: int = 0
    """of initial weights and data order"""
    epochs: int = 4
    """passes over the 60,000 training images"""
    output: Path = MADE
    """folder of the files, named as the embedded ones"""

    def __call__(self) -> None:
        training, test = load_fashion(self.data, "train"), load_fashion(self.data, "test")
        torch.manual_seed(self.seed)
        classifier = SmallFeatures("fashion64", training.image_shape, NUM_FEATURES, 10)
        self._fit(classifier, classes_of, training, test)
        self._save(classifier, FEATURES, {TRAIN_STATISTICS: training, TEST_STATISTICS: test})
        torch.manual_seed(self.seed)
        turned = SmallFeatures("rotation64", training.image_shape, NUM_FEATURES, 4, **SECOND)
        self._fit(turned, quarter_turns, training, test)
        self._save(turned, SECOND_FEATURES, {SECOND_TEST_STATISTICS: test})
        with atomic_write(self.output / REAL_IMAGES.name) as file:
            np.savez_compressed(file, images=test.images[:NUM_REAL_IMAGES].numpy())

    def _fit(
        self,
        extractor: SmallFeatures,
        lesson_of: Callable[[ArrayDataset], Lesson],
        training: ArrayDataset,
        test: ArrayDataset,
    ) -> None:
        fit_classifier(extractor, lesson_of(training), torch.arange(len(training)), self.epochs)
        right, chance = accuracy(extractor, lesson_of(test), torch.arange(len(test)))
        print(f"{extractor.name}: accuracy {right:.4f} on the {len(test)} test images (by chance {chance:.2f})")

    def _save(self, extractor: SmallFeatures, asset: Path, statistics: Mapping[Path, ArrayDataset]) -> None:
        extractor.save(self.output / asset.name)
        for path, split in statistics.items():
            found = Statistics.from_features(features_of(extractor, split.images))
            replace(found, features=extractor.identity).save(self.output / path.name)


@dataclass(frozen=True, kw_only=True)
class ExportImages:
    """Write the training images, at the demo's resolution and with their classes, as a zip of PNG files."""

    data: Path = DEBIAN_FOLDER
    """folder with the four Fashion-MNIST files"""
    output: Path = Path("fashion.zip")
    """zip to write"""

    def __call__(self) -> None:
        training = load_fashion(self.data, "train")
        assert training.labels is not None
        check_writable(self.output, overwrite=False, flag=None)
        with TemporaryDirectory() as folder:
            write_images(folder, range(len(training)), training.images)
            write_labels(folder, training.labels.tolist(), len(training))
            pack_set(folder, self.output)
        print(f"{self.output}: {len(training)} images")


def _main() -> int:
    torch.set_num_threads(1)
    commands: dict[str, Callable[..., Any]] = {
        "base": TrainBase,
        "features": TrainFeatures,
        "images": ExportImages,
    }
    try:
        with answered():
            tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)()
    except (RequestError, WorkError, Stopped) as error:
        print(f"neon.demo.train: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
