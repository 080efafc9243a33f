"""From a model to scores: features block by block, compared with real images, resumable."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from neon.evaluate.features import features_in_order, sampled_images
from neon.evaluate.reference import Reference, scores_in
from neon.evaluate.scores import Scores
from neon.evaluate.tally import Tally, resume_tallies, save_tallies
from neon.metrics import Statistics
from neon.model import GenerativeModel
from neon.runtime.distributed import Processes
from neon.runtime.signals import Stopped
from neon.sampling import Label, labels_of, prompts_of

SAVE_EVERY_SECONDS = 60.0


def evaluate(
    model: GenerativeModel,
    seeds: Sequence[int],
    settings: Any,
    references: Sequence[Reference],
    *,
    batch_size: int,
    processes: Processes,
    label: Label = None,
    title: str = "evaluating",
    state: Path | None = None,
    identity: str = "",
    statistics: Path | None = None,
) -> Scores:
    """Scores of `len(seeds)` sampled images against `references`, in every process; they are sampled once.

    Args:
        references: real images in each feature space; the first is that of the scores, which hold those of the others.
        label: which classes to sample.
        state: file in which the evaluation keeps what it has, so that a killed one goes on; removed at the end.
        identity: what the images are; a `state` of other images is not gone on from.
        statistics: file in which the mean and covariance of the features of the first space are kept.

    Raises:
        DegenerateError: features are not finite (the weights, or the images, are broken), or all alike.
    """
    prompted = model.prompts is not None and any(one.extractor.reads_prompts for one in references)
    tallies = [
        Tally(
            one.extractor,
            len(seeds),
            keep_features=one.real is not None,
            device=processes.device,
            prompted=prompted,
        )
        for one in references
    ]
    seconds = 0.0
    if state is not None:
        seconds = processes.on_main(lambda: resume_tallies(state, tallies, identity))
    saved = time.monotonic()
    started = saved - seconds
    try:
        for parts in features_in_order(
            sampled_images(model, seeds, settings, processes, label),
            len(seeds),
            [one.extractor for one in references],
            batch_size=batch_size,
            processes=processes,
            title=title,
            done=processes.from_main(tallies[0].done),
        ):
            if not processes.is_main:
                continue
            block = range(tallies[0].done, tallies[0].done + len(parts[0]))
            prompts = prompts_of(model, labels_of(model, [block], seeds, processes, label)) if prompted else None
            for tally, features in zip(tallies, parts, strict=True):
                tally.update(features, prompts)
            now = time.monotonic()
            seconds = now - started
            if state is not None and now - saved > SAVE_EVERY_SECONDS:
                save_tallies(state, tallies, seconds, identity)
                saved = time.monotonic()
    except Stopped as stop:
        done = tallies[0].done
        if state is not None and processes.is_main and done:
            save_tallies(state, tallies, seconds, identity)
            stop.kept = f"image {done:,} of {len(seeds):,} ({title})"
        raise
    if processes.is_main and processes.device.type == "cuda":  # which has not yet done all that it was asked for
        torch.cuda.synchronize(processes.device)
        seconds = time.monotonic() - started

    def score() -> Scores:
        try:
            scores = scores_in(references, tallies, title, seconds)
            if statistics is not None:
                Statistics.from_moments(tallies[0].moments, name=title).save(statistics)
            return scores
        finally:
            if state is not None:
                state.unlink(missing_ok=True)

    return processes.on_main(score)
