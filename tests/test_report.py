"""What a report says about its figures, what its page shows, and that both survive the run folder."""

import base64
import csv
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import ttest_rel

from neon.cli.app import main
from neon.data.pictures import load_picture
from neon.errors import RequestError
from neon.evaluate import Scores
from neon.report.grids import image_grid, images_of
from neon.report.page import page, report_again, write_report
from neon.report.plots import draw_distance, plots
from neon.report.record import Evaluated, Report, Row, Training, load, paired_gain, save
from neon.report.samples import Samples
from neon.report.words import (
    bias_undone,
    conclusions,
    explained,
    headline,
    score_table,
    scores_at,
    scores_of,
    text_table,
    write_scores_csv,
)


def scores(distance: float, precision: float | None = None, recall: float | None = None) -> Scores:
    return Scores(distance=distance, precision=precision, recall=recall, num_images=10)


def row(name: str, distances: tuple[float, ...], precision: float | None = 0.5, recall: float | None = 0.5) -> Row:
    return Row(name=name, calls=5, blocks=tuple(scores(d, precision, recall) for d in distances))


BASE = row("base", (10.0, 11.0, 12.0))


def report(neon: Row, base: Row = BASE, w: float = 1.0) -> Report:
    return Report(title="t", metric="fd_x", rows=(base, neon), base=base, neon=neon, w=w)


def numbers(shape: tuple[int, ...], factor: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).mul(factor).byte()


def tuned() -> Report:
    """A search over w, guidance and two snapshots, one evaluation of which failed."""
    short, long = {"snapshot": "6.4 kimg", "kimg": 6.4}, {"snapshot": "12.8 kimg", "kimg": 12.8}
    evaluated = (
        Evaluated(w=0.0, guidance=1.5, scores=scores(8.25, 0.9, 0.3)),
        Evaluated(w=0.0, guidance=2.0, scores=scores(9.5, 0.9, 0.3)),
        Evaluated(w=1.0, guidance=1.5, scores=scores(4.75, 0.7, 0.5), **short),
        Evaluated(w=1.0, guidance=2.0, scores=scores(3.5, 0.8, 0.6), **short),
        Evaluated(w=3.0, guidance=2.5, failure="features are not finite <nan>", **short),
        Evaluated(w=0.5, guidance=2.0, scores=scores(3.75, 0.8, 0.6), **long),
        Evaluated(w=-1.0, guidance=2.0, scores=scores(19.5, 0.9, 0.1), searched=False, **short),
    )
    base = row("base", (10.0, 11.0, 12.0), None, None)
    neon = row("Neon", (5.0, 5.5, 6.5), None, None)
    return Report(
        title="tuning <b>&",
        metric="fid",
        rows=(base, row("self-trained", (20.0, 21.0, 22.0), None, None), neon),
        base=base,
        neon=neon,
        w=1.0,
        guidance=2.0,
        snapshot="6.4 kimg",
        evaluated=evaluated,
        fit=((0.0, 9.4), (0.5, 5.0), (1.0, 3.6)),
        training=(Training(name="the sampler", images=(6400.0, 12800.0), losses=(0.5, 0.25), moved=((6400.0, 0.01),)),),
        samples=Samples(
            grids={w: numbers((4, 3, 4, 5), i + 1) for i, w in enumerate((-1.0, 0.0, 1.0))},
            captions=("class <0>", "class <0>", "class 1", "class 1"),
            real=torch.full((2, 3, 4, 5), 77, dtype=torch.uint8),
            nearest={0.0: [[0, 1]] * 4, 1.0: [[2, 0]] * 4},
            neighbours=numbers((3, 3, 4, 5), 9),
        ),
        commands=(("Repeat <it>", "neon tune --out 'a&b'"),),
        notes=("w < 2 only",),
        provenance={"command": "neon tune --out 'a&b'", "range": (0.0, float("inf"))},
    )


def test_a_gain_is_told_with_its_size_and_certainty() -> None:
    text = headline(report(row("Neon", (4.0, 5.0, 5.7))))
    assert "Neon with w = 1 lowers" in text and "from 11.00 to 4.90 (-55%)" in text
    assert "between 5.67 and 6.53 with 95% confidence (3 paired blocks of seeds)" in text


