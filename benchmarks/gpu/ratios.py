"""What a choice is worth: two ways to do the same work, side by side in one run, and the ratio of their seconds.

`usual_s` is without the choice, `chosen_s` with it, `times_as_fast` the one over the other. Those that compile come
last, for they take longest.
"""

import io
import multiprocessing
import os
import socket
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gpu.networks import Subject, changed, subjects
from gpu.rows import Figures, LeftOutError, Rows
from gpu.timing import sample, timed
from gpu.train import run_of
from neon.cli.app import main
from neon.data.images import write_images, write_labels
from neon.demo.assets import BASE, real_images
from neon.lora.settings import LoRA
from neon.model import GenerativeModel, load_model, open_autoencoder
from neon.nn.transformer import BlockCausal
from neon.precision import FP32, TF32
from neon.runtime import compiling
from neon.runtime.background import Background
from neon.runtime.files import read_json_lines
from neon.selftrain import LOG_FILE, TrainingRun

REPEATS = 5
ATTENTION = {
    "VAR d16": (96, 16, [side**2 for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]),
    "xAR-B": (32, 12, [64] * 4),
}
"""images, heads and the sizes of the groups, as trained"""
DECODED = 64


def measure(rows: Rows) -> None:
    """A row for each choice."""
    known = {name: subject for name, subject in subjects(rows.tiny).items() if subject.training_batch}
    of_edm = next(subject for name, subject in known.items() if "edm" in name)
    of_imm = next(subject for name, subject in known.items() if "imm" in name)
    of_var = next(subject for name, subject in known.items() if "var" in name.lower())
    for name, shape in ATTENTION.items():
        rows.add(f"attention in pieces {name}", lambda s=shape: _attention(rows, *s))  # type: ignore[misc]
    rows.add("tf32 training edm", lambda: _tf32(rows, of_edm))
    rows.add("channels last training edm", lambda: _channels_last(rows, of_edm))
    rows.add("channels last decoder imm", lambda: _decoder(rows, of_imm, _innermost))
    rows.add("decoder at once imm", lambda: _decoder(rows, of_imm, lambda model: nullcontext()))
    rows.add("state in the background VAR", lambda: _state(rows, of_var))
    rows.add("lora training VAR", lambda: _lora(rows, of_var))
    rows.add("diffusers", lambda: _diffusers(rows))
    rows.add("workers", lambda: _workers(rows))
    for engine in ("ddp", "fsdp"):
        rows.add(f"parallel {engine}", lambda e=engine: _command(rows, "--parallel", ["ordered"], [e]))  # type: ignore[misc]
    rows.add("graphs edm", lambda: _graphs(rows, of_edm))
    for name, subject in known.items():
        rows.add(f"compiled training {name}", lambda s=subject: _compiled(rows, s))  # type: ignore[misc]


def _ratio(usual: float, chosen: float, **others: Any) -> Figures:
    return {"usual_s": usual, "chosen_s": chosen, "times_as_fast": usual / chosen, **others}


def _side_by_side(usual: Callable[[], object], chosen: Callable[[], object], rows: Rows) -> tuple[float, float]:
    """Median seconds of both, in turn, after one call of each."""
    ways = usual, chosen
    seconds: tuple[list[float], list[float]] = [], []
    for way in ways:
        way()
    for _ in range(1 if rows.tiny else REPEATS):
        for way, found in zip(ways, seconds, strict=True):
            found.append(timed(way, rows.device))
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _steps(run: TrainingRun, rows: Rows) -> tuple[float, float]:
    """Seconds of the first step, and the median of later ones."""
    first = timed(run.one_step, rows.device)
    return first, statistics.median(timed(run.one_step, rows.device) for _ in range(1 if rows.tiny else REPEATS))


