"""Whether the device computes what the CPU does: recorded cases, merging, scores, batches, a killed run."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import torch

from gpu.drift import SETTINGS
from gpu.networks import changed, trained
from gpu.rows import Figures, Rows
from neon.checkpoint import load_state
from neon.data.images import pack_set, write_images, write_labels
from neon.demo.assets import BASE, real_images
from neon.merge import LiveMerge, merge_tensor
from neon.metrics import FrechetReference, Moments, Statistics
from neon.runtime.distributed import Processes
from neon.sampling import sample_block
from neon.selftrain import STATE_FILE

ROOT = Path(__file__).parent.parent.parent
RESUMED = 5.0
"""how far a killed and continued run may end from one that was not, as a multiple of how far two that were not end from
each other: sums on a GPU have no fixed order, and Adam turns a rounding of a small gradient into a step"""
MERGED = 1.0
"""units in the last place by which a merge may differ: one rounding, where the device fuses a multiplication"""
DISTANCE = 1e-8
"""of Frechet distances, relative: features are added up in float64, in another order"""
LEVELS = 1
"""grey levels by which an image may depend on the batch it is computed in: a value that lies on a rounding"""


class DiffersError(Exception):
    """The device computes something else than it should; says what."""


def measure(rows: Rows) -> None:
    """Rows of every kind, the recorded cases first."""
    rows.add("goldens", lambda: _goldens(rows))
    rows.add("merge", lambda: _merge(rows.device))
    rows.add("frechet", lambda: _frechet(rows))
    for architecture in SETTINGS:
        rows.add(f"batches {architecture}", lambda name=architecture: _batches(rows, name))  # type: ignore[misc]
    rows.add("collectives", lambda: _collectives(rows.device))
    rows.add("resume", lambda: _resume(rows))


def _environment(**changes: str) -> dict[str, str]:
    """This process's, in which the checkout comes before whatever else is on the path of modules."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **changes}


