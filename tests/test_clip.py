"""CLIP: its features and its scores beside transformers' own, and how well images of prompts are said to fit them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("diffusers")

import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from neon.cli import main
from neon.data.images import ArrayDataset, ImageDataset
from neon.errors import RequestError
from neon.evaluate import Tally
from neon.metrics.clip import CLIPFeatures
from neon.metrics.reference import NamedFeatures
from neon.model import load_model, open_autoencoder
from neon.noise import Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.sampling import write_samples
from tests import pipelines
from tests.programs import write_real

CPU = torch.device("cpu")
PROMPTS = ("a cat", "2 dogs", "the sea", "a long prompt of more letters than it reads")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that is asked by prompts, a file of such, and real images of its size."""
    work = tmp_path_factory.mktemp("work")
    pipelines.stable(work / "pipeline")
    (work / "prompts.txt").write_text("\n".join(PROMPTS))
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_real(work, ArrayDataset(images, torch.arange(40) % 3, "real"))
    return work


def by_transformers(folder: Path, images: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Image embeddings [B, F], and the cosine of each with its prompt in percent [B]."""
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=list(images), return_tensors="pt")
    words = transformers.CLIPTokenizer.from_pretrained(folder)(
        list(PROMPTS), padding=True, truncation=True, max_length=pipelines.LENGTH, return_tensors="pt"
    )
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(**pixels, **words)
        features = model.get_image_features(**pixels).pooler_output
    return features, 100 * (found.image_embeds * found.text_embeds).sum(1)


@pytest.mark.parametrize("size", [(16, 16), (37, 24), (20, 61)])
def test_features_and_scores_are_those_of_transformers(size: tuple[int, int], folder: Path) -> None:
    images = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    clip = CLIPFeatures.load(folder)
    features = clip(images)
    expected, cosines = by_transformers(folder, images.numpy())
    assert features.dtype == torch.float32 and features.shape == (4, clip.dim)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clip.fit(features, PROMPTS), cosines.clamp(min=0), rtol=1e-5, atol=1e-4)
    assert (clip.fit(features, PROMPTS) > 0).any()


def test_an_interrupted_score_goes_on_to_the_same_bits(folder: Path) -> None:
    clip = CLIPFeatures.load(folder)
    features = clip(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8))
    whole, first, second = (Tally(clip, 4, keep_features=False, device=CPU, prompted=True) for _ in range(3))
    for tally in (whole, first):
        tally.update(features[:2], PROMPTS[:2])
    second.take_up(first.state())
    for tally in (whole, second):
        tally.update(features[2:], PROMPTS[2:])
    assert second.clip_score == whole.clip_score
    assert whole.clip_score == pytest.approx(clip.fit(features, PROMPTS).mean().item(), rel=1e-6)


def clip_score(text: str) -> str:
    found = re.search(r"CLIP=(\S+)", text)
    assert found, text
    return found[1]


def test_a_network_is_scored_as_the_set_it_draws(
    folder: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, statistics, features = tmp_path / "set", tmp_path / "real.npz", f"clip={folder}"
    model = load_model(work / "pipeline")
    open_autoencoder(model, None)
    model.use_prompts(PROMPTS)
    seeds, label = image_seeds(Purpose.REPORT, 0, 12), model.labels_for(Purpose.REPORT, 12, 0)
    settings = replace(model.default_settings, num_steps=2)
    write_samples(model, seeds, settings, drawn, batch_size=4, processes=Processes(), label=label)
    assert main(["stats", f"{work}/real", str(statistics), "--features", features]) == 0
    capsys.readouterr()
    assert main(["fid", str(drawn), str(statistics), "--features", features, "--json", f"{tmp_path}/set.json"]) == 0
    of_set = clip_score(capsys.readouterr().out)
    words = ["--ref", str(statistics), "--features", features, "--json", f"{tmp_path}/network.json"]
    asked = ["--network", f"{work}/pipeline", "--prompts", f"{work}/prompts.txt", "--num_images", "12"]
    assert main(["evaluate", *asked, *words, "--num_steps", "2", "--batch_size", "5"]) == 0
    assert clip_score(capsys.readouterr().out) == of_set
    clip, images = CLIPFeatures.load(folder), ImageDataset(drawn)
    assert images.texts is not None
    expected = clip.fit(clip(images.examples(range(12))), images.texts).mean().item()
    for name in ("set", "network"):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["clip_score"] == pytest.approx(expected, rel=1e-5)


def test_a_whole_run_reports_it_beside_the_distances(folder: Path, work: Path, tmp_path: Path) -> None:
    command = [
        "improve", f"{work}/pipeline", "--prompts", f"{work}/prompts.txt", "--real", f"{work}/real",
        "--features", f"{work}/features.safetensors", f"clip={folder}", "--num_steps", "2", "--num_synthetic", "6",
        "--training_images", "8", "--batch", "4", "--select_images", "12", "--report_images", "9",
        "--lr", "1e-3", "--w", "0", "1", "--limit", "2", "--no_tune_sampler", "--no_baselines",
        "--snapshots", "1", "--processes", "1", "--out", f"{tmp_path}/run",
    ]  # fmt: skip
    assert main(command) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "CLIP score" in page
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert all(0 < row["clip_score"] < 100 for row in scores["rows"].values())
    assert set(scores["beside"]) == {"fd_clip"}


@pytest.mark.parametrize("lacks", ["config.json", "tokenizer.json", "model.safetensors", "all"])
def test_what_is_no_clip_is_one_line(lacks: str, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken, ignore=shutil.ignore_patterns("*" if lacks == "all" else lacks))
    with pytest.raises(RequestError, match=str(broken)) as caught:
        NamedFeatures(names=(f"clip={broken}",)).load(CPU)
    assert "\n" not in str(caught.value)
