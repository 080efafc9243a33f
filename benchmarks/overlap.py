"""What goes on beside sampling and scoring, against an earlier commit: time, processor time and memory of each part.

    git worktree add ../before 696c338
    python benchmarks/overlap.py --before ../before
    python benchmarks/overlap.py --before ../before --only images   # some of it again; the rest keeps its figures

Each part runs in a process of its own on the code of either tree, three times in turn, and must give the same bytes.
The sampler of `images` computes nothing and sleeps, as a host whose GPU is busy for so long; on a GPU it is not
measured yet. `rounds` are those of two processes. Ratios are of medians.
"""

import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent


def sha(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def timed(program: Callable[[], str]) -> dict[str, Any]:
    wall, processor = time.perf_counter(), time.process_time()
    made = program()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - processor, "sha256": made}


def moments() -> dict[str, Any]:
    """20 blocks of 64 rows of 2,048 features."""
    import torch

    from neon.metrics import Moments

    sums, block = Moments(2048), torch.rand(64, 2048, generator=torch.Generator().manual_seed(0))
    sums.update(block)

    def add() -> str:
        for _ in range(20):
            sums.update(block)
        return sha(sums.state()[name].numpy().tobytes() for name in ("mean", "scatter"))

    return timed(add)


def precision_recall(count: int, dim: int) -> dict[str, Any]:
    import torch

    from neon.metrics import Manifold

    generator = torch.Generator().manual_seed(0)
    real, made = (torch.randn(count, dim, generator=generator).relu() * scale for scale in (2, 1.95))
    return timed(lambda: repr(Manifold(real, 3).compare(made)))


def features() -> dict[str, Any]:
    """10,000 rows of 2,048 features kept, and asked for: the most memory above that of the start, in MB."""
    import torch

    from neon.evaluate import Tally

    def memory(field: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])

    block = torch.rand(50, 2048, generator=torch.Generator().manual_seed(0))
    extractor: Any = SimpleNamespace(dim=2048, logits=lambda features: None)
    tally = Tally(extractor, 10_000, keep_features=True, device=torch.device("cpu"))
    start = memory("VmRSS")

    def keep() -> str:
        for _ in range(200):
            tally.update(block.clone())
        return sha([tally.features.numpy().tobytes()[:1024]])

    return {**timed(keep), "peak_mb": (memory("VmHWM") - start) / 1024}


@dataclass(frozen=True)
class Asleep:
    """Settings of a sampler that takes no processor."""

    seconds_per_batch: float = 0.4


