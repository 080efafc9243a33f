"""The choice of w, at the sampler that was asked for and at the base's best one, its report on other images, and files.

The table holds every way to get there that costs nothing but calls or scores: the base at its best sampler, with more
calls, and both networks sampling together. So a gain of Neon is not one that a setting gives, too.
"""

import math
import shlex
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from neon.errors import DegenerateError
from neon.model import own_class
from neon.report.page import PAGE_FILE, write_report
from neon.report.record import Report, Row, TriedSampler, paired_gain, save
from neon.report.samples import Samples
from neon.report.words import result_text, scores_of, write_scores_csv
from neon.runtime.files import write_json
from neon.tunable import at_calls
from neon.tune.pictures import SHOWN, RealPictures, slider_ws, with_nearest
from neon.tune.reasons import why_nothing_gained
from neon.tune.retrain import SelfTraining
from neon.tune.run import Tuner, best_sampler
from neon.tune.sampler import SamplerSearch
from neon.tune.scorer import set_text, settings_text
from neon.tune.search import Point
from neon.tune.weights import IMPROVED, reopened, write_weights

RESULT_FILE, SCORES_FILE = "tune.json", "scores.json"
OWN_SUFFIX = "-best-sampler"
"""of the names of the synthetic set and the self-training for the base's best sampler"""


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """What a report shows beside the points searched and the choice."""

    title: str | None = None
    """None: it names the base"""
    picture_w: tuple[float, ...] = ()
    """merge weights that are evaluated for the curves, and never chosen"""
    grid_size: int = SHOWN
    """images in each grid of samples, at most: as many of each class, if they can be"""
    real: RealPictures | None = None
    """real images to compare with"""
    class_names: tuple[str, ...] = ()
    """of all classes in their order; none: they are numbered"""
    again: str | None = None
    """the command that repeats the run; None: the one that was typed"""
    notes: tuple[str, ...] = ()
    """how base and self-trained weights came about, a sentence each"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a run: the recommended weights and sampler, the searches that led there, the report on other images."""

    given: Tuner
    """with the sampler that was asked for"""
    tuned: Tuner | None
    """with the base's best sampler; None: the former is, or it was not searched"""
    samplers: SamplerSearch | None
    report: Report
    seconds: float
    """of all evaluations, those before a kill included"""
    reason: str | None
    """why nothing was gained; None: something was"""
    weights: tuple[Path, ...] = ()
    """files of the improved weights; none where nothing was gained, or they were not to be kept"""

    @property
    def helps(self) -> bool:
        """Whether the best merge is better than the base at its best sampler, beyond the noise."""
        report = self.report
        return report.best is not report.fair and paired_gain(report.fair, report.best).certain

    @property
    def recommended(self) -> tuple[Tuner, Point]:
        """Where to sample, and with which weights: w = 0, the base, where Neon does not help beyond the noise."""
        if self.helps:
            tuner = self.given if self.report.best is self.report.neon or self.tuned is None else self.tuned
            return tuner, tuner.best
        tuner = self.given if self.tuned is None or self.report.fair is self.report.base else self.tuned
        return tuner, tuner.search.base.point

    @property
    def page(self) -> Path:
        """The report for a browser."""
        return self.given.scorer.folder / PAGE_FILE

    @property
    def evaluations(self) -> int:
        """Points scored on selection images."""
        searches = [tuner.search for tuner in (self.given, self.tuned) if tuner is not None]
        return sum(len(search.evaluations) for search in searches) + (
            0 if self.samplers is None else len(self.samplers.evaluations)
        )

    @property
    def text(self) -> str:
        """Table, result, the place of the page and what to do next, for a terminal."""
        last = f"{self.evaluations} evaluations, {self.seconds:.0f} s. Report: {self.page}"
        reason = [] if self.reason is None else [self.reason]
        return "\n".join(["", result_text(self.report), *reason, "", last, *self.advice])

    @property
    def merge(self) -> str | None:
        """The command that makes the improved weights, up to the name of their file; None: the base is recommended."""
        tuner, point = self.recommended
        if point.w == 0:
            return None
        plan, weights = tuner.plan, tuner.snapshots[point.snapshot]
        names = shlex.join(["--base", str(plan.base), "--self-trained", str(weights)])
        return f"neon merge {names} -w {point.w:g} --output"

    @property
    def sample(self) -> str:
        """The command that samples what is recommended, up to the number of images."""
        tuner, point = self.recommended
        settings = set_text(self.given.scorer.model.default_settings, tuner.settings_at(point))
        network = self.weights[0] if self.weights else f"{IMPROVED}.safetensors" if point.w else tuner.plan.base
        # Improved weights say their sampler.
        sampler = f" --set {settings}" if settings and not self.weights else ""
        return f"neon sample --network {shlex.quote(str(network))}{own_class(type(tuner.scorer.model))}{sampler}"

    @property
    def advice(self) -> list[str]:
        """What the improved weights are made of and where they lie, and how to sample what is recommended."""
        sample, merge = f"{self.sample} --num_images 50000 --outdir samples.zip", self.merge
        if merge is None:
            return [f"Next: {sample}, the base."]
        if not self.weights:
            return [f"Next: {merge} {IMPROVED}.safetensors", f"then: {sample}"]
        made = f"(as by {merge} {self.weights[0]})"
        return [
            f"Improved weights: {', '.join(map(str, self.weights))} {made}, which say their sampler.",
            f"Next: {sample}",
        ]

    def commands(self, again: str | None) -> tuple[tuple[str, str], ...]:
        """What to type to do it again, and with its result: what that does, and the line."""
        typed = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        found = [("Repeat the run", again or typed)]
        if self.merge is not None:
            found.append(("Merge the weights", f"{self.merge} {IMPROVED}.safetensors"))
        return (*found, ("Sample", f"{self.sample} --num_images 16 --outdir samples"))


