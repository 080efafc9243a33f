"""Merging folders against mergekit: time and peak anonymous memory of both commands on the same files.

`mergekit-pytorch` reads single files, so both merge a folder with one file each; neon merges the same weights in
shards, too. Its `linear` method with weights 1 + w and -w, not normalised, is the same arithmetic. Every program is a
process of its own, imports included; what these take is what the same command takes on 1 MB. Repeats are interleaved.

mergekit needs an environment of its own: `python -m venv DIR`, `DIR/bin/pip install mergekit`.

    python benchmarks/merge_folders.py --mergekit DIR/bin/python                # 1 GB, three repeats
    python benchmarks/merge_folders.py --mergekit DIR/bin/python --file-mb 4000
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml
from machine import machine
from merge import random_state

from neon.checkpoint import open_checkpoint, save_safetensors
from neon.runtime.files import write_json

W = 1.5
SHARDS = 4
RAW = "from mergekit.scripts.merge_raw_pytorch import main; main()"
"""what `mergekit-pytorch` is"""
POLL = 0.005  # seconds between looks at a process's memory


def write_folder(folder: Path, state: dict[str, torch.Tensor], shards: int) -> None:
    """A model's folder of so many files of weights."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if shards == 1:
        save_safetensors(folder / "model.safetensors", state, {"format": "pt"})
        return
    where = {
        name: f"model-{i * shards // len(state) + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(state)
    }
    for file in set(where.values()):
        part = {name: tensor for name, tensor in state.items() if where[name] == file}
        save_safetensors(folder / file, part, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def measured(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak anonymous memory, in MB, of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        if "RssAnon:" in status:
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(POLL)
    error = process.communicate()[1]
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {error[-2000:]}")
    return seconds, peak * 1024 / 1e6


def commands(folder: Path, mergekit: Path) -> dict[str, list[str]]:
    """The programs on the folders `base`, `tuned` and the same in shards, each with its output last."""
    recipe = folder / "mergekit.yaml"
    models = [
        {"model": str(folder / side / "model.safetensors"), "parameters": {"weight": weight}}
        for side, weight in (("base", 1 + W), ("tuned", -W))
    ]
    recipe.write_text(
        yaml.safe_dump(
            {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "dtype": "float32"}
        )
    )
    neon = [sys.executable, "-m", "neon.cli", "merge", "-w", str(W)]

    def of(suffix: str) -> list[str]:
        sides = ["--base", str(folder / f"base{suffix}"), "--self-trained", str(folder / f"tuned{suffix}")]
        return [*neon, *sides, "--output", str(folder / f"neon{suffix}")]

    raw = [str(mergekit), "-c", RAW, str(recipe), str(folder / "mergekit")]
    return {"neon merge": of(""), f"neon merge, {SHARDS} shards": of("-shards"), "mergekit-pytorch": raw}


def prepare(folder: Path, megabytes: int) -> None:
    folder.mkdir()
    for side, seed in (("base", 0), ("tuned", 1)):
        state = random_state(megabytes, seed)
        write_folder(folder / side, state, 1)
        write_folder(folder / f"{side}-shards", state, SHARDS)


def greatest_difference(a: Path, b: Path) -> float:
    """Of any two values under one name."""
    with open_checkpoint(a) as one, open_checkpoint(b) as other:
        assert one.specs.keys() == other.specs.keys()
        return max(float((one.tensor(name) - other.tensor(name)).abs().max()) for name in one.specs)


def main(
    mergekit: Path,
    file_mb: int = 1000,
    repeats: int = 3,
    warm_up: int = 1,
    json_file: Path = Path(__file__).parent / "results" / "merge_folders.json",
) -> None:
    """Measure `neon merge` of folders beside `mergekit-pytorch`.

    Args:
        mergekit: The Python of an environment in which mergekit is installed.
        file_mb: Size of each side's weights, in 10^6 bytes.
        repeats: Timed rounds; medians are reported.
        warm_up: Rounds before them that do not count.
        json_file: Where the figures go.
    """
    asked = [
        str(mergekit),
        "-c",
        "from importlib.metadata import version; print(version('mergekit'), version('torch'))",
    ]
    versions = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    record: dict[str, Any] = {
        "command": f"python benchmarks/merge_folders.py --file-mb {file_mb} --repeats {repeats} --warm-up {warm_up}",
        "machine": {**machine(), "mergekit": versions[0], "torch of mergekit": versions[1]},
        "file_mb": file_mb,
    }
    print(json.dumps(record["machine"]))
    with tempfile.TemporaryDirectory() as temporary:
        for part, megabytes, rounds in (("start-up", 1, 1), ("programs", file_mb, repeats)):
            folder = Path(temporary) / part
            prepare(folder, megabytes)
            programs = commands(folder, mergekit)
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
            names = list(programs)
            for turn in range(-warm_up, rounds):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    shutil.rmtree(programs[name][-1], ignore_errors=True)
                    result = measured(programs[name])
                    if turn >= 0:
                        found[name].append(result)
            record[part] = {
                name: {
                    "median_seconds": statistics.median(seconds for seconds, _ in results),
                    "seconds": [seconds for seconds, _ in results],
                    "peak_anonymous_mb": max(peak for _, peak in results),
                }
                for name, results in found.items()
            }
            print(f"\n{part + f', {megabytes} MB':<34}{'median s':>10}{'peak anonymous MB':>20}")
            for name, row in record[part].items():
                print(f"  {name:<32}{row['median_seconds']:>10.2f}{row['peak_anonymous_mb']:>20.0f}")
        record["greatest_difference"] = greatest_difference(folder / "neon", folder / "mergekit")
    print(f"\ngreatest difference of a value between the two: {record['greatest_difference']:.2g}")
    write_json(json_file, record)
    print(f"written to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
