"""The run behind `neon tune`: weights stay resident, each point is merged in place and scored, nothing is scored twice.

Points are compared on the same selection images, so that their difference is that of the weights; what was chosen is
then scored on report images, which share no seed with the selection, in several blocks, whose spread is the noise.

w belongs to a sampler. It is chosen at the one that was asked for, with the self-trained weights that were given, and
at the base's best one of as many network calls, with weights of its own: the base there is what a gain is held against.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

from neon import __version__
from neon.errors import DegenerateError, RequestError
from neon.evaluate import Scores
from neon.merge.live import Live, beside
from neon.metrics import Statistics
from neon.model import GenerativeModel
from neon.noise import Purpose
from neon.report.record import Evaluated, Row, Training
from neon.report.samples import Samples
from neon.runtime.files import sha256_file
from neon.selftrain import training_curve
from neon.tune.pictures import samples_at
from neon.tune.plan import TunePlan
from neon.tune.sampler import SamplerSearch, search_sampler
from neon.tune.scorer import Candidate, Scorer, number_text, settings_text
from neon.tune.search import Point, Search, grid, search
from neon.tune.snapshots import budgets, snapshot_names

BASE = Point(0.0)


class Tuner:
    """The points of a plan at one sampler: base and self-trained weights, merged into the live network.

    The search sees the moments of the features; for other metrics than the distance only values.

    Args:
        settings: of the sampler.
        given: settings that those of the sampler are told from, in names.
        snapshots: self-trained weights, by default those of the plan.
    """

    def __init__(
        self,
        plan: TunePlan,
        scorer: Scorer,
        settings: Any,
        given: Any = None,
        snapshots: Sequence[Path] = (),
    ) -> None:
        # A grid needs no statistics, and other metrics do not follow from them.
        self.by_moments = plan.grid is None and plan.metric == "distance"
        self.plan, self.scorer, self.settings = plan, scorer, settings
        self.sampler = settings_text(settings if given is None else given, settings)
        self.snapshots = tuple(snapshots) or plan.self_trained
        self.own_key = plan.self_trained_key if self.snapshots == plan.self_trained else None
        self.weights = [
            beside(scorer.model.network, plan.base, path, plan.key, self.own_key, copied=lambda: scorer.base)
            for path in self.snapshots
        ]
        """of each snapshot"""
        self.names = snapshot_names(self.snapshots)
        self.budgets = budgets(self.snapshots, plan.key, self.own_key)
        self._live: tuple[int, Live] | None = None

    def lengths(self) -> list[float]:
        """How far each snapshot is from the base: the Euclidean norm of the update of all weights.

        Raises:
            RequestError: a snapshot is the base.
        """
        lengths = [weights.length for weights in self.weights]
        for path, length in zip(self.snapshots, lengths, strict=True):
            if not length:
                raise RequestError(f"{path}: holds the weights of the base; expected weights after self-training")
        return lengths

    @cached_property
    def shares(self) -> list[float]:
        """How far each snapshot is from the base, as a share of the norm of all weights."""
        norm = self.scorer.norm
        return [length / norm if norm else math.inf for length in self.lengths()]

    @property
    def moved(self) -> float:
        """How far the last snapshot is, likewise."""
        return self.shares[-1]

    def merged(self, point: Point) -> GenerativeModel:
        """The live model with the weights of `point`."""
        if self._live is None or self._live[0] != point.snapshot:
            self._live = (point.snapshot, self.weights[point.snapshot].live())
        self.scorer.put(self._live[1], point.w)
        return self.scorer.model

    def combined(self, point: Point) -> GenerativeModel:
        """What samples with the base and the self-trained network of `point` together, at scale w (SIMS)."""
        model = self.merged(BASE)
        return model.combine(self.weights[point.snapshot].second(), point.w)

    def settings_at(self, point: Point) -> Any:
        """The sampler's settings for `point`."""
        return self.settings if point.guidance is None else replace(self.settings, guidance=point.guidance)

    def text(self, point: Point) -> str:
        """The point in words, which is its name in the log."""
        parts = [f"w {number_text(point.w)}"]
        if point.guidance is not None:
            parts.append(f"guidance {number_text(point.guidance)}")
        if point.w != 0 and len(self.snapshots) > 1:
            parts.append(self.names[point.snapshot])
        return ", ".join([*parts, *([self.sampler] if self.sampler else [])])

    def label(self, point: Point) -> str | None:
        """What the snapshot of a point is called on the page: its budget, or its name; None if there is no choice."""
        if point.w == 0 or len(self.snapshots) == 1:
            return None
        budget = self.budgets[point.snapshot]
        return self.names[point.snapshot] if budget is None else f"{budget:g} kimg"

    def candidate(self, point: Point) -> Candidate:
        """`point`, to be scored."""
        return Candidate(
            name=self.text(point),
            put=lambda: self.merged(point),
            settings=self.settings_at(point),
            w=point.w,
            snapshot=self.label(point),
            sampler=self.sampler,
        )

    def scores(self, point: Point, purpose: Purpose, block: int = 0) -> Scores:
        """Scores of `point` on one block of images, from the log if they are there; a DegenerateError likewise."""
        return self.scorer.scores(
            self.candidate(point), purpose, block, keep=purpose is Purpose.SELECTION and self.by_moments
        )

    def statistics(self, point: Point) -> Statistics:
        """Statistics of `point` on selection images."""
        return self.scorer.statistics(self.candidate(point))

    def value(self, point: Point) -> float:
        """What the search minimises."""
        return self.scorer.value(self.candidate(point))

    @cached_property
    def search(self) -> Search:
        """The search, or the grid, of the plan."""
        plan = self.plan
        if plan.grid is not None:
            return grid(self.value, plan.grid, plan.guidances or (None,), self.lengths())
        return search(
            self.statistics if self.by_moments else self.value,
            w=plan.w,
            guidance=plan.guidance,
            snapshots=self.lengths(),
            reference=self.scorer.selection.frechet if self.by_moments else None,
            tolerance=plan.tolerance,
            limit=plan.limit,
        )

    @property
    def best(self) -> Point:
        """What the search chose."""
        return self.search.best.point

    @property
    def trained(self) -> Point:
        """A point at the guidance and of the snapshot that are compared: those of the choice, unless it is the base."""
        return self.best if self.best.w != 0 else Point(0.0, self.search.base.point.guidance, len(self.snapshots) - 1)

    def row(
        self,
        key: str,
        name: str,
        point: Point,
        blocks: int,
        *,
        settings: Any = None,
        with_both: bool = False,
        put: Callable[[Point], GenerativeModel] | None = None,
    ) -> Row:
        """One line of the report, scored on so many blocks.

        Args:
            settings: of another sampler.
            with_both: sampled with base and self-trained network together, at scale w.
            put: puts the weights of the point in place; by default `merged`.
        """
        candidate = self.candidate(point)
        if settings is not None:
            sampler = settings_text(self.settings, settings)
            scored = ", ".join([f"w {number_text(point.w)}", sampler])
            candidate = replace(candidate, name=scored, settings=settings, sampler=sampler)
            name = f"{name} ({sampler})"
        if with_both:
            candidate = replace(candidate, name=candidate.name.replace("w ", "SIMS ", 1))
        # Once for all blocks, and only if one is not in the log.
        putting = self.combined if with_both else put or self.merged
        candidate, used = replace(candidate, put=cache(partial(putting, point))), candidate.settings
        found = tuple(self.scorer.scores(candidate, Purpose.REPORT, block) for block in range(blocks))
        calls = self.scorer.model.calls(used)
        return Row(
            key=key,
            name=name,
            calls=calls and calls * (2 if with_both else 1),
            blocks=found,
            w=point.w,
            settings=asdict(used),
        )

    def evaluated(self, point: Point, *, searched: bool = True) -> Evaluated:
        """A point on selection images, as the report shows it."""
        scores, failure = None, None
        try:
            scores = self.scores(point, Purpose.SELECTION)
        except DegenerateError as error:
            failure = str(error)
        return Evaluated(
            w=point.w,
            guidance=point.guidance,
            snapshot=self.label(point),
            kimg=self.budgets[point.snapshot] if point.w != 0 else None,
            sampler=self.sampler or None,
            scores=scores,
            failure=failure,
            searched=searched,
        )

    def samples(self, point: Point, ws: Collection[float], most: int, class_names: Sequence[str] = ()) -> Samples:
        """Images of the report's noise at several w, to look at."""
        scorer = self.scorer
        return samples_at(
            ws,
            lambda w: self.merged(point._replace(w=w)),
            scorer.model,
            self.settings_at(point),
            self.plan.seed,
            most,
            self.plan.batch_size,
            scorer.processes,
            class_names,
        )

    def training(self) -> Training:
        """The self-training behind the snapshots, as far as is known."""
        seen = [None if budget is None else 1000 * budget for budget in self.budgets]
        curve = self.scorer.processes.on_main(lambda: training_curve(self.snapshots[-1].parent))
        return Training(
            name="the base's best sampler" if self.sampler else "the sampler that was asked for",
            images=tuple(images for images, _ in curve),
            losses=tuple(loss for _, loss in curve),
            moved=tuple(zip(seen, self.shares, strict=True)),
        )


