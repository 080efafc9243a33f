"""Whether any reader of foreign files can be made to fail in another way than by one line, to swell, or to hang.

    python benchmarks/fuzz.py                                # 20,000 inputs over all readers
    python benchmarks/fuzz.py --inputs 500 --only statistics
    python benchmarks/fuzz.py --only torch --first 1234 --inputs 1 --keep /tmp/kept      # one input again, kept

Each input is a valid file or folder with one file changed (tests/mutations.py), made from the number of the input
alone. A reader may take it, or raise a RequestError or WorkError that names it. Anything else, more than 400 MB of
memory, more than 10 seconds, or advice to read unsafely is a fault, which ends the program with 1.
"""

import contextlib
import io
import json
import os
import resource
import shlex
import shutil
import signal
import socketserver
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

import numpy as np
import torch
import tyro
from machine import machine

sys.path.insert(0, str(Path(__file__).parent.parent))  # for what the tests write and change

from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.data.encoded import write_index, write_shard
from neon.data.images import ImageDataset, write_images, write_labels
from neon.data.shards import images_or_examples
from neon.errors import RequestError, WorkError, one_line
from neon.evaluate import ScoreLog, Tally, resume_tallies, save_tallies
from neon.metrics import Statistics
from neon.metrics.small import SmallFeatures, load_features
from neon.model import load_model, save_model
from neon.recipe import Recipe
from neon.report import record, words
from neon.runtime.distributed import Processes
from neon.runtime.download import download
from neon.runtime.files import write_json
from neon.runtime.run_folder import run_folder
from neon.selftrain import TrainingRun, train
from tests import pickles
from tests.mutations import mutated
from tests.programs import Killed, dies_after
from tests.tiny import tiny_edm, tiny_images

MEMORY_MB, SECONDS = 400, 10
ADVICE = ("allow_pickle", "weights_only", "unsafe", "add_safe_globals", "trust")
ROOT = Path(__file__).parent.parent


class TooLong(BaseException):
    """The time of an input is up; no reader catches this."""


@dataclass
class Outcome:
    """What became of the inputs of one reader."""

    read: int = 0
    refused: int = 0
    seconds: list[float] = field(default_factory=list)
    swollen_mb: float = 0.0
    """the most that the memory of the process grew by in one input"""
    faults: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        return self.read + self.refused + len(self.faults)


@dataclass(frozen=True)
class Reader:
    """Something that reads foreign files: how to make valid ones in an empty folder, and how to read one of them."""

    write: Callable[[Path], None]
    """writes the valid inputs, each a file or folder"""
    read: Callable[[Path], object]
    spares: tuple[str, ...] = ()
    """files of an input that are not changed"""


