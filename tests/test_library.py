"""Neon from Python gives the images, weights and scores of the commands, and leaves alone what it is given."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import neon
from neon import sampling
from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.data.images import ImageDataset, write_images, write_labels
from neon.data.sampler import sampler_record
from neon.demo.assets import BASE, FEATURES, TEST_STATISTICS, real_images
from neon.library.generator import _FLAG, Generator, in_python
from neon.merge import merge_files
from neon.metrics.small import SmallFeatures
from neon.model import save_model
from neon.runtime.distributed import Processes, processes
from neon.runtime.files import sha256_file
from neon.settings import settings_json, with_settings
from tests.programs import ROOT, Killed, dies_after
from tests.test_flags_in_messages import OTHERS_FLAGS, flags_in_messages
from tests.test_own_model import run
from tests.tiny import tiny_edm, tiny_tokenizer, tiny_var
from tests.workers import Workers

EULER: dict[str, Any] = {"solver": "euler", "num_steps": 2}
TRAINING: dict[str, Any] = {"total_images": 64, "batch": 32, "lr": 1e-4, "lr_rampup": 0, "ema": 0, "seed": 1}
SCORING: dict[str, Any] = {"features": FEATURES, "num_images": 80, "batch_size": 32}
COMMANDS = f"""
neon sample --network {BASE} --num_images 40 --seed 3 --batch_size 16 --outdir sampled --num_steps 2 --set solver=euler
neon selftrain --network {BASE} --data sampled --outdir trained --total_images 64 --batch 32 --lr 1e-4 --lr_rampup 0
    --ema 0 --seed 1