def test_the_certainty_is_that_of_a_paired_t_test() -> None:
    before, after = (10.0, 11.5, 12.0, 10.2), (9.1, 10.9, 11.8, 8.7)
    interval = ttest_rel(before, after).confidence_interval(0.95)
    found = paired_gain(row("base", before), row("Neon", after)).interval
    assert found == pytest.approx((interval.low, interval.high))


def test_a_gain_hidden_by_the_spread_of_blocks_shows_when_they_are_paired() -> None:
    assert paired_gain(row("base", (10.0, 20.0, 30.0)), row("Neon", (9.0, 19.1, 28.9))).certain
    assert not paired_gain(row("base", (10.0, 20.0, 30.0)), row("Neon", (19.1, 28.9, 9.0))).certain


@pytest.mark.parametrize("neon", [(9.5, 11.5, 10.5), (14.0, 15.0, 16.0), (10.0, 11.0, 12.0)])
def test_a_change_within_the_noise_or_for_the_worse_is_no_gain(neon: tuple[float, ...]) -> None:
    text = headline(report(row("Neon", neon)))
    assert text.startswith("No gain") and "keep the base" in text


def test_where_the_base_was_chosen_the_headline_keeps_it() -> None:
    assert headline(report(BASE, w=0.0)).startswith("No gain: no merge did better")
    assert conclusions(report(BASE, w=0.0)) == [headline(report(BASE, w=0.0))], "no bias undone by doing nothing"


def test_a_gain_on_one_block_is_not_called_certain() -> None:
    text = headline(report(row("Neon", (5.0,)), base=row("base", (10.0,))))
    assert "to 5.00 (-50%)" in text and "does not tell how much of that is noise" in text


def test_a_negative_w_is_told_as_a_step_towards_the_self_trained_model() -> None:
    text = headline(report(row("chosen", (4.0, 5.0, 5.7)), w=-0.4))
    assert text.startswith("A step towards the self-trained model with w = -0.4 lowers") and "Neon" not in text


def fair_report(best: tuple[float, ...] = (4.0, 5.0, 4.5), **changes: object) -> Report:
    """The base at 11, at 6 with its best sampler, and Neon at 5 and at `best` there; both networks on one block."""
    fair = dataclasses.replace(row("base, best sampler", (5.5, 6.5, 6.0)), key="base_best_sampler")
    neon = dataclasses.replace(row("Neon (w = 1)", (5.0, 5.5, 4.5)), key="neon", w=1.0)
    tuned_neon = dataclasses.replace(row("Neon, best sampler", best), key="neon_best_sampler", w=0.75)
    together = dataclasses.replace(row("SIMS (w = 1)", (4.0,)), key="sims", calls=10)
    base = dataclasses.replace(BASE, key="base")
    return dataclasses.replace(
        Report(title="t", metric="fd_x", rows=(base, fair, neon, tuned_neon, together), base=base, neon=neon, w=1.0,
               base_best_sampler=fair, choice=tuned_neon),
        **changes,
    )  # fmt: skip


def test_a_gain_is_held_against_the_base_at_its_best_sampler() -> None:
    result, credit, _ = conclusions(fair_report())
    assert "with w = 0.75 on the base's best sampler" in result
    assert "from 6.00 (the base with its best sampler of as many calls) to 4.50 (-25%)" in result
    assert "at 11.00: choosing its sampler alone takes 5.00 off, Neon 1.50 more" in credit


def test_what_neon_gains_on_a_sampler_that_the_base_would_not_choose_is_no_gain() -> None:
    """Neon at 5 beats the base as given by far, and the base at its best sampler not beyond the noise."""
    text = headline(fair_report((5.4, 6.6, 5.9)))
    assert text.startswith("No gain beyond the noise") and "keep the base with that sampler" in text
    assert headline(fair_report((5.6, 6.6, 6.1))).startswith("No gain: with w = 0.75")
    nothing = fair_report()
    kept = dataclasses.replace(nothing, choice=nothing.base_best_sampler)
    assert "no merge did better than the base with its best sampler" in headline(kept)
    assert conclusions(kept)[1].endswith("choosing its sampler alone takes 5.00 off, at as many network calls.")
    assert len(conclusions(kept)) == 2, "no bias undone by doing nothing"


