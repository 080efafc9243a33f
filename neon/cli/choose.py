"""`neon tune`, `align`, `report` and `demo`: the choice of w, from the files that a user names.

torch and what needs it are imported where a command runs, so that `neon --help` does not wait for them.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from neon.cli.command_line import at_least_one, values_refused
from neon.cli.flags import (
    INCEPTION,
    Device,
    FeatureFlags,
    Features,
    File,
    Key,
    Log,
    ModelName,
    said_settings,
    settings_with,
    tell_prompts,
)
from neon.errors import RequestError, warn
from neon.runtime.trackers import check_installed
from neon.tune.plan import TunePlan

if TYPE_CHECKING:
    from neon.model import GenerativeModel
    from neon.runtime.distributed import Processes
    from neon.tune.inputs import Inputs


@dataclass(frozen=True, kw_only=True)
class ResidentFlags(FeatureFlags):
    """The model whose weights stay resident while they are merged and scored."""

    set: tuple[str, ...] = ()
    """settings of the sampler, NAME=VALUE each"""
    model: ModelName = None
    """the class of a model of your own; by default as the base says"""
    vae: Path | None = None
    """autoencoder or tokenizer, if the model needs one; by default where it usually lies"""
    prompts: File = None
    """of a network that is asked by prompts: a text file with one in each line"""
    device: Device = None
    """by default a GPU where there is one"""

    def open(self, base: Path, key: str | None, processes: "Processes") -> "tuple[GenerativeModel, Any]":
        """The model of checkpoint `base`, still without its autoencoder, and the sampler's settings."""
        from neon.model import load_model

        model = load_model(base, key, device=processes.device, kind=self.model)
        return model, settings_with(said_settings(model), self.set)

    def loader(self, base: Path, key: str | None, processes: "Processes") -> "Callable[[bool], GenerativeModel]":
        """What loads the base once more, whole, to sample from or (True) to train."""
        from neon.model import load_model

        def load(for_training: bool) -> "GenerativeModel":
            model = load_model(base, key, device=processes.device, kind=self.model, for_training=for_training)
            self.complete(model)
            return model

        return load

    def complete(self, model: "GenerativeModel") -> Path | None:
        """Give `model` its autoencoder, whose file is returned, and its prompts."""
        from neon.model import complete

        return complete(model, self.vae, self.prompts)


@dataclass(frozen=True, kw_only=True)
class ChoiceFlags(ResidentFlags):
    """Real images that w is chosen against, and others that the choice is reported against."""

    select_stats: Path
    """statistics of real images that the choice is made against (.npz), or the images (folder or zip)"""
    report_stats: Path | None = None
    """what the report is made against, likewise; by default the same"""
    real_images: Path | None = None
    """folder or zip of real images: also scores precision and recall"""
    nearest_k: int = 5
    """which nearest neighbour gives the radius in precision and recall"""
    fresh: bool = False
    """start anew, replacing a run that is in the folder"""

    def opened(self, plan: TunePlan, processes: "Processes") -> "Inputs":
        """All that `plan` needs, read and checked.

        Raises:
            RequestError: a file is not readable or does not fit the others, or flags contradict each other.
        """
        from neon.merge import check_same_network
        from neon.model import code_file
        from neon.tune.inputs import RealImages, open_real_images

        model, settings = self.open(plan.base, plan.key, processes)
        self._check_plan(plan, model, settings)
        autoencoder = self.complete(model)
        tell_prompts(self.prompts, model)
        real = RealImages(
            features=self.named_features(),
            select=self.select_stats,
            report=self.report_stats or self.select_stats,
            manifold=self.real_images,
            nearest_k=self.nearest_k,
        )
        files = {"autoencoder_sha256": autoencoder, "model_sha256": code_file(self.model)}
        files |= {} if self.prompts is None else {"prompts_sha256": self.prompts}
        found = open_real_images(
            real, model, settings, batch_size=plan.batch_size, processes=processes, files=files
        )  # fmt: skip
        for path in plan.self_trained:
            check_same_network(plan.base, path, plan.key, plan.self_trained_key)
        return found

    def _check_plan(self, plan: TunePlan, model: "GenerativeModel", settings: Any) -> None:
        """A RequestError if the plan asks for guidance that the model has not, or for FID of too few images."""
        from neon.metrics.reference import INCEPTION_DIM

        if plan.guidances and not hasattr(settings, "guidance"):
            raise RequestError(f"--guidance: the sampler of {model.architecture} has none")
        if plan.guidances and model.num_classes == 0:
            raise RequestError(f"--guidance: {plan.base} is unconditional, there is nothing to guide by")
        for guidance in plan.guidances:
            with values_refused():
                replace(settings, guidance=guidance)
        if self.features[0] == INCEPTION and min(plan.num_images, plan.report_images) <= INCEPTION_DIM:
            raise RequestError(
                f"--num_images {plan.num_images}, --report_images {plan.report_images}: FID of as few images as "
                f"features ({INCEPTION_DIM}) says little of the network; ask for more, or score with a small feature "
                "network"
            )


