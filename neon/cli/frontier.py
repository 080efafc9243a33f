"""`neon frontier`: what base and Neon reach for how many network calls."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neon.cli.choose import ChoiceFlags, say_what_is_added
from neon.cli.command_line import at_least_one
from neon.cli.flags import Key
from neon.errors import RequestError
from neon.runtime.parallel import Parallel
from neon.tune.plan import TunePlan

if TYPE_CHECKING:
    from neon.report.frontier import Frontier
    from neon.report.record import Report
    from neon.runtime.distributed import Processes
    from neon.tune.inputs import Inputs
    from neon.tune.retrain import SelfTraining


@dataclass(frozen=True, kw_only=True)
class MeasureFrontier(ChoiceFlags):
    """Distance, precision and recall against network calls an image, of base and Neon.

    For each number of --calls the sampler of --set takes the most steps that fit; w is chosen at each on selection
    images, and base and Neon are scored on report images of other seeds. It tells how many calls Neon saves, and at
    how many there is nothing left to gain. A killed run goes on, numbers of calls can be added to a finished one, and
    torchrun gives equal results.

    Example: neon frontier --base base.safetensors --self-trained tuned.safetensors --calls 5 10 19 35
    --select-stats train.npz --report-stats test.npz --features features.safetensors --set solver=heun
    """

    base: Path
    """base weights, of a network that is recognised or written by neon"""
    self_trained: tuple[Path, ...]
    """snapshots of one self-training, in order of budget"""
    calls: tuple[int, ...]
    """network calls an image, one point each"""
    key: Key = None
    """nesting of the state dict in the base's file, such as model_ema; chosen if not given"""
    self_trained_key: Key = None
    """the same for the snapshots"""
    w: tuple[float, float] = TunePlan.w
    """range of merge weights; 0, the base, is always in it"""
    limit: int = 5
    """evaluations of the search for w at each point at most"""
    num_images: int = TunePlan.num_images
    """selection images behind each of these"""
    report_images: int = TunePlan.report_images
    """report images in each block"""
    blocks: int = TunePlan.blocks
    """of report images, at least 3"""
    batch_size: int = TunePlan.batch_size
    """images per forward pass of one process"""
    seed: int = 0
    """of the images"""
    resample: bool = False
    """for each point, draw a synthetic set with its sampler and train on it as the last snapshot was; otherwise the
    snapshots that are given are used at all of them"""
    synthetic_images: int | None = None
    """images of these sets; by default as many as the last snapshot was trained on"""
    training_images: int | None = None
    """images of these self-trainings, repeated ones included; by default as of the last snapshot"""
    parallel: Parallel | None = None
    """how several processes train there: ordered, ddp or fsdp, as in self-training"""
    workers: int | None = None
    """processes that read images ahead there, for each that trains; by default none on a CPU, up to 8 on a GPU"""
    out: Path = Path("runs/frontier")
    """folder of the run: evaluations, frontier.json, frontier.csv, frontier.png"""
    into: Path | None = None
    """folder of a finished `neon tune` or `neon demo`: put the results on its page, too"""

    def __call__(self) -> None:
        """Measure; everything that can be wrong with the files is found before the first image is sampled."""
        from neon.runtime.distributed import processes

        if len(self.features) > 1:
            raise RequestError(
                f"--features {' '.join(self.features)}: a frontier is drawn in one feature space; give one"
            )
        if not self.calls:
            raise RequestError("--calls: expected one or several numbers of network calls, such as 5 10 19 35")
        for number in self.calls:
            at_least_one(calls=number)
        for name in ("synthetic_images", "training_images", "parallel", "workers"):
            if not self.resample and getattr(self, name) is not None:
                raise RequestError(f"--{name}: is of the self-trainings of --resample; add that, or leave the flag out")
        say_what_is_added("frontier", self.w)
        with processes(self.device) as group:
            self._run(self._plan(), group)

    def _plan(self) -> TunePlan:
        """As of `neon tune` without a search for another sampler."""
        names = (
            "base", "self_trained", "key", "self_trained_key", "w", "limit", "num_images", "report_images", "blocks",
            "batch_size", "seed", "resample", "synthetic_images", "training_images", "parallel", "workers",
        )  # fmt: skip
        return TunePlan(**{name: getattr(self, name) for name in names}, sampler_scores=1, baselines=False)

    def _run(self, plan: TunePlan, processes: "Processes") -> None:
        from neon.report.frontier import frontier_text
        from neon.runtime.run_folder import held_by_main
        from neon.tune.frontier import measure, samplers_at
        from neon.tune.run import identity_of
        from neon.tune.scorer import Scorer

        found = self.opened(plan, processes)
        samplers = samplers_at(found.model, found.settings, self.calls)
        self_training = self._self_training(plan, found, processes)
        own = {name: getattr(self, name) for name in ("resample", "synthetic_images", "training_images")}
        facts = {**found.facts, "frontier": own}
        identity = processes.on_main(lambda: identity_of(plan, found.model, found.settings, facts))
        report = processes.on_main(lambda: self._report(found))
        with held_by_main(self.out, identity, processes, fresh=self.fresh):
            scorer = Scorer(plan, found.model, found.selection, found.reporting, self.out, processes)
            frontier = measure(scorer, found.settings, samplers, identity, self_training)
            processes.on_main(lambda: self._write(frontier, report))
        if processes.is_main:
            print(f"\n{frontier_text(frontier)}\n\n{self.into or self.out}")

    def _self_training(self, plan: TunePlan, found: "Inputs", processes: "Processes") -> "SelfTraining | None":
        from neon.tune.retrain import self_training_of

        if not self.resample:
            return None
        like_it = self_training_of(plan, found.model, self.loader(plan.base, plan.key, processes))
        if like_it is None:
            raise RequestError(
                f"--resample: {plan.self_trained[-1]} does not say how many images it was trained on; give "
                "--training_images"
            )
        return like_it

    def _report(self, found: "Inputs") -> "Report | None":
        """The report whose page the results go on; a RequestError if there is none, or of something else."""
        from neon.report.frontier import FRONTIER_FILE
        from neon.report.record import load
        from neon.runtime.files import check_writable, sha256_file

        if self.into is None:
            return None
        report, metric = load(self.into), found.selection.metric
        made_of = (report.provenance.get("base_sha256"), report.provenance.get("base"))  # of a tune, of a demo
        if sha256_file(self.base) not in made_of:
            raise RequestError(f"--into {self.into}: a run of another base than {self.base}; name one of this base")
        if report.metric != metric:
            raise RequestError(
                f"--into {self.into}: scored by {report.metric}, expected {metric}; name the --features of that run"
            )
        check_writable(self.into / FRONTIER_FILE, overwrite=True)
        return report

    def _write(self, frontier: "Frontier", report: "Report | None") -> None:
        from neon.report.page import write_frontier, write_report

        write_frontier(self.out, frontier)
        if self.into is not None and report is not None:
            write_frontier(self.into, frontier)
            write_report(self.into, report)
