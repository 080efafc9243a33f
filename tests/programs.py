"""What the tests of every architecture's programs share: files to work on, kills, refusals, and several processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest
import torch

from neon import selftrain
from neon.cli.command_line import run_program
from neon.data.images import ArrayDataset, ImageDataset, write_images, write_labels
from neon.evaluate import features as rows
from neon.evaluate import run as evaluation
from neon.metrics import Statistics
from neon.metrics.features import features_of
from neon.metrics.small import SmallFeatures
from neon.model import save_model
from neon.runtime.distributed import processes
from tests.tiny import tiny_edm, tiny_images
from tests.workers import Workers, environment_of, free_port

ROOT = Path(__file__).parent.parent


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


def dies_after(calls: int, owner: object, name: str) -> AbstractContextManager[object]:
    """A context in which the process dies at the call of `owner.name` after the first `calls`."""
    function, left = getattr(owner, name), calls

    def count(*args: object, **kwargs: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return function(*args, **kwargs)

    return mock.patch.object(owner, name, count)


def write_real(folder: Path, real: ArrayDataset) -> None:
    """Write `real` images of three classes, a feature network for them, and their statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = SmallFeatures("tiny6", real.image_shape, dim=6, num_classes=3).eval().requires_grad_(False)
    features.save(folder / "features.safetensors")
    Statistics.from_features(features_of(features, real.images)).save(folder / "real.npz")
    assert real.labels is not None
    write_images(folder / "real", range(len(real)), real.images)
    write_labels(folder / "real", real.labels.tolist(), len(real))


def write_pair(folder: Path) -> None:
    """Write a tiny base, weights some way from it, a network they do not fit, and real images with their statistics."""
    base, away = tiny_edm(0), tiny_edm(1).network.state_dict()
    save_model(folder / "base.safetensors", base)
    weights = base.network.state_dict()
    moved = {key: tensor + 0.05 * (away[key] - tensor) for key, tensor in weights.items()}
    save_model(folder / "tuned.safetensors", base, moved)
    save_model(folder / "wide.safetensors", tiny_edm(0, model_channels=16))
    write_real(folder, tiny_images(60))
    Statistics.from_features(torch.rand(20, 7)).save(folder / "seven.npz")


def link(files: Path, folder: Path) -> None:
    """Put links to all `files` into `folder`."""
    for file in files.iterdir():
        (folder / file.name).symlink_to(file)