@dataclass(frozen=True, kw_only=True)
class Tune(ChoiceFlags):
    """Choose w (and guidance, snapshot and sampler) with few evaluations, and report the choice on other images.

    Weights stay resident, every point is merged in place and scored on the same selection images. w is chosen with the
    sampler that is asked for and with the base's best one of as many network calls, for which a synthetic set is drawn
    and trained on anew. All are then scored on report images of other seeds, beside the base with more calls. The
    improved weights are written, with their sampler; where the gain over the base's best sampler is within the noise
    the base is recommended, and nothing is written. A killed run goes on; runs on several
    processes under `torchrun -m neon.cli tune ...`, with equal results.

    Example: neon tune --base base.safetensors --self-trained runs/self/snapshot-*.safetensors
    --select-stats train.npz --report-stats test.npz --guidance 1 3
    """

    plan: Annotated[TunePlan, tyro.conf.arg(name="")]
    out: Path = Path("runs/tune")
    """folder of the run: evaluations, tune.json, report.html, improved.safetensors"""
    save: bool = True
    """write the weights that are better than the base"""
    log: Log = None
    """also send the curves of search and training to a tracker"""

    def __call__(self) -> None:
        """Run the search; everything that can be wrong with the files is found before the first image is sampled."""
        from neon.runtime.distributed import processes

        check_installed(self.log)
        say_what_is_added("tune", self.plan.w)
        with processes(self.device) as group:
            self._run(group)

    def _run(self, processes: "Processes") -> None:
        from neon.merge import warn_of_snapshot
        from neon.runtime.run_folder import held_by_main
        from neon.runtime.trackers import Tracker
        from neon.tune.outcome import Presentation, choose
        from neon.tune.retrain import self_training_of
        from neon.tune.run import Tuner, identity_of
        from neon.tune.scorer import Scorer

        plan, found = self.plan, self.opened(self.plan, processes)
        model, settings = found.model, found.settings
        if processes.is_main:
            for path in plan.self_trained:
                warn_of_snapshot(path, model, settings, plan.key, plan.self_trained_key)
        identity = processes.on_main(lambda: identity_of(plan, model, settings, found.facts))
        with (
            held_by_main(self.out, identity, processes, fresh=self.fresh),
            Tracker(self.log, self.out, identity, processes) as tracker,
        ):
            scorer = Scorer(plan, model, found.selection, found.reporting, self.out, processes, tracker)
            load = self.loader(plan.base, plan.key, processes)
            again = self_training_of(plan, model, load) if plan.resample else None
            if again is None and plan.resample and plan.searches_sampler and model.tunable and processes.is_main:
                warn(
                    f"{plan.self_trained[-1]}: does not say how many images it was trained on, so that for the base's "
                    "best sampler these weights are used as they are; with --training_images and --synthetic_images "
                    "others are trained for it"
                )
            again = again and replace(again, log=self.log)
            outcome = choose(
                Tuner(plan, scorer, settings), Presentation(real=found.pictures), identity, again, save=self.save
            )
        if processes.is_main:
            print(outcome.text, flush=True)


