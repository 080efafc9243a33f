"""The page of a report in a browser, used as by a reader: mouse, keyboard, saved files; the console stays empty."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from neon.report.page import write_report
from neon.report.unscored import write_unscored
from tests.browser import CHROMIUM, Browser
from tests.test_report import tuned
from tests.test_unscored import UNSCORED

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the page in"),
]
SHIFTS = """new Promise(done => {
  const seen = [];
  new PerformanceObserver(list => seen.push(...list.getEntries())).observe({type: "layout-shift", buffered: true});
  setTimeout(() => done(seen.length), 100);
})"""
PLACES = """JSON.stringify(["#w", "#cells", "#grids", "h2:last-of-type"]
  .map(place => document.querySelector(place).getBoundingClientRect()))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with grids for w = -1, 0 and 1."""
    return write_report(tmp_path_factory.mktemp("run"), tuned())


def told_and_shown(browser: Browser) -> tuple[str, str, int]:
    """What the slider tells a screen reader, what is written above it, and which grid is shown."""
    return tuple(browser.value('[w.getAttribute("aria-valuetext"), title.textContent, Number(cells.dataset.shown)]'))


def pixels(browser: Browser, canvas: str) -> list[list[int]]:
    """The colours of a canvas, row by row."""
    data = browser.value(f"""(({{width, height}}, drawn) => [...drawn.getImageData(0, 0, width, height).data])
        (document.querySelector("{canvas}"), document.querySelector("{canvas}").getContext("2d"))""")
    return [data[i : i + 3] for i in range(0, len(data), 4)]


def test_the_slider_moves_through_the_grids_by_keyboard_and_nothing_jumps(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    assert told_and_shown(browser) == ("Neon (w = 1)", "Neon (w = 1)", 2)
    assert browser.value("score.textContent") == "fid 3.50 on selection images"
    browser.value("w.focus()")
    before = browser.value(PLACES)
    browser.press("ArrowLeft")
    assert told_and_shown(browser) == ("base (w = 0)", "base (w = 0)", 1)
    browser.press("ArrowLeft")
    assert told_and_shown(browser) == ("self-trained (w = -1)", "self-trained (w = -1)", 0)
    browser.press("End")
    assert told_and_shown(browser) == ("Neon (w = 1)", "Neon (w = 1)", 2)
    assert browser.value(PLACES) == before and browser.value(SHIFTS) == 0
    assert browser.value("w.labels[0].textContent").startswith("Merge weight")


def test_each_image_is_shown_to_the_last_bit_under_its_class(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    images = tuned().samples.grids[1.0]
    for i, image in enumerate(images):
        there = image.permute(1, 2, 0).reshape(-1, 3).tolist()
        assert pixels(browser, f"#cells button:nth-of-type({i + 1}) canvas") == there
    order = "[...cells.children].map(one => one.tagName + one.textContent)"
    assert browser.value(order) == ["SPANclass <0>", "BUTTON", "BUTTON", "SPANclass 1", "BUTTON", "BUTTON"]


def test_the_base_is_there_as_long_as_the_button_is_held(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    assert browser.value("flip.textContent") == "Hold: base (w = 0)"
    browser.mouse("#flip", "mouseMoved", "mousePressed")
    assert told_and_shown(browser) == ("Neon (w = 1)", "base (w = 0)", 1)
    browser.mouse("#flip", "mouseReleased")
    assert told_and_shown(browser) == ("Neon (w = 1)", "Neon (w = 1)", 2)
    browser.value("flip.focus()")
    browser.press("Enter", "rawKeyDown")
    assert told_and_shown(browser)[2] == 1 and browser.value("flip.getAttribute('aria-pressed')") == "true"
    browser.press("Enter", "keyUp")
    assert told_and_shown(browser)[2] == 2
    browser.value("w.focus()")
    browser.press("ArrowLeft")
    browser.mouse("#flip", "mouseMoved", "mousePressed")
    assert told_and_shown(browser) == ("base (w = 0)", "Neon (w = 1)", 2), "at the base it shows the choice"
    browser.mouse("#flip", "mouseReleased")


def test_a_sample_is_enlarged_with_every_w_and_the_nearest_real_images(browser: Browser, shown: Path) -> None:
    samples = tuned().samples
    assert samples.neighbours is not None
    browser.open(shown)
    browser.click("#cells button:nth-of-type(2)")
    assert browser.value("enlarged.open && which.textContent") == "class <0>, image 2: Neon (w = 1)"
    assert pixels(browser, "#large") == samples.grids[1.0][1].permute(1, 2, 0).reshape(-1, 3).tolist()
    assert browser.value("[...every.children].map(one => one.textContent)") == [
        "self-trained (w = -1)", "base (w = 0)", "Neon (w = 1)"]  # fmt: skip
    assert browser.value("nearest.children.length") == 2
    first = samples.neighbours[samples.nearest[1.0][1][0]]
    assert pixels(browser, "#nearest canvas") == first.permute(1, 2, 0).reshape(-1, 3).tolist()
    browser.press("ArrowRight")
    assert browser.value("which.textContent") == "class 1, image 3: Neon (w = 1)"
    browser.click("#every button")
    assert browser.value("which.textContent") == "class 1, image 3: self-trained (w = -1)"
    assert browser.value("nearest.textContent") == "Of base (w = 0) and Neon (w = 1) only."
    browser.press("Escape")
    assert browser.value("enlarged.open") is False and told_and_shown(browser)[2] == 0
    assert browser.trouble() == []


def test_the_value_under_the_pointer_is_told(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    tip = '(one => !one.hidden && one.textContent)(document.querySelector("[data-name=distance] .tip"))'
    assert browser.value(tip) is False
    browser.mouse("[data-name=distance] .mark", "mouseMoved")
    assert browser.value(tip) == "w = 0, guidance 1.5: 8.25, on selection images"
    browser.mouse("[data-name=distance] .mark:last-of-type", "mouseMoved")
    assert browser.value(tip) == "choice, reported: 5.67 ± 0.76"
    browser.mouse("h1", "mouseMoved")
    assert browser.value(tip) is False


def test_table_and_plots_are_saved_as_files_and_commands_copied(browser: Browser, shown: Path, tmp_path: Path) -> None:
    browser.open(shown, dark=True)
    table = list(csv.DictReader(io.StringIO(browser.downloaded("[download]", "table.csv", tmp_path).decode())))
    assert [(row["name"], float(row["fid"])) for row in table] == [
        (row.name, row.distance) for row in tuned().rows]  # fmt: skip
    assert float(table[2]["high"]) < 0 and table[0]["difference"] == ""
    drawing = ElementTree.fromstring(
        browser.downloaded("[data-name=distance] .buttons button", "distance.svg", tmp_path)
    )
    colours = ElementTree.tostring(drawing, encoding="unicode")
    assert "#2f5fa8" in colours and "var(" not in colours and "undefined" not in colours
    browser.downloaded("[data-name=distance] .buttons button:last-child", "distance.png", tmp_path)
    with Image.open(tmp_path / "distance.png") as picture:
        assert picture.size == (1440, 1209) and len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255), "in the colours of paper"
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.click(".command button")
    assert browser.value("navigator.clipboard.readText()") == "neon tune --out 'a&b'"
    assert browser.trouble() == []


def test_the_slider_of_a_page_without_scores_moves_through_every_w(browser: Browser, tmp_path: Path) -> None:
    page = write_unscored(tmp_path, UNSCORED)
    browser.open(page)
    assert told_and_shown(browser) == ("base (w = 0)", "base (w = 0)", 0)
    browser.value("w.focus()")
    browser.press("End")
    assert told_and_shown(browser) == ("w = 1.5", "w = 1.5", 3)
    assert browser.trouble() == [] and browser.requests() == [page.as_uri()]


def test_the_page_asks_for_nothing_and_the_console_stays_empty(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    browser.value("w.focus()")
    browser.press("ArrowLeft")
    assert browser.trouble() == [] and browser.requests() == [shown.as_uri()]


def test_a_foreign_script_or_a_request_is_refused_and_would_be_seen(
    browser: Browser, shown: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.html"
    image = '<img src="http://127.0.0.1:9/a.png">'
    script = "<script>document.title = 'run'</script>"
    broken.write_text(shown.read_text().replace("</body>", f"{image}{script}</body>"))
    browser.open(broken)
    told = str(browser.trouble())
    assert "inline script" in told and "127.0.0.1" in told and told.count("Content Security Policy") >= 2
    assert browser.value("document.title") != "run", "no script but the page's own is run"


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_tables_by_themselves_and_never_the_page(browser: Browser, shown: Path, dark: bool) -> None:
    browser.open(shown, width=390, dark=dark)
    browser.value('document.querySelectorAll("details").forEach(details => details.open = true)')
    assert browser.value("document.documentElement.scrollWidth") == 390
    texts = 'Math.min(...[...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height))'
    assert browser.value(texts) >= 9, "text of plots stays readable"


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_plots_stand_out_from_the_paper(browser: Browser, shown: Path, dark: bool) -> None:
    browser.open(shown, dark=dark)
    contrasts = browser.value("""(() => {
      const luminance = colour => {
        const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const [r, g, b] = colour.match(/[0-9.]+/g).map(v => linear(v / 255));
        return .2126 * r + .7152 * g + .0722 * b;
      };
      const paper = luminance(getComputedStyle(document.body).backgroundColor);
      const colours = ["ink", "grey", "base", "neon"].map(name => {
        document.body.style.color = `var(--${name})`;
        return luminance(getComputedStyle(document.body).color);
      });
      return [paper, ...colours.map(c => (Math.max(c, paper) + .05) / (Math.min(c, paper) + .05))];
    })()""")
    assert (contrasts[0] < 0.1) == dark
    assert min(contrasts[1:]) >= 4.5, "the contrast that WCAG AA asks of text"


def test_without_script_the_main_grids_are_there_and_the_slider_is_not(browser: Browser, shown: Path) -> None:
    browser.open(shown, script=False)
    visible = (
        "[...document.querySelectorAll('#grids figure')].filter(f => f.offsetHeight).map(f => f.textContent.trim())"
    )
    assert browser.value(visible) == ["self-trained (w = -1)", "base (w = 0)", "Neon (w = 1)", "real images"]
    assert browser.value("document.getElementById('w').offsetHeight") == 0
    titles = "[...document.querySelectorAll('.mark title')].map(title => title.textContent)"
    assert "choice, reported: 5.67 ± 0.76" in browser.value(titles), "values are shown by the browser itself"