def choose(
    given: Tuner,
    presentation: Presentation,
    provenance: dict[str, Any],
    self_training: SelfTraining | None = None,
    *,
    save: bool = True,
) -> Outcome:
    """Search, report the choice on other images, and write both into the folder of the run, which the caller holds.

    `provenance` says what the scores depend on, as JSON. `self_training` makes weights for the base's best sampler;
    without it those of the plan are used there, too. `save` keeps the weights that are better than the base.
    """
    scorer, plan = given.scorer, given.plan
    _ = given.search
    samplers = best_sampler(given) if plan.searches_sampler and scorer.model.tunable else None
    tuned = None
    if samplers is not None and samplers.best.settings != given.settings:
        settings = samplers.best.settings
        own: tuple[Path, ...] = ()
        if self_training is not None:
            own = self_training(settings, scorer.folder, scorer.processes, OWN_SUFFIX)
        tuned = Tuner(plan, scorer, settings, given.settings, own)
        _ = tuned.search
    report = _Rows(given, tuned, save=save).report(samplers, presentation, provenance, self_training is not None)
    reason = why_nothing_gained(report, (given,) if tuned is None else (given, tuned))
    if reason is not None:
        report = replace(report, notes=(*report.notes, reason))
    outcome = Outcome(
        given=given, tuned=tuned, samplers=samplers, report=report, seconds=scorer.seconds, reason=reason
    )  # fmt: skip
    if save:
        outcome = replace(outcome, weights=scorer.processes.on_main(lambda: write_weights(*outcome.recommended)))
    outcome = replace(outcome, report=replace(report, commands=outcome.commands(presentation.again)))
    scorer.processes.on_main(lambda: _write(outcome))
    scorer.track_result(report.rows)
    return outcome


