"""What `neon doctor` finds: whether the installation works, which published files are there, and what fills each gap.

The files, and the places they may lie in, are those of download_models.sh, which is asked for its table. Nothing beyond
the standard library is imported before it is known to import.
"""

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import neon
from neon.cli.command_line import exit_code
from neon.errors import RequestError, WorkError
from neon.runtime.files import write_json

SCRIPT = Path(neon.__file__).parents[1] / "download_models.sh"
PACKAGES = ("torch", "torchvision", "numpy", "diffusers")
OPTIONAL = {"diffusers": "pip install 'neon[imm]'"}
"""packages that only some programs need, and the command that installs them"""
LAUNCH_SECONDS = 120
"""after which processes that have not joined are given up"""
END_SECONDS = 35
"""torchrun gives its own processes 30 s to end"""


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A row of the table of download_models.sh."""

    name: str
    architectures: Sequence[str]
    """that need it"""
    kind: str
    """neon (checkpoint), base, vae, statistics or inception"""
    megabytes: int | None
    """about; None: not known"""
    source: str
    """hf:REPOSITORY, a URL, or by:PUBLISHER where no address is known"""
    places: Sequence[str]
    """where programs look for it; it is fetched to the first"""


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


def examine() -> Diagnosis:
    """Import everything, launch processes, and open every published file that is there."""
    diagnosis = Diagnosis(versions={"neon": neon.__version__, "python": platform.python_version()})
    for name in PACKAGES:
        _import(name, diagnosis)
    if diagnosis.versions["torch"] is None:  # without which nothing else can be told
        return diagnosis
    _import_architectures(diagnosis)
    diagnosis.devices = _devices()
    diagnosis.launches = list(_launches())
    diagnosis.faults += [
        f"{launched.processes} processes with {launched.backend}: {launched.error}"
        for launched in diagnosis.launches
        if launched.error is not None
    ]
    try:
        files = published_files()
    except WorkError as error:
        diagnosis.gaps.append(str(error))
        return diagnosis
    diagnosis.findings = [look_for(file) for file in files]
    diagnosis.free_bytes = _free_bytes(files)
    diagnosis.gaps += _fetches(diagnosis.findings)
    return diagnosis


def published_files() -> list[PublishedFile]:
    """The table of download_models.sh, places relative to the working directory or absolute.

    Raises:
        WorkError: the script is not beside the package, or does not run.
    """
    if not SCRIPT.is_file():
        raise WorkError(f"{SCRIPT}: not there, so files are not looked for; run neon from a checkout of its repository")
    try:
        done = subprocess.run(["bash", str(SCRIPT), "--list"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise WorkError(f"{SCRIPT}: does not run, so files are not looked for ({error}); is bash installed?") from error
    files = []
    for line in done.stdout.splitlines():
        architectures, kind, megabytes, source, *places = line.split("\t")
        files.append(
            PublishedFile(
                name=Path(places[0]).name,
                architectures=architectures.split(","),
                kind=kind,
                megabytes=None if megabytes == "-" else int(megabytes),
                source=source,
                places=places,
            )
        )
    return files


def look_for(file: PublishedFile) -> Finding:
    """What lies in the first place of `file` that holds anything; headers are read, and nothing in it is executed."""
    for place in file.places:
        if Path(place).exists():
            try:
                return Finding(file=file, state="found", path=place, detail=_content(Path(place)))
            except (RequestError, WorkError) as error:
                return Finding(file=file, state="damaged", path=place, detail=str(error).removeprefix(f"{place}: "))
    part = Path(f"{file.places[0]}.part")
    return Finding(file=file, state="missing", detail="begun" if part.exists() else "")


def _content(path: Path) -> str:
    if path.suffix == ".json":
        try:
            return f"{len(json.loads(path.read_bytes()))} entries"
        except (ValueError, OSError) as error:
            raise RequestError(f"{path}: not readable as JSON ({error}); download it again") from error
    if path.suffix == ".npz":
        from neon.metrics import Statistics

        return f"{Statistics.load(path).dim} features"
    from neon.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        weights = sum(spec.numel for spec in checkpoint.specs.values() if spec.dtype.is_floating_point)
    return f"{weights / 1e6:.1f} M weights"


def _import(name: str, diagnosis: Diagnosis) -> None:
    """Note the version of a package; a gap or a fault if there is none."""
    diagnosis.versions[name] = None
    try:
        diagnosis.versions[name] = importlib.import_module(name).__version__
    except Exception as error:  # a broken package can raise anything while it is imported
        if name in OPTIONAL and isinstance(error, ModuleNotFoundError) and error.name == name:
            diagnosis.gaps.append(f"{OPTIONAL[name]}  ({name} is not installed)")
        else:
            diagnosis.faults.append(f"import {name}: {_one_line(error)}; install it again")


def _import_architectures(diagnosis: Diagnosis) -> None:
    from importlib.metadata import entry_points

    from neon.model import GROUP

    found = entry_points(group=GROUP)
    if not found:
        diagnosis.faults.append("no architecture is installed; run `pip install -e .` in the checkout")
    for entry in found:
        try:
            entry.load()
        except Exception as error:  # as above
            diagnosis.faults.append(f"import {entry.value}: {_one_line(error)}; run `pip install -e .` in the checkout")


def _devices() -> list[str]:
    import torch

    from neon.runtime.launch import available_cpus

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"{available_cpus()} CPUs",
        *(f"GPU {index}: {gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for index, gpu in enumerate(gpus)),
    ]


def _launches() -> Iterator[Launch]:
    """Two processes on the CPU, and one on every GPU if there are any."""
    import torch

    yield launch("gloo", 2)
    if torch.cuda.is_available():
        yield launch("nccl", torch.cuda.device_count())


def launch(backend: Literal["gloo", "nccl"], processes: int) -> Launch:
    """Start `processes` as torchrun does, let them reduce a number, and wait."""
    device = "cuda" if backend == "nccl" else "cpu"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = time.perf_counter()
    child = subprocess.Popen(
        [*torchrun, "-m", "neon.cli.doctor", device],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    error = None
    try:
        said, _ = child.communicate(timeout=LAUNCH_SECONDS)
        if child.returncode:
            error = _reason(said)
    except subprocess.TimeoutExpired:
        error = f"have not joined after {LAUNCH_SECONDS:g} s; does the name of this machine resolve to it?"
    finally:
        _end(child)
    return Launch(backend=backend, processes=processes, seconds=time.perf_counter() - start, error=error)


def _end(child: subprocess.Popen[str]) -> None:
    """End torchrun if it still runs: by a signal that lets it end its processes, which are not in its session."""
    child.terminate()
    try:
        child.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()


def _reason(said: str) -> str:
    """The line of failed processes that tells most: the first error of theirs, not torchrun's summary of it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("neon doctor:") or "Error: " in line]
    return (told or lines or ["ended without a word"])[0][:300]


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