def images() -> dict[str, Any]:
    """160 images of 256 x 256 in batches of 40, which a GPU would make in 10 ms each, as PNG files."""
    import torch

    from neon.runtime.distributed import Processes
    from neon.sampling import write_samples

    smooth = torch.rand(3, 40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pictures = [torch.nn.functional.interpolate(each, 256, mode="bicubic").clip(0, 1) for each in smooth]
    batches = [(255 * each).to(torch.uint8) for each in pictures]

    def sample(noise: Any, labels: object, settings: Asleep) -> torch.Tensor:
        time.sleep(settings.seconds_per_batch)
        return batches[noise.seeds[0] // 40 % 3]

    precision = SimpleNamespace(allowed_on=lambda device: nullcontext())
    model: Any = SimpleNamespace(
        num_classes=0, prompts=None, precision=precision, sample=sample, architecture="none", labels=lambda *_: None
    )

    def write() -> str:
        write_samples(model, range(160), Asleep(), folder, batch_size=40, processes=Processes())
        return sha(file.read_bytes() for file in sorted(Path(folder).glob("*.png")))

    with tempfile.TemporaryDirectory() as folder:
        return timed(write)


def merge_of(write: Callable[[Path, Path, Path], object]) -> dict[str, Any]:
    """A merge of two .pth of 400 MB."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.pth" for name in ("base", "self_trained", "neon")]
        for seed, file in enumerate(files[:2]):
            generator = torch.Generator().manual_seed(seed)
            torch.save({f"layers.{i}": torch.randn(1 << 22, generator=generator) for i in range(24)}, file)
        os.sync()
        found = timed(lambda: str(write(*files)))
        weights = torch.load(files[2], mmap=True)
        return {**found, "sha256": sha(tensor.numpy().tobytes() for tensor in weights.values())}


def merge() -> dict[str, Any]:
    from neon.merge import merge_files

    return merge_of(lambda base, self_trained, output: merge_files(base, self_trained, [1.5], output))


def script(base: Path, self_trained: Path, output: Path) -> None:
    """A merge that hashes nothing, waits for no disk and measures no rounding."""
    import torch

    b, s = torch.load(base), torch.load(self_trained)
    torch.save({name: torch.lerp(b[name], s[name], -1.5) for name in b}, output)


def rounds() -> dict[str, Any]:
    """400 rounds of two processes, which give 8 rows of 2,048 features each and compute nothing."""
    import torch

    from neon.runtime.blocks import rows_in_order
    from neon.runtime.distributed import processes

    with processes("cpu") as group:

        def gather() -> str:
            rows = rows_in_order(
                lambda block: torch.full((len(block), 2048), float(block.start)), 6400, 2048, batch_size=8,
                processes=group, title="rounds",
            )  # fmt: skip
            return str(sum(float(part[0, 0]) for part in rows))

        return timed(gather)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "moments": moments,
    "precision and recall, 10,000 x 64": lambda: precision_recall(10_000, 64),
    "precision and recall, 1,500 x 2,048": lambda: precision_recall(1_500, 2_048),
    "features": features,
    "images": images,
    "rounds": rounds,
    "merge of .pth, one thread": merge,
    "merge of .pth, two threads": merge,
    "script, one thread": lambda: merge_of(script),
    "script, two threads": lambda: merge_of(script),
}


def in_tree(tree: Path, name: str) -> dict[str, Any]:
    """What a case gives in a process of its own on the code of `tree`."""
    program = [sys.executable]
    if name == "rounds":
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    threads = "2" if name.endswith("two threads") else "1"
    paths = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": threads, "OVERLAP_CASE": name}
    done = subprocess.run([*program, __file__], env=paths, cwd=tree, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def draws() -> dict[str, float]:
    """Microseconds of processor time of one draw of one image of 64, in this process."""
    import torch

    from neon.noise import ImageNoise

    def microseconds(program: Callable[[], object]) -> float:
        program()
        start = time.process_time()
        for _ in range(30):
            program()
        return (time.process_time() - start) / 30 / 64 * 1e6

    torch.set_num_threads(1)
    noise, one = ImageNoise(range(64)), torch.Generator().manual_seed(0)
    return {
        "a number, a generator for each image": microseconds(lambda: noise.normal(1)),
        "a number, one generator": microseconds(lambda: torch.empty(64, 1).normal_(generator=one)),
        "3 x 32 x 32 numbers, a generator for each image": microseconds(lambda: noise.normal(3, 32, 32)),
        "3 x 32 x 32 numbers, one generator": microseconds(lambda: torch.empty(64, 3, 32, 32).normal_(generator=one)),
        "3 x 32 x 32 numbers by Philox in tensor operations": microseconds(lambda: philox(64 * 3 * 32 * 32 // 4)),
    }


def philox(count: int) -> Any:
    """The bits of Philox4x32-10 for counters 0 .. count - 1 under the key 0: int64 [count, 4], each below 2^32."""
    import torch

    low = 0xFFFFFFFF
    a = torch.arange(count)
    b, c, d, keys = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(a), (0, 0)
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = ((q >> 32) & low) ^ b ^ keys[0], q & low, ((p >> 32) & low) ^ d ^ keys[1], p & low
        keys = ((keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low)
    return torch.stack([a, b, c, d], 1)


def main(
    before: Path,
    only: tuple[str, ...] = (),
    repeats: int = 3,
    json_file: Path = HERE / "results" / "overlap.json",
) -> None:
    """Measure each part on the code of two trees.

    Args:
        before: A checkout of the commit to compare with.
        only: Names of the parts to measure; by default all.
        repeats: Runs of each on either; medians are reported.
        json_file: Where the figures go.
    """
    from machine import machine

    from neon.runtime.files import write_json

    trees = {"before": before, "after": HERE.parent}
    record: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/overlap.py", *sys.argv[1:]]).replace(str(before), before.name),
        "before": subprocess.check_output(["git", "-C", before, "rev-parse", "--short", "HEAD"], text=True).strip(),
        "machine": machine(),
        "repeats": repeats,
        "draws_us": draws(),
        "cases": json.loads(json_file.read_text())["cases"] if only else {},
    }
    print(record["machine"])
    print(f"{'medians':<38}{'wall s':>20}{'CPU s':>20}{'ratios':>14}")
    for name in only or CASES:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in trees}
        for turn in range(repeats):
            for side, tree in [*trees.items()][:: 1 if turn % 2 else -1]:
                runs[side].append(in_tree(tree, name))
        assert len({run["sha256"] for side in runs.values() for run in side}) == 1, f"{name}: other bytes"
        of_case: dict[str, Any] = {"load": round(os.getloadavg()[0], 1)}
        for figure in ("wall_s", "cpu_s", "peak_mb"):
            if figure in runs["after"][0]:
                median = {side: statistics.median(run[figure] for run in found) for side, found in runs.items()}
                of_case[figure] = {**median, "ratio": median["after"] / median["before"]}
        record["cases"][name] = of_case
        columns = [of_case[figure] for figure in ("wall_s", "cpu_s", "peak_mb") if figure in of_case]
        shown = "".join(f"{column['before']:>11.2f} ->{column['after']:>6.2f}" for column in columns[:2])
        print(f"{name:<38}{shown}" + "".join(f"{column['ratio']:>7.2f}" for column in columns), flush=True)
    write_json(json_file, record)
    print(f"written to {json_file}")


if __name__ == "__main__":
    if case := os.environ.get("OVERLAP_CASE"):
        print(json.dumps(CASES[case]()))
    else:
        import tyro

        tyro.cli(main)