def say_what_is_added(command: str, w: tuple[float, float]) -> None:
    """Say that the base is scored, too, where a range of w leaves it out."""
    low, high = w
    if low > 0 or high < 0:
        print(f"neon {command}: --w {low:g} {high:g}: 0, the base, is added to the range", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Align(ResidentFlags):
    """Predict the best w from few images: those of the same noise at w = -0.5, 0, 0.5 and one more.

    Mean and variances of their features are interpolated in w, and compared with those of real images. With any
    feature network it costs about a tenth of an evaluation of 10,000 images, and tells whether evaluations are worth
    it. `neon tune` finds the w to use. What follows +- is the standard error of the images; the interval of w holds
    the error of the interpolation, too.

    Example: neon align --base base.safetensors --self-trained tuned.pth --features net.safetensors --stats train.npz
    """

    base: Path
    """base weights, of a network that is recognised or written by neon"""
    self_trained: Path
    """weights fine-tuned on the base's own samples"""
    stats: Path
    """statistics of real images (.npz), made with the same features"""
    features: Features
    """feature network: inception, or a FILE made by `neon features`"""
    key: Key = None
    """nesting of the state dict in the base's file, such as model_ema; chosen if not given"""
    self_trained_key: Key = None
    """the same for the self-trained file"""
    real: Path | None = None
    """folder or zip of real images: also the cosine between gradients of the loss on these and on `synthetic`"""
    synthetic: Path | None = None
    """folder or zip of images of the base, with `real`"""
    num_images: int = 250
    """images at each of the four w, at least 20"""
    batch_size: int = 64
    """images per forward pass of one process"""
    seed: int = 0
    """of the images"""
    json: File = None
    """also write the figures to this file"""

    def __call__(self) -> None:
        """Predict; everything that can be wrong with the files is found before the first image is sampled."""
        from neon.runtime.distributed import processes

        if (self.real is None) != (self.synthetic is None):
            raise RequestError(
                "--real, --synthetic: gradients are compared of both; give both sets of images, or neither"
            )
        at_least_one(batch_size=self.batch_size)
        with processes(self.device) as group:
            self._run(group)

    def _run(self, processes: "Processes") -> None:
        import torch

        from neon.data.shards import open_images
        from neon.merge import LiveMerge, check_same_network, load_self_trained
        from neon.metrics.reference import load_statistics
        from neon.runtime.files import check_writable, write_json
        from neon.runtime.threads import use_threads
        from neon.tune.align import features_at, predict_from_few, prediction_text, rounding
        from neon.tune.gradients import gradient_alignment
        from neon.tune.predict import GROUPS

        if (file := self.json) is not None:
            processes.on_main(lambda: check_writable(file, overwrite=True))
        check_same_network(self.base, self.self_trained, self.key, self.self_trained_key)
        model, settings = self.open(self.base, self.key, processes)
        self.complete(model)
        tell_prompts(self.prompts, model)
        extractor, *others = self.extractors(processes.device)
        if others:
            raise RequestError(f"--features {' '.join(self.features)}: align predicts in one feature space; give one")
        use_threads(processes.device, model, extractor)
        [reference] = load_statistics(self.stats, model, [extractor])
        if self.num_images < (fewest := 2 * GROUPS):
            raise RequestError(
                f"--num_images {self.num_images}: too few to tell their noise; "
                f"expected at least {fewest}, better hundreds"
            )
        sets = None
        if self.real is not None and self.synthetic is not None:
            sets = open_images(self.real), open_images(self.synthetic)
        trained = load_self_trained(model.network, self.base, self.self_trained, self.key, self.self_trained_key)
        own = next(model.network.parameters()).dtype
        left = processes.on_main(lambda: rounding(model.network, trained, [own, torch.bfloat16, torch.float16]))
        compared = sets and gradient_alignment(model, *sets, seed=self.seed, processes=processes)
        base = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
        live = LiveMerge(model.network, base, trained)

        def sample(ws: Sequence[float]) -> "torch.Tensor":
            return features_at(
                model,
                live,
                ws,
                settings,
                extractor,
                self.num_images,
                seed=self.seed,
                batch_size=self.batch_size,
                processes=processes,
            )

        prediction = predict_from_few(sample, reference, processes)
        metric = extractor.score_name

        def write() -> None:
            print(prediction_text(prediction, left, metric, self.num_images))
            if compared is not None:
                print(compared)
            if file is not None:
                figures = {
                    "metric": metric,
                    "num_images": self.num_images,
                    "seed": self.seed,
                    "sign": prediction.sign,
                    **asdict(prediction),
                    "rounding": [asdict(entry) for entry in left],
                    "gradients": compared and asdict(compared),
                    "settings": asdict(settings),
                }
                write_json(file, figures)

        processes.on_main(write)


@dataclass(frozen=True, kw_only=True)
class WriteReport:
    """Write the page of a run of `neon tune` or `neon demo` again.

    Example: neon report runs/tune
    """

    run: tyro.conf.Positional[Path]
    """folder of the run"""

    def __call__(self) -> None:
        """Write it, and print where."""
        from neon.report.page import report_again

        print(report_again(self.run))
