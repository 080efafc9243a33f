"""Names on the Hub wherever a file is named, and `neon push`, against a server on this machine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save

import neon
from edm.calculate_fid import ScoreEDM
from neon.checkpoint import open_checkpoint, save_safetensors
from neon.cli import main
from neon.cli.choose import Tune
from neon.cli.command_line import parse, with_hub_files
from neon.cli.improve import Improve
from neon.cli.programs import Evaluate, Sample
from neon.demo.assets import BASE, FEATURES, TRAIN_STATISTICS
from neon.errors import NoConnectionError, RequestError, WorkError
from neon.improve.plan import ImprovePlan
from neon.library.generator import named_features
from neon.library.improving import recipe_of_run
from neon.runtime.hub import fetched, hub_name, parsed
from neon.runtime.hub_upload import content_of
from neon.tune.inputs import RealImages
from tests.hub_server import COMMIT, OLD_COMMIT, HubServer, only_this, serving

CONFIG = b'{"architectures": ["Toy"]}'


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, and nothing else that huggingface_hub could ask or find."""
    with serving() as server:
        only_this(server, tmp_path / "hf", monkeypatch)
        server.repositories["some/demo"] = {"improved.safetensors": BASE.read_bytes(), "README.md": b"# Demo\n"}
        server.repositories["some/data"] = {"train.npz": TRAIN_STATISTICS.read_bytes()}
        yield server


def weights(value: float) -> bytes:
    return save({"a": torch.full((3,), value), "b": torch.full((2, 2), value)}, {"format": "pt"})


def model(value: float, **more: bytes) -> dict[str, bytes]:
    return {"config.json": CONFIG, "model.safetensors": weights(value), **more}