def test_differences_are_paired_with_the_fair_baseline_and_rows_of_few_blocks_are_marked() -> None:
    lines = text_table(score_table(fair_report())).splitlines()
    assert "against base, best sampler" in lines[0]
    found = ttest_rel((4.0, 5.0, 4.5), (5.5, 6.5, 6.0)).confidence_interval(0.95)
    assert f"-1.50 [{found.low:.2f}, {found.high:.2f}]" in lines[4]
    assert "[" not in lines[2], "the baseline itself"
    assert "4.00 (1 block)" in lines[5] and "-1.50" in lines[5] and "[" not in lines[5]
    assert "not another synthetic set" in explained(fair_report()) and "one block" in explained(fair_report())


def test_scores_are_told_by_the_keys_of_rows() -> None:
    scores = scores_of(fair_report())
    assert (scores["base"], scores["neon"], scores["neon_best_sampler"], scores["w"]) == (11.0, 5.0, 4.5, 1.0)
    assert (scores["fair"], scores["best"]) == ("base_best_sampler", "neon_best_sampler")
    assert scores["rows"]["neon_best_sampler"]["difference"] == -1.5
    assert scores["rows"]["base_best_sampler"]["difference"] is None
    assert scores["rows"]["sims"]["interval"] is None and scores["rows"]["sims"]["network_calls"] == 10


def test_a_table_for_other_programs_has_every_block_with_the_same_numbers(tmp_path: Path) -> None:
    scored = Scores(
        distance=0.1 + 0.2, is_mean=1 / 3, precision=0.5, recall=2 / 3, density=1.25, coverage=1e-17, num_images=1000
    )
    full = Row(key="neon", name='Neon, "w = 1"\n', calls=5, w=0.1, blocks=(scored, scores(7.0)),
               settings={"num_steps": 5, "levels": (0.5, float("inf"))})  # fmt: skip
    shown = dataclasses.replace(report(BASE), rows=(BASE, full))
    with open(write_scores_csv(tmp_path, shown), newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["key"], line["block"]) for line in lines] == [
        ("", "0"),
        ("", "1"),
        ("", "2"),
        ("neon", "0"),
        ("neon", "1"),
    ]
    assert [float(line["distance"]) for line in lines[:3]] == [block.distance for block in BASE.blocks]
    first, second = lines[3:]
    for name in ("distance", "is_mean", "precision", "recall", "density", "coverage"):
        assert float(first[name]) == getattr(scored, name)
    assert (first["name"], float(first["w"]), first["network_calls"], first["num_images"], first["metric"]) == (
        full.name, 0.1, "5", "1000", "fd_x",
    )  # fmt: skip
    assert json.loads(first["settings"]) == {"num_steps": 5, "levels": [0.5, "inf"]}
    assert second["is_mean"] == second["coverage"] == "" and lines[0]["settings"] == lines[0]["w"] == ""


def test_guidance_and_snapshot_of_the_choice_are_named() -> None:
    assert "w = 1 (guidance 2, snapshot 6.4 kimg)" in headline(tuned())


def test_the_bias_undone_is_read_from_precision_and_recall() -> None:
    def told(before: tuple[float, float], after: tuple[float, float]) -> str | None:
        return bias_undone(row("base", (1.0,), *before), row("Neon", (1.0,), *after))

    assert "too concentrated" in str(told((0.9, 0.3), (0.8, 0.7)))
    assert "too noisy" in str(told((0.5, 0.9), (0.7, 0.8)))
    assert "both" in str(told((0.5, 0.5), (0.6, 0.6)))
    assert "Neither" in str(told((0.6, 0.6), (0.5, 0.5)))
    assert bias_undone(row("base", (1.0,), None, None), row("Neon", (1.0,), None, None)) is None


def test_the_table_has_a_line_per_row_with_the_change_against_the_base() -> None:
    lines = text_table(score_table(report(row("Neon", (5.0, 6.0)), base=row("base", (10.0, 12.0))))).splitlines()
    assert len(lines) == 3 and "-50%" in lines[2] and "%" not in lines[1]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


def test_a_score_that_no_row_has_is_no_column() -> None:
    assert "precision" in text_table(score_table(report(row("Neon", (5.0, 6.0, 7.0)))))
    assert "precision" not in text_table(score_table(tuned())) and "inception" not in text_table(score_table(tuned()))


def test_the_plots_are_those_there_are_figures_for() -> None:
    assert [plot.name for plot in plots(tuned())] == ["distance", "shares", "heatmap", "budget"]
    only_w = tuple(Evaluated(w=w, scores=scores(5.0)) for w in (0.0, 1.0))
    assert [plot.name for plot in plots(dataclasses.replace(tuned(), evaluated=only_w))] == ["distance"]
    assert plots(report(BASE)) == ()


