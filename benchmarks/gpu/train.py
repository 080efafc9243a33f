"""Self-training at the published batch of one GPU, in the published precision: steps and images per second, memory.

Images are in memory as uint8 and go through the frozen autoencoder in every step, as when training on a folder;
`encode_s` is its share of a step's seconds. Nothing is written but the log.
"""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from gpu.networks import Subject, subjects
from gpu.rows import Figures, Rows
from gpu.timing import timed
from neon.data.images import ArrayDataset
from neon.lora.settings import LoRA
from neon.model import GenerativeModel
from neon.noise import ImageNoise
from neon.runtime.distributed import Processes
from neon.selftrain import TrainingRun

TIMED_STEPS, WARM_UP = 8, 3


def measure(rows: Rows) -> None:
    """A row for each network with a published self-training; the slow one to build last."""
    for name, subject in subjects(rows.tiny).items():
        if subject.training_batch:
            rows.add(name, lambda s=subject: _training(rows, s))  # type: ignore[misc]


def run_of(
    model: GenerativeModel, batch: int, folder: Path, device: torch.device, lora: LoRA | None = None
) -> TrainingRun:
    """A training of `model` on four batches of random images in memory."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4 * batch, *model.image_shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(len(images)) % model.num_classes if model.num_classes else None
    return TrainingRun(
        model,
        ArrayDataset(images, labels, Path("random images")),
        folder,
        replace(model.recipe, batch_size=batch, scale_losses=model.precision.name == "fp16"),
        seed=0,
        processes=Processes(device=device),
        micro_batch=batch,
        lora=lora,
    )


def _training(rows: Rows, subject: Subject) -> Figures:
    device, batch, precision = rows.device, subject.training_batch, subject.training_precision
    timed_steps, warm_up = (2, 1) if rows.tiny else (TIMED_STEPS, WARM_UP)
    model = subject.on(device, precision)
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(model, batch, Path(folder), device)
        for _ in range(warm_up):
            run.one_step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = [timed(run.one_step, device) for _ in range(timed_steps)]
        some = run.dataset.examples(range(batch)).to(device)
        with precision.allowed_on(device):
            encoding = min(
                timed(lambda: model.encode(some, ImageNoise(range(batch), device)), device) for _ in range(2)
            )
    step = statistics.median(seconds)
    figures = {
        "precision": precision.name,
        "batch": batch,
        "steps_per_s": 1 / step,
        "images_per_s": batch / step,
        "step_s": step,
        "encode_s": encoding,
    }
    if device.type == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return figures
