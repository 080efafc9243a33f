"""Images a second that training reads and prepares, by form of the set and number of workers, beside what GPUs take.

    python benchmarks/loading.py                  # 32 and 256 pixels, a few minutes
    python benchmarks/loading.py --images 256 --repeats 5

Smooth random images with a little noise, whose PNG files are as large as those of photographs. Files are in the page
cache. Methods run in turn, one round after the other; figures are medians of rounds. CPU time is that of all
processes: where others run beside, what N free processors would do follows from it.

"before" is VAR's way until images were prepared on the CPU as bytes: read by the training process, resized by
torchvision, cropped and scaled to floats there. "conversion here" adds that scaling, as a training on a CPU does it, to
what workers send.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image

from neon.data.augment import edm_augment
from neon.data.encoded import ExampleSet, write_index, write_shard
from neon.data.images import ImageDataset, TrainingImages, from_uint8, pack_set, visit_order, write_images, write_labels
from neon.data.loading import read_ahead
from neon.data.shards import open_images, write_image_shards
from neon.demo.assets import BASE
from neon.model import GenerativeModel, load_model
from neon.noise import ImageNoise
from neon.runtime.distributed import Processes
from neon.runtime.files import write_json
from neon.selftrain.visits import Visits, read
from VAR.model import VARModel
from VAR.published import PATCH_NUMS
from xAR.model import XARModel

CPU = torch.device("cpu")
MICRO_BATCH = 32
SHARD = 64
WORKERS = (0, 1, 2)
WARM_UP = 4
"""batches"""
H100 = Path("benchmarks/results/gpu_nvidia_h100_80gb_hbm3.json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second that training reads and prepares.")
    parser.add_argument("--images", type=int, default=256, help="of 256 pixels; eight times as many of 32")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/loading.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "micro_batch": MICRO_BATCH,
        "repeats": args.repeats,
        "h100": h100(),
    }
    with tempfile.TemporaryDirectory() as folder:
        record["png_kb"], sets = write_sets(Path(folder), args.images)
        methods = methods_of(sets)
        record["rows"] = measure(methods, args.repeats)
    record["edm_augment_ms_per_image"] = augment_ms()
    record["VAR_times_before"] = times_before(record["rows"])
    show(record)
    write_json(args.json, record)


def h100() -> dict[str, dict[str, float]]:
    """Images a second that self-training on an H100 takes: as measured with its data, and at most, without encoding."""
    if not H100.exists():
        return {}
    rows = json.loads(H100.read_text())["parts"]["train"]["rows"]
    return {
        row["row"]: {
            "measured": row["images_per_s"],
            "without_encoding": row["batch"] / (row["step_s"] - row["encode_s"]),
        }
        for row in rows
        if row["status"] == "ok"
    }


def write_sets(folder: Path, count: int) -> tuple[dict[int, float], dict[str, TrainingImages]]:
    """(kB of a PNG by size, the sets by name)."""
    sets: dict[str, TrainingImages] = {}
    sizes = {}
    for side, number in ((32, 8 * count), (256, count)):
        generator, labels = torch.Generator().manual_seed(0), torch.arange(number) % 10
        small = torch.rand(number, 3, max(side // 10, 2), max(side // 10, 2), generator=generator)
        smooth = F.interpolate(small, size=side, mode="bicubic").clamp(0, 1) * 255
        images = (smooth + 4 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
        here = folder / str(side)
        write_images(here / "png", range(number), images)
        write_labels(here / "png", labels.tolist(), number)
        pack_set(here / "png", here / "png.zip")

        def compute(block: range, images: Tensor = images, labels: Tensor = labels) -> tuple[Tensor, Tensor]:
            return images[block.start : block.stop], labels[block.start : block.stop]

        write_image_shards(
            compute, number, here / "shards", image_shape=(3, side, side), batch_size=SHARD, processes=Processes(),
            title="writing",
        )  # fmt: skip
        sizes[side] = sum(file.stat().st_size for file in (here / "png").glob("*.png")) / number / 1e3
        for name in ("png", "png.zip", "shards"):
            sets[f"{name} {side}"] = open_images(here / name)
    for kind, example in (
        ("VAR tokens", torch.zeros(680, dtype=torch.uint16)),
        ("xAR moments", torch.zeros(2, 32, 16, 16)),
        ("IMM moments", torch.zeros(8, 32, 32)),
    ):
        here, number = folder / kind, 8 * count
        shards = [range(first, min(first + SHARD, number)) for first in range(0, number, SHARD)]
        for shard in shards:
            write_shard(here, shard.start, example.expand(len(shard), *example.shape), torch.arange(len(shard)) % 10)
        write_index(here, shards, (3, 256, 256), kind)
        sets[kind] = ExampleSet(here, kind)
    return sizes, sets


def models() -> dict[str, GenerativeModel]:
    """Models of 256 pixels that prepare images as published ones do; EDM's and IMM's way is to leave them."""
    transformer = {"classes": 10, "depth": 1, "width": 64, "heads": 1, "patch_nums": list(PATCH_NUMS[256])}
    xar = {"classes": 10, "width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "latent_channels": 4}
    found = {
        "EDM, IMM": load_model(BASE),
        "VAR": VARModel({"transformer": {**transformer, "vocab": 16, "code_channels": 4}}),
        "xAR": XARModel({"transformer": {**xar, "grid": 16}}),
    }
    assert found["VAR"].image_shape == found["xAR"].image_shape == (3, 256, 256)
    return found


Batches = Callable[[], Iterable[Any]]
"""gives all examples of a set, batch by batch"""


def methods_of(sets: dict[str, TrainingImages]) -> dict[tuple[str, str, str], tuple[int, Batches]]:
    """By path, set and method: how many images, and how to read them."""
    made = models()
    found: dict[tuple[str, str, str], tuple[int, Batches]] = {}
    for path, name in (
        *(("EDM, IMM", f"{form} {side}") for side in (32, 256) for form in ("png", "png.zip", "shards")),
        *((path, f"{form} 256") for path in ("VAR", "xAR") for form in ("png", "png.zip", "shards")),
        *(("EDM, IMM", kind) for kind in ("VAR tokens", "xAR moments", "IMM moments")),
    ):
        dataset, load = sets[name], partial(read, made[path], sets[name], CPU)
        label = "encoded" if dataset.encoded else path
        for workers in WORKERS:
            found[label, name, f"{workers} workers"] = (len(dataset), partial(ahead, load, dataset, workers))
    png = sets["png 256"]
    load = partial(read, made["VAR"], png, CPU)
    assert isinstance(png, ImageDataset)
    assert torch.equal(next(iter(before(png))), from_uint8(next(iter(ahead(load, png, 0))).loaded.examples)), (
        "other bits"
    )
    found["VAR", "png 256", "before"] = (len(png), partial(before, png))
    found["VAR", "png 256", "2 threads"] = (len(png), partial(threads, load, png))
    for name in ("png 256", "shards 256"):
        load = partial(read, made["VAR"], sets[name], CPU)
        found["VAR", name, "2 workers, conversion here"] = (len(png), partial(converted, load, sets[name]))
    return found


def visits(dataset: TrainingImages) -> Iterator[Visits]:
    """Images in a random order, in micro-batches, without an end."""
    order = visit_order(len(dataset), 1)
    while True:
        part = list(islice(order, MICRO_BATCH))
        yield Visits(part, part)


class Timed(NamedTuple):
    """What was loaded, by which process, and the CPU seconds of that so far."""

    loaded: Any
    process: int
    seconds: float


def timed(load: Callable[[Visits], Any], part: Visits) -> Timed:
    return Timed(load(part), os.getpid(), time.process_time())


def ahead(load: Callable[[Visits], Any], dataset: TrainingImages, workers: int) -> Iterable[Timed]:
    return read_ahead(partial(timed, load), visits(dataset), workers=workers, device=CPU)


def converted(load: Callable[[Visits], Any], dataset: TrainingImages) -> Iterator[Timed]:
    for batch in ahead(load, dataset, 2):
        yield batch._replace(loaded=from_uint8(batch.loaded.examples))


def threads(load: Callable[[Visits], Any], dataset: TrainingImages) -> Iterator[Any]:
    with ThreadPoolExecutor(2) as pool:
        plan = visits(dataset)
        ahead = deque(pool.submit(load, part) for part in islice(plan, 4))
        try:
            while True:
                yield ahead.popleft().result()
                ahead.append(pool.submit(load, next(plan)))
        finally:
            pool.shutdown(cancel_futures=True)


def before(dataset: ImageDataset, enlarged: int = 288, side: int = 256) -> Iterator[Tensor]:
    """What VAR's tokenizer got, as it was made at commit 696c338."""
    for part in visits(dataset):
        images, _ = dataset.load(part.indices)
        noise = ImageNoise(part.seeds)
        large = [
            pil_to_tensor(resize(to_pil_image(image), [enlarged], InterpolationMode.LANCZOS)) for image in images.cpu()
        ]
        corners = torch.stack([noise.integers(enlarged - side + 1), noise.integers(enlarged - side + 1)], dim=1)
        crops = [
            image[:, top : top + side, left : left + side]
            for image, (top, left) in zip(large, corners.tolist(), strict=True)
        ]
        yield from_uint8(torch.stack(crops))