def _goldens(rows: Rows) -> Figures:
    """The recorded cases of the sample, in float32 without TF32; tolerances are those of the CPU, times a factor."""
    from tests.goldens import DEVICE_TOLERANCE, GPU_SAMPLE, TINY_SAMPLE

    sample = TINY_SAMPLE if rows.tiny else GPU_SAMPLE
    ids = [f"tests/test_golden_{name}.py::test_golden[{case}]" for name, cases in sample.items() for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
        environment = _environment(NEON_GOLDEN_DEVICE=rows.device.type)
        ran = subprocess.run(
            [*command, f"--junitxml={report}", *ids], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if not report.exists():
            raise RuntimeError(f"pytest ran no case: {' '.join((ran.stdout + ran.stderr).split())[-300:]}")
        found = [_Case(element) for element in ET.parse(report).getroot().iter("testcase")]
    failed = {case.name: case.failure for case in found if case.failure}
    used = {case.name: case.tolerance_used for case in found if case.tolerance_used is not None}
    factor = 1.0 if rows.device.type == "cpu" else DEVICE_TOLERANCE
    if failed or len(found) < len(ids):
        told = "; ".join(f"{name}: {failure}" for name, failure in failed.items())
        raise DiffersError(
            f"{len(found) - len(failed)} of {len(ids)} cases hold at {factor:g} times the tolerance; {told}"
        )
    worst = max(used, key=used.__getitem__, default="")
    return {"cases": len(found), "tolerance_factor": factor, "tolerance_used": used.get(worst, 0.0), "note": worst}


class _Case:
    """What pytest says of one recorded case."""

    def __init__(self, element: ET.Element) -> None:
        module = element.get("classname", "").rpartition("test_golden_")[2]
        self.name = f"{module} {element.get('name', '').removeprefix('test_golden[').removesuffix(']')}".strip()
        problems = [part for kind in ("failure", "error", "skipped") for part in element.iter(kind)]
        self.failure = _told(problems[0]) if problems else ""
        properties = {p.get("name"): p.get("value") for p in element.iter("property")}
        self.tolerance_used = float(properties["tolerance_used"] or 0) if "tolerance_used" in properties else None


def _told(problem: ET.Element) -> str:
    """The last error that pytest shows of a case, in one line."""
    lines = [line.removeprefix("E").strip() for line in (problem.text or "").splitlines() if line.startswith("E ")]
    return (lines[-1] if lines else " ".join((problem.get("message") or "").split()))[:160]


def _merge(device: torch.device) -> Figures:
    """A live network on the device against tensors merged on the CPU, in units of the last place."""
    base = load_state(BASE)
    moved = {name: t + 0.01 * torch.ones_like(t).cumsum(-1) if t.is_floating_point() else t for name, t in base.items()}
    network = trained("edm", device).network
    live, w = LiveMerge(network, base, moved), 0.75
    live.set(w)
    worst = 0.0
    for name, weights in network.named_parameters():
        expected = merge_tensor(base[name], moved[name], w)
        ulp = torch.nextafter(expected.abs(), torch.tensor(torch.inf)) - expected.abs()
        worst = max(worst, ((weights.cpu() - expected).abs() / ulp).max().item())
    if worst > MERGED:
        raise DiffersError(f"merged weights differ by {worst:g} units in the last place; at most {MERGED:g} allowed")
    live.set(0.0)
    if any(not torch.equal(tensor.cpu(), base[name]) for name, tensor in network.state_dict().items()):
        raise DiffersError("w = 0 does not give the base back")
    return {"units_in_last_place": worst}


def _frechet(rows: Rows) -> Figures:
    """The distance of features that were added up on the device, against the CPU's."""
    generator = torch.Generator().manual_seed(0)
    width = 64 if rows.tiny else 2048
    real, generated = (torch.randn(2 * width, width, generator=generator) * scale for scale in (1.0, 1.1))

    def distance(device: torch.device) -> float:
        sides = []
        for features in (real, generated):
            moments = Moments(width, device=device)
            for block in features.to(device).split(100):
                moments.update(block)
            sides.append(Statistics.from_moments(moments))
        return FrechetReference(sides[0]).distance(sides[1])

    found, expected = distance(rows.device), distance(torch.device("cpu"))
    off = abs(found - expected) / expected
    if off > DISTANCE:
        raise DiffersError(f"distance {found!r} and not {expected!r}, off by {off:.1e}; at most {DISTANCE:.0e} allowed")
    return {"features": width, "relative_difference": off}


def _batches(rows: Rows, architecture: str) -> Figures:
    """Images of one batch against the same images of batches half the size."""
    model, device = trained(architecture, rows.device), rows.device
    count = 4 if rows.tiny else 32
    settings = changed(model, SETTINGS[architecture])

    def images(batch: int) -> torch.Tensor:
        parts = [range(first, first + batch) for first in range(0, count, batch)]
        group = Processes(device=device)
        return torch.cat([sample_block(model, part, range(count), settings, group)[0].cpu() for part in parts])

    levels = (images(count).int() - images(count // 2).int()).abs()
    moved = (levels.flatten(1).amax(1) > LEVELS).sum().item()
    allowed = 1 if architecture == "VAR" else 0  # a token on the edge of two flips with a rounding
    if moved > allowed:
        raise DiffersError(f"{moved} of {count} images depend on their batch by more than {LEVELS} of 255")
    return {"images": count, "largest": int(levels.max()), "moved_images": moved}


def _collectives(device: torch.device) -> Figures:
    """One rank of torchrun: NCCL on a GPU, gloo on a CPU."""
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
         str(Path(__file__).parent / "collectives.py"), device.type],
        env=_environment(OMP_NUM_THREADS="1"), capture_output=True, text=True,
    )  # fmt: skip
    if ran.returncode:
        raise DiffersError(" ".join((ran.stderr or ran.stdout).split())[-300:])
    return {"note": ran.stdout.strip().splitlines()[-1]}


def _resume(rows: Rows) -> Figures:
    """A self-training by the program, killed after its state was saved and continued, against one or two left alone."""
    steps = 12 if rows.tiny else 60
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_images(folder / "images.zip")
        command = [
            sys.executable, str(ROOT / "edm" / "finetune.py"), "--transfer", str(BASE), "--data",
            str(folder / "images.zip"), "--augment", "0", "--batch", "64", "--batch_gpu", "32", "--lr", "1e-4",
            "--lr_rampup", "0", "--ema", "0", "--duration", str(64 * steps / 1e6), "--state_every", "0.01",
            "--device", rows.device.type,
        ]  # fmt: skip
        _run([*command, "--outdir", str(folder / "whole")])
        if rows.device.type != "cpu":
            _run([*command, "--outdir", str(folder / "again")])
        _kill_when(folder / "killed" / STATE_FILE, [*command, "--outdir", str(folder / "killed")])
        reached = len((folder / "killed" / "training.jsonl").read_text().splitlines())
        _run([*command, "--outdir", str(folder / "killed")])
        ends = {run.name: _last(run) for run in folder.iterdir() if run.is_dir()}
    base = load_state(BASE)

    def apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
        return _norm({name: one[name] - other[name] for name in base if base[name].is_floating_point()})

    moved, whole = apart(ends["whole"], base), ends["whole"]
    found, without = apart(ends["killed"], whole) / moved, apart(ends.get("again", whole), whole) / moved
    if found > RESUMED * without:
        raise DiffersError(
            f"killed at step {reached} of {steps}, ended {found:.1e} of the way apart; {without:.1e} if left alone, "
            f"{RESUMED:g} times that allowed"
        )
    return {"killed_at_step": reached, "of": steps, "apart": found, "apart_if_left_alone": without}


def _write_images(path: Path) -> None:
    images = real_images()[:256]
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, range(len(images)), images)
        write_labels(folder, [i % 10 for i in range(len(images))], len(images))
        pack_set(folder, path)


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, env=_environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(" ".join(ran.stderr.split())[-300:])


def _kill_when(file: Path, command: list[str], limit: float = 120.0) -> None:
    """Start `command` and kill it when `file` is there."""
    process = subprocess.Popen(
        command, env=_environment(OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + limit
    try:
        while not file.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not file.exists():
        raise RuntimeError(f"no {file.name} within {limit:g} s")


def _last(folder: Path) -> Mapping[str, torch.Tensor]:
    return load_state(max(folder.glob("snapshot-*.safetensors")))


def _norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5
