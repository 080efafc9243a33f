"""The whole method from Python: `neon improve` as a function."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from neon.errors import RequestError
from neon.improve.plan import ImprovePlan
from neon.improve.run import Base, improve
from neon.improve.unscored import improve_unscored
from neon.library.generator import Generator, PathLike, named_features, public, whole
from neon.runtime.distributed import Processes
from neon.runtime.download import shared_file
from neon.runtime.hub import in_words, output_path, short_name
from neon.runtime.signals import answered
from neon.runtime.threads import threads_for
from neon.runtime.trackers import TrackerName
from neon.tune.inputs import Inputs, RealImages, check_counts, open_real_images
from neon.tune.outcome import Presentation


@dataclass(frozen=True, kw_only=True)
class Improved:
    """What `improve_model` made of a generator."""

    folder: Path
    """of the run: report.html, scores.json and, where something was gained, the model card README.md"""
    path: Path | None
    """the improved model, for `load`, sampled as it was chosen for; None: nothing was gained beyond the noise, or
    nothing was scored"""
    weights: tuple[Path, ...]
    """all files of improved weights; without real images the merges to look at"""
    w: float | None
    """the merge weight of `path`; None: there is none"""
    text: str = field(repr=False)
    """table, result, reason and what to do next, for people"""


@public
def improve_model(
    generator: Generator,
    out: PathLike,
    *,
    real: PathLike | None = None,
    report_real: PathLike | None = None,
    real_images: PathLike | None = None,
    nearest_k: int = 5,
    features: PathLike | Sequence[PathLike] = "inception",
    inception_weights: PathLike | None = None,
    resize: str | None = None,
    fresh: bool = False,
    processes: Processes | None = None,
    **plan: Any,
) -> Improved:
    """The whole method, as `neon improve`: a synthetic set, a self-training, the choice of w, the improved model.

    The same call goes on where one that was killed has ended.

    Args:
        generator: what is improved, for the settings that it is sampled with (`Generator.with_settings`); a file.
        out: folder of the run.
        real: real images that the choice is made against: statistics (.npz), or a folder or zip. None: nothing is
            scored, and merges at w = 0.5, 1 and 1.5 are written, with a page of samples of each.
        report_real: what the report is made against, likewise; by default the same.
        real_images: folder or zip of real images: also scores precision and recall.
        nearest_k: which nearest neighbour gives the radius in these.
        features: "inception", or the file of a feature network; or several: the choice is made by the first, and
            reported in all.
        inception_weights: file of the Inception network; by default in torch-fidelity's cache.
        resize: how images are resized for it: "clean", "legacy_pytorch" or, by default, "legacy_tensorflow".
        fresh: replace a run that is in the folder.
        processes: as in `sample_set`.
        plan: num_synthetic, training_images, select_images, w and the like: the other flags of `neon improve`, by name.

    Raises:
        RequestError: a number makes no sense, files are missing or do not fit each other, there are too few images for
            the features, or the folder is another run's.
        WorkError: the disk is full, the self-training did not move the weights, or the base cannot be scored.
    """
    group = generator._processes(processes)
    if real is None and not (report_real is None and real_images is None):
        raise RequestError("report_real, real_images: go with real, what the choice is made against")
    try:
        asked = ImprovePlan(**plan)
    except TypeError as error:
        known = ", ".join(one.name for one in fields(ImprovePlan))
        raise RequestError(f"improve_model: {error}; expected among {known}") from error
    images = None
    if real is not None:
        images = RealImages(
            features=named_features(features, inception_weights, resize),
            select=shared_file(os.fspath(real), group),
            report=shared_file(os.fspath(real if report_real is None else report_real), group),
            manifold=None if real_images is None else shared_file(os.fspath(real_images), group),
            nearest_k=whole("nearest_k", nearest_k),
        )
    with threads_for(group.device, generator.model), answered():
        return improve_generator(generator, images, asked, output_path(out), group, fresh=fresh)


def improve_generator(
    generator: Generator,
    real: RealImages | None,
    plan: ImprovePlan,
    out: Path,
    group: Processes,
    *,
    fresh: bool,
    log: TrackerName | None = None,
) -> Improved:
    """`improve_model` of what was asked for, read and checked; errors as there."""
    if generator.path is None:
        raise RequestError("improve_model: this generator is in memory only; save it, and load the file")
    origin, model, settings = generator.origin, generator.model, generator.settings
    base = Base(
        path=origin.path, key=origin.key, load=lambda for_training: origin.open(group.device, for_training=for_training)
    )  # fmt: skip
    recipe = recipe_of_run(generator, real, plan)
    inputs = real_inputs(generator, real, plan, group)
    if inputs is None:
        facts = group.on_main(lambda: origin.facts(model))
        merges, text = improve_unscored(
            plan, base, model, settings, out, group, recipe=recipe, facts=facts, fresh=fresh, log=log
        )  # fmt: skip
        return Improved(folder=out, path=None, weights=merges, w=None, text=text)
    shown = Presentation(title=f"Neon: {short_name(base.path)}, improved", real=inputs.pictures)
    outcome = improve(plan, base, inputs, out, group, recipe=recipe, presentation=shown, fresh=fresh, log=log)
    path = outcome.weights[0] if outcome.weights else None
    w = None if path is None else outcome.recommended[1].w
    return Improved(folder=out, path=path, weights=outcome.weights, w=w, text=outcome.text)


def real_inputs(generator: Generator, real: RealImages | None, plan: ImprovePlan, group: Processes) -> Inputs | None:
    """The real images, read and checked; None: there are none.

    Raises:
        RequestError: files do not fit each other, or the plan asks for too few images for the features.
    """
    if real is None:
        return None
    model = generator.model
    found = open_real_images(real, model, generator.settings, batch_size=plan.batch_size, processes=group, files={})
    check_counts(found.extractor, select_images=plan.select_images)
    for reference in found.reporting:
        check_counts(reference.extractor, report_images=plan.images_of_report)
    return replace(found, facts={**found.facts, **group.on_main(lambda: generator.origin.facts(model))})


def recipe_of_run(generator: Generator, real: RealImages | None, plan: ImprovePlan) -> dict[str, Any]:
    """What is asked for, by the names of the flags of `neon improve`, as JSON."""
    origin = generator.origin
    given = {
        "base": origin.path,
        "key": origin.key,
        "vae": origin.autoencoder,
        **({} if origin.prompts is None else {"prompts": origin.prompts}),
        "precision": origin.precision,
        **({} if origin.tf32 is None else {"tf32": origin.tf32}),
        "settings": asdict(generator.settings),
        **plan.facts(),
    }
    if origin.loss:
        given["loss"] = list(origin.loss)
    if real is not None:
        report = None if real.report == real.select else real.report
        given |= {"real": real.select, "report_real": report, "real_images": real.manifold}
        named = real.features
        names = tuple(map(in_words, named.names))
        features = names[0] if len(names) == 1 else names
        given |= {"nearest_k": real.nearest_k, "features": features, "inception_weights": named.inception_weights}
        if named.resize is not None:
            given["resize"] = named.resize
    return {name: in_words(value) if isinstance(value, Path) else value for name, value in given.items()}
