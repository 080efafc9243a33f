"""What the page of a run without real images says and shows."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from neon.data.pictures import load_picture
from neon.report.grids import images_of
from neon.report.page import page
from neon.report.samples import Samples
from neon.report.unscored import Unscored, unscored_page, write_unscored
from tests.test_report import tuned

WS = (0.0, 0.5, 1.0, 1.5)
GRIDS = {w: torch.randint(256, (6, 3, 4, 5), dtype=torch.uint8) for w in WS}
UNSCORED = Unscored(
    title="Neon: <b>.pkl",
    samples=Samples(grids=GRIDS),
    notes=("1,000 images & one self-training.",),
    provenance={"command": "neon improve '<b>.pkl'", "rho": float("inf")},
)


class Pictures(HTMLParser):
    """Every figure with a w, and its picture."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[float, str] = {}
        self.hidden: list[float] = []
        self.w: float | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "figure" and given.get("data-w"):
            self.w = float(str(given["data-w"]))
            self.hidden += [self.w] if "hidden" in given else []
        elif tag == "img" and self.w is not None:
            self.found[self.w], self.w = str(given["src"]), None


def test_the_page_says_first_that_nothing_was_scored_and_what_to_do() -> None:
    shown = unscored_page(UNSCORED)
    headline = re.findall('<p class="headline">(.*?)</p>', shown)
    assert len(headline) == 1 and headline[0].startswith("Nothing was scored: there were no real images")
    assert "Look at the samples" in shown and "real images or their statistics (--real)" in shown
    assert "Scores</h2>" not in shown and "<table" not in shown and "<svg" not in shown


def test_every_w_is_seen_with_all_its_images_and_through_the_slider() -> None:
    shown = unscored_page(UNSCORED)
    pictures = Pictures(shown)
    assert list(pictures.found) == list(WS) and not pictures.hidden
    for w, source in pictures.found.items():
        picture = load_picture(base64.b64decode(source.removeprefix("data:image/webp;base64,")))
        assert torch.equal(images_of(picture, GRIDS[w].shape), GRIDS[w])
    assert 'min="0" max="3" step="1" value="0"' in shown, "the slider starts at the base"
    assert "<span>w = 0</span><span>w = 1.5</span>" in shown
    assert [f"<figcaption>{name}<" in shown for name in ("base (w = 0)", "w = 0.5", "w = 1", "w = 1.5")] == [True] * 4


def test_notes_and_provenance_are_there_and_what_others_wrote_is_escaped() -> None:
    shown = unscored_page(UNSCORED)
    assert "Neon: &lt;b&gt;.pkl" in shown and "<b>" not in shown
    assert "<li>1,000 images &amp; one self-training.</li>" in shown
    assert "&quot;neon improve &#x27;&lt;b&gt;.pkl&#x27;&quot;" in shown and "&quot;inf&quot;" in shown


def test_the_page_is_framed_as_that_of_a_run_with_scores() -> None:
    def head(text: str) -> str:
        return re.sub("<title>.*?</title>", "", text[: text.index("<body>")])

    shown = unscored_page(UNSCORED)
    assert head(shown) == head(page(tuned())) and "default-src 'none'" in shown
    assert re.search("https?://", shown) is None


def test_page_and_strip_are_written_and_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_unscored(tmp_path / name, UNSCORED) for name in "ab")
    assert first == tmp_path / "a" / "report.html" and first.read_text() == unscored_page(UNSCORED)
    files = {file.name: file.read_bytes() for file in first.parent.iterdir()}
    assert set(files) == {"report.html", "samples.png"}
    assert files == {file.name: file.read_bytes() for file in second.parent.iterdir()}
    with Image.open(tmp_path / "a" / "samples.png") as strip:
        assert strip.width > 2 * strip.height, "side by side"


@pytest.mark.parametrize("grids", [{}, {1.0: GRIDS[1.0]}], ids=["none", "no base"])
def test_a_page_without_the_base_is_refused(grids: dict[float, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="expected the base's"):
        Unscored(title="t", samples=Samples(grids=grids))


def test_grids_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="expected as many of one shape"):
        Samples(grids={0.0: GRIDS[0.0], 1.0: GRIDS[1.0][:5]})