def _attention(rows: Rows, batch: int, heads: int, sizes: list[int]) -> Figures:
    """Forward and backward of one layer."""
    if rows.tiny:
        batch, heads = 1, 2
    dtype = torch.bfloat16 if rows.device.type == "cpu" else torch.float16
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    mask = torch.zeros(len(groups), len(groups)).masked_fill(groups[:, None] < groups, -torch.inf)
    seen = BlockCausal(mask[None, None].to(rows.device), tuple(torch.tensor(sizes).cumsum(0).tolist()))
    inputs = [
        torch.randn(batch, heads, len(groups), 64, device=rows.device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]

    def both_ways(split: bool) -> None:
        seen.attend(*inputs, split=split).sum().backward()

    return _ratio(*_side_by_side(lambda: both_ways(False), lambda: both_ways(True), rows), batch=batch)


def _tf32(rows: Rows, subject: Subject) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(subject.on(rows.device, FP32), subject.training_batch, Path(folder), rows.device)

        def step(precision: Any) -> None:
            run.model.precision = precision
            run.one_step()

        return _ratio(*_side_by_side(lambda: step(FP32), lambda: step(TF32), rows))


def _innermost(model: GenerativeModel) -> AbstractContextManager[object]:
    """The decoder with channels innermost in memory, within the block."""
    decoder: Any = model.codec.vae.decoder  # type: ignore[union-attr]
    decoder.to(memory_format=torch.channels_last)

    class Within(nullcontext[None]):
        def __exit__(self, *_: object) -> None:
            decoder.to(memory_format=torch.contiguous_format)

    return Within()


def _channels_last(rows: Rows, subject: Subject) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        model = subject.on(rows.device, subject.training_precision)
        run = run_of(model, subject.training_batch, Path(folder), rows.device)
        _, usual = _steps(run, rows)
        model.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch documents it
        return _ratio(usual, _steps(run, rows)[1])


def _decoder(
    rows: Rows, subject: Subject, choice: Callable[[GenerativeModel], AbstractContextManager[object]]
) -> Figures:
    """Decoding a batch with a `choice` about the decoder; or 8 images at once, and as many as usual."""
    model: Any = subject.on(rows.device, FP32)
    side, count = model.network.img_resolution, 9 if rows.tiny else DECODED
    latents = torch.randn(count, model.network.img_channels, side, side, device=rows.device)

    def chosen() -> None:
        with torch.no_grad(), choice(model):
            model.codec.decode(latents)

    def usual() -> None:
        eight = mock.patch("imm.vae.decoded_at_once", lambda side, device: 8)
        with torch.no_grad(), nullcontext() if choice is _innermost else eight:
            model.codec.decode(latents)

    return _ratio(*_side_by_side(usual, chosen, rows), batch=count)


def _state(rows: Rows, subject: Subject) -> Figures:
    """How long training waits for its state to be saved; `written_s` is until it is on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        model = subject.on(rows.device, subject.training_precision)
        run = run_of(model, model.batch_multiple, Path(folder), rows.device)
        run.one_step()
        usual = timed(run.save_state, rows.device)
        with Background(threads=1, ahead=1) as saving:
            chosen = timed(lambda: run.save_state(saving), rows.device)
            written = chosen + timed(saving.wait, rows.device)
    return _ratio(usual, chosen, written_s=written)


def _lora(rows: Rows, subject: Subject) -> Figures:
    """A step of factors of rank 16 against one of all weights."""
    seconds, memory = [], []
    for lora in (None, LoRA(rank=16, alpha=16.0, targets=("attn.mat_qkv", "attn.proj"))):
        if rows.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(rows.device)
        with tempfile.TemporaryDirectory() as folder:
            model = subject.on(rows.device, subject.training_precision)
            seconds.append(_steps(run_of(model, subject.training_batch, Path(folder), rows.device, lora=lora), rows)[1])
        if rows.device.type == "cuda":
            memory.append(torch.cuda.max_memory_allocated(rows.device) / 2**30)
        del model
    return _ratio(*seconds, **({"usual_gib": memory[0], "peak_gib": memory[1]} if memory else {}))


def _diffusers(rows: Rows) -> Figures:
    """A tiny pipeline of prompts samples, and is self-trained by LoRA: that it works, no more."""
    from tests import pipelines

    with tempfile.TemporaryDirectory() as folder:
        with torch.random.fork_rng():
            place = pipelines.stable(Path(folder) / "pipeline")
        model = load_model(place, device=rows.device, for_training=True)
        open_autoencoder(model, None)
        model.use_prompts(["a dog", "a cat"])
        images = sample(model, 4, changed(model, {"num_steps": 2}), rows.device)
        lora = LoRA(rank=2, alpha=2.0, targets=model.lora_targets)
        run = run_of(model, 4, Path(folder), rows.device, lora=lora)
        _, step = _steps(run, rows)
    return {"images_per_s": 4 / images.total, "step_s": step, "precision": model.precision.name}


def _workers(rows: Rows) -> Figures:
    """Images read ahead by four processes."""
    if multiprocessing.current_process().daemon:
        raise LeftOutError("this process may start none")
    return _command(rows, "--workers", ["0"], ["4"])


def _command(rows: Rows, flag: str, usual: list[str], chosen: list[str]) -> Figures:
    """Steps of `neon selftrain` of the demo's base on a folder of PNGs, as the flag says."""
    batch, steps = (4, 3) if rows.tiny else (256, 30)
    images = real_images()[: 4 * batch]
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/images", range(len(images)), images)
        write_labels(f"{folder}/images", [index % 10 for index in range(len(images))], len(images))
        common = ["selftrain", "--network", str(BASE), "--data", f"{folder}/images", "--device", rows.device.type]
        common += ["--batch", str(batch), "--total_images", str(steps * batch), flag]
        found = []
        for words in (usual, chosen):
            out = Path(folder) / "-".join(words)
            found.append(_step_of_command([*common, *words, "--outdir", str(out)], out, alone=flag != "--parallel"))
    return _ratio(*found)


def _step_of_command(words: list[str], folder: Path, *, alone: bool) -> float:
    """The median seconds of its steps; unless `alone` it is one process of a group of one."""
    environment = {} if alone else _group_of_one()
    with mock.patch.dict(os.environ, environment), redirect_stdout(io.StringIO()):
        if code := main(words):
            raise RuntimeError(f"neon {' '.join(words)}: ended with {code}")
    times = [row["seconds"] for row in read_json_lines(folder / LOG_FILE)]
    return statistics.median(later - before for before, later in pairwise(times))


def _group_of_one() -> Mapping[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _graphs(rows: Rows, subject: Subject) -> Figures:
    """Sampling few images, compiled, without CUDA graphs and with them."""
    batch, seconds = 8, []
    for part in (lambda parts, repeated: compiling.compile_parts(parts), compiling.compile_parts):
        model = subject.on(rows.device, subject.training_precision)
        settings = changed(model, subject.short if rows.tiny else {})
        with mock.patch("neon.model.compile_parts", part):
            model.compile_parts()
        sample(model, batch, settings, rows.device)
        sample(model, batch, settings, rows.device)
        times = [sample(model, batch, settings, rows.device).total for _ in range(1 if rows.tiny else REPEATS)]
        seconds.append(statistics.median(times))
    return _ratio(*seconds, batch=batch)


def _compiled(rows: Rows, subject: Subject) -> Figures:
    """A step at the published batch before and after compilation; `compilation_s` is what the first one took longer."""
    with tempfile.TemporaryDirectory() as folder:
        model = subject.on(rows.device, subject.training_precision)
        run = run_of(model, subject.training_batch, Path(folder), rows.device)
        _, usual = _steps(run, rows)
        model.compile_training()
        first, chosen = _steps(run, rows)
    return _ratio(usual, chosen, compilation_s=first - chosen, batch=subject.training_batch)
