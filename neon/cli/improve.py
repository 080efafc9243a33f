"""`neon improve` and `neon demo`: from a base to an improved model, in as many processes as there are processors."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from neon.cli.command_line import Command, at_least_one, exit_code
from neon.cli.flags import Device, FeatureFlags, File, Log, SamplerFlags
from neon.cli.programs import LossFlags
from neon.cli.recipe import words_of_recipe
from neon.errors import RequestError
from neon.improve.plan import ImprovePlan
from neon.runtime.trackers import check_installed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neon.runtime.distributed import Processes
    from neon.tune.inputs import RealImages

MOST_PROCESSES = 8
"""that are started without being asked for: each holds the model"""
Number = Annotated[int | None, tyro.conf.arg(metavar="N")]
FileOrFolder = Annotated[Path | None, tyro.conf.arg(metavar="STATS|IMAGES")]


def in_processes(command: Command, name: str, number: int | None, device: Device = None) -> int | None:
    """Run `command` once more in each of several processes of one thread on a CPU; the worst exit code.

    None: nothing was started, since this process is one of several already (torchrun's, or ours), is to be the only
    one, or there is a GPU.

    Raises:
        RequestError: torchrun decides on the `number` of processes.
    """
    from neon.runtime.launch import launched, run_in_processes
    from neon.runtime.threads import available_cpus

    at_least_one(processes=number)
    if launched() and number is not None:
        raise RequestError("--processes: torchrun decides on the number of processes; leave the flag out")
    import torch

    from neon.runtime.distributed import device_type, gpu_count

    if device_type(device, gpu_count()) == "cuda":
        if number not in (None, 1):
            raise RequestError("--processes: is of a CPU; on several GPUs start under torchrun -m neon.cli")
        return None
    number = 1 if launched() else number or min(available_cpus(), MOST_PROCESSES)
    if number == 1:
        torch.set_num_threads(1)
        return None
    # The flag is for this process; those that it starts are told by their environment.
    alone = replace(command, processes=None)  # type: ignore[type-var]
    return run_in_processes(_run_again, (name, alone), number)


def _run_again(called: tuple[str, Command]) -> int:
    return exit_code(*called)


@dataclass(frozen=True, kw_only=True)
class Improve(SamplerFlags, FeatureFlags, LossFlags):
    """Improve a model in one step: sample a synthetic set, self-train, choose w, report, write the improved model.

    Samples with the settings that the model will be used with, or that its file carries. w, guidance, snapshot and
    sampler are chosen on selection images and reported on others; where nothing is gained beyond the noise there is no
    improved model, and the reason is said. Without --real there is no score: merges at w = 0.5, 1 and 1.5 are written,
    and a page shows samples of each. A killed run goes on where it was; on a CPU it uses a process for each processor,
    on several GPUs start it under `torchrun -m neon.cli improve ...`: the results are the same.

    Example: neon improve neon/demo/base.safetensors --real neon/demo/train-statistics.npz
    --report_real neon/demo/test-statistics.npz --features neon/demo/features.safetensors --num_steps 5
    --set solver=euler --select_images 1000 --out runs/improve
    """

    network: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="BASE")]]
    """the model to improve: a checkpoint, file or URL, or hf:ORG/REPO on the Hugging Face Hub"""
    real: FileOrFolder = None
    """real images that the choice is made against: statistics (.npz), or a folder or zip; without them nothing is
    scored"""
    report_real: FileOrFolder = None
    """what the report is made against, likewise; by default the same"""
    real_images: Annotated[Path | None, tyro.conf.arg(metavar="IMAGES")] = None
    """real images: also scores precision and recall"""
    nearest_k: int = 5
    """which nearest neighbour gives the radius in precision and recall"""
    plan: Annotated[ImprovePlan, tyro.conf.arg(name="")] = field(default_factory=ImprovePlan)
    out: Path = Path("runs/improve")
    """folder of the run: improved.safetensors, README.md, report.html, scores.json, scores.csv, run.json"""
    dry_run: bool = False
    """only say which stages there are, how many images and network calls they take, and what they leave on the disk"""
    recipe: File = None
    """a run.json, or YAML of flags by name: what it says stands for flags that are not given"""
    processes: Number = None
    """CPU processes, one thread each; by default one per processor, at most 8"""
    log: Log = None
    """also send the curves of training and search to a tracker"""
    fresh: bool = False
    """start anew, replacing a run that is in the folder"""

    @classmethod
    def with_recipe(cls, words: "Sequence[str]") -> list[str]:
        """The words of a command line, after those of the recipe that it names."""
        return words_of_recipe(cls, words)

    def __call__(self) -> int:
        """Run it in several processes, or in this one if that is one of several."""
        from neon.runtime.distributed import processes

        self.check()
        if not self.dry_run and (code := in_processes(self, "neon improve", self.processes, self.device)) is not None:
            return code
        if self.dry_run:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # nothing is computed, so nobody is told of threads
        with processes(self.device) as group:
            self._run(group)
        return 0

    def check(self) -> None:
        """A RequestError for flags that do not go together."""
        check_installed(self.log)
        self.named_features().check()
        at_least_one(nearest_k=self.nearest_k)
        for name in ("report_real", "real_images"):
            if self.real is None and getattr(self, name) is not None:
                raise RequestError(f"--{name}: goes with --real, what the choice is made against")

    def _run(self, group: "Processes") -> None:
        from neon.improve.estimate import stages, stages_text
        from neon.library.generator import Generator
        from neon.library.improving import improve_generator, real_inputs
        from neon.merge import warn_of_merge

        path, model = self.load(group)
        self.print_precision(model, group)
        settings = self.settings_for(model)
        warn_of_merge(path, model, settings)
        generator = Generator(
            model=model, settings=settings, device=group.device, path=path, origin=self._origin(path)
        )  # fmt: skip
        if self.dry_run:
            inputs = real_inputs(generator, self._real(), self.plan, group)
            features = None if inputs is None else inputs.extractor.dim
            text = stages_text(stages(self.plan, model, settings, features))
        else:
            text = improve_generator(
                generator, self._real(), self.plan, self.out, group, fresh=self.fresh, log=self.log
            ).text
        if group.is_main:
            print(text, flush=True)

    def _real(self) -> "RealImages | None":
        """The real images that flags name; None: there are none."""
        from neon.tune.inputs import RealImages

        if self.real is None:
            return None
        return RealImages(
            features=self.named_features(),
            select=self.real,
            report=self.report_real or self.real,
            manifold=self.real_images,
            nearest_k=self.nearest_k,
        )


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run `neon improve` on embedded real images: scores, plots and a report in about three minutes.

    A killed demo continues where it was. Also runs under torchrun; results do not depend on the number of processes.

    Example: neon demo --seed 1 --out runs/demo-1
    """

    out: Path = Path("runs/demo")
    """folder of the run"""
    seed: int = 0
    """of the synthetic set, the self-training and every evaluation"""
    fresh: bool = False
    """start anew, replacing a run that is in the folder"""
    processes: Number = None
    """CPU processes, one thread each; by default one per processor, at most 8"""
    base: File = None
    """base model to improve, made by `python -m neon.demo.train base`; by default the embedded one"""

    def __call__(self) -> int:
        """Run it in several processes, or in this one if that is one of several."""
        code = in_processes(self, "neon demo", self.processes, "cpu")
        if code is not None:
            return code
        from neon.demo.assets import BASE
        from neon.demo.run import PLAN, run_demo
        from neon.noise import Purpose, image_seeds
        from neon.runtime.distributed import processes

        image_seeds(Purpose.SYNTHETIC, self.seed, 0)  # refused before the others are met, who are refused alike
        with processes("cpu") as group:
            outcome = run_demo(
                replace(PLAN, seed=self.seed), self.out, group, base=self.base or BASE, fresh=self.fresh
            )  # fmt: skip
            if group.is_main:
                print(outcome.text, flush=True)
        return 0
