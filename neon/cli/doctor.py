"""`neon doctor`: whether the installation works, which published files are there, and what fills each gap.

Nothing beyond the standard library is imported before it is known to import.
"""

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import neon
from neon.errors import RequestError, WorkError, one_line
from neon.runtime.files import check_writable, write_json
from neon.runtime.published_files import PublishedFile, published_files
from neon.runtime.run_folder import reading_state

PACKAGES = ("torch", "torchvision", "numpy", "diffusers")
OPTIONAL = {"diffusers": "pip install 'neon-extrapolation[imm]'"}
"""packages that only some programs need, and the command that installs them"""
LAUNCH_SECONDS = 120
"""after which processes that have not joined are given up"""
END_SECONDS = 35
"""torchrun gives its own processes 30 s to end"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What lies where a published file should."""

    file: PublishedFile
    state: Literal["found", "damaged", "missing"]
    path: str | None = None
    detail: str = ""
    """what is in it, or what is wrong with it"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How processes joined a process group and reduced a number."""

    backend: Literal["gloo", "nccl"]
    processes: int
    seconds: float
    error: str | None = None


@dataclass(kw_only=True)
class Diagnosis:
    """All that the doctor found. A fault is what keeps the installation from working; a gap is what is not there."""

    versions: dict[str, str | None]
    """None: not installed, or not importable"""
    devices: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    free_bytes: dict[str, int] = field(default_factory=dict)
    """by folder that files are fetched to, one for each disk"""
    gaps: list[str] = field(default_factory=list)
    """the command, or the advice, that fills each"""
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Tell whether the installation works, which published files are found, and what fills each gap.

    Imports what the programs need, lets processes join as under torchrun, and opens checkpoints, autoencoders,
    statistics and Inception where programs started here look for them. Missing files are no failure.

    Example: neon doctor --json doctor.json
    """

    json: Path | None = None
    """also write the findings to this file"""

    def __call__(self) -> int:
        """Examine and print; 0 if the installation works, whatever files are missing, else 1."""
        if self.json is not None:
            check_writable(self.json, overwrite=True)
        diagnosis = examine()
        print_diagnosis(diagnosis)
        if self.json is not None:
            write_json(self.json, {"works": not diagnosis.faults, **asdict(diagnosis)})
        return 1 if diagnosis.faults else 0


def examine() -> Diagnosis:
    """Import everything, launch processes, and open every published file that is there."""
    diagnosis = Diagnosis(versions={"neon": neon.__version__, "python": platform.python_version()})
    _import_packages(diagnosis)
    if diagnosis.versions["torch"] is None:  # without which nothing else can be told
        return diagnosis
    _import_architectures(diagnosis)
    _launch_on_devices(diagnosis)
    diagnosis.findings = [look_for(file) for file in published_files()]
    diagnosis.free_bytes = _free_bytes(diagnosis.findings)
    diagnosis.gaps += _commands(diagnosis.findings)
    return diagnosis


def _import_packages(diagnosis: Diagnosis) -> None:
    for name in PACKAGES:
        diagnosis.versions[name] = None
        try:
            diagnosis.versions[name] = importlib.import_module(name).__version__
        except Exception as error:  # a broken package can raise anything while it is imported
            if name in OPTIONAL and isinstance(error, ModuleNotFoundError) and error.name == name:
                diagnosis.gaps.append(f"{OPTIONAL[name]}  ({name} is not installed)")
            else:
                diagnosis.faults.append(f"import {name}: {type(error).__name__}: {one_line(error)}; install it again")


def _import_architectures(diagnosis: Diagnosis) -> None:
    from importlib.metadata import entry_points

    from neon.model import GROUP

    advice = "run `pip install -e .` in the checkout"
    architectures = entry_points(group=GROUP)
    if not architectures:
        diagnosis.faults.append(f"no architecture is installed; {advice}")
    for entry in architectures:
        try:
            entry.load()
        except Exception as error:  # as above
            diagnosis.faults.append(f"import {entry.value}: {type(error).__name__}: {one_line(error)}; {advice}")


def _launch_on_devices(diagnosis: Diagnosis) -> None:
    import torch

    from neon.runtime.threads import available_cpus

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    diagnosis.devices.append(f"{available_cpus()} CPUs")
    diagnosis.devices += [f"GPU {index}: {gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for index, gpu in enumerate(gpus)]
    diagnosis.launches += [launch("gloo", 2), *([launch("nccl", len(gpus))] if gpus else [])]
    failed = [each for each in diagnosis.launches if each.error is not None]
    diagnosis.faults += [f"{each.processes} processes with {each.backend}: {each.error}" for each in failed]


def _free_bytes(findings: Sequence[Finding]) -> dict[str, int]:
    """By folder that files are fetched to, one for each disk."""
    folders: dict[int, Path] = {}
    for finding in findings:
        parents = Path(finding.file.places[0]).absolute().parents
        folder = next(parent for parent in parents if parent.exists())
        folders.setdefault(folder.stat().st_dev, folder)
    return {str(folder): shutil.disk_usage(folder).free for folder in folders.values()}


def look_for(file: PublishedFile) -> Finding:
    """What lies in the first place of `file` that holds anything; headers are read, and nothing in it is executed."""
    for place in file.places:
        if Path(place).exists():
            try:
                return Finding(file=file, state="found", path=place, detail=_content(Path(place)))
            except (RequestError, WorkError, OSError) as error:
                return Finding(file=file, state="damaged", path=place, detail=str(error).removeprefix(f"{place}: "))
    begun = Path(f"{file.places[0]}.part").exists()
    return Finding(file=file, state="missing", detail="begun" if begun else "")


def _content(path: Path) -> str:
    from neon.checkpoint import open_checkpoint
    from neon.metrics import Statistics

    if path.suffix == ".npz":
        return f"{Statistics.load(path).dim} features"
    if path.suffix == ".json":
        with reading_state(path, "download it again"):
            return f"{len(json.loads(path.read_bytes()))} entries"
    with open_checkpoint(path) as checkpoint:
        weights = sum(spec.numel for spec in checkpoint.specs.values() if spec.dtype.is_floating_point)
    return f"{weights / 1e6:.1f} M weights"


def launch(backend: Literal["gloo", "nccl"], processes: int) -> Launch:
    """Start `processes` as torchrun does, let them reduce a number, and wait."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = time.perf_counter()
    child = subprocess.Popen(
        [*torchrun, "-m", "neon.cli.doctor", "cuda" if backend == "nccl" else "cpu"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    error = None
    try:
        output, _ = child.communicate(timeout=LAUNCH_SECONDS)
        if child.returncode:  # the first error of the processes tells more than torchrun's summary of it
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("neon doctor:") or "Error: " in line]
            error = (errors or lines or ["ended without a word"])[0][:300]
    except subprocess.TimeoutExpired:
        error = f"have not joined after {LAUNCH_SECONDS:g} s; does the name of this machine resolve to it?"
    finally:
        child.terminate()  # a signal that lets torchrun end its processes, which are not in its session
        try:
            child.communicate(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
    return Launch(backend=backend, processes=processes, seconds=time.perf_counter() - start, error=error)


def reduce_number(device: str) -> None:
    """What each launched process does: add its rank to those of the others.

    Raises:
        WorkError: the sum is wrong.
    """
    import torch

    from neon.runtime.distributed import processes

    with processes(device) as group:
        total = int(group.sum(torch.tensor([group.rank + 1], device=group.device)))
        expected = group.world_size * (group.world_size + 1) // 2
        if total != expected:
            raise WorkError(f"the ranks add up to {total} instead of {expected}; processes do not reach each other")


def _commands(findings: Sequence[Finding]) -> list[str]:
    """How to get what is not whole: a command for each architecture, or one for all if none has everything."""
    gaps = [finding.file for finding in findings if finding.state != "found"]
    unknown = [file for file in gaps if file.source.startswith("by:")]
    architectures = dict.fromkeys(name for finding in findings for name in finding.file.architectures)
    commands = []
    for base, flag in ((False, ""), (True, " --base")):
        lacking = [file for file in gaps if file not in unknown and (file.kind == "base") == base]
        needed = {f" --only {name}": [file for file in lacking if name in file.architectures] for name in architectures}
        for only, files in ({"": lacking} if all(needed.values()) else needed).items():
            if files:
                size = sum(file.megabytes or 0 for file in files) / 1000
                commands.append(f"neon download{only}{flag}  ({len(files)} files, about {size:.1f} GB)")
    if unknown:
        publishers = ", ".join(dict.fromkeys(file.source.removeprefix("by:") for file in unknown))
        names = ", ".join(file.name for file in unknown)
        commands.append(f"base models of {publishers}, of which no address is known here, by hand: {names}")
    return commands


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print it on about one screen."""
    versions = "  ".join(f"{name} {version or '-'}" for name, version in diagnosis.versions.items())
    print(f"versions   {versions}")
    print(f"devices    {', '.join(diagnosis.devices) or '-'}")
    for each in diagnosis.launches:
        outcome = "failed" if each.error else "joined and added up"
        print(f"processes  {each.processes} with {each.backend}: {outcome}, {each.seconds:.1f} s")
    for folder, free in diagnosis.free_bytes.items():
        print(f"disk       {free / 1e9:.1f} GB free in {folder}")
    groups: dict[str, list[Finding]] = {}
    for finding in diagnosis.findings:
        file = finding.file
        name = file.architectures[0] if len(file.architectures) == 1 else "shared"
        groups.setdefault(f"{name:<10} {file.kind:<11}", []).append(finding)
    for head, findings in groups.items():
        lines = [
            f"{each.path}  ({'DAMAGED: ' * (each.state == 'damaged')}{each.detail})" for each in findings if each.path
        ]
        missing = [f"{each.file.name}{each.detail and f' ({each.detail})'}" for each in findings if not each.path]
        lines += [f"missing: {', '.join(missing)}"] if missing else []
        print(head + f"\n{' ' * len(head)}".join(lines))
    for heading, lines in (("to fill the gaps:", diagnosis.gaps), ("faults:", diagnosis.faults)):
        if lines:
            print(heading, *lines, sep="\n  ")
    print("the installation works" if not diagnosis.faults else "the installation does not work")


if __name__ == "__main__":  # one of the processes of `launch`
    from neon.cli.command_line import exit_code

    sys.exit(exit_code("neon doctor", lambda: reduce_number(sys.argv[1])))