def _free_bytes(files: Sequence[PublishedFile]) -> dict[str, int]:
    """Free space by folder, the first on each disk that files are fetched to."""
    free: dict[int, tuple[str, int]] = {}
    for file in files:
        place = Path(file.places[0]).absolute()
        folder = next(parent for parent in place.parents if parent.exists())
        free.setdefault(folder.stat().st_dev, (str(folder), shutil.disk_usage(folder).free))
    return dict(free.values())


def _fetches(findings: Sequence[Finding]) -> list[str]:
    """How to get what is not whole: a command for each architecture, or one for all if none has everything."""
    script = "download_models.sh" if Path.cwd() == SCRIPT.parent else str(SCRIPT)
    architectures = list(dict.fromkeys(name for finding in findings for name in finding.file.architectures))
    gaps = [finding for finding in findings if finding.state != "found"]
    unknown = [gap.file for gap in gaps if gap.file.source.startswith("by:")]
    commands = []
    for base, flag in ((False, ""), (True, " --base")):
        lacking = [item for item in gaps if item.file not in unknown and (item.file.kind == "base") == base]
        needed = {name: [item for item in lacking if name in item.file.architectures] for name in architectures}
        if all(needed.values()):
            needed = {"": lacking}
        for name, items in needed.items():
            size = sum(item.file.megabytes or 0 for item in items) / 1000
            if items:
                only = f" --only {name}" if name else ""
                commands.append(f"bash {script}{only}{flag}  ({len(items)} files, about {size:.1f} GB)")
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
    for launched in diagnosis.launches:
        outcome = "failed" if launched.error else "joined and added up"
        print(f"processes  {launched.processes} with {launched.backend}: {outcome}, {launched.seconds:.1f} s")
    for folder, free in diagnosis.free_bytes.items():
        print(f"disk       {free / 1e9:.1f} GB free in {folder}")
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in diagnosis.findings:
        groups.setdefault((",".join(finding.file.architectures), finding.file.kind), []).append(finding)
    for (architectures, kind), findings in groups.items():
        head = f"{architectures if ',' not in architectures else 'shared':<10} {kind:<11}"
        for finding in findings:
            if finding.state != "missing":
                mark = "" if finding.state == "found" else "DAMAGED: "
                print(f"{head}{finding.path}  ({mark}{finding.detail})")
                head = " " * len(head)
        missing = [
            f"{finding.file.name}{f' ({finding.detail})' if finding.detail else ''}"
            for finding in findings
            if finding.state == "missing"
        ]
        if missing:
            print(f"{head}missing: {', '.join(missing)}")
    for heading, lines in (("to fill the gaps:", diagnosis.gaps), ("faults:", diagnosis.faults)):
        if lines:
            print(heading)
            for line in lines:
                print(f"  {line}")
    print("the installation works" if not diagnosis.faults else "the installation does not work")


def doctor_command(output: Path | None) -> int:
    """Examine, print, write JSON to `output`; 0 if the installation works, whatever files are missing, else 1."""
    diagnosis = examine()
    print_diagnosis(diagnosis)
    if output is not None:
        facts: dict[str, Any] = asdict(diagnosis)
        write_json(output, {"works": not diagnosis.faults, **facts})
    return 1 if diagnosis.faults else 0


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":  # one of the processes of `launch`
    sys.exit(exit_code("neon doctor", lambda: reduce_number(sys.argv[1])))
