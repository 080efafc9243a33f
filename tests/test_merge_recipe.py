"""Merges by a recipe: flags from a file, w by the names of tensors, the recipe beside an output, and mergekit's."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.cli.app import main
from neon.merge import merge_state
from tests.tiny import pair

PATTERNS = {"w": {"one.*": 0.5, "*": -1, "default": 2}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base and tuned as files and as folders of models."""
    monkeypatch.chdir(tmp_path)
    for name, index in (("base", 0), ("tuned", 1)):
        tensor = pair(torch.float32)[index]
        save_safetensors(f"{name}.safetensors", {"one.w": tensor, "two.w": 2 * tensor, "three.w": 3 * tensor}, {})
        Path(name).mkdir()
        save_safetensors(f"{name}/model.safetensors", load_state(f"{name}.safetensors"), {"format": "pt"})
        Path(name, "config.json").write_text('{"dtype": "float32"}')
    return tmp_path


def recipe(**entries: object) -> str:
    files = {"base": "base.safetensors", "self_trained": "tuned.safetensors", "w": 1.5, "output": "neon.safetensors"}
    content = {key: value for key, value in {**files, **entries}.items() if value is not None}
    Path("recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "recipe.yaml"


def merged(w: float, name: str) -> torch.Tensor:
    return merge_state(load_state("base.safetensors"), load_state("tuned.safetensors"), w)[name]


def test_a_recipe_stands_for_flags_and_what_is_typed_wins(here: Path) -> None:
    assert main(["merge", "--recipe", recipe(dtype="bfloat16")]) == 0
    assert torch.equal(load_state("neon.safetensors")["one.w"], merged(1.5, "one.w").bfloat16())
    assert main(["merge", "--recipe", recipe(**PATTERNS), "-w", "1", "--output=b.safetensors"]) == 0
    assert torch.equal(load_state("b.safetensors")["one.w"], merged(1, "one.w"))
    Path("recipe.json").write_text(json.dumps(yaml.safe_load(Path(recipe(w=[1, 2])).read_text())))
    assert main(["merge", "--recipe=recipe.json", "--output", "{w}.safetensors"]) == 0
    assert torch.equal(load_state("2.safetensors")["one.w"], merged(2, "one.w"))


def test_the_first_pattern_that_matches_says_the_w_of_a_tensor(here: Path) -> None:
    assert main(["merge", "--recipe", recipe(w={"one*": 0.5, "*w": -1.0, "t*": 9, "default": 2})]) == 0
    found = load_state("neon.safetensors")
    assert torch.equal(found["one.w"], merged(0.5, "one.w"))
    assert torch.equal(found["two.w"], merged(-1, "two.w"))
    flags = ["merge", "--base", "base.safetensors", "--self-trained", "tuned.safetensors", "-w", "2"]
    assert main([*flags, "--w-of", "one*=0.5", "--output", "a.pth"]) == 0
    assert torch.equal(load_state("a.pth")["three.w"], merged(2, "three.w"))
    assert json.loads(json.loads(Path("a.pth.json").read_text())["recipe"])["w"] == {"one*": 0.5, "default": 2.0}


@pytest.mark.parametrize("w", [1.5, {"one*": 0.5, "default": 2.0}])
def test_the_recipe_that_an_output_carries_gives_the_same_bytes(here: Path, w: object) -> None:
    folders = {"base": "base", "self_trained": "tuned", "shard_size": "500B"}
    assert (
        main(["merge", "--recipe", recipe(w=w, dtype="bfloat16", rounding="stochastic", **folders, output="neon")]) == 0
    )
    kept = yaml.safe_load(Path("neon/merge.yaml").read_text())
    assert kept == {**folders, "w": w, "dtype": "bfloat16", "rounding": "stochastic"}
    assert main(["merge", "--recipe", "neon/merge.yaml", "--output", "again"]) == 0
    files = sorted(path.name for path in Path("neon").iterdir())
    assert len(files) > 4
    assert all(Path("neon", name).read_bytes() == Path("again", name).read_bytes() for name in files)


def test_a_single_file_carries_its_recipe_where_w_is_by_pattern(here: Path) -> None:
    assert main(["merge", "--recipe", recipe(w={"one*": 0.5, "default": 2})]) == 0
    Path("carried.json").write_text(open_checkpoint("neon.safetensors").metadata["recipe"])
    assert main(["merge", "--recipe", "carried.json", "--output", "again.safetensors"]) == 0
    assert Path("neon.safetensors").read_bytes() == Path("again.safetensors").read_bytes()
    assert main(["merge", "--recipe", recipe(base="neon.safetensors"), "--output", "next.safetensors"]) == 0
    assert "recipe" not in open_checkpoint("next.safetensors").metadata, "of the base, not of this merge"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"w": {"nothing*": 1, "default": 2}}, "'nothing*': matches no merged tensor"),
        ({"w": {"one*": 1}}, "w: default is None"),
        ({"w": {"one*": "much", "default": 1}}, "w: one* is 'much'"),
        ({"w": []}, "w is None"),
        ({"w": True}, "w is True"),
        ({"base": 3}, "base is 3"),
        ({"weights": 1}, "'weights' is nothing that a recipe can hold"),
        ({"seed": 1.5, "rounding": "stochastic"}, "seed is 1.5"),
        ({"dtype": "int4"}, "int4"),
        ({"w": float("nan")}, "finite"),
    ],
)
def test_mistakes_are_named_in_one_line(
    here: Path, entries: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "--recipe", recipe(**entries)]) == 2
    assert said in capsys.readouterr().err
    assert not Path("neon.safetensors").exists()


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch ran']", "[1", "- a", ""])
def test_what_is_no_recipe_is_refused_and_not_run(here: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(text)
    assert main(["merge", "--recipe", "bad.yaml"]) == 2
    assert "bad.yaml" in capsys.readouterr().err and not Path("ran").exists()


def test_a_mergekit_recipe_says_the_same_sums(here: Path) -> None:
    flags = ["--base", "base", "--self-trained", "tuned", "-w", "1.5", "--w-of", "*one*=0", "--dtype", "bfloat16"]
    assert main(["merge", *flags, "--output", "neon", "--export-mergekit", "kit.yaml"]) == 0
    kit = yaml.safe_load(Path("kit.yaml").read_text())
    first, second = (model["parameters"]["weight"] for model in kit.pop("models"))
    assert first == [{"filter": "one", "value": 1.0}, {"value": 2.5}]
    assert second == [{"filter": "one", "value": 0.0}, {"value": -1.5}]
    said = {"merge_method": "linear", "parameters": {"normalize": False}, "dtype": "float32", "out_dtype": "bfloat16"}
    assert kit == said


@pytest.mark.parametrize("flags", [["--w-of", "one.w=0"], ["--rounding", "stochastic", "--dtype", "float16"]])
def test_what_mergekit_has_no_words_for_is_said_before_anything_is_written(
    here: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", "--base", "base", "--self-trained", "tuned", "-w", "1.5", "--output", "neon", *flags]
    assert main([*command, "--export-mergekit", "kit.yaml"]) == 2
    assert "mergekit has no words" in capsys.readouterr().err
    assert not Path("neon").exists() and not Path("kit.yaml").exists()
