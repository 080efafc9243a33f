"""The study of benchmarks/study: a killed one goes on, rows are repeated exactly, its page is made of the records."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from neon.evaluate import RealFeatures, Reference
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import features_of
from neon.metrics.small import SmallFeatures
from neon.model import save_model
from neon.recipe import Recipe
from tests.tiny import tiny_edm, tiny_images

ROOT = Path(__file__).parent.parent


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The modules of the study, with a family of tiny models called "tiny"."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import study.record

    yield study


@pytest.fixture
def plans(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Rows of a tiny family: the base at its best, Neon with w chosen, a random direction, SIMS and a second round."""
    from study.data import Data
    from study.families import FAMILIES, Family
    from study.plan import RandomStep, Round, Row, SelfTrained, at

    base = tmp_path / "base.safetensors"
    save_model(base, tiny_edm())
    references = []
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        extractor = SmallFeatures(name, (1, 8, 8), 4, 3).eval().requires_grad_(False)
        features = features_of(extractor, tiny_images(60).images)
        real = RealFeatures(manifold=Manifold(features, k=2))
        references.append(
            Reference(extractor=extractor, frechet=FrechetReference(Statistics.from_features(features)), real=real)
        )
    data = Data(selection=references[0], reporting=tuple(references), real=lambda: tiny_images(60))
    family = Family(
        name="tiny",
        bases=(base,),
        data=lambda: data,
        recipe=lambda model: Recipe(batch_size=8, lr=1e-2),
        micro_batch=8,
        num_synthetic=16,
        steps=2,
        select_images=12,
        report_images=12,
        batch_size=6,
    )
    monkeypatch.setitem(FAMILIES, "tiny", lambda: family)
    given = at(solver="euler", num_steps=2)
    away = SelfTrained(sampler=given)
    rows = [
        Row(method="base", sampler=given, blocks=2),
        Row(method="base, best levels", sampler=at(solver="euler", num_steps=2, scores=3), blocks=2),
        Row(method="Neon", sampler=given, direction=away, w=(0.0, 1.0), blocks=2),
        Row(method="random", sampler=given, direction=RandomStep(like=away, per_tensor=True), w=0.5, blocks=1),
        Row(method="SIMS", sampler=given, direction=away, w=0.5, both=True, blocks=1),
        Row(
            method="twice",
            sampler=given,
            direction=away,
            w=0.5,
            start=Round(direction=away, w=(0.1, 1.0), share=0.5),
            blocks=1,
        ),
    ]
    return [("tiny", row) for row in rows]


def test_a_killed_study_goes_on_and_repeats_its_rows_exactly(
    study: ModuleType, plans: list[tuple[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from study.record import Record, differences

    from neon.tune.scorer import Scorer

    whole, scored, left = Record(tmp_path / "whole.json"), Scorer.scores, 9
    whole.fill(plans, tmp_path / "whole", "A")
    assert len(whole.rows) == len(plans)

    def dying(*args: object, **keywords: object) -> object:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return scored(*args, **keywords)

    killed = Record(tmp_path / "killed.json")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Scorer, "scores", dying)
        killed.fill(plans, tmp_path / "killed", "A")
    kept = json.loads((tmp_path / "killed.json").read_text())["rows"]
    assert 0 < len(kept) < len(plans)
    Record(killed.path).fill(plans, tmp_path / "killed", "A")
    again = Record(killed.path)
    assert again.rows == whole.rows
    assert not differences(whole, again)
    whole.rows["tiny: base, base 0"]["w"] = 1.0
    assert differences(whole, again) == ["tiny: base, base 0: w was 1.0, is 0.0"]


def test_a_row_that_is_there_is_not_computed_again_unless_it_means_something_else(
    study: ModuleType, plans: list[tuple[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from study import record
    from study.plan import Row

    one = record.Record(tmp_path / "rows.json")
    one.fill(plans[:1], tmp_path / "run", "A")
    with monkeypatch.context() as patch:
        patch.setattr(record, "Bench", None)
        one.fill(plans[:1], tmp_path / "run", "A")
    row = plans[0][1]
    assert isinstance(row, Row)
    one.fill([("tiny", dataclasses.replace(row, blocks=1))], tmp_path / "run", "A")
    assert len(one.rows["tiny: base, base 0"]["blocks"]) == 1


def test_spreads_are_nested(study: ModuleType) -> None:
    from study.summary import estimate

    found = estimate({(0, 0): [1.0, 3.0], (0, 1): [4.0, 6.0], (1, 0): [9.0, 11.0]})
    assert found.mean == pytest.approx((3.5 + 10) / 2)
    assert found.blocks is not None and found.blocks.deviation == pytest.approx(2**0.5)
    assert found.seeds is not None and found.seeds.deviation == pytest.approx(4.5**0.5)
    assert found.bases is not None and found.bases.deviation == pytest.approx(6.5 / 2**0.5)
    assert estimate({(0, 0): [2.0]}).blocks is None


def test_a_gain_is_held_against_the_best_base_of_at_most_as_many_calls(study: ModuleType) -> None:
    from study.summary import fair_row

    rows = [
        {"family": "f", "base": 0, "of_base": calls > 0, "calls": abs(calls), "blocks": [{"distance": distance}]}
        for calls, distance in ((5, 9.0), (5, 7.0), (10, 3.0), (-5, 1.0))
    ]
    assert fair_row(rows, rows[3]) is rows[1]


def test_the_page_is_what_the_program_makes_of_the_records(study: ModuleType) -> None:
    import study_page

    assert (ROOT / "docs" / "study.md").read_text() == study_page.text(), "run python benchmarks/study_page.py"


def test_every_row_of_the_records_can_be_repeated(study: ModuleType) -> None:
    import study_page
    from study.record import title
    from study.tiers import TIERS

    planned = {title(plan): repr(plan[1]) for plans in TIERS.values() for plan in plans()}
    for tier, rows in study_page.records().items():
        for row in rows:
            assert row["command"].startswith(f"python benchmarks/run_study.py {tier} --only ")
            assert row["specification"] == planned[row["name"]]
            assert row["n"] and row["blocks"]
