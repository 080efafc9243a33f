"""Prompts as labels: a text file, other prompts for other purposes, and sets that carry them."""

import json
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neon
from neon.cli import main
from neon.data import prompts
from neon.data.images import ImageDataset, from_uint8, to_uint8
from neon.data.prompts import prompts_for, read_prompts
from neon.errors import RequestError
from neon.model import GenerativeModel, save_model
from neon.noise import SEEDS_PER_PURPOSE, Noise, Purpose
from neon.recipe import Recipe
from tests.programs import write_real
from tests.tiny import tiny_images

SHAPE = tiny_images(1).image_shape
SIX = ("a", "a cat", "a cat and", "a cat and a", "a cat and a dog", "a cat and a dog play")
seen: dict[tuple[str, Purpose], set[str]] = defaultdict(set)
"""what was asked for, by what and for which purpose"""


@dataclass(frozen=True)
class Settings:
    num_steps: int = 1


class Asked(GenerativeModel):
    """Images as grey as the prompt is long."""

    architecture = "asked"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.image_shape, self.num_classes = config, SHAPE, 0
        self.network = nn.Linear(1, torch.Size(SHAPE).numel())
        self.default_settings, self.recipe = Settings(), Recipe(batch_size=2, lr=1e-3)
        self.prompts = ()

    def _grey(self, what: str, noise: Any, labels: Tensor | None) -> Tensor:
        assert self.prompts is not None
        assert labels is not None
        asked = [self.prompts[label] for label in labels.tolist()]
        for prompt, seed in zip(asked, noise.seeds, strict=True):
            seen[what, Purpose(seed // SEEDS_PER_PURPOSE)].add(prompt)
        lengths = torch.tensor([[len(prompt) / 10] for prompt in asked])
        return self.network(lengths).view(-1, *SHAPE)  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(self, noise: Noise, labels: Tensor | None, settings: Any) -> Tensor:
        return to_uint8(self._grey("sample", noise, labels) + noise.normal(*SHAPE) / 4)

    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        return from_uint8(images)

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        return (self._grey("train", noise, labels) - examples).square().flatten(1).mean(1)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network, six prompts and real images, where two prompts are enough for each purpose."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompts, "FEWEST", 2)
    torch.manual_seed(0)
    save_model("base.safetensors", Asked({}))
    Path("prompts.txt").write_text("\n".join(SIX))
    write_real(tmp_path, tiny_images(60))
    seen.clear()
    return tmp_path


ASKED = ("--network", "base.safetensors", "--model", f"{__file__}:Asked")


def test_a_set_carries_its_prompts_and_is_trained_on_by_them(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--prompts", "prompts.txt", "--num_images", "4"]
    assert main(["sample", *ASKED, *asked, "--outdir", "synthetic.zip"]) == 0
    assert "prompts.txt: 6 prompts, of which synthetic set, selection and report have a third each" in (
        capsys.readouterr().err
    )
    with zipfile.ZipFile("synthetic.zip") as packed:
        lines = [json.loads(line) for line in packed.read("metadata.jsonl").splitlines()]
        labels = json.loads(packed.read("dataset.json"))["labels"]
    assert [line["file_name"] for line in lines] == [f"{index:08d}.png" for index in range(4)]
    assert [line["text"] for line in lines] == [SIX[label] for _, label in labels]
    assert {line["text"] for line in lines} == {SIX[0], SIX[3]}
    # The set says what its images were asked by, so no file of prompts is needed.
    assert main(["selftrain", *ASKED, "--data", "synthetic.zip", "--outdir", "run", "--total_images", "8"]) == 0
    images = ImageDataset("synthetic.zip")
    assert images.texts == [line["text"] for line in lines]


def test_purposes_have_prompts_of_their_own(work: Path) -> None:
    generator = neon.load("base.safetensors", model=Asked, prompts="prompts.txt")
    neon.improve_model(
        generator, "run", real="real.npz", features="features.safetensors", num_synthetic=4, training_images=8,
        select_images=8, lr=0.01, w=(0.0, 1.0), limit=2, tune_sampler=False, baselines=False, snapshots=1,
    )  # fmt: skip
    of = {purpose: {SIX[number] for number in prompts_for(purpose, 6)} for purpose in list(Purpose)[:3]}
    assert seen == {
        ("train", Purpose.TRAINING): of[Purpose.SYNTHETIC], **{("sample", one): asked for one, asked in of.items()}
    }  # fmt: skip
    assert sorted(prompt for one in of.values() for prompt in one) == sorted(SIX)
    assert "6 prompts, of which synthetic set" in Path("run/report.html").read_text()
    record = json.loads(Path("run/run.json").read_text())
    assert (record["recipe"]["prompts"], len(record["prompts_sha256"])) == ("prompts.txt", 64)


def test_too_few_prompts_are_shared_and_it_is_said(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("few.txt").write_text("one\ntwo\n")
    assert main(["sample", *ASKED, "--prompts", "few.txt", "--num_images", "4", "--outdir", "out"]) == 0
    assert "few.txt: 2 prompts for synthetic set, selection and report alike" in capsys.readouterr().err
    assert set(ImageDataset("out").texts or ()) == {"one", "two"}
    choose = "tune --base base.safetensors --self-trained base.safetensors --select-stats real.npz --features x.pt"
    assert main([*choose.split(), "--model", f"{__file__}:Asked", "--prompts", "few.txt"]) == 2
    assert "few.txt: 2 prompts for synthetic set, selection and report alike" in capsys.readouterr().err
    assert {purpose: list(prompts_for(purpose, 2)) for purpose in Purpose if purpose != Purpose.TRAINING} == {
        Purpose.SYNTHETIC: [0, 1], Purpose.SELECTION: [0, 1], Purpose.REPORT: [0, 1]
    }  # fmt: skip


def test_a_prompt_is_named_by_its_number(work: Path) -> None:
    assert (
        main(["sample", *ASKED, "--prompts", "prompts.txt", "--class", "5", "--num_images", "2", "--outdir", "o"]) == 0
    )
    assert ImageDataset("o").texts == [SIX[5]] * 2
    generator = neon.load("base.safetensors", model=Asked, prompts="prompts.txt")
    assert torch.equal(generator.sample(2, label=5), generator.sample(2, label=[5, 5]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sample", "--num_images", "4", "--outdir", "out"), "asked by prompts; name a text file"),
        (("sample", "--num_images", "4", "--class", "0", "--outdir", "out"), "asked by prompts; name a text file"),
        (("selftrain", "--data", "real", "--outdir", "out", "--total_images", "4"), "real: no metadata.jsonl"),
        (("sample", "--num_images", "4", "--outdir", "out", "--prompts", "none.txt"), "none.txt"),
        (("sample", "--num_images", "4", "--outdir", "out", "--prompts", "base.safetensors"), "no text in UTF-8"),
    ],
)
def test_missing_prompts_are_said_in_one_line(
    words: tuple[str, ...], said: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([words[0], *ASKED, *words[1:]]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if said in line]) == 1
    assert not Path("out").exists()


def test_prompts_are_not_for_a_network_of_classes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = Path(neon.__file__).parent / "demo" / "base.safetensors"
    words = ["--network", str(base), "--prompts", "prompts.txt", "--num_images", "4", "--outdir", "out"]
    assert main(["sample", *words]) == 2
    assert "--prompts: a network of edm is not asked by prompts" in capsys.readouterr().err


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n  a dog, 2\u20293 \na cat\n".encode())
    assert read_prompts(file) == ("a cat", "a dog, 2\u20293")
    file.write_text("\n \n")
    with pytest.raises(RequestError, match="no prompts in it"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 of metadata.jsonl is no JSON"),
        ('{"file_name": "00000001.png", "text": "\\ud800"}', "line 2 of metadata.jsonl is no JSON"),
        ("[" * 100_000, "line 2 of metadata.jsonl is no JSON"),
        ("[]", "line 2 of metadata.jsonl has no file_name"),
        ('{"file_name": "00000001.png", "label": 3}', "has no file_name with a text"),
        ('{"file_name": "other.png", "text": "a"}', "has no text for 1 of 2 images, the first is 00000001.png"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(line: str, said: str, work: Path) -> None:
    assert main(["sample", *ASKED, "--prompts", "prompts.txt", "--num_images", "2", "--outdir", "set"]) == 0
    first = Path("set/metadata.jsonl").read_text().splitlines()[0]
    Path("set/metadata.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(RequestError, match=said):
        _ = ImageDataset("set").texts


def test_a_set_of_other_prompts_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", *ASKED, "--prompts", "prompts.txt", "--num_images", "2", "--outdir", "set"]) == 0
    Path("few.txt").write_text("one\n")
    words = ["--data", "set", "--outdir", "out", "--total_images", "4", "--prompts", "few.txt"]
    assert main(["selftrain", *ASKED, *words]) == 2
    assert "is none of the 1 that the network is asked by" in capsys.readouterr().err
