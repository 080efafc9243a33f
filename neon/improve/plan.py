"""What `neon improve` makes and searches; imports nothing heavy, so that the command line can state its flags by it."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neon.errors import RequestError
from neon.lora.settings import LoRA, check_lora, lora_of
from neon.runtime.parallel import Parallel
from neon.tune.plan import Metric, TunePlan

if TYPE_CHECKING:
    from neon.model import GenerativeModel
    from neon.recipe import Recipe

_NEW = ("lora_rank", "lora_alpha", "lora_targets", "gradient_checkpointing", "compile")
"""fields that records of runs hold only where they are used"""
FEWEST_STEPS = 50
"""of a self-training: the published batch is halved until the budget gives as many, for the weights move by steps"""


@dataclass(frozen=True, kw_only=True)
class ImprovePlan:
    """Synthetic set, self-training, search and report.

    Raises:
        RequestError: a range is empty or runs backwards, or a number is too small.
    """

    num_synthetic: int = 5000
    """images of the synthetic set"""
    training_images: int | None = None
    """images of the self-training, repeated ones included; by default five times as many as the set has"""
    batch: int | None = None
    """images per step of it; by default as published, or fewer where the budget would give less than 50 steps"""
    batch_gpu: int | None = None
    """images per forward pass of it; it moves results by rounding (and dropout)"""
    lr: float | None = None
    """its learning rate; by default as published, or raised where that would leave the weights where they are"""
    lr_rampup: float | None = None
    """thousand images over which the learning rate rises from 0; 0: none. By default as published, or shortened in
    proportion to the budget"""
    ema: float | None = None
    """half-life of averaged weights in thousand images; 0: none. By default as published, or shortened likewise"""
    snapshots: int = 2
    """weights kept of the self-training, evenly over its budget, which the search chooses among"""
    lora_rank: int | None = None
    """train factors of this rank beside layers, in the place of the weights (LoRA); leaves improved-lora/ too"""
    lora_alpha: float | None = None
    """the product of the factors is multiplied with this over the rank; by default the rank"""
    lora_targets: tuple[str, ...] = ()
    """the layers, by the last words of their names, or all; by default those that are usual for the architecture"""
    gradient_checkpointing: bool = False
    """compute activations once more for the backward pass, where a network can: less memory, more time"""
    compile: bool = False
    """compile the network for the self-training: the first step takes a minute, the others less; other roundings"""
    parallel: Parallel | None = None
    """how several processes train: ordered adds gradients as one process would, ddp as they come, fsdp also spreads
    weights and optimiser over the GPUs. By default ordered on CPUs, ddp on GPUs, fsdp where nothing else fits"""
    workers: int | None = None
    """processes that read images ahead, for each that trains; by default none on a CPU, up to 8 on a GPU"""
    w: tuple[float, float] = (0.0, 20.0)
    """range of merge weights; the search feels its way up from 0, so that a wide range costs nothing"""
    guidance_range: tuple[float, float] | None = None
    """range of guidance that is searched together with w; by default up to twice that of the sampler, if it guides"""
    metric: Metric = "distance"
    """what is best: the lowest distance, or the highest of another score"""
    select_images: int = 10_000
    """selection images behind each point"""
    report_images: int | None = None
    """report images in each block; by default as many"""
    blocks: int = TunePlan.blocks
    """of report images, at least 3"""
    batch_size: int = TunePlan.batch_size
    """images per forward pass of one process"""
    seed: int = 0
    """of the images and of the training"""
    tolerance: float = TunePlan.tolerance
    """relative gain below which a search ends"""
    limit: int = TunePlan.limit
    """evaluations of a search at most"""
    tune_sampler: bool = True
    """search of the base's best sampler of as many network calls, which gets a self-training and a w of its own; gains
    are held against it"""
    sampler_scores: int = TunePlan.sampler_scores
    """evaluations of that search, the settings that were asked for among them"""
    baselines: bool = True
    """rows of the base at twice the network calls and with a converged sampler, and of both networks at inference"""

    def __post_init__(self) -> None:
        for name in (
            "num_synthetic", "training_images", "batch", "batch_gpu", "snapshots", "select_images", "report_images",
            "batch_size",
        ):  # fmt: skip
            if (number := getattr(self, name)) is not None and number < 1:
                raise RequestError(f"--{name} {number}: expected at least 1")
        for name in ("lr_rampup", "ema"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise RequestError(f"--{name} {value:g}: expected 0 (none) or more")
        if self.w[1] <= 0:
            raise RequestError(f"--w {self.w[0]:g} {self.w[1]:g}: expected a range that ends above 0, such as 0 20")
        if (span := self.guidance_range) is not None and not span[0] < span[1]:
            raise RequestError(f"--guidance_range {span[0]:g} {span[1]:g}: expected a range, the lower end first")
        check_lora(self.lora_rank, self.lora_alpha, self.lora_targets)
        self.tune_plan(Path("base"), None, (Path("self-trained"),), self.guidance_range)  # refuses what it refuses

    def facts(self) -> dict[str, Any]:
        """What is asked for and determines the result, as JSON by the names of fields."""
        usual = {name: getattr(ImprovePlan, name) for name in _NEW}
        facts = {name: value for name, value in asdict(self).items() if name not in _NEW or value != usual[name]}
        return {name: value for name, value in facts.items() if name not in ("parallel", "workers")}

    def lora(self, model: "GenerativeModel") -> LoRA | None:
        """The factors that are trained; None: the weights are."""
        return lora_of(self.lora_rank, self.lora_alpha, self.lora_targets, model.lora_targets)

    @property
    def budget(self) -> int:
        """Images of the self-training, repeated ones included."""
        return 5 * self.num_synthetic if self.training_images is None else self.training_images

    @property
    def images_of_report(self) -> int:
        """Images in each block of the report."""
        return self.select_images if self.report_images is None else self.report_images

    def recipe(self, model: "GenerativeModel") -> "Recipe":
        """The published recipe of `model`, made to fit the budget, with what was given in its place.

        Raises:
            RequestError: a learning rate that is none.
        """
        from dataclasses import replace

        recipe = model.recipe.scaled_to(self.budget)
        batch = self.batch or _fitting(recipe.batch_size, self.budget, model.batch_multiple)
        try:
            recipe = replace(recipe, batch_size=batch, lr=recipe.lr if self.lr is None else self.lr)
        except ValueError as error:
            raise RequestError(f"--lr: {error}") from error
        if self.lr_rampup is not None:
            recipe = recipe.with_rampup(self.lr_rampup)
        return recipe if self.ema is None else recipe.with_halflife(self.ema or None)

    def guidances(self, model: "GenerativeModel", settings: Any) -> tuple[float, float] | None:
        """The range of guidance to search: as given, or up to twice that of a sampler that guides."""
        from neon.tunable import Range

        known, given = model.tunable.get("guidance"), getattr(settings, "guidance", None)
        if self.guidance_range is not None:
            if given is None:
                raise RequestError(f"--guidance_range: the sampler of {model.architecture} has no guidance")
            return self.guidance_range
        if not isinstance(known, Range) or given is None or given <= known.low:
            return None
        return known.low, 2 * given

    def tune_plan(
        self,
        base: Path,
        key: str | None,
        snapshots: tuple[Path, ...],
        guidance: tuple[float, float] | None,
    ) -> TunePlan:
        """The search among merges of `base` with `snapshots`."""
        alike = {field.name for field in fields(TunePlan)} & {field.name for field in fields(self)}
        return TunePlan(
            base=base,
            key=key,
            self_trained=snapshots,
            guidance=guidance,
            num_images=self.select_images,
            **{name: getattr(self, name) for name in alike - {"report_images", "training_images"}},
            report_images=self.images_of_report,
        )


def _fitting(batch: int, budget: int, multiple: int) -> int:
    """The published `batch`, halved until `budget` images are enough steps, in multiples of what the model takes."""
    while batch * FEWEST_STEPS > budget and batch % 2 == 0 and (batch // 2) % multiple == 0:
        batch //= 2
    return batch
