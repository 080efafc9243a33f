"""The model card: front matter that the Hub reads, the report's scores, and names that cannot break either."""

import ast
import dataclasses
import re
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from neon.errors import RequestError
from neon.report.card import Card, write_card
from neon.report.record import Report
from neon.report.words import conclusions, score_table
from neon.runtime.files import sha256_file
from tests.test_report import fair_report, tuned

CARD = Card(
    architecture="edm",
    weights=("improved.pkl", "improved.safetensors"),
    base="base.pkl",
    base_sha256="ab" * 32,
    w=0.75,
    settings={"num_steps": 5, "solver": "euler", "S_max": float("inf")},
    synthetic_images=1000,
    training_images=6400,
    image_shape=(1, 14, 14),
    num_classes=10,
    real="test-statistics.npz",
)
HOSTILE = {
    "front matter": "a\n---\nlicense: mit\n---\n# b",
    "yaml": "- {a: [b, 'c\": !!python/object:os.system |\n  >",
    "a fence": "a\n```\n```` b ```",
    "backticks": "`a`` b`",
    "a table": "a | b |\n|---|---|",
    "a heading": "\n# a\n\n## Licence\n",
    "a template": "$w ${base} $$",
    "links": "![a](http://127.0.0.1/b) <script>alert(1)</script> &amp; *a* _b_ ~~c~~",
    "controls": "a\r\x00\x1b[31m\u2028\u202e\udcff",
}


def write(folder: Path, report: Report | None = None, **changes: Any) -> str:
    card = dataclasses.replace(CARD, **changes)
    for name in card.weights:
        (folder / name).write_text(name)
    return write_card(folder, report or fair_report(), card).read_text()


def front(text: str) -> dict[str, Any]:
    _, metadata, _ = text.split("---\n", 2)
    return dict(yaml.safe_load(metadata))


def test_the_front_matter_is_what_the_hub_expects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    read = front(write(tmp_path))
    assert read["library_name"] == "neon" and read["pipeline_tag"] == "unconditional-image-generation"
    assert read["tags"] == ["neon", "image-generation", "edm"]
    assert read["license"] == "unknown" and "base_model" not in read, "to be filled in"
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == read
    (score,) = card.data.eval_results
    assert (score.metric_type, score.metric_value, score.dataset_name) == ("fd_x", 4.5, "test-statistics.npz")
    assert score.metric_args == {"num_images": 10, "blocks": 3}
    assert score.task_type == "unconditional-image-generation"


@pytest.mark.parametrize(("metric", "told"), [("fid", "FID"), ("fd_x", "Fréchet distance of features of x (no FID)")])
def test_only_the_distance_of_inception_is_called_fid(tmp_path: Path, metric: str, told: str) -> None:
    text = write(tmp_path, dataclasses.replace(fair_report(), metric=metric))
    (model,) = front(text)["model-index"]
    (score,) = model["results"][0]["metrics"]
    assert (score["type"], score["name"]) == (metric, told)
    assert f"Scored against `test-statistics.npz`, by {told}, on 3 blocks of 10 images each" in text


def test_the_body_says_what_came_out_how_it_was_made_and_how_to_use_it(tmp_path: Path) -> None:
    text = write(tmp_path)
    assert f"\n\n**{conclusions(fair_report())[0]}**\n\n" in text
    assert "1,000 images were sampled from the base, `base.pkl`, with the settings below" in text
    assert "over 6,400 images" in text and "images of 14 x 14 pixels and 1 channel, 10 classes" in text
    assert "theta = (1 + w) theta_base - w theta_self_trained,  w = 0.75\n" in text
    assert '```python\nimport neon\n\nmodel = neon.load("improved.safetensors")\n' in text
    assert "images = model.sample(16, seed=0)  # uint8 [16, 1, 14, 14]\n```" in text
    assert "```sh\nneon sample --network improved.safetensors --num_images 16 --outdir samples\n```" in text
    assert '```json\n{"num_steps": 5, "solver": "euler", "S_max": "inf"}\n```' in text
    assert "**TO BE FILLED IN: these weights derive from `base.pkl`" in text
    for name in CARD.weights:
        assert f"- `{name}`, SHA-256 `{sha256_file(tmp_path / name)}`" in text
    assert f"- `base.pkl`, SHA-256 `{'ab' * 32}`" in text and "arXiv 2510.03597" in text