@pytest.mark.parametrize(
    ("name", "inside", "revision"),
    [
        ("hf:some/model", "", None),
        ("hf:some/model@v1", "", "v1"),
        ("hf:some/model/unet", "unet", None),
        ("hf:some/mo.del-1/a/b.safetensors@refs/pr/1", "a/b.safetensors", "refs/pr/1"),
    ],
)
def test_a_name_says_repository_file_and_revision(name: str, inside: str, revision: str | None) -> None:
    found = parsed(Path(name))
    assert (found.repository.split("/")[0], found.inside, found.revision) == ("some", inside, revision)


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:model", "hf:/model", "hf:a/b@", "hf:a/b/../c.bin", "hf:a/b@x@y", "hf://a/b", "hf:a b/c"],
)
def test_a_malformed_name_is_refused_before_anything_is_asked(
    hub: HubServer, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", name]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "not a name on the Hub; expected hf:ORG/REPO" in line
    assert hub.asked == []


def test_what_is_in_the_cache_is_not_fetched_again_and_knows_its_name(hub: HubServer) -> None:
    path = fetched("hf:some/demo/improved.safetensors")
    assert path.read_bytes() == BASE.read_bytes()
    hub.asked.clear()
    assert fetched("hf:some/demo/improved.safetensors") == path
    assert not [asked for asked in hub.asked if asked[0] == "GET" and "resolve" in asked[1]]
    assert hub_name(path) == f"hf:some/demo/improved.safetensors@{COMMIT}"
    assert (
        hub_name(fetched("hf:some/demo/improved.safetensors@v1")) == f"hf:some/demo/improved.safetensors@{OLD_COMMIT}"
    )
    assert hub_name(BASE) is None


def test_a_repository_of_one_file_of_weights_is_that_file(hub: HubServer) -> None:
    assert fetched("hf:some/demo").name == "improved.safetensors"


def test_of_a_folder_no_code_and_no_other_format_is_fetched(hub: HubServer) -> None:
    others = ("model.py", "a.msgpack", "a.onnx", "a.gguf", "pytorch_model.bin", "training_args.bin", "x.pkl")
    hub.repositories["some/model"] = model(1.0, **dict.fromkeys(others, b"no"))
    folder = fetched("hf:some/model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_bin_is_fetched_only_for_the_model_that_has_no_safetensors(hub: HubServer) -> None:
    hub.repositories["some/pipeline"] = {
        "model_index.json": b"{}",
        **{f"unet/{name}": data for name, data in model(1.0).items()},
        "unet/pytorch_model.bin": b"no",
        "text/config.json": CONFIG,
        "text/pytorch_model.bin": b"yes",
        "text/optimizer.bin": b"no",
    }
    folder = fetched("hf:some/pipeline")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.bin"))
    assert found == ["text/pytorch_model.bin"]
    assert sorted(path.name for path in fetched("hf:some/pipeline/unet").iterdir()) == sorted(model(1.0))


def test_an_index_comes_with_its_shards(hub: HubServer) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    hub.repositories["some/shards"] = {
        "config.json": CONFIG,
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode(),
        names[0]: save({"a": torch.ones(3)}),
        names[1]: save({"b": torch.ones(2)}),
    }
    assert main(["inspect", "hf:some/shards/model.safetensors.index.json"]) == 0
    assert main(["inspect", "hf:some/shards"]) == 0


def test_two_models_are_merged(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories |= {"some/base": model(1.0), "some/tuned": model(1.5)}
    out = tmp_path / "merged"
    names = ["--base", "hf:some/base", "--self-trained", f"hf:some/tuned@{COMMIT}"]
    assert main(["merge", *names, "-w", "1", "--output", str(out)]) == 0
    assert load_file(out / "model.safetensors")["a"].tolist() == [0.5] * 3
    assert (out / "config.json").read_bytes() == CONFIG
    card = (out / "README.md").read_text()
    assert f"hf:some/base/model.safetensors@{COMMIT}" in card and "hf:some/tuned" in card
    assert main(["convert", "hf:some/base", str(tmp_path / "flat.safetensors")]) == 0


@pytest.fixture
def two_models(hub: HubServer) -> HubServer:
    """The server with a base and what it became, a pipeline with one as a component, and a LoRA of neither."""
    hub.repositories |= {"some/base": model(1.0), "some/tuned": model(1.5)}
    hub.repositories["some/pipe"] = {"model_index.json": b"{}", **{f"unet/{n}": d for n, d in model(1.0).items()}}
    return hub


@pytest.mark.parametrize("base", ["hf:some/base", "hf:some/base@v1", "hf:some/pipe/unet"])
def test_a_recipe_of_names_merges_the_same_elsewhere(
    two_models: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    names = ["--base", base, "--self-trained", "hf:some/tuned"]
    assert main(["merge", *names, "-w", "1", "--output", str(once), "--json", str(tmp_path / "report.json")]) == 0
    commit = OLD_COMMIT if base.endswith("@v1") else COMMIT
    recipe = yaml.safe_load((once / "merge.yaml").read_text())
    assert recipe == {
        "base": f"{base.partition('@')[0]}@{commit}", "self_trained": f"hf:some/tuned@{COMMIT}", "w": 1.0
    }  # fmt: skip
    with safe_open(once / "model.safetensors", "pt") as file:
        assert file.metadata()["base"] == f"{base.partition('@')[0]}/model.safetensors@{commit}"
    for path in [*once.iterdir(), tmp_path / "report.json"]:
        assert b"models--" not in path.read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache of another machine"))
    two_models.repositories["other/model"] = {"merge.yaml": (once / "merge.yaml").read_bytes()}
    assert main(["merge", "--recipe", "hf:other/model/merge.yaml", "--output", str(again)]) == 0
    assert [path.name for path in sorted(once.iterdir())] == [path.name for path in sorted(again.iterdir())]
    for path in once.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_a_merge_in_one_file_tells_its_names(two_models: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "neon.safetensors"
    names = ["--base", "hf:some/base", "--self-trained", "hf:some/tuned/model.safetensors"]
    assert main(["merge", *names, "-w", "1", "--w-of", "a=0", "--output", str(out)]) == 0
    with safe_open(out, "pt") as file:
        told = file.metadata()
    assert json.loads(told["recipe"])["base"] == f"hf:some/base@{COMMIT}"
    assert told["self_trained"] == f"hf:some/tuned/model.safetensors@{COMMIT}"
    assert not any("models--" in text for text in told.values())


def test_a_mergekit_recipe_names_repositories(
    two_models: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = tmp_path / "kit.yaml"
    rest = ["--self-trained", "hf:some/tuned", "-w", "1", "--export-mergekit", str(kit)]
    assert main(["merge", "--base", "hf:some/base@v1", *rest, "--output", str(tmp_path / "neon")]) == 0
    models = yaml.safe_load(kit.read_text())["models"]
    assert [one["model"] for one in models] == [f"some/base@{OLD_COMMIT}", f"some/tuned@{COMMIT}"]
    capsys.readouterr()
    assert main(["merge", "--base", "hf:some/pipe/unet", *rest, "--output", str(tmp_path / "more")]) == 2
    assert "takes a whole repository, and not hf:some/pipe/unet@" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


FEW = [
    *("--num_synthetic", "16", "--training_images", "64", "--batch", "16", "--snapshots", "1", "--num_steps", "2"),
    *("--set", "solver=euler", "--processes", "1", "--device", "cpu"),
]  # fmt: skip


def test_a_model_on_the_hub_is_improved(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["improve", "hf:some/demo", *FEW, "--out", str(out)]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["recipe"]["base"] == f"hf:some/demo/improved.safetensors@{COMMIT}"
    assert not [path for path in out.glob("*.html") if str(tmp_path) in path.read_text()]
    merged = load_file(next(out.glob("*.safetensors")))
    assert merged.keys() == load_file(BASE).keys()
    assert main(["improve", "--recipe", str(out / "run.json"), "--out", str(tmp_path / "again"), "--dry-run"]) == 0


SCORED = ["--real", "hf:some/data/train.npz", "--features", str(FEATURES)]


@pytest.mark.parametrize(
    ("command", "words", "fields"),
    [
        (Improve, ["hf:some/demo", *SCORED, "--vae", "hf:some/demo"], {"network", "real", "vae"}),
        (
            Evaluate,
            ["--network", "hf:some/demo", "--num_images", "9", "--ref", "hf:some/data/train.npz"],
            {"network", "ref"},
        ),
        (Sample, ["--network", "hf:some/demo", "--num_images", "9", "--outdir", "x"], {"network"}),
        (
            ScoreEDM,
            ["--network", "hf:some/demo", "--ref", "hf:some/data/train.npz", "--seeds", "0-9"],
            {"network_pkl", "ref"},
        ),
    ],
    ids=["improve", "evaluate", "sample", "edm"],
)
def test_every_input_of_a_command_can_be_a_name(
    hub: HubServer, command: type, words: list[str], fields: set[str]
) -> None:
    ready = with_hub_files(parse(command, words, "neon"))
    for field in fields:
        name = "some--data" if field in ("real", "ref") else "some--demo"
        path = Path(getattr(ready, field))
        assert name in str(path) and path.is_file()


def test_names_in_lists_and_behind_labels_are_fetched(hub: HubServer) -> None:
    hub.repositories["some/other"] = {"other.safetensors": weights(1.0)}
    words = ["--base", "hf:some/demo", "--self_trained", "hf:some/demo", "base.pth", "hf:some/other@v1"]
    features = ["--features", "inception", "dinov2=hf:some/data/train.npz", "hf:some/data/train.npz"]
    command = parse(Tune, [*words, "--select_stats", "hf:some/data/train.npz", *features, "--out", "run"], "neon")
    ready = with_hub_files(command)
    assert isinstance(ready, Tune)
    first, second, third = ready.plan.self_trained
    assert second == Path("base.pth") and COMMIT in str(first) and OLD_COMMIT in str(third)
    assert all(isinstance(path, Path) for path in ready.plan.self_trained) and first.is_file() and third.is_file()
    name, labelled, file = ready.features
    label, path = labelled.split("=")
    assert (name, label) == ("inception", "dinov2") and path == file and Path(path).is_file()
    untouched = parse(Tune, ["--base", "a", "--self_trained", "b", "--select_stats", "c", "--out", "d"], "neon")
    assert with_hub_files(untouched) is untouched


def test_a_name_in_a_list_that_is_none_is_one_line(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", str(BASE), "--self_trained", str(BASE), "hf:some/none", "--select_stats", "x", "--out", "run"]
    assert main(["tune", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("neon tune: hf:some/none: Hugging Face has no such repository")


def test_code_on_the_hub_is_not_run(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["some/demo"]["model.py:NAME"] = hub.repositories["some/demo"]["model.py"] = b"raise SystemExit(7)"
    words = ["--network", str(BASE), "--num_images", "1", "--outdir", "x", "--model", "hf:some/demo/model.py:NAME"]
    assert main(["sample", *words]) == 2
    assert "code from the Hub is not run; download it, read it, and name that file" in capsys.readouterr().err
    assert hub.asked == []


def test_the_library_loads_a_name(hub: HubServer) -> None:
    assert neon.load("hf:some/demo", device="cpu").sample(1, num_steps=2, solver="euler").shape[0] == 1


def test_the_library_takes_names_wherever_it_takes_files(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["some/data"]["features.safetensors"] = FEATURES.read_bytes()
    base = neon.load(BASE, device="cpu").with_settings(num_steps=2, solver="euler")
    merged = neon.extrapolate(base, "hf:some/demo", w=1.0)
    merged.save(tmp_path / "neon.safetensors")
    with safe_open(tmp_path / "neon.safetensors", "pt") as file:
        assert file.metadata()["self_trained"] == f"hf:some/demo/improved.safetensors@{COMMIT}"
    words = {"features": "hf:some/data/features.safetensors", "num_images": 70}
    scores = neon.score(merged, "hf:some/data/train.npz", **words)
    assert scores.distance == neon.score(base, TRAIN_STATISTICS, features=FEATURES, num_images=70).distance
    synthetic = neon.sample_set(base, 4, tmp_path / "synthetic.zip")
    hub.repositories["some/data"]["synthetic.zip"] = synthetic.read_bytes()
    neon.self_train(base, "hf:some/data/synthetic.zip", tmp_path / "self-training", total_images=4, batch=4)
    assert list((tmp_path / "self-training").glob("snapshot-*.safetensors"))


def test_a_run_from_the_library_records_names(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["some/data"]["features.safetensors"] = FEATURES.read_bytes()
    real = RealImages(
        features=named_features(["hf:some/data/features.safetensors", "dinov2=hf:some/demo"], None),
        select=fetched("hf:some/data/train.npz"),
        report=TRAIN_STATISTICS,
    )
    record = recipe_of_run(neon.load("hf:some/demo", device="cpu"), real, ImprovePlan())
    demo, data = f"hf:some/demo/improved.safetensors@{COMMIT}", f"hf:some/data/train.npz@{COMMIT}"
    assert (record["base"], record["real"], record["report_real"]) == (demo, data, str(TRAIN_STATISTICS))
    assert record["features"] == (f"hf:some/data/features.safetensors@{COMMIT}", f"dinov2={demo}")


def test_outputs_of_the_library_are_no_names_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    base = neon.load(BASE, device="cpu")
    for write in (
        lambda: base.save("hf:some/new.safetensors"),
        lambda: neon.sample_set(base, 1, "hf:some/new"),
        lambda: neon.self_train(base, BASE, "hf:some/new", total_images=8),
        lambda: neon.improve_model(base, "hf:some/new"),
    ):
        with pytest.raises(RequestError, match="an output is written here; `neon push` brings a folder to the Hub"):
            write()


def test_the_endpoint_of_the_environment_holds(hub: HubServer) -> None:
    code = "import sys; from neon.cli import main; sys.exit(main(['inspect', 'hf:some/demo', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["architecture"] == "edm"


@pytest.mark.parametrize(
    ("name", "refused", "message"),
    [
        ("hf:some/none", None, "no such repository, or not for you; if it asks for a login: `hf auth login`"),
        ("hf:some/none/a.bin", None, "no such repository"),
        ("hf:some/demo/a.bin", None, "no such file in the repository"),
        ("hf:some/demo/unet", None, "not in the repository some/demo"),
        ("hf:some/demo/a.safetensors.index.json", None, "not in the repository some/demo"),
        ("hf:some/demo@v9", None, "no such revision"),
        ("hf:some/demo/improved.safetensors@v9", None, "no such revision"),
        ("hf:some/demo", (403, "GatedRepo"), "gated; ask for access on its page and log in (`hf auth login`, or HF"),
        ("hf:some/demo/a.bin", (401, "GatedRepo"), "gated; ask for access"),
        ("hf:some/data", None, "no weights as safetensors in it; name a file, as hf:some/data/FILE"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: HubServer, name: str, refused: tuple[int, str] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if refused is not None:
        hub.refused["some/demo"] = refused
    assert main(["inspect", name]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("neon")]
    assert line.startswith(f"neon inspect: {name}: ") and message in line


def test_offline_the_cache_is_used_and_what_is_not_there_is_said(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["some/model"] = model(1.0)
    names = ["hf:some/model", "hf:some/demo/improved.safetensors", "hf:some/demo"]
    there = [fetched(name) for name in names]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert [fetched(name) for name in names] == there
    for name in ("hf:some/data/train.npz", "hf:some/other"):
        with pytest.raises(RequestError, match=f"^{name}: not whole in the cache, and HF_HUB_OFFLINE is set"):
            fetched(name)
    assert hub.asked == []


def test_no_network_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **keywords: object) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    for name in ("hf:some/demo", "hf:some/demo/a.bin"):
        with pytest.raises(NoConnectionError, match=rf"^{name}: no connection to Hugging Face \(nobody answers\)"):
            fetched(name)


def test_a_server_that_fails_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refused["some/demo"] = (400, "")
    with pytest.raises(WorkError, match="Hugging Face refuses"):
        fetched("hf:some/demo/a.bin")


def test_an_output_is_no_name_on_the_hub(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "hf:some/demo", "hf:some/new"]) == 2
    assert "an output is written here; `neon push` brings a folder to the Hub" in capsys.readouterr().err
    assert "some/new" not in hub.repositories


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a run leaves it."""
    folder = tmp_path / "run"
    (folder / "self-training").mkdir(parents=True)
    texts = {
        "README.md": "# Demo\n", "report.html": '<a href="https://a.b/c/d">"/srv/models/base.safetensors"</a>',
        "scores.json": '{"base": "/srv/models/base.safetensors"}', "scores.csv": "w,fid\n1,2\n", "run.json": "{}",
        "notes.txt": f"in {Path.home()}/models", "evaluations.jsonl": "{}", "out.log": "", "model.py": "", ".lock": "",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "improved.safetensors").write_bytes(weights(1.0))
    (folder / "self-training/snapshot.safetensors").write_bytes(weights(2.0))
    return folder


PUSHED = {"README.md", "improved.safetensors", "report.html", "scores.csv", "scores.json"}


def test_a_dry_run_of_push_lists_files_and_asks_nothing(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "hf:some/new", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("bytes  ")[1] for line in lines if "bytes  " in line} == PUSHED
    left_out = {line.split("left out  ")[1].split(" (")[0] for line in lines if "left out  " in line}
    assert left_out == {path.name for path in run.iterdir()} - PUSHED
    assert lines[-1].endswith("would go to hf:some/new; nothing was uploaded")
    assert hub.asked == []


def test_what_is_pushed_can_be_named(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["push", str(run), "hf:some/new", "--private"]) == 0
    pushed = hub.repositories["some/new"]
    assert set(pushed) == PUSHED
    assert pushed["report.html"] == b'<a href="https://a.b/c/d">"base.safetensors"</a>'
    assert json.loads(pushed["scores.json"]) == {"base": "base.safetensors"}
    assert "/srv" in (run / "report.html").read_text()
    [created] = hub.created
    assert created["name"] == "new" and (created.get("visibility") == "private" or created.get("private"))
    assert "Bearer hf_secret" in hub.tokens
    assert fetched("hf:some/new").read_bytes() == weights(1.0)


def test_metadata_of_pushed_weights_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    told = {"config": json.dumps({"place": "/home/someone/pipes/small", "sizes": "1/2"}), "w": "1"}
    tensors = {"/home/someone/x": torch.arange(3.0), "b": torch.ones(2, 2)}
    for name, metadata in (("places", told), ("none", {"w": "1"})):
        save_safetensors(tmp_path / f"{name}.safetensors", tensors, metadata)
    assert content_of(tmp_path / "none.safetensors", tmp_path) == tmp_path / "none.safetensors"
    pushed = content_of(tmp_path / "places.safetensors", tmp_path)
    assert isinstance(pushed, Path) and pushed.stat().st_size == (tmp_path / "places.safetensors").stat().st_size
    with open_checkpoint(pushed) as file:
        assert json.loads(file.metadata["config"]) == {"place": "small", "sizes": "1/2"}
        assert file.metadata["w"] == "1"
        assert all(torch.equal(file.tensor(key), tensor) for key, tensor in tensors.items())


def test_a_pipeline_is_pushed_with_its_components(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("unet", "images"):
        (tmp_path / "pipe" / name).mkdir(parents=True)
    (tmp_path / "pipe/model_index.json").write_text("{}")
    for name, data in model(1.0).items():
        (tmp_path / "pipe/unet" / name).write_bytes(data)
    assert main(["push", str(tmp_path / "pipe"), "hf:some/pipe", "--dry-run"]) == 0
    assert "unet/model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hf:some/new/file.bin", "hf:some/new@v1", "some/new"])
def test_push_goes_to_a_whole_repository(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), name]) == 2
    assert "expected hf:ORG/REPO" in capsys.readouterr().err


def test_push_needs_weights_and_somebody_logged_in(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["push", str(run), "hf:some/new"]) == 2
    assert "nobody is logged in; `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.refused["some/new"] = (403, "")
    assert main(["push", str(run), "hf:some/new"]) == 2
    assert "Hugging Face does not let you (403)" in capsys.readouterr().err
    (run / "improved.safetensors").unlink()
    assert main(["push", str(run), "hf:some/new", "--dry-run"]) == 2
    assert "holds no weights to upload" in capsys.readouterr().err
    assert main(["push", str(run / "none"), "hf:some/new"]) == 2
    assert "not a folder" in capsys.readouterr().err
    assert "some/new" not in hub.repositories