def measure(methods: dict[tuple[str, str, str], tuple[int, Batches]], repeats: int) -> list[dict[str, Any]]:
    """Time of as many batches as a set has, once some have come.

    So workers are as far ahead at the end as at the start.
    """
    seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in methods}
    cpu: dict[tuple[str, str, str], list[float]] = {key: [] for key in methods}
    for _ in range(repeats):
        for key, (count, batches) in methods.items():
            arriving, number = iter(batches()), count // MICRO_BATCH
            used: dict[int, float] = {}
            for batch in islice(arriving, WARM_UP):
                used |= cpu_of(batch)
            start, before_all = time.perf_counter(), sum((used | cpu_of()).values())
            for batch in islice(arriving, number):
                used |= cpu_of(batch)
            seconds[key].append((time.perf_counter() - start) / (number * MICRO_BATCH))
            cpu[key].append((sum((used | cpu_of()).values()) - before_all) / (number * MICRO_BATCH))
            del arriving
    return [
        {
            "path": path,
            "set": name,
            "method": method,
            "images_per_second": 1 / statistics.median(seconds[path, name, method]),
            "cpu_ms_per_image": 1e3 * statistics.median(cpu[path, name, method]),
        }
        for path, name, method in methods
    ]


def times_before(rows: list[dict[str, Any]]) -> dict[str, float]:
    """VAR's images a second by two workers on two free processors over those of before, which used one: by CPU time."""
    of_var = {(row["set"], row["method"]): row["cpu_ms_per_image"] for row in rows if row["path"] == "VAR"}
    once = of_var["png 256", "before"]
    return {f"{name}, {method}": 2 * once / ms for (name, method), ms in of_var.items() if method[:9] == "2 workers"}