def test_every_evaluation_is_on_the_plot_and_failed_ones_are_marked() -> None:
    axes = Figure().subplots()
    draw_distance(axes, tuned())
    drawn = {
        label: handle.get_xydata() if isinstance(handle, Line2D) else handle.get_offsets()
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        if isinstance(handle, (Line2D, PathCollection))
    }
    assert drawn["searched"].tolist() == [[0.0, 9.5], [1.0, 3.5]]
    assert drawn["for the picture"].tolist() == [[-1.0, 19.5]]
    assert drawn["other settings"].tolist() == [[0.0, 8.25], [1.0, 4.75], [0.5, 3.75]]
    assert drawn["fitted"].tolist() == [list(point) for point in tuned().fit]
    assert drawn["failed"][:, 0].tolist() == [3.0]
    low, high = axes.get_xlim()
    assert low < -1 and high > 3, "the failed one is inside the picture"


def test_a_score_is_told_only_of_the_weights_whose_samples_are_shown() -> None:
    assert {w: text.split()[1] for w, text in scores_at(tuned()).items()} == {0.0: "9.50", 1.0: "3.50", -1.0: "19.50"}
    kept = dataclasses.replace(tuned(), w=0.0, snapshot=None)
    assert scores_at(kept).keys() == {0.0}, "of two snapshots, neither of which was chosen"


def test_every_evaluation_is_in_the_page_as_text() -> None:
    shown = page(tuned())
    for text in ("8.25", "9.50", "4.75", "3.50", "3.75", "19.50", "failed: features are not finite &lt;nan&gt;"):
        assert text in shown, text
    assert shown.count("for the picture</td>") == 1 and shown.count("<td>chosen</td>") == 1


def test_what_others_wrote_is_escaped_in_the_page() -> None:
    shown = page(tuned())
    assert "tuning &lt;b&gt;&amp;" in shown and "<b>" not in shown
    assert "w &lt; 2 only" in shown and "--out &#x27;a&amp;b&#x27;" in shown
    assert "Repeat &lt;it&gt;" in shown and "class <0>" not in shown and "class &lt;0&gt;" in shown


def test_the_page_names_no_address_and_forbids_itself_the_network() -> None:
    shown = page(tuned())
    assert re.search("https?://", shown) is None and "default-src 'none'" in shown


def test_a_page_of_large_images_stays_small_enough_to_send() -> None:
    """Noise, which no format makes small: as small as it has to be, and every image still in its place."""
    noise = torch.randint(256, (20, 3, 320, 320), generator=torch.Generator().manual_seed(0)).byte()
    level = torch.linspace(0, 1, 20)[:, None, None, None].mul(noise).byte()  # image i is brighter than image i - 1
    large = Samples(grids=dict.fromkeys((-1.0, 0.0, 0.5, 1.0), level), captions=("class 0",) * 10 + ("class 1",) * 10)
    shown = page(dataclasses.replace(tuned(), samples=large))
    assert len(shown) < 4e6
    [encoded, *_] = re.findall('data:image/webp;base64,([^"]+)', shown)
    picture = load_picture(base64.b64decode(encoded)).convert("L")
    columns, rows = large.columns, 20 // large.columns
    pixels = torch.from_numpy(np.asarray(picture).copy()).float()[None, None]
    means = torch.nn.functional.adaptive_avg_pool2d(pixels, (rows, columns)).flatten()
    assert means.diff().min() > 0


def test_no_two_elements_of_the_page_share_a_name() -> None:
    names = re.findall(r'\bid="([^"]*)"', page(tuned()))
    assert len(names) > 20 and len(names) == len(set(names))


def test_a_saved_report_gives_the_same_page_and_plots(tmp_path: Path) -> None:
    first = tmp_path / "first"
    save(tuned(), first)
    write_report(first, tuned())
    written = {file.name: file.read_bytes() for file in first.iterdir() if file.is_file()}
    assert set(written) == {
        "report.json",
        "report.html",
        "curve.png",
        "samples.png",
        "heatmap.png",
        "budget.png",
    }
    for name in written.keys() - {"report.json"}:
        (first / name).unlink()
    assert report_again(first) == first / "report.html"
    assert {file.name: file.read_bytes() for file in first.iterdir() if file.is_file()} == written


