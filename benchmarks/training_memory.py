"""Memory of one training step of EDM by each engine, as multiples of the weights, in one, two and four processes.

    python benchmarks/training_memory.py

Random weights and tiny images, so that next to all memory is the state: weights, gradients, two moments, the average,
and in the main process the weights at the start, by which it tells how far they moved. Processes are of this machine,
on gloo; memory is what Linux counts as resident above what the process had before there was a network.
"""

import argparse
import gc
import os
import shlex
import socket
import sys
import tempfile
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from machine import machine

from edm.model import EDM
from neon.data.images import ArrayDataset
from neon.recipe import Recipe
from neon.runtime.distributed import Processes, processes
from neon.runtime.files import write_json
from neon.runtime.parallel import Parallel
from neon.selftrain import TrainingRun

ENGINES: tuple[Parallel, ...] = ("ordered", "ddp", "fsdp")
STEPS = 3
"""the first makes moments and buffers"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a training step, as multiples of the weights.")
    parser.add_argument("--channels", type=int, default=64, help="of the U-Net (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="(default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/training_memory.json"), help="(default: %(default)s)"
    )
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back, as to the allocator of a GPU
    rows = [row for number in args.processes for engine in ENGINES for row in measured(engine, number, args.channels)]
    weights = sum(p.numel() for p in network(args.channels).parameters())
    record = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "weights": weights, "rows": rows}
    print(f"EDM of {weights / 1e6:.1f} million weights; multiples of their {4 * weights / 1e6:.0f} MB")
    print("| engine | processes | | resident | peak of a step |\n|---|---:|---|---:|---:|")
    for row in rows:
        print("| {engine} | {processes} | {of} | {resident:.1f} | {peak:.1f} |".format(**row))
    write_json(args.json, record)


def network(channels: int) -> EDM:
    torch.manual_seed(0)
    config = {
        "img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "model_channels": channels,
        "channel_mult": [1, 2, 2], "num_blocks": 2, "attn_resolutions": [4],
    }  # fmt: skip
    return EDM({"network": config})


def measured(engine: Parallel, number: int, channels: int) -> list[dict[str, Any]]:
    """Of the main process, and of the other one with most."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        context.Process(target=_train, args=(queue, engine, rank, number, port, channels)) for rank in range(number)
    ]
    for process in started:
        process.start()
    figures = dict(queue.get(timeout=280) for _ in started)
    for process in started:
        process.join()
    row = {"engine": engine, "processes": number}
    rows = [{**row, "of": "main process", **figures.pop(0)}]
    if figures:
        rows.append({**row, "of": "another", **max(figures.values(), key=lambda one: one["peak"])})
    return rows


def _train(queue: "Queue[Any]", engine: Parallel, rank: int, number: int, port: int, channels: int) -> None:
    torch.set_num_threads(1)
    if number > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    with processes("cpu") as group, tempfile.TemporaryDirectory() as folder:
        _steps(network(8), engine, group, Path(folder))  # what libraries keep for themselves
        before = _reset()
        model = network(channels)
        run = _steps(model, engine, group, Path(folder))
        gc.collect()
        weights = 4 * sum(p.numel() for p in model.network.parameters())
        resident = (_reset() - before) / weights
        run.one_step()
        queue.put((rank, {"resident": round(resident, 2), "peak": round((_status("VmHWM") - before) / weights, 2)}))
        group.barrier()


def _steps(model: EDM, engine: Parallel, group: Processes, folder: Path) -> TrainingRun:
    images = ArrayDataset(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), None, Path("images"))
    recipe = Recipe(batch_size=8, ema_halflife_kimg=1.0)
    run = TrainingRun(model, images, folder, recipe, 0, group, 1, parallel=engine)
    for _ in range(STEPS):
        run.one_step()
    return run


def _reset() -> int:
    """Resident bytes; the peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