def best_sampler(given: Tuner) -> SamplerSearch:
    """The base's best settings at as many network calls as those of `given`, on selection images."""
    plan, scorer = given.plan, given.scorer

    by_moments = plan.metric == "distance"
    score = scorer.statistics if by_moments else scorer.value

    def evaluate(settings: Any) -> float | Statistics:
        sampler = settings_text(given.settings, settings)
        name = ", ".join(filter(None, ["w 0", sampler]))
        candidate = replace(given.candidate(BASE), name=name, settings=settings, sampler=sampler)
        return score(candidate, num_images=plan.sampler_images)

    return search_sampler(
        evaluate,
        given.settings,
        scorer.model.tunable,
        scorer.model.calls,
        reference=scorer.selection.frechet if by_moments else None,
        limit=plan.sampler_scores,
        tolerance=plan.tolerance,
    )


def identity_of(plan: TunePlan, model: GenerativeModel, settings: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """What a run is determined by, as JSON; `facts` say what beside plan, model and settings the scores depend on."""
    # Runs that began before classes were dealt to the images of a set, as the protocol says, are not continued.
    dealt = {} if model.set_labels(1, 0) is None else {"labels": "dealt to the set"}
    return {
        "neon": __version__,
        "torch": torch.__version__,
        "architecture": model.architecture,
        **plan.facts(),
        # One entry for both, as in records of earlier runs.
        "grid": None if plan.grid is None else (plan.grid, plan.guidances),
        "guidance_grid": None,
        "base": str(plan.base),
        "self_trained": [str(path) for path in plan.self_trained],
        "base_sha256": sha256_file(plan.base),
        "self_trained_sha256": [sha256_file(path) for path in plan.self_trained],
        "settings": asdict(settings),
        **model.protocol,
        **dealt,
        **facts,
    }