def cpu_of(batch: Any = None) -> dict[int, float]:
    """CPU seconds by process: of this one, and of that which loaded a batch."""
    others = {batch.process: batch.seconds} if isinstance(batch, Timed) else {}
    return {**others, os.getpid(): time.process_time()}


def augment_ms() -> float:
    """EDM's augmentation of 32-pixel images, on one thread: milliseconds an image."""
    images, pipe = torch.rand(64, 3, 32, 32) * 2 - 1, edm_augment(0.12)
    assert pipe is not None
    times = []
    for _ in range(5):
        start = time.process_time()
        pipe(images, ImageNoise(range(64)))
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times) / 64


def show(record: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    print(f"micro-batches of {MICRO_BATCH}; PNG of {record['png_kb']} kB\n")
    print(f"{'path':10}{'set':14}{'method':28}{'images/s':>10}{'CPU ms':>8}")
    for row in record["rows"]:
        print(
            f"{row['path']:10}{row['set']:14}{row['method']:28}"
            f"{row['images_per_second']:10.0f}{row['cpu_ms_per_image']:8.2f}"
        )
    print(f"\nEDM's augmentation of 32 pixels: {record['edm_augment_ms_per_image']:.2f} ms an image")
    for name, times in record["VAR_times_before"].items():
        print(f"VAR on two free processors, {name}: {times:.2f} times before")
    for name, taken in record["h100"].items():
        print(
            f"an H100 takes, {name}: {taken['measured']:.0f} images/s; {taken['without_encoding']:.0f} without encoding"
        )


if __name__ == "__main__":
    main()
