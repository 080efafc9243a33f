"""A merge weight belongs to a sampler: files say which drew what they were trained on, and others are warned of."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edm.settings import AblationSettings, EDMSettings
from imm.settings import IMMSettings
from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.data.encoded import ExampleSet, encode_set, write_index, write_shard
from neon.data.images import ImageDataset, Subset, write_labels
from neon.data.sampler import SAMPLER, as_sampler, parse_sampler, sampler_record, sampler_text
from neon.demo.assets import BASE, FEATURES, TEST_STATISTICS
from neon.merge import merge_files
from neon.model import GenerativeModel, load_model, sampler_of, unlike_sampler_of
from neon.runtime.distributed import Processes
from neon.runtime.files import sha256_file
from neon.tunable import far_apart
from tests.programs import ROOT
from tests.test_old_files import MERGED, OLD
from tests.test_own_model import run
from tests.tiny import tiny_edm, tiny_images, tiny_imm, tiny_var, tiny_xar
from VAR.settings import VARSettings
from xAR.settings import XARSettings

EULER = "--set num_steps=3 solver=euler"
TRAIN = "--total_images 16 --batch 8 --lr 1e-3 --lr_rampup 0 --ema 0 --device cpu"
FAR = "very different sampler"


def metadata(path: str | Path) -> dict[str, str]:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.metadata


def record(**changes: Any) -> dict[str, Any]:
    settings = EDMSettings(num_steps=3, solver="euler", **changes)
    made = sampler_record("edm", settings)
    assert made is not None
    return made


# Through the programs


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set as a zip and as a folder, the demo's base trained on each, and merges with them."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("set.zip", "set"):
            drawn = f"neon sample --network {BASE} --num_images 12 {EULER} --outdir {name} --device cpu"
            assert run(drawn) == 0
            assert run(f"neon selftrain --network {BASE} --data {name} --outdir of-{name} {TRAIN}") == 0
            Path(f"{name}.safetensors").symlink_to(next(Path(f"of-{name}").glob("snapshot*")))
        assert run(f"neon merge --base {BASE} --self-trained set.safetensors -w 0 0.5 --output w{{w}}.safetensors") == 0
    return folder


@pytest.fixture
def here(chain: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(chain)
    return chain


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_a_set_and_what_was_trained_on_it_say_what_drew_it(here: Path, name: str) -> None:
    drawn_by = ImageDataset(name).sampler
    assert drawn_by is not None and drawn_by["architecture"] == "edm"
    assert drawn_by["network_sha256"] == sha256_file(BASE)
    assert drawn_by["settings"]["num_steps"] == 3 and drawn_by["settings"]["S_max"] == "inf"
    told = metadata(f"{name}.safetensors")
    assert sampler_of(told) == drawn_by and told["synthetic_images"] == "12" and told["images_seen"] == "16"
    recipe = json.loads(told["training"])["recipe"]
    assert (recipe["batch_size"], recipe["lr"]) == (8, 1e-3)


def test_folder_and_zip_hold_the_same_record(here: Path) -> None:
    with zipfile.ZipFile("set.zip") as packed:
        assert packed.read("dataset.json") == Path("set/dataset.json").read_bytes()


@pytest.mark.parametrize(
    ("network", "settings", "differences"),
    [
        ("w0.5", EULER, None),
        ("w0.5", "--set num_steps=3 solver=euler rho=8", None),
        ("w0.5", "--set num_steps=6 solver=euler", "network calls: 3 -> 6"),
        ("w0.5", "--set num_steps=3", "solver: euler -> heun; network calls: 3 -> 5"),
        ("w0.5", "--set num_steps=3 solver=euler sigma_max=10", "sigma_max: 80 -> 10"),
        ("w0", "--num_steps 9", None),  # the base
        ("set", "--num_steps 9", None),  # weights without a w
    ],
)
def test_sampling_a_merge_with_a_very_different_sampler_warns_in_one_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], network: str, settings: str, differences: str | None
) -> None:
    command = f"neon sample --network {network}.safetensors --per_class_count 1 {settings} --outdir {tmp_path / 'out'}"
    assert run(f"{command} --device cpu") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    if differences is None:
        assert not lines
    else:
        assert len(lines) == 1 and f"{network}.safetensors: merged with w = 0.5 for a {FAR} ({differences})" in lines[0]
        assert "choose w again" in lines[0]


@pytest.mark.parametrize(("settings", "warns"), [(EULER, False), ("--num_steps 4", True)])
def test_scoring_merges_with_a_snapshot_of_another_sampler_warns(
    here: Path, capsys: pytest.CaptureFixture[str], settings: str, warns: bool
) -> None:
    command = (
        f"neon evaluate --network {BASE} --self_trained set.zip.safetensors --w 0.5 --ref {TEST_STATISTICS} "
        f"--features {FEATURES} --num_images 70 {settings} --device cpu"
    )
    assert run(command) == 0
    said = capsys.readouterr().err
    assert (f"set.zip.safetensors: trained on images that a {FAR} drew" in said) == warns
    assert said.count(FAR) == warns


def test_the_programs_of_an_architecture_warn_too(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = f"python {ROOT}/edm/sample.py --network_pkl w0.5.safetensors --seeds 0-3 --outdir {tmp_path}"
    assert run(f"{program}/same --num_steps 3 --solver euler --device cpu") == 0
    assert FAR not in capsys.readouterr().err
    assert run(f"{program}/other --num_steps 3 --solver euler --disc vp --device cpu") == 0
    assert "discretization: edm -> vp" in capsys.readouterr().err


def test_from_python_nothing_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model("w0.5.safetensors")
    assert sampler_of(model.file_metadata) == ImageDataset("set").sampler
    assert capsys.readouterr().err == ""
    assert unlike_sampler_of(model.file_metadata, model, EDMSettings())


def test_a_merge_names_the_sampler_that_its_caller_chose_w_for(here: Path, tmp_path: Path) -> None:
    chosen = record(sigma_max=10.0)
    merge_files(BASE, "set.safetensors", [0.5], tmp_path / "chosen.safetensors", sampler=chosen)
    assert sampler_of(metadata(tmp_path / "chosen.safetensors")) == chosen
    merge_files(BASE, "set.safetensors", [0.5], tmp_path / "neon.pth")
    assert parse_sampler(json.loads((tmp_path / "neon.pth.json").read_text())[SAMPLER]) == ImageDataset("set").sampler
    # On top of a merge: the sampler of the self-trained file, or that of the base where it says none.
    silent = tmp_path / "silent.safetensors"
    save_safetensors(
        silent, load_state("set.safetensors"), {k: v for k, v in metadata("set.safetensors").items() if k != SAMPLER}
    )
    for name, self_trained in (("again", "set.safetensors"), ("kept", silent)):
        merge_files(tmp_path / "chosen.safetensors", self_trained, [0.25], tmp_path / f"{name}.safetensors")
    assert sampler_of(metadata(tmp_path / "again.safetensors")) == ImageDataset("set").sampler
    assert sampler_of(metadata(tmp_path / "kept.safetensors")) == chosen


# Sets


def test_encoded_sets_and_parts_of_sets_carry_the_record(here: Path, tmp_path: Path) -> None:
    whole = ImageDataset("set")
    encode_set(
        lambda images: images.float(), whole, tmp_path, kind="toys", image_shape=whole.image_shape, batch_size=5,
        processes=Processes(), identity={}, fresh=False,
    )  # fmt: skip
    assert ExampleSet(tmp_path, "toys").sampler == Subset(whole, 3, seed=0).sampler == whole.sampler is not None


def test_sets_that_do_not_tell_are_read_as_before(tmp_path: Path) -> None:
    old = ImageDataset(OLD / "finished" / "synthetic.zip")
    assert old.sampler is None and old.labels is not None
    assert tiny_images().sampler is None
    write_labels(tmp_path, [1, 2], 2)
    assert json.loads((tmp_path / "dataset.json").read_text()).keys() == {"labels"}
    real = tiny_images(6)
    write_shard(tmp_path, 0, real.images, None)
    write_index(tmp_path, [range(6)], real.image_shape, "toys")
    assert ExampleSet(tmp_path, "toys").sampler is None


def test_an_old_merge_is_sampled_at_any_settings_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"neon sample --network {MERGED} --per_class_count 1 --num_steps 2 --outdir {tmp_path / 'out'}"
    assert run(f"{command} --device cpu") == 0
    assert "warning" not in capsys.readouterr().err


# What strangers write


STRANGE: Mapping[str, Any] = {
    "no table": [1, 2],
    "text": "euler",
    "no settings": {"architecture": "edm"},
    "no architecture": {"settings": {}},
    "a long name": {"architecture": "edm", "settings": {"x" * 101: 1}},
    "tables inside": {"architecture": "edm", "settings": {"num_steps": {"num_steps": 3}}},
    "rows of rows": {"architecture": "edm", "settings": {"num_steps": [[3]]}},
    "many settings": {"architecture": "edm", "settings": {str(i): i for i in range(101)}},
    "a long row": {"architecture": "edm", "settings": {"num_steps": [0] * 1001}},
    "a huge number": {"architecture": "edm", "settings": {"num_steps": 10**400}},
    "a hash that is none": {"architecture": "edm", "network_sha256": 7, "settings": {}},
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_record_is_passed_over(here: Path, tmp_path: Path, name: str) -> None:
    value = STRANGE[name]
    assert as_sampler(value) is None and parse_sampler(json.dumps(value)) is None
    labels = json.loads(Path("set/dataset.json").read_text())
    write_labels(tmp_path, [3], 1)
    (tmp_path / "00000000.png").write_bytes(Path("set/00000000.png").read_bytes())
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels["labels"][:1], SAMPLER: value}))
    found = ImageDataset(tmp_path)
    assert found.sampler is None and found.labels is not None


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"settings": NaN}', "x" * (1 << 21)])
def test_metadata_that_are_no_record_name_no_sampler(text: str) -> None:
    assert sampler_of({SAMPLER: text}) is None


@pytest.mark.parametrize(
    ("settings", "w", "warns"),
    [
        ({"num_steps": "many", "solver": 3, "S_max": None, "rho": "inf"}, "0.5", True),
        ({"num_steps": "many", "solver": "\x1b[31m"}, "0.5", True),
        ({"num_steps": -5, "sigma_max": -1.0}, "1e999", False),
        ({"solver": "heun"}, "half", False),
    ],
)
def test_a_strangers_metadata_ends_in_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], w: str, warns: bool
) -> None:
    told = {"architecture": "edm", "settings": settings}
    strange = {**metadata(BASE), "w": w, SAMPLER: json.dumps(told)}
    save_safetensors(tmp_path / "strange.safetensors", load_state(BASE), strange)
    command = (
        f"neon sample --network {tmp_path}/strange.safetensors --per_class_count 1 {EULER} --outdir {tmp_path}/out"
    )
    assert run(f"{command} --device cpu") == 0
    said = capsys.readouterr().err
    assert (FAR in said) == warns and "Traceback" not in said and "\x1b" not in said


def test_settings_that_no_file_can_tell_have_no_record() -> None:
    assert sampler_record("own", object()) is None
    assert sampler_record("own", IMMSettings(num_steps=3, mid_nt=(2.0, 1.0))) is not None


def test_equal_records_give_equal_texts() -> None:
    made = record()
    assert sampler_text(made) == sampler_text(dict(reversed(made.items())))
    assert parse_sampler(sampler_text(made)) == made


# Far apart


def apart(model: GenerativeModel, then: Any, now: Any) -> tuple[str, ...]:
    made = sampler_record(model.architecture, then)
    assert made is not None
    return unlike_sampler_of({SAMPLER: sampler_text(made)}, model, now)


@pytest.mark.parametrize(
    ("then", "now", "found"),
    [
        (EDMSettings(), EDMSettings(), ()),
        (EDMSettings(), EDMSettings(num_steps=15), ()),
        (EDMSettings(), EDMSettings(num_steps=13), ("network calls: 35 -> 25",)),
        (EDMSettings(num_steps=5, solver="euler"), EDMSettings(num_steps=3), ("solver: euler -> heun",)),
        (EDMSettings(), EDMSettings(guidance=0.1), ("guidance: 0 -> 0.1", "network calls: 35 -> 70")),
        (EDMSettings(guidance=0.5), EDMSettings(guidance=1.2), ()),
        (EDMSettings(guidance=0.5), EDMSettings(guidance=1.3), ("guidance: 0.5 -> 1.3",)),
        (EDMSettings(sigma_max=80.0), EDMSettings(sigma_max=30.0), ()),
        (EDMSettings(sigma_max=80.0), EDMSettings(sigma_max=20.0), ("sigma_max: 80 -> 20",)),
        (EDMSettings(), EDMSettings(S_churn=30.0, S_max=50.0), ("S_churn: 0 -> 30", "S_max: inf -> 50")),
        (AblationSettings(), EDMSettings(sigma_min=0.1), ("sigma_min: None -> 0.1",)),
    ],
)
def test_edm_settings_are_far_apart_by_a_quarter(then: Any, now: Any, found: tuple[str, ...]) -> None:
    assert apart(tiny_edm(), then, now)[: len(found)] == found
    assert bool(apart(tiny_edm(), then, now)) == bool(found)


def test_samplers_of_other_settings_are_told_by_their_names() -> None:
    *_, last = apart(tiny_edm(), AblationSettings(), EDMSettings())
    assert "discretization" in last and last.endswith(": of another sampler")


@pytest.mark.parametrize(
    ("model", "then", "now", "found"),
    [
        (tiny_var, VARSettings(guidance=1.5), VARSettings(guidance=2.9), ()),
        (tiny_var, VARSettings(guidance=0.0), VARSettings(guidance=0.5),
         ("guidance: 0 -> 0.5", "network calls: 3 -> 6")),
        (tiny_var, VARSettings(), VARSettings(temperature=1.3), ()),
        (tiny_var, VARSettings(), VARSettings(temperature=1.5, smooth=True),
         ("smooth: False -> True", "temperature: 1 -> 1.5")),
        (tiny_xar, XARSettings(), XARSettings(stochastic=False), ("stochastic: True -> False",)),
        (tiny_xar, XARSettings(guidance=0.0), XARSettings(guidance=1.0), ()),
        (tiny_imm, IMMSettings(num_steps=2), IMMSettings(num_steps=2, mid_nt=(1.4,)), ("mid_nt: none -> 1.4",)),
        (tiny_imm, IMMSettings(guidance=1.5), IMMSettings(guidance=2.0), ()),
    ],
)  # fmt: skip
def test_settings_of_other_architectures_likewise(model: Any, then: Any, now: Any, found: tuple[str, ...]) -> None:
    assert apart(model(), then, now) == found


def test_steps_count_where_calls_are_not_told() -> None:
    assert far_apart({}, lambda settings: None, {"num_steps": 5}, XARSettings(num_steps=6)) == ()
    assert far_apart({}, lambda settings: None, {"num_steps": 5}, XARSettings()) == ("num_steps: 5 -> 40",)


def test_settings_of_before_there_was_a_choice_have_its_default() -> None:
    assert far_apart({}, lambda settings: None, {"guidance": 2.9}, VARSettings()) == ()
    assert far_apart({}, lambda settings: None, {"guidance": 2.9}, VARSettings(smooth=True))


def test_another_architectures_sampler_is_no_matter() -> None:
    assert unlike_sampler_of({SAMPLER: sampler_text(record())}, tiny_var(), VARSettings()) == ()