def _write_images(folder: Path) -> None:
    images = tiny_images(6)
    grey = folder / "grey"
    write_images(grey, range(6), images.images)
    write_labels(grey, [0, 1, 2, 0, 1, 2], 6)
    write_images(folder / "classes" / "3", range(2), images.images[:2].expand(-1, 3, -1, -1))
    write_images(folder / "classes" / "7", range(2), images.images[:2].expand(-1, 3, -1, -1))
    for name, method in (("stored.zip", zipfile.ZIP_STORED), ("packed.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(folder / name, "w", method) as archive:
            for path in sorted(grey.iterdir()):
                archive.write(path, path.name)


def _read_images(path: Path) -> object:
    images = ImageDataset(path)
    return [images.load([index]) for index in range(len(images))]


def _write_encoded(folder: Path) -> None:
    examples, labels = torch.arange(24.0).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    for part in (range(0, 3), range(3, 6)):
        write_shard(folder / "set", part.start, examples[list(part)], labels[list(part)])
    write_index(folder / "set", [range(0, 3), range(3, 6)], (1, 8, 8), "latents")


def _read_encoded(path: Path) -> object:
    examples = images_or_examples(path, "latents")
    return [examples.load([index]) for index in range(len(examples))]


def _write_statistics(folder: Path) -> None:
    sigma = np.eye(5) + 0.1
    np.savez(folder / "plain.npz", mu=np.arange(5.0), sigma=sigma, count=np.int64(100))
    np.savez_compressed(folder / "packed.npz", mu=np.arange(5.0, dtype=np.float32), sigma=sigma)


def _write_torch(folder: Path) -> None:
    state = {"net.weight": torch.randn(8, 4), "net.bias": torch.zeros(4, dtype=torch.bfloat16)}
    state["tied"] = state["net.weight"].t()
    nested = {"model_ema": OrderedDict(state), "epoch": 3, "args": {"lr": 1e-4}, "optimizer": {"state": {}}}
    torch.save(state, folder / "plain.pth")
    torch.save(nested, folder / "nested.ckpt")
    torch.save(nested, folder / "legacy.pt", _use_new_zipfile_serialization=False)


def _write_pickles(folder: Path) -> None:
    model = tiny_edm()
    content = pickles.snapshot(model.network, model.config["network"])
    for name, protocol in (("new.pkl", 4), ("old.pkl", 2)):
        (folder / name).write_bytes(pickles.dumps(content, protocol=protocol))


def _write_safetensors(folder: Path) -> None:
    model = tiny_edm()
    save_model(folder / "model.safetensors", model, model.network.state_dict(), {"images_seen": "1000"})
    tensors = {"a": torch.ones(3, 2), "b": torch.zeros((), dtype=torch.int64), "c": torch.ones(4, dtype=torch.float16)}
    save_safetensors(folder / "plain.safetensors", tensors, {})


def _read_checkpoint(path: Path) -> object:
    with open_checkpoint(path) as checkpoint:
        specs = dict(checkpoint.specs), dict(checkpoint.metadata)
    return specs, load_state(path)


def _write_shards(folder: Path) -> None:
    (folder / "model").mkdir()
    where = {}
    for number, name in enumerate(("first", "second")):
        shard = f"model-{number}.safetensors"
        save_safetensors(folder / "model" / shard, {f"{name}.weight": torch.ones(3, 2)}, {})
        where[f"{name}.weight"] = shard
    write_json(folder / "model" / "model.safetensors.index.json", {"metadata": {"total_size": 48}, "weight_map": where})


def _write_features(folder: Path) -> None:
    shutil.copy(ROOT / "neon" / "demo" / "features.safetensors", folder / "features.safetensors")


def _train(folder: Path, num_steps: int) -> object:
    recipe = Recipe(batch_size=4, lr=1e-3, ema_halflife_kimg=0.01)
    return train(
        tiny_edm(model_channels=4, attn_resolutions=[]), tiny_images(8), folder, num_steps=num_steps,
        snapshot_steps=[1], recipe=recipe, seed=0, processes=Processes(), micro_batch=4, state_every_seconds=0.0,
    )  # fmt: skip


def _write_training(folder: Path) -> None:
    with (
        contextlib.redirect_stderr(io.StringIO()),
        run_folder(folder / "run", {"what": "training"}),
        dies_after(2, TrainingRun, "one_step"),
        contextlib.suppress(Killed),
    ):
        _train(folder / "run", 3)


def _read_training(path: Path) -> object:
    with run_folder(path, {"what": "training"}):
        return _train(path, 3)


def _write_scores(folder: Path) -> None:
    (folder / "run").mkdir()
    lines = [
        {"name": "w=0", "distance": 3.5, "is_mean": None, "is_std": None, "precision": 0.5, "recall": 0.5,
         "density": 1.0, "coverage": 0.9, "num_images": 64, "seconds": 1.5},
        {"name": "w=1", "failure": "all 64 images look the same"},
    ]  # fmt: skip
    (folder / "run" / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_tallies(folder / "run" / "evaluation.safetensors", [_tally()], 1.5, "these images")
    write_json(folder / "run" / "run.json", {"what": "scores", "settings": {"num_steps": 3}})


def _tally() -> Tally:
    tally = Tally(SmallFeatures("small", (1, 8, 8), 4, 3), 64, keep_features=True, device=torch.device("cpu"))
    tally.update(torch.randn(8, tally.moments.mean.numel(), generator=torch.Generator().manual_seed(0)))
    return tally


def _read_scores(path: Path) -> object:
    with run_folder(path, {"what": "scores", "settings": {"num_steps": 3}}):
        tally = _tally()
        resume_tallies(path / "evaluation.safetensors", [tally], "these images")
        return ScoreLog(path / "evaluations.jsonl", Processes()).entries, tally


def _write_report(folder: Path) -> None:
    finished = ROOT / "tests" / "fixtures" / "written_by_553f1e5" / "finished" / "tuning"
    shutil.copytree(finished, folder / "tuning", ignore=shutil.ignore_patterns("statistics"))


def _read_report(path: Path) -> object:
    return words.result_text(record.load(path))


def _write_answer(folder: Path) -> None:
    _write_torch(folder)
    body = (folder / "plain.pth").read_bytes()
    for path in list(folder.iterdir()):
        path.unlink()
    (folder / "plain.pth").write_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nETag: 1\r\n\r\n" % len(body) + body)


def _download(path: Path) -> None:
    """Fetch a file from a server that answers with the bytes in `path`."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.recv(10_000)
                self.request.sendall(path.read_bytes())

    with socketserver.TCPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.001,))
        thread.start()
        try:
            download(f"http://127.0.0.1:{server.server_address[1]}/{path.name}", path.parent / "fetched.pth")
        finally:
            server.shutdown()
            thread.join()


READERS = {
    "images": Reader(_write_images, _read_images),
    "encoded": Reader(_write_encoded, _read_encoded),
    "statistics": Reader(_write_statistics, Statistics.load),
    "torch": Reader(_write_torch, _read_checkpoint),
    "pickles": Reader(_write_pickles, _read_checkpoint),
    "safetensors": Reader(_write_safetensors, _read_checkpoint),
    "shards": Reader(_write_shards, _read_checkpoint),
    "model": Reader(_write_safetensors, load_model, spares=("plain.safetensors",)),
    "features": Reader(_write_features, load_features),
    "training": Reader(_write_training, _read_training),
    "scores": Reader(_write_scores, _read_scores),
    "download": Reader(_write_answer, _download),
    "report": Reader(_write_report, _read_report),
}


def peak_mb() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(name: str, numbers: range, keep: Path | None) -> Outcome:
    """Give the inputs of these numbers to the reader `name`."""
    reader, outcome = READERS[name], Outcome()
    with tempfile.TemporaryDirectory() as scratch:
        valid = Path(scratch, "valid")
        valid.mkdir()
        reader.write(valid)
        inputs = sorted(path for path in valid.iterdir() if path.name not in reader.spares)
        for each in inputs:  # what is not changed is read; and first calls cost memory that is no input's
            copy = _copied(each, Path(scratch, "whole"))
            with contextlib.redirect_stderr(io.StringIO()):
                reader.read(copy)
        for number in numbers:
            random = Random(f"{name} {number}")
            path = _copied(random.choice(inputs), Path(scratch, "changed"))
            files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
            changed = random.choice([file for file in files if file.name != ".lock"])
            changed.write_bytes(mutated(changed.read_bytes(), random))
            if keep is not None:
                shutil.copytree(path.parent, keep / f"{name}-{number}", dirs_exist_ok=True)
            _read(reader, path, f"{name} {number} ({changed.name})", outcome)
    return outcome


def _copied(path: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy = folder / path.name
    return Path(shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy))


def _read(reader: Reader, path: Path, title: str, outcome: Outcome) -> None:
    before, started, fault = peak_mb(), time.perf_counter(), None
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # warnings and progress
            reader.read(path)
        outcome.read += 1
    except (RequestError, WorkError) as error:
        text = str(error)
        if path.name not in text:
            fault = f"does not name the file: {text[:200]}"
        elif any(word in text for word in ADVICE):
            fault = f"advises to read unsafely: {text[:200]}"
        else:
            outcome.refused += 1
    except TooLong:
        fault = f"more than {SECONDS} s"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__}: {str(error)[:120]} ({Path(last.filename).name}:{last.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    outcome.seconds.append(time.perf_counter() - started)
    grown = peak_mb() - before
    outcome.swollen_mb = max(outcome.swollen_mb, grown)
    if fault is None and grown > MEMORY_MB:
        fault = f"{grown:.0f} MB of memory"
    if fault is not None:
        outcome.faults.append(one_line(f"{title}: {fault}"))


def _ring(number: int, frame: FrameType | None) -> None:
    raise TooLong


def main(
    inputs: int = 20_000,
    only: tuple[str, ...] = tuple(READERS),
    first: int = 0,
    keep: Path | None = None,
    json_file: Path | None = Path(__file__).parent / "results" / "fuzz.json",
) -> int:
    """Fuzz every reader of foreign files.

    Args:
        inputs: How many, over all readers.
        only: The readers.
        first: Number of the first input of each reader.
        keep: Where to keep the inputs.
        json_file: Where the figures go.
    """
    signal.signal(signal.SIGALRM, _ring)
    # What is allocated without being touched counts too: a claimed size of 30 GB must not be asked for.
    used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * 1024**3, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    each = -(-inputs // len(only))
    rows = []
    print(f"{'':<12} {'inputs':>7} {'read':>7} {'refused':>8} {'faults':>7} {'median':>9} {'longest':>9} {'memory':>8}")
    for name in only:
        found = fuzz(name, range(first, first + each), keep)
        median, longest = statistics.median(found.seconds), max(found.seconds)
        rows.append(
            {
                "reader": name,
                "inputs": found.inputs,
                "read": found.read,
                "refused": found.refused,
                "faults": found.faults,
                "median_seconds": round(median, 5),
                "longest_seconds": round(longest, 3),
                "memory_mb": round(found.swollen_mb),
            }
        )
        print(
            f"{name:<12} {found.inputs:>7} {found.read:>7} {found.refused:>8} {len(found.faults):>7} "
            f"{median * 1e3:>6.1f} ms {longest * 1e3:>6.0f} ms {found.swollen_mb:>5.0f} MB",
            flush=True,
        )
        for fault in found.faults[:40]:
            print(f"  {fault}", flush=True)
    if json_file is not None:
        command = shlex.join(["python", "benchmarks/fuzz.py", *sys.argv[1:]])
        write_json(json_file, {"command": command, "machine": machine(), "readers": rows})
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    sys.exit(tyro.cli(main))