def work_in(folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`folder`, with `files` in it, as the working directory."""
    link(files, folder)
    monkeypatch.chdir(folder)
    return folder


def images(path: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All images of a set, and their classes."""
    dataset = ImageDataset(path)
    return dataset.load(range(len(dataset)))


def log(run: str | Path) -> list[dict]:
    """What a training run logged, step by step."""
    return [json.loads(line) for line in Path(run, "training.jsonl").read_text().splitlines()]


def losses(run: str | Path) -> list[float]:
    """The losses of a training run, step by step."""
    return [entry["loss"] for entry in log(run)]


def evaluation_goes_on(scores: Callable[[str], dict], flags: str) -> None:
    """Assert that an evaluation of five blocks that is killed after three goes on to the score of a whole one."""
    whole = scores(flags)["fd_tiny6"]
    with mock.patch.object(evaluation, "SAVE_EVERY_SECONDS", 0.0):
        with dies_after(3, rows, "sample_block"), pytest.raises(Killed):
            scores(flags)
        with dies_after(2, rows, "sample_block"):
            assert scores(flags)["fd_tiny6"] == whole


def both_at_inference(
    sample: Callable[[str], int], scores: Callable[[str], dict], flags: str, base: str, self_trained: str
) -> None:
    """Assert that `--sims` 0 and -1 are either network alone, for images and for scores, and another g is neither.

    `flags` name the network last. Images may differ by rounding.
    """
    values: dict[object, float] = {
        network: scores(f"{flags} {network}")["fd_tiny6"] for network in (base, self_trained)
    }
    sweep = scores(f"{flags} {base} --self_trained {self_trained} --sims 0 -1 0.5")
    values |= {entry["sims"]: entry["fd_tiny6"] for entry in sweep["sweep"]}
    assert sweep["sims"] == min(sweep["sweep"], key=lambda entry: entry["fd_tiny6"])["sims"]
    assert sweep["combination"].startswith("SIMS") and "w" not in sweep
    for g, network in ((0, base), (-1, self_trained)):
        assert values[g] == pytest.approx(values[network], rel=1e-3) != values[0.5]
        assert sample(f"--outdir alone{g} {flags} {network}") == 0
        assert sample(f"--outdir both{g} {flags} {base} --self_trained {self_trained} --sims {g}") == 0
        assert (images(f"both{g}")[0].int() - images(f"alone{g}")[0].int()).abs().max() <= 1
    assert sample(f"--outdir both {flags} {base} --self_trained {self_trained} --sims 0.5") == 0
    assert not torch.equal(images("both")[0], images("both0")[0])


def training_goes_on(finetune: Callable[[str], int], flags: str, *, killed_after: int = 5) -> list[str]:
    """Assert that a run killed after some steps goes on to the snapshots of a whole one, and return their names.

    The runs lie in folders `whole` and `killed`; `flags` end with the one that names a folder.
    """
    assert finetune(f"{flags} whole") == 0
    with dies_after(killed_after, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        finetune(f"{flags} killed")
    assert finetune(f"{flags} killed") == 0
    same_files(Path("whole"), Path("killed"), "snapshot*")
    return sorted(path.name for path in Path("whole").glob("snapshot*"))


def refused(status: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that a program ended as on a wrong request, with `message`, and left no image or snapshot in `folder`."""
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(folder.rglob("out/*.png")) and not list(folder.rglob("*snapshot*"))


def torchrun(world_size: int, command: str, folder: Path, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    """Run a command under torchrun in `folder`, in processes of one thread each which import from `path`."""
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={world_size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*launcher, *command.split()], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )


def run_as_typed(command: str, folder: Path, path: str) -> None:
    """Run a published command as `torchrun` does in one process, and assert that it ends with a score."""
    environment = {**os.environ, **environment_of(0, 1, free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    line = [sys.executable, *command.split()]
    ends_with_score(subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=200))


def ends_with_score(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that a program of scores did its work."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("FD_tiny6=")


def drive(commands: Iterable[tuple[type, str]], usual: str) -> None:
    """Run programs with their flags and the `usual` ones, one after the other in one process group, until one fails."""
    torch.set_num_threads(1)
    with processes("cpu"):
        for program, flags in commands:
            if status := run_program(program, [*flags.split(), *usual.split(), "--device", "cpu"]):
                sys.exit(status)


def in_worlds(driver: str, files: Path, tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> dict[int, Path]:
    """What a driver leaves behind beside `files` with 1, 2 and 3 processes; `stderr` holds what it said."""
    outputs = {}
    for world_size in (1, 2, 3):
        out = outputs[world_size] = tmp_path_factory.mktemp(f"world{world_size}")
        link(files, out)
        workers.run(f"tests.{driver}:main", folder=out, world_size=world_size)
    return outputs


def same_files(one: Path, many: Path, *patterns: str) -> None:
    """Assert that both folders hold files of the same names and bytes for each of `patterns`, at least one each."""
    for pattern in patterns:
        names = sorted(path.relative_to(one) for path in one.glob(pattern))
        assert names and names == sorted(path.relative_to(many) for path in many.glob(pattern)), pattern
        for name in names:
            assert (one / name).read_bytes() == (many / name).read_bytes(), name


def same_scores(one: Path, many: Path, *names: str) -> None:
    """Assert that both scores.json hold the same of 20 images, up to rounding."""
    a, b = (json.loads((out / "scores.json").read_text()) for out in (one, many))
    assert a["num_images"] == b["num_images"] == 20
    for name in ("fd_tiny6", *names):
        assert a[name] == pytest.approx(b[name], rel=1e-9, abs=0)