def test_a_loaded_report_keeps_images_and_which_rows_are_base_and_choice(tmp_path: Path) -> None:
    save(tuned(), tmp_path)
    found = load(tmp_path)
    assert found.base is found.rows[0] and found.neon is found.rows[2]
    theirs, ours = found.samples, tuned().samples
    assert all(torch.equal(theirs.grids[w], images) for w, images in ours.grids.items())
    assert theirs.real is not None and theirs.real.shape == (2, 3, 4, 5) and bool((theirs.real == 77).all())
    assert (theirs.captions, theirs.nearest) == (ours.captions, ours.nearest)
    assert theirs.neighbours is not None and torch.equal(theirs.neighbours, numbers((3, 3, 4, 5), 9))
    assert (found.training, found.commands) == (tuned().training, tuned().commands)
    save(report(BASE, w=0.0), tmp_path)
    found = load(tmp_path)
    assert found.neon is found.base


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 5))
def test_images_come_back_from_their_grid(count: int, channels: int, height: int, width: int) -> None:
    images = torch.arange(count * channels * height * width).reshape(count, channels, height, width).byte()
    assert torch.equal(images_of(image_grid(images), images.shape), images)


def test_a_folder_without_a_report_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no report to show \(report.json: No such file or directory\); name"):
        report_again(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


ROWS = [{"name": "base", "calls": None, "blocks": [{"distance": 1.0, "num_images": 3}]}]
FOREIGN: dict[str, object] = {
    "null": None, "a number": 3, "a list": [1], "no field": {"a": 1}, "deep": "[" * 100_000, "not UTF-8": b"\xff\xfe{",
    "a title": {"title": 3}, "w": {"w": "x"}, "w of no number": {"w": None}, "a fit": {"fit": [1, 2]},
    "rows": {"rows": []}, "blocks": {"rows": [{**ROWS[0], "blocks": []}] * 3},
    "a name": {"rows": [{**ROWS[0], "name": 3}] * 3},
    "a distance": {"rows": [{**ROWS[0], "blocks": [{"distance": "low", "num_images": 1}]}] * 3},
    "evaluated": {"evaluated": [{"w": "x"}]}, "no such field": {"evaluated": [{"w": 1.0, "more": 1}]},
    "notes": {"notes": 3}, "grids": {"grids": [{"w": 1.0, "shape": [0, 3, 4, 5]}]}, "real": {"real": "x"},
    "captions": {"captions": ["class 0"]}, "nearest": {"nearest": [{"w": 1.0, "of": [[7]] * 4}]},
    "training": {"training": [{"name": "", "images": [1.0], "losses": [], "moved": []}]}, "commands": {"commands": [1]},
    "provenance": {"provenance": []}, "base": {"base": "x"},
}  # fmt: skip


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_a_record_of_something_else_is_refused_in_one_line(
    tmp_path: Path, foreign: object, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tuned(), tmp_path)
    record = tmp_path / "report.json"
    if isinstance(foreign, dict) and "a" not in foreign:
        foreign = {**json.loads(record.read_text()), **foreign}
    record.write_bytes(foreign if isinstance(foreign, bytes) else json.dumps(foreign).encode())
    if isinstance(foreign, str):
        record.write_text(foreign)
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged" in line and "run again what wrote it" in line


@pytest.mark.parametrize("damage", ["half", "a field less", "no row", "no picture", "another picture"])
def test_a_damaged_report_is_refused_by_the_name_of_its_file(tmp_path: Path, damage: str) -> None:
    save(tuned(), tmp_path)
    record, picture = tmp_path / "report.json", tmp_path / "samples" / "w1.png"
    content = json.loads(record.read_text())
    if damage == "half":
        record.write_text(record.read_text()[:100])
    elif damage == "a field less":
        record.write_text(json.dumps({**content, "rows": [{"name": "base"}]}))
    elif damage == "no row":
        record.write_text(json.dumps({**content, "neon": 9}))
    elif damage == "no picture":
        picture.unlink()
    else:
        image_grid(torch.zeros(2, 3, 9, 9, dtype=torch.uint8)).save(picture)
    with pytest.raises(RequestError, match=r"(w1\.png|report\.json): damaged") as error:
        load(tmp_path)
    assert "run again what wrote it" in str(error.value) and "\n" not in str(error.value)