class _Rows:
    """The lines of a report, scored in their order; those that cannot be scored leave a note.

    Merges of a LoRA that `save` keeps are scored as they are written, reopened: no copy of the network is at hand that
    says that they are what was merged in place.
    """

    def __init__(self, given: Tuner, tuned: Tuner | None, *, save: bool) -> None:
        self.given, self.tuned, self.plan, self.save = given, tuned, given.plan, save
        self.model = given.scorer.model
        self.notes: list[str] = []
        self.base = given.row("base", "base", given.search.base.point, self.plan.blocks)
        self.calls = self.base.calls
        self.rows = [self.base, *self._of_base()]
        self._more_calls()
        self._try("The self-trained weights", self._self_trained)
        self.neon = self._neon(given, "neon", "Neon") or self.base
        tuned_neon = None if tuned is None else self._neon(tuned, "neon_best_sampler", "Neon, best sampler")
        fair = [row for row in self.rows if row.key == "base_best_sampler"]
        self.fair = fair[0] if fair else self.base
        self.best = self._best(tuned_neon)
        if self.plan.baselines and self.model.combines:
            if tuned is not None and (self.best is tuned_neon or given.best.w == 0):
                self._together(tuned, "SIMS, best sampler")
            else:
                self._together(given, "SIMS")

    def _blocks(self, calls: int | None) -> int:
        """Rows of many calls are told apart by one block, too."""
        return 1 if calls is not None and self.calls is not None and calls > 2 * self.calls else self.plan.blocks

    def _try(self, what: str, row: Callable[[], Row]) -> Row | None:
        try:
            self.rows.append(row())
        except DegenerateError as error:
            self.notes.append(f"{what} could not be scored: {error}.")
            return None
        return self.rows[-1]

    def _of_base(self) -> Iterator[Row]:
        """The base at what was chosen."""
        given, base, best = self.given, self.given.search.base.point, self.given.best
        if best.w != 0 and best.guidance != base.guidance:
            at_best = Point(0.0, best.guidance)
            yield given.row("base_same_guidance", f"base, guidance {best.guidance:g}", at_best, self.plan.blocks)
        if self.tuned is not None:
            point = self.tuned.search.base.point
            yield self.tuned.row("base_best_sampler", "base, best sampler", point, self.plan.blocks)

    def _more_calls(self) -> None:
        """The base with more steps of the sampler that was asked for."""
        if not self.plan.baselines or self.calls is None:
            return
        base = self.given.search.base.point
        settings = self.given.settings_at(base)

        def add(key: str, name: str, more: Any, least: int) -> None:
            calls = None if more is None else self.model.calls(more)
            if calls is not None and calls > least:
                self._try(name, lambda: self.given.row(key, name, base, self._blocks(calls), settings=more))

        twice = at_calls(self.model.calls, settings, 2 * self.calls)
        add("base_twice_the_calls", "base, twice the calls", twice, self.calls)
        add("base_converged", "base, converged", self.model.converged(settings), 2 * self.calls)

    def _self_trained(self) -> Row:
        trained = self.given.trained._replace(w=-1.0)
        return self.given.row("self_trained", "self-trained (w = -1)", trained, self.plan.blocks)

    def _neon(self, tuner: Tuner, key: str, name: str) -> Row | None:
        point = tuner.best
        if point.w == 0:
            return None
        put = partial(reopened, tuner) if self.save and tuner.weights[point.snapshot].is_adapter else None
        self.rows.append(tuner.row(key, f"{name} (w = {point.w:g})", point, self.plan.blocks, put=put))
        return self.rows[-1]

    def _together(self, tuner: Tuner, name: str) -> None:
        """Both networks at inference, where Neon does best."""
        point = tuner.best
        if point.w == 0:
            return
        calls = self.model.calls(tuner.settings_at(point))
        blocks = self._blocks(calls and 2 * calls)
        name = f"{name} (w = {point.w:g})"
        self._try(name, lambda: tuner.row("sims", name, point, blocks, with_both=True))

    def _best(self, tuned_neon: Row | None) -> Row:
        """What did best on selection images."""
        choices = [((self.tuned or self.given).search.base.value, self.fair)]
        if self.neon is not self.base:
            choices.append((self.given.search.best.value, self.neon))
        if tuned_neon is not None and self.tuned is not None:
            choices.append((self.tuned.search.best.value, tuned_neon))
        return min(choices, key=lambda choice: math.inf if choice[0] is None else choice[0])[1]

    def report(
        self,
        samplers: SamplerSearch | None,
        shown: Presentation,
        provenance: dict[str, Any],
        own_weights: bool,
    ) -> Report:
        given, tuned, plan, scorer = self.given, self.tuned, self.plan, self.given.scorer
        gain = 0.0 if self.best is self.fair else paired_gain(self.fair, self.best).mean
        trained = given.trained
        evaluated = [given.evaluated(evaluation.point) for evaluation in given.search.evaluations]
        pictured = set(shown.picture_w) - {one.w for one in evaluated}
        evaluated += [
            given.evaluated(trained._replace(w=w), searched=False) for w in shown.picture_w if w in pictured
        ]  # fmt: skip
        ws = {one.w for one in evaluated if one.scores is not None} | {0.0}
        ws |= set(slider_ws(min(ws), max(ws)))
        if tuned is not None:
            evaluated += [tuned.evaluated(evaluation.point) for evaluation in tuned.search.evaluations]
        return Report(
            title=shown.title or f"Neon: choice of w for {plan.base.name}",
            metric=scorer.selection.metric,
            beside=tuple(reference.metric for reference in scorer.reporting[1:]),
            rows=tuple(self.rows),
            base=self.base,
            neon=self.neon,
            base_best_sampler=None if self.fair is self.base else self.fair,
            choice=None if self.best is self.neon else self.best,
            w=given.best.w,
            guidance=given.best.guidance,
            snapshot=given.label(given.best),
            evaluated=tuple(evaluated),
            fit=given.search.curve(trained.guidance, trained.snapshot) if plan.metric == "distance" else (),
            samplers=tuple(_tried(given, samplers)),
            training=tuple(tuner.training() for tuner in (given, tuned) if tuner is not None),
            samples=self._samples(trained, ws, shown),
            notes=(*shown.notes, *_notes(given, tuned, samplers, own_weights), *self.notes, *scorer.cautions(gain)),
            provenance={**provenance, "command": " ".join(sys.argv)},
        )

    def _samples(self, trained: Point, ws: Collection[float], shown: Presentation) -> Samples:
        """Images to look at, with real ones beside them where there are some."""
        given, real = self.given, shown.real
        samples = given.samples(trained, ws, shown.grid_size, shown.class_names)
        if real is None:
            return samples

        def beside() -> Samples:
            ws_shown = (0.0, given.best.w)
            return with_nearest(replace(samples, real=real.first()), ws_shown, real, given.scorer.selection)

        return given.scorer.processes.on_main(beside)


