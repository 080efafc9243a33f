"""One base of a family, scored under any weights and settings; nothing is made, chosen or scored twice."""

import copy
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from neon.checkpoint import load_state
from neon.evaluate import scores_json
from neon.merge import LiveMerge
from neon.metrics import Statistics
from neon.model import GenerativeModel, load_weights
from neon.noise import Purpose
from neon.runtime.distributed import Processes
from neon.tune.plan import TunePlan
from neon.tune.sampler import SamplerSearch, search_sampler
from neon.tune.scorer import Candidate, Scorer, number_text, set_text
from neon.tune.search import Point, Search, search
from study.families import Family
from study.plan import Direction, Round, Row, Sampler, slug
from study.weights import images_of, made, merged_file

LIMIT = 6
"""evaluations of a search for w"""


@dataclass(frozen=True, kw_only=True)
class Away:
    """Weights at w from others, sampled with some settings."""

    direction: Direction | None
    settings: Any
    both: bool = False


class Bench:
    """One base: what it takes to fill rows. All of it lies in `folder`."""

    def __init__(self, family: Family, base: Path, folder: Path) -> None:
        self.family, self.base, self.folder = family, base, folder
        folder.mkdir(parents=True, exist_ok=True)
        plan = TunePlan(
            base=base,
            self_trained=(base,),
            num_images=family.select_images,
            report_images=family.report_images,
            batch_size=family.batch_size,
        )
        data = family.data()
        self.scorer = Scorer(
            plan, family.load(base, False), data.selection, data.reporting, folder, Processes()
        )  # fmt: skip
        self.settings_of = cache(self._settings_of)

    @property
    def model(self) -> GenerativeModel:
        """The live model, with the weights that were put there last."""
        return self.scorer.model

    def _settings_of(self, sampler: Sampler) -> Any:
        given = replace(self.model.default_settings, **dict(sampler.changes))
        return self.best_sampler(given, sampler.scores).best.settings if sampler.scores else given

    def best_sampler(self, given: Any, limit: int) -> SamplerSearch:
        """The search for the base's best settings of as many calls as those of `given`."""

        def evaluate(settings: Any) -> Statistics:
            return self.scorer.statistics(self._candidate(Away(direction=None, settings=settings), 0.0))

        return search_sampler(
            evaluate,
            given,
            self.model.tunable,
            self.model.calls,
            reference=self.scorer.selection.frechet,
            limit=limit,
        )

    def file(self, direction: Direction) -> Path:
        """The weights of `direction`."""
        return made(direction, self.family, self.base, self.folder, self.settings_of)

    def _candidate(self, away: Away, w: float) -> Candidate:
        settings = set_text(self.model.default_settings, away.settings) or "default settings"
        if away.direction is None or (w == 0 and not away.both):
            return Candidate(name=f"base, {settings}", put=self._put_base, settings=away.settings, w=0.0)
        path = self.file(away.direction)
        way = f"{'both' if away.both else 'w'} {number_text(w)}"
        digest = f"{slug(away.direction)} {path.stem}"
        put = cache(partial(self._put_both if away.both else self._put_merge, path, w))
        return Candidate(name=f"{way}, {digest}, {settings}", put=put, settings=away.settings, w=w)

    def _put_base(self) -> GenerativeModel:
        self.model.network.load_state_dict(self.scorer.base)
        return self.model

    def _put_merge(self, path: Path, w: float) -> GenerativeModel:
        LiveMerge(self.model.network, self.scorer.base, load_state(path)).set(w)
        return self.model

    def _put_both(self, path: Path, scale: float) -> GenerativeModel:
        model = self._put_base()
        second = copy.deepcopy(model.network)
        load_weights(second, load_state(path), path)
        return model.combine(second, scale)

    def chosen(self, away: Away, w: tuple[float, float]) -> Search:
        """The search for w on selection images, in a range."""

        def evaluate(point: Point) -> Statistics:
            at_zero = replace(away, direction=None, both=False) if point.w == 0 else away
            return self.scorer.statistics(self._candidate(at_zero, point.w))

        return search(evaluate, w=w, reference=self.scorer.selection.frechet, limit=LIMIT)

    def after(self, first: Round, sampler: Sampler) -> "Bench":
        """The bench of the base that a first round of Neon makes of this one."""
        away = Away(direction=first.direction, settings=self.settings_of(sampler))
        w = first.share * self.chosen(away, first.w).best.point.w
        own = self.folder / slug(first)
        path = merged_file(own / "base.safetensors", self.model, self.scorer.base, self.file(first.direction), w)
        return Bench(self.family, path, own)

    def record(self, row: Row) -> dict[str, Any]:
        """What is known of a row once it is scored, as JSON."""
        bench = self if row.start is None else self.after(row.start, row.sampler)
        return bench._scored(row)

    def _scored(self, row: Row) -> dict[str, Any]:
        away = Away(direction=row.direction, settings=self.settings_of(row.sampler), both=row.both)
        tried: list[tuple[float, float | None]] = []
        w = row.w if isinstance(row.w, float) else 0.0
        if isinstance(row.w, tuple):
            found = self.chosen(away, row.w)
            w = found.best.point.w
            tried = sorted((one.point.w, one.value) for one in found.evaluations)
        candidate = self._candidate(replace(away, both=row.both and w != 0), w)
        blocks = [self.scorer.scores(candidate, Purpose.REPORT, block) for block in range(row.blocks)]
        sampled, trained = (0, 0) if row.direction is None else images_of(row.direction, self.family)
        calls = self.model.calls(away.settings)
        return {
            "method": row.method,
            "of_base": row.direction is None and row.start is None,
            "base": row.base,
            "seed": row.seed,
            "n": self.family.report_images,
            "calls": calls and calls * (2 if row.both else 1),
            "images_sampled": sampled,
            "images_trained": trained,
            "w": w,
            "tried": tried,
            "settings": asdict(away.settings),
            "blocks": [{**scores_json(block), "seconds": None} for block in blocks],
        }
