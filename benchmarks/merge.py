"""Speed and memory of merging, beside the plain work it cannot avoid.

In memory: LiveMerge.set and merge_state against copying the same bytes once. Files: merge_files of two safetensors,
with the hashes of both, against reading both, hashing both and writing one with the same fsync. Repeats are
interleaved, so that whatever else the machine does falls on all of them.

    python benchmarks/merge.py                         # 256 MB in memory, two files of 1 GB, five repeats
    python benchmarks/merge.py --file-mb 100 --repeats 3
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine

from neon.checkpoint import save_safetensors
from neon.merge import LiveMerge, merge_files, merge_state
from neon.runtime.files import write_json

BLOCK = 1 << 22
TENSOR_ELEMENTS = 1 << 22  # 16 MB in float32, a large layer

PEAK_OF_MERGE = """
import pathlib, sys, torch, neon.merge
def memory(field):  # not getrusage: its peak includes that of the process that started this one
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(field)[1].split()[0])
before = memory("VmRSS:")
neon.merge.merge_files(sys.argv[1], sys.argv[2], [1.5], sys.argv[3], overwrite=True)
print((memory("VmHWM:") - before) / 1024)
"""


def random_state(megabytes: int, seed: int) -> dict[str, torch.Tensor]:
    """float32 weights of this size, in layers of 16 MB."""
    generator = torch.Generator().manual_seed(seed)
    elements = megabytes * 1_000_000 // 4
    sizes = [min(TENSOR_ELEMENTS, elements - start) for start in range(0, elements, TENSOR_ELEMENTS)]
    return {f"layers.{i}": torch.randn(n, generator=generator) for i, n in enumerate(sizes)}


def interleaved(
    programs: dict[str, Callable[[], object]], repeats: int, prepare: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every program in every round, after one round of warm-up; `prepare` runs untimed before each.

    The order rotates: what one program leaves behind (free pages, a warm cache) falls to each of the others in turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            prepare()
            start = time.perf_counter()
            programs[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def in_memory(megabytes: int, repeats: int) -> dict[str, list[float]]:
    base, self_trained = random_state(megabytes, 0), random_state(megabytes, 1)
    network = torch.nn.Module()
    network.layers = torch.nn.ParameterList([torch.empty_like(t) for t in base.values()])
    live = LiveMerge(network, base, self_trained)
    copies = {name: torch.empty_like(t) for name, t in base.items()}

    def copy() -> None:
        for name, tensor in base.items():
            copies[name].copy_(tensor)

    return interleaved(
        {
            "copy into place": copy,
            "LiveMerge.set": lambda: live.set(1.5),
            "clone": lambda: {name: tensor.clone() for name, tensor in base.items()},
            "merge_state": lambda: merge_state(base, self_trained, 1.5),
        },
        repeats,
    )


def read_and_hash(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_synced(path: Path, size: int) -> None:
    block = os.urandom(BLOCK)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def on_files(megabytes: int, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Seconds per program, and the peak resident MB of the merge above the interpreter with torch imported."""
    with tempfile.TemporaryDirectory() as folder:
        base, self_trained, output = (Path(folder) / f"{n}.safetensors" for n in ("base", "self_trained", "neon"))
        for path, seed in ((base, 0), (self_trained, 1)):
            save_safetensors(path, random_state(megabytes, seed), {})
        size = base.stat().st_size

        def serial() -> None:
            read_and_hash(base), read_and_hash(self_trained)
            write_synced(output, size)

        def two_threads() -> None:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(read_and_hash, (base, self_trained)))
            write_synced(output, size)

        seconds = interleaved(
            {
                "read, hash, write": serial,
                "the same, hashing in two threads": two_threads,
                "merge_files": lambda: merge_files(base, self_trained, [1.5], output),
            },
            repeats,
            prepare=lambda: output.unlink(missing_ok=True),  # all write a new file; none pays for freeing an old one
        )
        peak = subprocess.run(
            [sys.executable, "-c", PEAK_OF_MERGE, str(base), str(self_trained), str(output)],
            check=True,
            capture_output=True,
            text=True,
        )
        return seconds, float(peak.stdout)


def show(title: str, seconds: dict[str, list[float]], compare: list[tuple[str, str]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{title:<40}{'median s':>10}{'min s':>10}{'max s':>10}")
    for name, values in seconds.items():
        print(f"  {name:<38}{medians[name]:>10.3f}{min(values):>10.3f}{max(values):>10.3f}")
    ratios = {f"{merge} / {plain}": medians[merge] / medians[plain] for merge, plain in compare}
    for name, ratio in ratios.items():
        print(f"  {name:<58}{ratio:>10.2f}")
    return {"median_seconds": medians, "seconds": seconds, "ratios": ratios}


def main(
    memory_mb: int = 256,
    file_mb: int = 1000,
    repeats: int = 5,
    json_file: Path = Path(__file__).parent / "results" / "merge.json",
) -> None:
    """Measure merging in memory and on files.

    Args:
        memory_mb: Size of the state dict merged in memory, in 10^6 bytes.
        file_mb: Size of each file merged, in 10^6 bytes.
        repeats: Timed rounds after one of warm-up; medians are reported.
        json_file: Where the figures go.
    """
    record: dict[str, Any] = {"command": f"python benchmarks/merge.py {' '.join(sys.argv[1:])}".strip()}
    record["machine"] = machine()
    print(json.dumps(record["machine"]))
    record["in_memory"] = show(
        f"{memory_mb} MB float32 in memory",
        in_memory(memory_mb, 4 * repeats),
        [("LiveMerge.set", "copy into place"), ("merge_state", "clone")],
    )
    seconds, peak = on_files(file_mb, repeats)
    record["files"] = show(
        f"two files of {file_mb} MB",
        seconds,
        [("merge_files", "read, hash, write"), ("merge_files", "the same, hashing in two threads")],
    )
    record["files"]["peak_mb_above_interpreter"] = peak
    print(f"  {'peak resident memory above the interpreter, MB':<58}{peak:>10.0f}")
    record["sizes"] = {"memory_mb": memory_mb, "file_mb": file_mb, "repeats": repeats}
    write_json(json_file, record)
    print(f"\nwritten to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
