"""The page of a report in a browser: the slider, the keyboard, and a console that stays empty."""

from collections.abc import Iterator
from pathlib import Path

import pytest

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
PLACES = """JSON.stringify(["#w", "#shown", "#grids", "h2:last-of-type"]
  .map(place => document.querySelector(place).getBoundingClientRect()))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with grids for w = -1, 0 and 1."""
    return write_report(tmp_path_factory.mktemp("run"), tuned())


def text_and_picture(browser: Browser) -> tuple[str, str, int]:
    """What the slider tells a screen reader, what is written above it, and which grid is shown."""
    grids = '[...document.querySelectorAll("#grids img")].map(img => img.src).indexOf(shown.src)'
    return tuple(browser.value(f'[w.getAttribute("aria-valuetext"), title.textContent, {grids}]'))


def test_the_slider_moves_through_the_grids_by_keyboard_and_nothing_jumps(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    assert text_and_picture(browser) == ("Neon (w = 1)", "Neon (w = 1)", 2)
    browser.value("w.focus()")
    before = browser.value(PLACES)
    browser.press("ArrowLeft")
    assert text_and_picture(browser) == ("base (w = 0)", "base (w = 0)", 1)
    browser.press("ArrowLeft")
    assert text_and_picture(browser) == ("self-trained (w = -1)", "self-trained (w = -1)", 0)
    browser.press("End")
    assert text_and_picture(browser) == ("Neon (w = 1)", "Neon (w = 1)", 2)
    assert browser.value(PLACES) == before and browser.value(SHIFTS) == 0
    assert browser.value("w.labels[0].textContent").startswith("Merge weight")
    assert browser.value("shown.naturalWidth > 1 && shown.alt") == "samples: Neon (w = 1)"


def test_the_slider_of_a_page_without_scores_moves_through_every_w(browser: Browser, tmp_path: Path) -> None:
    page = write_unscored(tmp_path, UNSCORED)
    browser.open(page)
    assert text_and_picture(browser) == ("base (w = 0)", "base (w = 0)", 0)
    browser.value("w.focus()")
    browser.press("End")
    assert text_and_picture(browser) == ("w = 1.5", "w = 1.5", 3)
    assert browser.trouble() == [] and browser.requests() == [page.as_uri()]


def test_the_page_asks_for_nothing_and_the_console_stays_empty(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    browser.value("w.focus()")
    browser.press("ArrowLeft")
    assert browser.trouble() == [] and browser.requests() == [shown.as_uri()]


def test_an_error_or_a_request_of_the_page_would_be_seen(browser: Browser, shown: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    image = '<img src="http://127.0.0.1:9/a.png">'
    broken.write_text(shown.read_text().replace("</body>", f"{image}<script>undefined_name()</script></body>"))
    browser.open(broken)
    told = str(browser.trouble())
    assert "undefined_name is not defined" in told and "Content Security Policy" in told


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