def _tried(given: Tuner, samplers: SamplerSearch | None) -> Iterator[TriedSampler]:
    for tried in () if samplers is None else samplers.evaluations:
        settings = settings_text(given.settings, tried.settings) or "as asked for"
        yield TriedSampler(settings=settings, value=tried.value)


def _notes(given: Tuner, tuned: Tuner | None, samplers: SamplerSearch | None, own_weights: bool) -> list[str]:
    plan, result = given.plan, given.search
    notes = [
        f"{len(result.evaluations)} points were scored on the same {plan.num_images:,} selection images each; "
        f"the search ended because {result.reason}.",
        f"The table is of {plan.blocks} blocks of {plan.report_images:,} report images each, which share no seed with "
        "the selection.",
        f"Sampler: {', '.join(f'{name} {value}' for name, value in asdict(given.settings).items())}.",
    ]
    if plan.guidances:
        notes.append(
            "The base is scored at its own best guidance, so that no gain of guidance is counted as Neon's."
        )  # fmt: skip
    if samplers is not None:
        found = "none is better than the one asked for" if tuned is None else f"the best has {tuned.sampler}"
        notes.append(
            f"{len(samplers.evaluations)} samplers of at most as many calls were scored with the base on "
            f"{plan.sampler_images or plan.num_images:,} selection images each: {found}; the search ended because "
            f"{samplers.reason}."
        )
    if tuned is not None:
        whose = "of a synthetic set of its own" if own_weights else "that were given, drawn with another sampler"
        notes.append(
            f"w for that sampler was chosen by {len(tuned.search.evaluations)} points, with self-trained weights "
            f"{whose}."
        )
    return notes


def _write(outcome: Outcome) -> None:
    report, given, folder = outcome.report, outcome.given, outcome.given.scorer.folder
    result, (tuner, chosen) = given.search, outcome.recommended
    save(report, folder)
    write_report(folder, report)
    write_json(folder / SCORES_FILE, scores_of(report))
    write_scores_csv(folder, report)
    gained = None if report.best is report.fair else paired_gain(report.fair, report.best)
    images = len(result.evaluations) * given.plan.num_images
    if outcome.samplers is not None:
        images += len(outcome.samplers.evaluations) * (given.plan.sampler_images or given.plan.num_images)
    if outcome.tuned is not None:
        images += len(outcome.tuned.search.evaluations) * given.plan.num_images
    write_json(
        folder / RESULT_FILE,
        {
            "metric": report.metric,
            "recommended": "base" if chosen.w == 0 else "neon",
            "w": chosen.w,
            "guidance": chosen.guidance,
            "settings": asdict(tuner.settings_at(chosen)),
            "self_trained": None if chosen.w == 0 else str(tuner.snapshots[chosen.snapshot]),
            "base": report.base.distance,
            "fair_base": report.fair.distance,
            "neon": report.best.distance,
            "gain": None if gained is None else gained.mean,
            "gain_interval": None if gained is None else gained.interval,
            "blocks": given.plan.blocks,
            "evaluations": outcome.evaluations,
            "images": images + sum(len(row.blocks) for row in report.rows) * given.plan.report_images,
            "seconds": round(outcome.seconds, 1),
            "reason": result.reason,
            "best_on_selection": {**result.best.point._asdict(), "value": result.best.value},
            "base_on_selection": {**result.base.point._asdict(), "value": result.base.value},
        },
    )
