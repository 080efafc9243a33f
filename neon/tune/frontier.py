"""The run behind `neon frontier`: the choice of w at one sampler's numbers of steps, from cheap to dear.

w belongs to a sampler, so it is chosen at each; what Neon gains at few calls, more calls may give the base as well.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neon.errors import RequestError
from neon.model import GenerativeModel
from neon.report.frontier import Frontier, FrontierPoint
from neon.tunable import at_calls
from neon.tune.retrain import SelfTraining
from neon.tune.run import BASE, Tuner
from neon.tune.scorer import Scorer


def samplers_at(model: GenerativeModel, settings: Any, calls: Sequence[int]) -> dict[int, Any]:
    """`settings` with the most steps that fit in each number of `calls`, by the network calls that they take, rising.

    Raises:
        RequestError: the model does not count its calls, its sampler has no steps, or too many for one of the numbers.
    """
    own = model.calls(settings)
    if own is None:
        raise RequestError(
            f"--calls: {model.architecture} does not count its network calls; give its class a method `calls`, as in "
            "neon/model.py"
        )
    if not hasattr(settings, "num_steps"):
        raise RequestError(
            f"--calls: the sampler of {model.architecture} has no number of steps; an image always takes {own} network "
            "calls, so there is one point, which `neon tune` reports"
        )
    found = dict[int, Any]()
    for number in calls:
        candidate = at_calls(model.calls, settings, number)
        if candidate is None:
            fewest = (n for n in range(number + 1, own + 1) if at_calls(model.calls, settings, n) is not None)
            raise RequestError(
                f"--calls {number}: this sampler takes at least {next(fewest, own)} network calls an image"
            )
        found.setdefault(model.calls(candidate) or number, candidate)
    return dict(sorted(found.items()))


def measure(
    scorer: Scorer, given: Any, samplers: dict[int, Any], provenance: dict[str, Any], self_training: SelfTraining | None
) -> Frontier:
    """Score base and Neon at each of the `samplers`, whose settings are told from `given` in names of the log.

    `self_training` makes weights for each sampler; without it those of the plan are used at all of them. The folder of
    the run is the caller's to hold.
    """
    points = tuple(
        _point(scorer, given, settings, calls, self_training) for calls, settings in samplers.items()
    )  # fmt: skip
    scorer.cautions(max(point.gain.mean for point in points))
    return Frontier(
        metric=scorer.selection.metric,
        points=points,
        resampled=self_training is not None,
        provenance={**provenance, "command": " ".join(sys.argv)},
    )


def _point(scorer: Scorer, given: Any, settings: Any, calls: int, self_training: SelfTraining | None) -> FrontierPoint:
    own: tuple[Path, ...] = ()
    if self_training is not None:
        own = self_training(settings, scorer.folder, scorer.processes, f"-{calls}-calls")
    tuner = Tuner(scorer.plan, scorer, settings, given, own)
    base = tuner.row("base", "base", BASE, scorer.plan.blocks)
    best = tuner.best
    return FrontierPoint(
        calls=calls,
        settings=asdict(settings),
        w=float(best.w),
        self_trained=None if best.w == 0 else str(tuner.snapshots[best.snapshot]),
        base=base,
        neon=base if best.w == 0 else tuner.row("neon", "Neon", best, scorer.plan.blocks),
    )