def test_a_set_drawn_with_other_settings_is_told_with_them(tmp_path: Path) -> None:
    text = write(tmp_path, synthetic_settings={"num_steps": 18})
    assert 'from the base, `base.pkl`, with `{"num_steps": 18}`. A copy' in text and "settings below. A" not in text


def test_without_classes_and_in_another_format_the_card_says_so(tmp_path: Path) -> None:
    text = write(tmp_path, num_classes=0, image_shape=(3, 8, 8), weights=("improved.pth",))
    assert "3 channels, no classes" in text and 'neon.load("improved.pth")' in text and "uint8 [16, 3, 8, 8]" in text


def rows(text: str) -> list[list[str]]:
    """The cells of the table, as Markdown shows them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [[re.sub(r"\\(.)", r"\1", cell) for cell in line] for line in cells]


def test_the_table_is_that_of_the_report_with_the_model_in_bold(tmp_path: Path) -> None:
    report = fair_report()
    head, line, *body = rows(write(tmp_path))
    assert line == ["---", *["---:"] * (len(head) - 1)]
    assert [[cell.replace("**", "") for cell in row] for row in [head, *body]] == score_table(report)
    bold = [all(cell.startswith("**") and cell.endswith("**") for cell in row if cell) for row in body]
    assert bold == [row is report.best for row in report.rows]


def prose(text: str) -> str:
    """A text without what Markdown shows as it is: code blocks, escaped characters, code spans."""
    text = re.sub("^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\\[^a-zA-Z0-9\s]|(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_foreign_texts_break_neither_the_front_matter_nor_the_body(tmp_path: Path, name: str) -> None:
    report = fair_report()
    marked = dataclasses.replace(report.neon, name=name)
    foreign = dataclasses.replace(
        report, rows=(*report.rows[:2], marked, *report.rows[3:]), neon=marked, metric=f"fd_{name}", title=name
    )
    settings = {name: name}
    plain = write(tmp_path, settings={"a": "b"})
    text = write(tmp_path, foreign, architecture=name, base=name, real=name, settings=settings,
                 synthetic_settings={"x": name})  # fmt: skip
    assert len(front(text)["tags"]) == 3 and front(text)["license"] == "unknown"
    assert front(text).keys() == front(plain).keys()
    assert ModelCard.load(tmp_path / "README.md").data.license == "unknown"

    body, plain_body = text.split("\n---\n", 1)[1], plain.split("\n---\n", 1)[1]
    assert len(body.split("\n")) == len(plain_body.split("\n")), "every foreign text stays on its line"
    starts = [[line[:2] for line in one.split("\n")] for one in (body, plain_body)]
    assert starts[0] == starts[1], "and begins none"
    assert [len(row) for row in rows(text)] == [len(row) for row in rows(plain)]
    for mark in "`<&_*~$[":
        assert prose(body).count(mark) == prose(plain_body).count(mark)


@pytest.mark.parametrize("name", ["a`b``c.safetensors", "it's $HOME; rm -rf.safetensors", "π.safetensors"])
def test_the_lines_to_type_name_the_file_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    text = write(tmp_path, weights=(name,))
    (call,) = re.findall(r"^model = neon\.load\((.*)\)$", text, re.MULTILINE)
    assert ast.literal_eval(call) == name
    (line,) = re.findall("^neon sample .*$", text, re.MULTILINE)
    assert shlex.split(line)[3] == name


def test_a_card_of_weights_that_are_not_there_or_of_another_w_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"improved\.pkl: not found; expected the weights that the card is of"):
        write_card(tmp_path, fair_report(), CARD)
    with pytest.raises(ValueError, match=r"w = 2 with the scores of w = 0\.75"):
        write(tmp_path, w=2.0)
    assert not (tmp_path / "README.md").exists()


def test_guidance_and_snapshot_of_the_choice_are_on_the_card(tmp_path: Path) -> None:
    assert "(guidance 2, snapshot 6.4 kimg)" in write(tmp_path, tuned(), w=1.0)
