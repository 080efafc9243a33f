"""Pipelines that are asked by prompts: sampled as the library does, and each prompt embedded once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers", minversion="5")

import diffusers

from neon.checkpoint import load_state
from neon.cli import main
from neon.errors import RequestError
from neon.lora.settings import lora_of
from neon.lora.trained import LowRank
from neon.merge import merge_files
from neon.model import load_model, open_autoencoder, save_model
from neon.noise import ImageNoise
from neon.tune.weights import write_lora
from neon_diffusers.kinds.flow import Flow
from neon_diffusers.model import DiffusersModel
from tests import pipelines

SEEDS = (3, 4, 5)
PROMPTS = ("a cat", "2 dogs", "the sea")
KINDS = ("stable", "velocity", "flow", "flow with t5")


@pytest.fixture(scope="session")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prompted")
    velocity = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, prediction_type="v_prediction")
    return {
        "stable": pipelines.stable(root / "stable"),
        "velocity": pipelines.stable(root / "velocity", velocity),
        "flow": pipelines.stable3(root / "flow"),
        "flow with t5": pipelines.stable3(root / "t5", t5=True),
    }


def opened(path: Path, prompts: tuple[str, ...] = PROMPTS) -> DiffusersModel:
    model = load_model(path)
    assert isinstance(model, DiffusersModel)
    open_autoencoder(model, None)
    model.use_prompts(prompts)
    return model


def images(model: Any, seeds: tuple[int, ...] = SEEDS, labels: Any = (0, 1, 2), **changed: Any) -> torch.Tensor:
    settings = replace(model.default_settings, **{"num_steps": 3, **changed})
    return model.sample(ImageNoise(seeds), torch.tensor(labels), settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_are_those_of_the_library(kind: str, guidance: float, prompted: dict[str, Path]) -> None:
    model = opened(prompted[kind])
    lacks = dict.fromkeys(("text_encoder_3", "tokenizer_3")) if kind == "flow" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(prompted[kind], **lacks)
    pipe.set_progress_bar_config(disable=True)
    own = [model.kind.embed(prompt) for prompt in (*PROMPTS, *[""] * len(PROMPTS))]
    said = {name: torch.cat([row[name] for row in own]) for name in own[0]}
    if isinstance(model.kind, Flow):
        (states, none), (pooled, no_pooled) = (one.chunk(2) for one in (model.kind.joined(said), said["pooled"]))
        theirs = pipe.encode_prompt(list(PROMPTS), None, None)
        given = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": no_pooled}
    else:
        states, none = said["states"].chunk(2)
        theirs, given = pipe.encode_prompt(list(PROMPTS), "cpu", 1, True), {}
    given |= {"prompt_embeds": states, "negative_prompt_embeds": none}
    torch.testing.assert_close((states, none, *list(given.values())[:-2]), theirs)
    drawn = pipe(
        **given, guidance_scale=guidance, num_inference_steps=3, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images  # fmt: skip
    ours = images(model, guidance=guidance)
    assert torch.equal(ours, torch.from_numpy((drawn * 255).round()).permute(0, 3, 1, 2).byte())


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_same_in_any_batch_and_beside_any_prompts(kind: str, prompted: dict[str, Path]) -> None:
    eight = tuple(range(8))
    together = images(opened(prompted[kind], tuple("abcdefgh")), eight, eight)
    for first in (0, 7):
        alone = images(opened(prompted[kind], ("x", "abcdefgh"[first])), (first,), (1,))
        assert torch.equal(alone[0], together[first])
    assert len({image.numpy().tobytes() for image in images(opened(prompted[kind]), (0,) * 3)}) == 3  # by prompt


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_an_image_is_its_own(kind: str, prompted: dict[str, Path], tmp_path: Path) -> None:
    model = opened(prompted[kind])
    save_model(tmp_path / "snapshot.safetensors", model)
    again = opened(tmp_path / "snapshot.safetensors")  # finds autoencoder and text encoders where they lie
    pictures, labels = torch.randint(0, 256, (3, *model.image_shape), dtype=torch.uint8), torch.tensor([0, 1, 2])
    examples = model.encode(pictures, ImageNoise(SEEDS))
    terms = model.training_loss(examples, labels, ImageNoise(SEEDS))
    assert terms.shape == (3,)
    alone = [again.training_loss(examples[[i]], labels[[i]], ImageNoise(SEEDS[i : i + 1])) for i in range(3)]
    torch.testing.assert_close(terms, torch.cat(alone))


def test_the_loss_of_a_flow_is_that_of_its_velocity(prompted: dict[str, Path]) -> None:
    model = opened(prompted["flow"])
    pictures = torch.randint(0, 256, (3, *model.image_shape), dtype=torch.uint8)
    examples, seen = model.encode(pictures, ImageNoise(SEEDS)), {}

    def network(x: torch.Tensor, states: object, pooled: object, t: torch.Tensor) -> Any:
        seen.update(x=x, t=t)
        return type("Said", (), {"sample": torch.zeros_like(x)})

    model.network.forward = network  # type: ignore[method-assign, assignment]
    terms = model.training_loss(examples, torch.tensor([0, 1, 2]), ImageNoise(SEEDS))
    noise = ImageNoise(SEEDS)
    clean = model.kind.clean(examples, noise)
    noise.uniform(), noise.normal()
    drawn, sigma = noise.normal(*model.kind.shape), (seen["t"] / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["x"], (1 - sigma) * clean + sigma * drawn)
    torch.testing.assert_close(terms, (drawn - clean).square().flatten(1).mean(1))


def test_each_prompt_is_embedded_once(prompted: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = opened(prompted["stable"]), []
    embed = model.kind.embed
    monkeypatch.setattr(model.kind, "embed", lambda prompt: asked.append(prompt) or embed(prompt))
    for labels in ((0, 1, 1), (1, 0, 0)):
        images(model, labels=labels)
    assert sorted(asked) == ["", "2 dogs", "a cat"]


def edited(folder: Path, target: Path, *left_out: str) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*left_out))
    return target


@pytest.mark.parametrize(
    ("kind", "left_out", "said"),
    [
        ("stable", ("tokenizer",), "tokenizer: no tokenizer.json"),
        ("flow", ("tokenizer_2",), "tokenizer_2: no tokenizer.json"),
        ("flow", ("text_encoder_2",), "its text_encoder_2 has no configuration"),
        ("stable", ("model.safetensors",), "text_encoder"),
    ],
)
def test_parts_that_are_missing_are_named(
    kind: str, left_out: tuple[str, ...], said: str, prompted: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=said):
        opened(edited(prompted[kind], tmp_path / "part", *left_out))


def test_a_long_prompt_is_cut_and_it_is_said(prompted: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    cut, whole = (
        opened(prompted["stable"], (prompt,)) for prompt in ("a b c d e f g h i j k l", "a b c d e f g h i j")
    )
    assert torch.equal(images(cut, (1,), (0,)), images(whole, (1,), (0,)))
    assert capsys.readouterr().err.count("more than 12 tokens are cut") == 1


class Runs:
    """What a pickle runs that is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_nothing_of_text_encoders_or_tokenizers_runs(
    prompted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = edited(prompted["stable"], tmp_path / "hostile"), tmp_path / "ran"
    config = folder / "tokenizer" / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **code}))
    for place in (folder, folder / "tokenizer"):
        (place / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
        monkeypatch.syspath_prepend(str(place))
    assert torch.equal(images(opened(folder)), images(opened(prompted["stable"])))
    assert not ran.exists()
    weights = folder / "text_encoder" / "model.safetensors"
    weights.unlink()
    torch.save({"x": Runs(ran)}, weights.with_name("pytorch_model.bin"))
    with pytest.raises(RequestError, match="refused"):
        opened(folder)
    assert not ran.exists()


def test_a_set_of_a_pipeline_is_drawn_and_trained_on(prompted: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    network = ["--network", str(prompted["flow"])]
    asked = ["--prompts", str(tmp_path / "prompts.txt"), "--num_images", "4", "--num_steps", "2"]
    drawn = str(tmp_path / "synthetic")
    assert main(["sample", *network, *asked, "--outdir", drawn]) == 0
    words = ["--data", drawn, "--outdir", str(tmp_path / "run"), "--total_images", "4", "--batch", "2"]
    assert main(["selftrain", *network, *words]) == 0
    assert len(list((tmp_path / "run").glob("snapshot-*.safetensors"))) == 1


@pytest.mark.parametrize("kind", ["stable", "flow"])
def test_the_library_loads_an_adapter_of_the_merge(kind: str, prompted: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base, lora = prompted[kind], tmp_path / "lora.safetensors"
    model = opened(base)
    usual = lora_of(2, None, (), model.lora_targets)
    assert usual is not None
    run = LowRank(model, usual, 0, tells_moved=False)
    with torch.no_grad():
        for number, factor in enumerate(run.parameters):
            factor.add_(0.05 * (1 + number % 3))
    run.save(lora, run.parameters, {"images_seen": "1"})
    assert write_lora(base, lora, 1.0, tmp_path / "adapter", of_pipeline=True) == [tmp_path / "adapter"]
    merge_files(base, lora, [1.0], tmp_path / "merged.safetensors")
    lacks = dict.fromkeys(("text_encoder_3", "tokenizer_3")) if kind == "flow" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(base, **lacks)
    pipe.load_lora_weights(tmp_path / "adapter")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found = (pipe.transformer if kind == "flow" else pipe.unet).state_dict()
    plain = opened(base).network.state_dict()
    merged = load_state(tmp_path / "merged.safetensors")
    assert sum(not torch.equal(merged[name], plain[name]) for name in merged) >= 4
    for name, weights in merged.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=1e-6)
