"""The `neon` command. Exit codes: 0 done, 1 the work failed, 2 the request was wrong."""

import dataclasses
import json as json_module
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from neon.cli.command_line import Weights, exit_code, number, parse, run_program
from neon.cli.usage import described_line, nearest, summary
from neon.errors import RequestError

Key = Annotated[str | None, tyro.conf.arg(metavar="KEY")]
ModelName = Annotated[str | None, tyro.conf.arg(metavar="FILE.py:NAME")]
JsonFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


def merge(
    *,
    base: Path,
    self_trained: Path,
    w: Weights,
    output: str,
    key: Key = None,
    self_trained_key: Key = None,
    overwrite: bool = False,
    json: JsonFile = None,
) -> None:
    """Merge two checkpoints: theta_neon = (1 + w) theta_base - w theta_self_trained.

    w = 0 is the base, w = -1 the self-trained model, w > 0 Neon. Several w cost one read of the inputs. The same as
    `python neon_merge.py`.

    Example: neon merge --base base.pth --self-trained tuned.pth -w 0.5 1 1.5 --output "neon_w{w}.pth"

    Args:
        base: Base weights: safetensors, .pth, .pt, .ckpt or a published .pkl.
        self_trained: Weights fine-tuned on the base's own samples.
        w: Merge weights.
        output: File to write (.safetensors, .pth, .pt, .ckpt, .pkl if the base is one); several w need {w} in it.
        key: Nesting of the state dict, such as model_ema; chosen and printed if not given.
        self_trained_key: The same for the self-trained file.
        overwrite: Replace an existing output.
        json: Also write the report to this file.
    """
    from tqdm import tqdm

    from neon.merge import merge_files
    from neon.runtime.files import check_writable, write_json

    if json is not None:
        check_writable(json, overwrite=True)
    with tqdm(unit="B", unit_scale=True, desc="merging", delay=2, leave=False, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        reports = merge_files(
            base,
            self_trained,
            [number("-w", text) for text in w],
            output,
            key=key,
            self_trained_key=self_trained_key,
            overwrite=overwrite,
            progress=progress,
        )
    first = reports[0]
    print(first.formula)
    print(f"base          {first.base}{_key_text(first.base_key, first.base_candidates)}")
    print(f"self-trained  {first.self_trained}{_key_text(first.self_trained_key, first.self_trained_candidates)}")
    print(f"tensors       {first.merged_tensors} merged, {first.copied_tensors} copied")
    for report in reports:
        kept = f"update off by {report.relative_error:.2%}, {report.share_lost:.2%} of it lost in rounding"
        print(f"w = {report.w:<8g}  {report.output}  ({kept})")
    for warning in dict.fromkeys(text for report in reports for text in report.warnings):
        print(f"neon merge: warning: {warning}", file=sys.stderr)
    if json is not None:
        write_json(json, [dataclasses.asdict(report) for report in reports])


def inspect(file: tyro.conf.Positional[Path], *, key: Key = None, json: bool = False) -> None:
    """Show what a checkpoint holds; nothing stored in it is executed.

    Example: neon inspect neon_w1.safetensors

    Args:
        file: Checkpoint of any readable format.
        key: Nesting of the state dict, such as model_ema; chosen and printed if not given.
        json: Print JSON.
    """
    from neon.checkpoint import open_checkpoint
    from neon.model import described
    from neon.runtime.files import sha256_file

    with open_checkpoint(file, key) as checkpoint:
        specs, metadata = checkpoint.specs, described(checkpoint)
        facts: dict[str, Any] = {
            "file": str(file),
            "format": checkpoint.format,
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
            "architecture": metadata.get("architecture"),
            "config": metadata.get("config"),
            "key": checkpoint.key,
            "candidates": list(checkpoint.candidates),
            "parameters": sum(spec.numel for spec in specs.values() if spec.dtype.is_floating_point),
            "metadata": checkpoint.metadata,
        }
    tensors = {name: {"shape": list(spec.shape), "dtype": _dtype_text(spec.dtype)} for name, spec in specs.items()}
    if json:
        print(json_module.dumps({**facts, "tensors": tensors}, indent=2))
        return
    facts["key"] = facts["key"] or "(the file itself)"
    facts["candidates"] = ", ".join(name or "(the file itself)" for name in facts["candidates"])
    for name, value in facts.items():
        if value is not None and name != "metadata":
            print(f"{name:<13} {value:,}" if isinstance(value, int) else f"{name:<13} {value}")
    for name, value in checkpoint.metadata.items():
        if name not in facts:
            print(f"{name:<13} {value}")
    print(f"tensors       {len(tensors)}")
    width = max(map(len, tensors))
    for name, tensor in tensors.items():
        print(f"  {name:<{width}}  {tensor['dtype']:<9} {tensor['shape']}")


def convert(
    file: tyro.conf.Positional[Path],
    output: tyro.conf.Positional[Path],
    *,
    key: Key = None,
    overwrite: bool = False,
) -> None:
    """Write any readable checkpoint as flat safetensors.

    Example: neon convert base.pth base.safetensors --key model_ema

    Args:
        file: Checkpoint of any readable format.
        output: File to write; ends in .safetensors.
        key: Nesting of the state dict, such as model_ema; chosen and printed if not given.
        overwrite: Replace an existing output.
    """
    from neon.cli.convert import convert_checkpoint

    source = convert_checkpoint(file, output, key, overwrite=overwrite)
    print(f"{file}{_key_text(source.key, source.candidates)} -> {output} ({len(source.specs)} tensors)")


def demo(
    *,
    out: Path = Path("runs/demo"),
    seed: int = 0,
    fresh: bool = False,
    processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    base: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> int:
    """Run Neon end to end on embedded real images: scores, plots and a report in about two minutes.

    A killed demo continues where it was. Also runs under torchrun; results do not depend on the number of processes.

    Example: neon demo --seed 1 --out runs/demo-1

    Args:
        out: Folder of the run.
        seed: Of the synthetic set, the self-training and every evaluation.
        fresh: Start anew, replacing a run that is in the folder.
        processes: CPU processes, one thread each; by default one per processor, at most 8.
        base: Base model to improve, made by `python -m neon.demo.train base`; by default the embedded one.
    """
    from neon.demo.assets import BASE
    from neon.runtime.launch import available_cpus, launched, run_in_processes

    base = BASE if base is None else base
    if processes is not None and processes < 1:
        raise RequestError(f"--processes {processes}: expected at least 1")
    if not launched():
        arguments = ["demo", "--out", str(out), "--seed", str(seed), "--base", str(base), *(["--fresh"] * fresh)]
        return run_in_processes(main, arguments, processes or min(available_cpus(), 8))
    if processes is not None:
        raise RequestError("--processes: torchrun decides on the number of processes; leave the flag out")

    import torch

    from neon.demo.run import DemoPlan, run_demo
    from neon.runtime.distributed import processes as process_group

    torch.set_num_threads(1)
    with process_group("cpu") as group:
        run_demo(DemoPlan(seed=seed, base=base), out, group, fresh=fresh)
    return 0


Features = Annotated[str, tyro.conf.arg(metavar="inception|FILE")]
InceptionWeights = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Device = Literal["cpu", "cuda"] | None


def stats(
    images: tyro.conf.Positional[Path],
    output: tyro.conf.Positional[Path],
    *,
    features: Features = "inception",
    inception_weights: InceptionWeights = None,
    batch_size: int = 64,
    device: Device = None,
    overwrite: bool = False,
) -> None:
    """Write the mean and covariance of the features of images: the reference that scores are computed against.

    Runs on several processes under `torchrun -m neon.cli stats ...`; the result is the same.

    Example: neon stats real_images/ real.npz

    Args:
        images: Folder or zip of images of one size.
        output: File to write; ends in .npz.
        features: Feature network: inception, or a file made by `python -m neon.demo.train features`.
        inception_weights: Weights of the Inception network; by default those in torch-fidelity's cache.
        batch_size: Images per forward pass.
        device: By default a GPU where there is one.
        overwrite: Replace an existing output.
    """
    from neon.data.images import ImageDataset
    from neon.evaluate import tally_images
    from neon.metrics import Statistics
    from neon.metrics.reference import load_extractor
    from neon.runtime.distributed import processes
    from neon.runtime.files import check_writable

    if output.suffix != ".npz":
        raise RequestError(f"{output}: statistics are written as .npz; end the name in .npz")
    with processes(device) as group:
        dataset = ImageDataset(images)
        extractor = load_extractor(features, inception_weights, group.device)
        group.on_main(lambda: check_writable(output, overwrite=overwrite))
        tally = tally_images(dataset, extractor, batch_size=batch_size, processes=group)

        def write() -> None:
            Statistics.from_moments(tally.moments, name=str(images)).save(output, overwrite=overwrite)
            print(f"{images} -> {output} ({tally.done} images, {extractor.dim} features of {extractor.name})")

        group.on_main(write)


def fid(
    a: tyro.conf.Positional[Path],
    b: tyro.conf.Positional[Path],
    *,
    features: Features = "inception",
    inception_weights: InceptionWeights = None,
    precision_recall: bool = False,
    nearest_k: int = 5,
    batch_size: int = 64,
    device: Device = None,
    json: JsonFile = None,
) -> None:
    """Score images A against images or statistics B: FID, the Inception Score of A, precision and recall.

    Runs on several processes under `torchrun -m neon.cli fid ...`; the result is the same.

    Example: neon fid samples.zip real.npz

    Args:
        a: Generated images (folder or zip), or statistics (.npz).
        b: Real images (folder or zip), or statistics (.npz).
        features: Feature network: inception, or a file made by `python -m neon.demo.train features`.
        inception_weights: Weights of the Inception network; by default those in torch-fidelity's cache.
        precision_recall: Also precision, recall, density and coverage; both sides must be images.
        nearest_k: Which nearest neighbour gives the radius in precision and recall.
        batch_size: Images per forward pass.
        device: By default a GPU where there is one.
        json: Also write the scores to this file.
    """
    from neon.cli.score import score_images
    from neon.runtime.distributed import processes
    from neon.runtime.files import check_writable

    with processes(device) as group:
        if json is not None:
            group.on_main(lambda: check_writable(json, overwrite=True))
        score_images(
            a,
            b,
            features=features,
            inception_weights=inception_weights,
            nearest_k=nearest_k if precision_recall else None,
            batch_size=batch_size,
            processes=group,
            output=json,
        )


def tune(
    *,
    base: Path,
    self_trained: list[Path],
    select_stats: Path,
    report_stats: Path | None = None,
    w: tuple[float, float] = (-0.5, 2.0),
    guidance: tuple[float, float] | None = None,
    grid: list[float] | None = None,
    guidance_grid: list[float] | None = None,
    metric: Literal["distance", "is", "precision", "recall"] = "distance",
    num_images: int = 10_000,
    report_images: int = 10_000,
    blocks: int = 3,
    set: list[str] | None = None,
    model: ModelName = None,
    vae: Path | None = None,
    real_images: Path | None = None,
    nearest_k: int = 5,
    features: Features = "inception",
    inception_weights: InceptionWeights = None,
    batch_size: int = 64,
    tolerance: float = 0.01,
    limit: int = 16,
    seed: int = 0,
    out: Path = Path("runs/tune"),
    fresh: bool = False,
    device: Device = None,
) -> None:
    """Choose w (and guidance, and the snapshot) with few evaluations, and report the choice on other images.

    Weights stay resident, every point is merged in place and scored on the same selection images. Base, self-trained
    and Neon are then scored on report images of other seeds; the base is recommended where the gain is within the
    noise. A killed run goes on; runs on several processes under `torchrun -m neon.cli tune ...`, with equal results.

    Example: neon tune --base base.safetensors --self-trained runs/self/snapshot-*.safetensors
    --select-stats train.npz --report-stats test.npz --guidance 1 3

    Args:
        base: Base weights, of a network that is recognised or written by neon.
        self_trained: Snapshots of one self-training, in order of budget.
        select_stats: Statistics of real images that the choice is made against (.npz).
        report_stats: Statistics that the report is made against; by default the same.
        w: Range of merge weights; 0, the base, is always in it.
        guidance: Range of guidance; without it, that of the sampler's settings.
        grid: Score all of these w for every snapshot, instead of a search.
        guidance_grid: With --grid: for each of these guidances.
        metric: What is best: the lowest distance, or the highest of another score.
        num_images: Selection images behind each point.
        report_images: Report images in each block.
        blocks: Blocks of report images, at least 3.
        set: Settings of the sampler, NAME=VALUE each.
        model: The class of a model of your own; by default as the base says.
        vae: Autoencoder or tokenizer, if the model needs one; by default where it usually lies.
        real_images: Folder or zip of real images: also scores precision and recall.
        nearest_k: Which nearest neighbour gives the radius in precision and recall.
        features: Feature network: inception, or a file made by `python -m neon.demo.train features`.
        inception_weights: Weights of the Inception network; by default those in torch-fidelity's cache.
        batch_size: Images per forward pass of one process.
        tolerance: Relative gain below which the search ends.
        limit: Evaluations of the search at most.
        seed: Of the images.
        out: Folder of the run: evaluations, tune.json, report.html.
        fresh: Start anew, replacing a run that is in the folder.
        device: By default a GPU where there is one.
    """
    from neon.cli.choose import tune_command
    from neon.runtime.distributed import processes
    from neon.tune.run import TunePlan

    if w[0] > 0 or w[1] < 0:
        print(f"neon tune: --w {w[0]:g} {w[1]:g}: 0, the base, is added to the range", file=sys.stderr)
    if guidance_grid is not None and grid is None:
        raise RequestError("--guidance-grid: goes with --grid; for a search give --guidance LOW HIGH")
    plan = TunePlan(
        base=base,
        self_trained=tuple(self_trained),
        w=w,
        guidance=guidance,
        grid=None if grid is None else (tuple(grid), tuple(guidance_grid or ())),
        metric=metric,
        num_images=num_images,
        report_images=report_images,
        blocks=blocks,
        batch_size=batch_size,
        seed=seed,
        tolerance=tolerance,
        limit=limit,
    )
    with processes(device) as group:
        tune_command(
            plan,
            select_stats=select_stats,
            report_stats=report_stats or select_stats,
            pairs=set or [],
            vae=vae,
            real_images=real_images,
            nearest_k=nearest_k,
            features=features,
            inception_weights=inception_weights,
            out=out,
            fresh=fresh,
            processes=group,
            kind=model,
        )


def align(
    *,
    base: Path,
    self_trained: Path,
    stats: Path,
    features: Features,
    inception_weights: InceptionWeights = None,
    real: Path | None = None,
    synthetic: Path | None = None,
    num_images: int = 300,
    batch_size: int = 64,
    set: list[str] | None = None,
    model: ModelName = None,
    vae: Path | None = None,
    seed: int = 0,
    device: Device = None,
    json: JsonFile = None,
) -> None:
    """Predict the best w from few images: those of the same noise at w = -0.5, 0 and 0.5.

    Mean and covariance of their features are interpolated in w, and compared with those of real images. It costs less
    than one evaluation, and tells whether the others are worth it; `neon tune` finds the w to use.

    Example: neon align --base base.safetensors --self-trained tuned.pth --features net.safetensors --stats train.npz

    Args:
        base: Base weights, of a network that is recognised or written by neon.
        self_trained: Weights fine-tuned on the base's own samples.
        stats: Statistics of real images (.npz), made with the same features.
        features: Feature network: inception, or a file made by `python -m neon.demo.train features`.
        inception_weights: Weights of the Inception network; by default those in torch-fidelity's cache.
        real: Folder or zip of real images: also compares the gradients of the loss, which are a poorer guide.
        synthetic: Folder or zip of images of the base, with `real`.
        num_images: Images at each of the three w, at least twice as many as there are features.
        batch_size: Images per forward pass of one process.
        set: Settings of the sampler, NAME=VALUE each.
        model: The class of a model of your own; by default as the base says.
        vae: Autoencoder or tokenizer, if the model needs one; by default where it usually lies.
        seed: Of the images.
        device: By default a GPU where there is one.
        json: Also write the figures to this file.
    """
    from neon.cli.choose import align_command
    from neon.runtime.distributed import processes

    with processes(device) as group:
        align_command(
            base,
            self_trained,
            stats,
            features=features,
            inception_weights=inception_weights,
            real=real,
            synthetic=synthetic,
            num_images=num_images,
            batch_size=batch_size,
            pairs=set or [],
            vae=vae,
            seed=seed,
            json=json,
            processes=group,
            kind=model,
        )


def report(run: tyro.conf.Positional[Path]) -> None:
    """Write the page of a run of `neon tune` or `neon demo` again.

    Example: neon report runs/tune

    Args:
        run: Folder of the run.
    """
    from neon.report.page import report_again

    print(report_again(run))


def doctor(*, json: JsonFile = None) -> int:
    """Tell whether the installation works, which published files are found, and what fills each gap.

    Imports what the programs need, lets processes join as under torchrun, and opens checkpoints, autoencoders,
    statistics and Inception where programs started here look for them. Missing files are no failure.

    Example: neon doctor --json doctor.json

    Args:
        json: Also write the findings to this file.
    """
    from neon.cli.doctor import doctor_command
    from neon.runtime.files import check_writable

    if json is not None:
        check_writable(json, overwrite=True)
    return doctor_command(json)


# A new subcommand is one row here; what it imports beyond the standard library belongs inside its function, so that
# `neon --help` does not wait for torch.
COMMANDS: dict[str, Callable[..., int | None]] = {
    "demo": demo,
    "merge": merge,
    "inspect": inspect,
    "convert": convert,
    "stats": stats,
    "fid": fid,
    "tune": tune,
    "align": align,
    "report": report,
    "doctor": doctor,
}

PROGRAMS = {
    "sample": "Sample images of a network: the synthetic set.",
    "selftrain": "Train a network briefly on its own samples.",
    "evaluate": "FID, Inception Score, precision and recall of a network, or of merges of two.",
}
"""commands that are classes of `neon.cli.programs`, which takes seconds to import, and what they do"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; errors are one line on stderr."""
    name, *words = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name in COMMANDS:
        return exit_code(f"neon {name}", lambda: parse(COMMANDS[name], words, name=f"neon {name}"))
    if name in PROGRAMS:
        from neon.cli import programs

        return run_program(getattr(programs, name.capitalize()), {}, words, name=f"neon {name}")

    def refuse() -> None:
        known = [*COMMANDS, *PROGRAMS]
        if not name:
            raise RequestError(f"expected one of {', '.join(known)}; see --help")
        advice = nearest(name, dict(zip(known, known, strict=True)))
        raise RequestError(f"{name}: unknown command; {advice}. There are {', '.join(known)}")

    return exit_code("neon", refuse)


def overview() -> str:
    """What `neon --help` prints."""
    return "\n".join(
        [
            "Neon improves a trained image generator by stepping away from its own self-training:",
            "theta_neon = (1 + w) theta_base - w theta_self_trained.",
            "Example: neon demo --out runs/demo",
            "Commands (their flags: neon COMMAND --help):",
            *(described_line(name, summary(command)) for name, command in COMMANDS.items()),
            "Commands for the network of any architecture:",
            *(described_line(name, text) for name, text in PROGRAMS.items()),
            "edm/, VAR/, xAR/ and imm/ hold programs with the published flags: python edm/sample.py --help",
        ]
    )


def _key_text(key: str, candidates: Sequence[str]) -> str:
    """Which state dict of a file was used, where there is a choice to know about."""
    if candidates == ("",):
        return ""
    others = ", ".join(other or "the file itself" for other in candidates if other != key)
    return f" [{key or 'the file itself'}{f'; also there: {others}' if others else ''}]"


def _dtype_text(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