neon merge --base {BASE} --self-trained trained/snapshot-000000.064-kimg.safetensors -w 0.75 --output merged.safetensors
neon evaluate --network merged.safetensors --ref {TEST_STATISTICS} --features {FEATURES} --num_images 80 --batch_size 32
    --num_steps 2 --set solver=euler --precision_recall real --json scores.json
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands leave, and some real images."""
    path = tmp_path_factory.mktemp("commands")
    write_images(path / "real", range(70), real_images()[:70])
    write_labels(path / "real", None, 70)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for command in COMMANDS.replace("\n    ", " ").strip().splitlines():
            assert run(command) == 0, command
    return path


@pytest.fixture
def base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Generator:
    """The demo's base at two Euler steps, in the folder of the commands."""
    monkeypatch.chdir(folder)
    return neon.load(BASE, device="cpu").with_settings(**EULER)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator:
    """An untrained EDM of three classes, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    save_model("tiny.safetensors", tiny_edm(0))
    return neon.load("tiny.safetensors", device="cpu").with_settings(num_steps=2)


def weights(generator: Generator) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in generator.model.network.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def test_importing_neon_is_quick_and_tells_what_there_is() -> None:
    program = (
        "import sys, time; start = time.perf_counter(); import neon; took = time.perf_counter() - start;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules;"
        "assert took < 0.2, took; print(*dir(neon)); assert neon.load.__doc__ and 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == neon.__all__
    assert {"Generator", "load", "sample_set", "self_train", "extrapolate", "score"} <= set(neon.__all__)
    with pytest.raises(AttributeError, match="no attribute 'improved'"):
        _ = neon.improved  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", neon.__all__)
def test_no_public_name_is_that_of_a_module(name: str) -> None:
    """A module that is imported later would take its place."""
    assert getattr(neon, name) is not None
    assert importlib.util.find_spec(f"neon.{name}") is None


def test_images_are_those_that_the_command_writes(base: Generator) -> None:
    images = base.sample(40, seed=3, batch_size=16)
    assert (images.dtype, images.shape, images.device.type) == (torch.uint8, (40, 1, 14, 14), "cpu")
    assert torch.equal(images, ImageDataset("sampled").examples(range(40)))
    assert not torch.equal(images, base.sample(40, seed=4, batch_size=16))
    assert torch.equal(images, neon.load(BASE, device="cpu").sample(40, seed=3, batch_size=16, **EULER))


def test_a_set_is_that_of_the_command(base: Generator, capfd: pytest.CaptureFixture[str]) -> None:
    assert neon.sample_set(base, 40, "set", seed=3, batch_size=16) == Path("set")
    ours, theirs = files_of("set"), files_of("sampled")
    assert json.loads(ours.pop("run.json")) == json.loads(theirs.pop("run.json"))
    assert ours == theirs and json.loads(ours["dataset.json"])["sampler"]["settings"]["num_steps"] == 2
    neon.sample_set(base, 40, "sampled", seed=3, batch_size=16)  # goes on with what the command has begun
    assert "sampling" in capfd.readouterr().err  # the bar of the first


def test_a_set_that_was_killed_is_completed_and_may_be_a_zip(tiny: Generator) -> None:
    with pytest.raises(Killed), dies_after(2, sampling, "write_images"):
        neon.sample_set(tiny, 12, "set.zip", batch_size=4, num_steps=3, label=1)
    assert not Path("set.zip").exists() and Path("set.zip.unfinished").exists()
    neon.sample_set(tiny, 12, "set.zip", batch_size=4, num_steps=3, label=1)
    made = ImageDataset("set.zip")
    assert torch.equal(made.examples(range(12)), tiny.sample(12, label=1, batch_size=4, num_steps=3))
    assert made.labels is not None and made.labels.tolist() == [1] * 12
    with pytest.raises(neon.RequestError, match="already exists; choose another name or pass fresh=True"):
        neon.sample_set(tiny, 12, "set.zip", batch_size=4, num_steps=3, label=2)
    neon.sample_set(tiny, 12, "set.zip", batch_size=4, num_steps=3, label=2, fresh=True)


def test_self_training_is_that_of_the_command_and_leaves_the_generator_alone(base: Generator) -> None:
    before, settings = weights(base), base.settings
    last = neon.self_train(base, "sampled", "ours", **TRAINING)
    assert last == Path("ours/snapshot-000000.064-kimg.safetensors")
    assert last.read_bytes() == Path("trained", last.name).read_bytes()
    assert neon.self_train(base, "sampled", "trained", **TRAINING) == Path("trained", last.name)
    assert_equal(weights(base), before)
    assert base.settings is settings and not base.model.network.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_self_training_that_goes_nowhere_is_told(tiny: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    images = neon.sample_set(tiny, 8, "set")
    last = neon.self_train(tiny, images, "run", total_images=16, batch=8, lr=1e-12, lr_rampup=0, ema=0, save_interval=8)
    assert sorted(path.name for path in Path("run").glob("snap*")) == [
        "snapshot-000000.008-kimg.safetensors",
        last.name,
    ]
    assert "any merge will be the base but for rounding; raise total_images or lr" in capsys.readouterr().err


def test_an_extrapolation_is_what_the_command_merges(base: Generator, tmp_path: Path) -> None:
    before, snapshot = weights(base), "trained/snapshot-000000.064-kimg.safetensors"
    improved = neon.extrapolate(base, snapshot, 0.75)
    merged = load_state("merged.safetensors")
    assert_equal(weights(improved), merged)
    assert_equal(load_state(improved.save(tmp_path / "saved.safetensors")), merged)
    assert_equal(weights(neon.extrapolate(base, neon.load(snapshot, device="cpu"), 0.75)), merged)
    assert_equal(weights(base), before)
    assert_equal(weights(neon.extrapolate(base, snapshot, 0)), before)
    assert_equal(weights(neon.extrapolate(base, snapshot, -1)), load_state(snapshot))
    assert improved.path is None and improved.settings == base.settings and base.path == BASE
    with open_checkpoint("merged.safetensors") as file:
        theirs = file.metadata
    ours = improved.model.file_metadata
    for name in ("w", "formula", "base", "base_sha256", "self_trained", "self_trained_sha256", "sampler"):
        assert ours[name] == theirs[name], name
    assert "w" not in base.model.file_metadata


def test_an_extrapolated_generator_is_as_good_as_a_loaded_one(base: Generator, tmp_path: Path) -> None:
    """It samples, is trained and extrapolated again, and its sets are told by the file that it is saved as."""
    improved = neon.extrapolate(base, "trained/snapshot-000000.064-kimg.safetensors", 0.75)
    saved = neon.load(improved.save(tmp_path / "saved.safetensors"), device="cpu")
    assert torch.equal(improved.sample(8), saved.sample(8))
    made = [neon.sample_set(one, 8, tmp_path / name) for one, name in ((improved, "a"), (saved, "b"))]
    assert files_of(str(made[0])) == files_of(str(made[1]))
    snapshots = [
        neon.self_train(one, made[0], tmp_path / name, **TRAINING) for one, name in ((improved, "c"), (saved, "d"))
    ]
    assert snapshots[0].read_bytes() == snapshots[1].read_bytes()
    again = [neon.extrapolate(one, snapshots[0], 0.5) for one in (improved, saved)]
    assert_equal(weights(again[0]), weights(again[1]))
    with pytest.raises(neon.RequestError, match="self_trained: this generator is in memory only; save it"):
        neon.extrapolate(base, improved, 0.5)


def test_scores_are_those_that_the_command_prints(base: Generator) -> None:
    improved = neon.extrapolate(base, "trained/snapshot-000000.064-kimg.safetensors", 0.75)
    scores = neon.score(improved, TEST_STATISTICS, **SCORING, real_images="real")
    printed = json.loads(Path("scores.json").read_text())
    assert scores.distance == printed["fd_fashion64"]
    for name in ("precision", "recall", "density", "coverage", "num_images"):
        assert getattr(scores, name) == printed[name], name


def test_real_images_are_as_good_as_their_statistics(base: Generator) -> None:
    assert run(f"neon stats real real.npz --features {FEATURES} --batch_size 32") == 0
    by_images, by_statistics = (neon.score(base, real, **SCORING) for real in ("real", "real.npz"))
    assert replace(by_images, seconds=None) == replace(by_statistics, seconds=None)


def test_a_saved_generator_is_sampled_as_it_was(tiny: Generator, tmp_path: Path) -> None:
    changed = tiny.with_settings(num_steps=3, S_churn=2, S_max=10.0)
    assert changed.settings != tiny.settings
    assert changed.save("copy.safetensors") == Path("copy.safetensors")
    loaded = neon.load("copy.safetensors", device="cpu")
    assert loaded.settings == changed.settings and loaded.path == Path("copy.safetensors")
    assert torch.equal(loaded.sample(5), changed.sample(5))
    with pytest.raises(neon.RequestError, match=r"already exists; choose another name or pass overwrite=True"):
        tiny.save("copy.safetensors")
    tiny.save("copy.safetensors", overwrite=True)
    assert neon.load("copy.safetensors", device="cpu").settings == tiny.settings
    with pytest.raises(neon.RequestError, match="the output is the input"):
        tiny.save(tmp_path / "tiny.safetensors", overwrite=True)


@dataclass(frozen=True)
class Odd:
    """Settings of many types."""

    level: float = float("inf")
    row: tuple[float, ...] = (1.0, 2.0)
    name: str = "a"
    count: int = 3
    on: bool = True
    left_open: float | None = None


def test_settings_of_every_type_survive_a_file() -> None:
    settings = Odd(level=float("-inf"), row=(3.0,), name="b", count=4, on=False)
    assert with_settings(Odd(), json.loads(settings_json(settings)), "file") == settings
    with pytest.raises(neon.RequestError, match="cannot be kept in a file"):
        settings_json(Odd(name=b"bytes"))  # type: ignore[arg-type]


def test_a_merge_for_a_sampler_is_sampled_so(base: Generator, tmp_path: Path) -> None:
    snapshot, record = "trained/snapshot-000000.064-kimg.safetensors", sampler_record("edm", base.settings)
    merge_files(BASE, snapshot, [1.0], tmp_path / "merged.safetensors", sampler=record)
    assert neon.load(tmp_path / "merged.safetensors", device="cpu").settings == base.settings


def test_classes_are_chosen_for_all_images_or_for_each(tiny: Generator) -> None:
    each = [2, 0, 0, 1]
    images = tiny.sample(4, label=each)
    assert torch.equal(images, tiny.sample(4, label=torch.tensor(each)))
    assert torch.equal(images[1:3], tiny.sample(4, label=0)[1:3])
    assert not torch.equal(images[0], tiny.sample(4, label=0)[0])


@pytest.mark.parametrize("model", ["docs/examples/flow.py:Flow", "class"])
def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    assert run("python docs/examples/flow.py --output own.safetensors --steps 2") == 0
    named = neon.load("own.safetensors", model="docs/examples/flow.py:Flow", device="cpu")
    own = named if ":" in model else neon.load("own.safetensors", model=type(named.model), device="cpu")
    images = neon.sample_set(own, 8, "set", num_steps=2)
    record = json.loads((images / "run.json").read_text())
    assert record["model_sha256"] == sha256_file("docs/examples/flow.py")
    snapshot = neon.self_train(own, images, "run", total_images=16, batch=8)
    improved = neon.extrapolate(own, snapshot, 1.0)
    assert improved.sample(4, num_steps=2).shape == (4, 1, 14, 14)
    with pytest.raises(neon.RequestError, match="architecture 'flow' is unknown"):
        neon.load("own.safetensors", device="cpu")


def test_a_model_with_an_autoencoder_shares_it_with_what_is_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model("var.safetensors", tiny_var(0))
    save_safetensors("tokenizer.safetensors", tiny_tokenizer().state_dict(), {})
    base = neon.load("var.safetensors", device="cpu", autoencoder="tokenizer.safetensors")
    before = weights(base)
    images = neon.sample_set(base, 8, "set")
    snapshot = neon.self_train(base, images, "run", total_images=16, batch=8, lr=1e-3, lr_rampup=0, ema=0)
    improved = neon.extrapolate(base, snapshot, 1.0)
    assert_equal(weights(base), before)
    assert improved.model.tokenizer is base.model.tokenizer
    assert improved.model.network is not base.model.network
    assert improved.sample(3).shape == (3, 3, 8, 8)


BAD: dict[str, tuple[Callable[[Generator], Any], str]] = {
    "setting": (lambda g: g.sample(1, steps=3), "no setting is called steps; expected one of num_steps, solver"),
    "type": (lambda g: g.with_settings(num_steps="many"), "num_steps is 'many'; expected a value such as 2"),
    "value": (lambda g: g.with_settings(num_steps=0), "num_steps"),
    "images": (lambda g: g.sample(0), "num_images is 0; expected a whole number, at least 1"),
    "float": (lambda g: g.sample(2.5), "num_images is 2.5; expected a whole number"),  # type: ignore[arg-type]
    "batch": (lambda g: g.sample(1, batch_size=0), "batch_size is 0; expected a whole number, at least 1"),
    "seed": (lambda g: g.sample(1, seed=1024), "^seed is 1024; expected 0 to 1023"),
    "label": (lambda g: g.sample(1, label=3), "^label 3: out of range; the network knows classes 0 to 2"),
    "labels": (lambda g: g.sample(3, label=[0, 1]), r"label: expected one class, or one for each of the 3 images"),
    "one of them": (lambda g: g.sample(2, label=[0, 5]), "labels run from 0 to 5; the model knows classes 0 to 2"),
    "file": (lambda g: neon.load("missing.safetensors"), "missing.safetensors: no such file"),
    "precision": (lambda g: neon.load("tiny.safetensors", precision="fp12"), "fp12"),
    "device": (lambda g: neon.load("tiny.safetensors", device="tpu"), "device is 'tpu'; expected \"cpu\""),
    "gpu": (lambda g: neon.load("tiny.safetensors", device="cuda:99"), "device is 'cuda:99', and there are"),
    "key": (lambda g: neon.load("tiny.safetensors", key="ema"), "no nesting 'ema'"),
    "suffix": (lambda g: g.save("neon.pth"), "end the name in .safetensors"),
    "no images": (lambda g: neon.self_train(g, "none", "run", total_images=8), "none: "),
    "total": (lambda g: neon.self_train(g, "none", "run", total_images=0), "total_images is 0"),
    "lr": (lambda g: neon.self_train(g, sampled(g), "run", total_images=8, batch=4, lr=-1), "lr is -1.0; expected"),
    "ema": (lambda g: neon.self_train(g, sampled(g), "run", total_images=8, ema=-1), "ema is -1; expected 0"),
    "micro": (
        lambda g: neon.self_train(g, sampled(g), "run", total_images=8, batch=4, micro_batch=3),
        "a batch of 4 images in micro-batches of 3",
    ),
    "snapshot": (lambda g: neon.extrapolate(g, "none.safetensors", 1.0), "none.safetensors: no such file"),
    "w": (lambda g: neon.extrapolate(g, "tiny.safetensors", float("nan")), "w = nan"),
    "other network": (lambda g: neon.extrapolate(g, BASE, 1.0), "both must come from the same network"),
    "statistics": (lambda g: neon.score(g, "none.npz", features=FEATURES), "none.npz"),
    "other features": (lambda g: neon.score(g, TEST_STATISTICS, features=FEATURES, num_images=4), "read images"),
    "few images": (
        lambda g: neon.score(g, sampled(g), features=FEATURES),
        r"set: 4 images are too few for 64 features.*or a smaller feature network \(features\)",
    ),
    "other size": (lambda g: neon.score(g, other_size(), features=FEATURES), "images are .1, 14, 14. .* of its size"),
    "two networks": (
        lambda g: neon.score(g, TEST_STATISTICS, features=FEATURES, inception_weights="w.pth"),
        "inception_weights .*: features ",
    ),
    "elsewhere": (
        lambda g: neon.sample_set(g, 1, "set", processes=Processes(device=torch.device("meta"))),
        "load it with device=processes.device",
    ),
}  # fmt: skip


def sampled(generator: Generator) -> Path:
    return neon.sample_set(generator, 4, "set")


def other_size() -> str:
    write_images("real", range(2), real_images()[:2])
    return "real"


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused_in_words_of_python(tiny: Generator, case: str) -> None:
    call, expected = BAD[case]
    with pytest.raises(neon.RequestError, match=expected) as refused:
        call(tiny)
    assert not re.search(r"--\w", str(refused.value))


NOT_OF_THE_LIBRARY = {
    "--augment", "--device", "--training-images", "--num-images", "--report-images", "--log",
    # of merging folders, adapters and by recipes, which is a command only
    "--variant", "--component", "--shard-size", "--as-adapter", "--adapter-format", "--rank", "--dtype", "--rounding",
    "--export-mergekit", "--recipe", "--output",
    "--loss",  # nothing of the library sets it
}  # fmt: skip


def is_below(file: str) -> bool:
    """Whether the library may come to a message in `file`."""
    return file == "neon/tune/inputs.py" or not file.startswith(("neon/tune/", "neon/improve/", "neon/report/"))


@pytest.mark.parametrize(("file", "flag"), sorted(one for one in flags_in_messages() if is_below(one[0])))
def test_flags_in_what_lower_rooms_say_become_keywords(file: str, flag: str) -> None:
    spelled = {flag, flag[:2] + flag[2:].replace("-", "_")}
    assert flag in NOT_OF_THE_LIBRARY | OTHERS_FLAGS or any(_FLAG.fullmatch(one) for one in spelled)


def test_a_message_is_said_in_words_of_python() -> None:
    assert in_python("add --fresh, --class 3, name it with --vae_path (neon's commands: --vae)") == (
        "add fresh=True, label 3, name it with autoencoder"
    )
    assert in_python("hf download x --include y; start fewer (--nproc_per_node)").count("--") == 2


def in_processes() -> None:
    """What several processes do with one library."""
    with processes("cpu") as group:
        base = neon.load("tiny.safetensors", device=group.device).with_settings(num_steps=2)
        images = neon.sample_set(base, 10, "set", batch_size=2, processes=group)
        last = neon.self_train(base, images, "run", total_images=16, batch=8, micro_batch=2, processes=group)
        improved = neon.extrapolate(base, last, 1.0)
        scores = neon.score(
            improved, "set", features="features.safetensors", num_images=9, batch_size=2, processes=group
        )
        if group.is_main:
            improved.save("improved.safetensors")
            Path("scores.json").write_text(json.dumps(scores.distance))


def test_several_processes_make_the_same(
    tiny: Generator, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallFeatures("tiny6", (1, 8, 8), dim=6, num_classes=3).save("features.safetensors")
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        for name in ("tiny.safetensors", "features.safetensors"):
            (folder / name).write_bytes((tmp_path / name).read_bytes())
        workers.run("tests.test_library:in_processes", folder=folder, world_size=count)
    for name in ("set/00000009.png", "set/dataset.json", "improved.safetensors", "scores.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
