"""Time the Fréchet distance of `neon.metrics` beside the matrix-root formula on `scipy.linalg.sqrtm`.

    python benchmarks/frechet.py                      # 2048 features, one thread, some minutes
    python benchmarks/frechet.py --dim 512 --repeats 5

Both get the same statistics and run alternately in one process, after one warm-up each; times are medians. The
last column of each case compares with the distance computed from the samples: their centred matrices are exact
factors of the covariances, so the singular values of their product give the exact answer.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fréchet distance: neon.metrics beside scipy.linalg.sqrtm.")
    parser.add_argument("--dim", type=int, default=2048, help="number of features (default: %(default)s, Inception's)")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/frechet.json"), help="(default: %(default)s)"
    )
    args = parser.parse_args()
    for variable in THREAD_VARIABLES:  # read once, when numpy and torch are first imported: hence imports below here
        os.environ[variable] = str(args.threads)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "threads": args.threads,
        "dim": args.dim,
        "repeats": args.repeats,
        "cases": [
            measure("full rank", args.dim, 4 * args.dim, args.repeats),
            measure("fewer samples than features", args.dim, args.dim // 2, args.repeats),
        ],
    }
    print_table(record)
    from neon.runtime.files import write_json

    write_json(args.json, record)


def measure(name: str, dim: int, num_samples: int, repeats: int) -> dict[str, Any]:
    """Times in seconds and distances for a generated set of `num_samples` and a full-rank reference."""
    import numpy as np
    import scipy.linalg

    from neon.metrics import FrechetReference, Statistics, frechet_distance

    draw = np.random.default_rng(0)
    # Variances fall from 1 by four decades in the reference; the other set is a little wider and shifted.
    deviations = np.logspace(0, -2, dim)
    basis = np.linalg.qr(draw.standard_normal((dim, dim)))[0]
    samples = [draw.standard_normal((n, dim)) * deviations @ basis for n in (4 * dim, num_samples)]
    samples[1] = 1.05 * samples[1] + 0.01
    reference, generated = (
        Statistics(mu=x.mean(0), sigma=np.cov(x, rowvar=False), count=len(x), name=name) for x in samples
    )
    cached = FrechetReference(reference)

    def matrix_root() -> float:
        shift = reference.mu - generated.mu
        root = scipy.linalg.sqrtm(reference.sigma @ generated.sigma)
        return float(shift @ shift + np.trace(reference.sigma + generated.sigma) - 2 * np.trace(root).real)

    # The nuclear norm of the product of the factors; QR first makes it one of [F, F] matrices at most.
    factors = [scipy.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r")[0][:dim] for x in samples]
    cross = scipy.linalg.svdvals(factors[0] @ factors[1].T).sum()
    shift = samples[0].mean(0) - samples[1].mean(0)
    exact = float(shift @ shift + sum((f * f).sum() for f in factors) - 2 * cross)

    methods: dict[str, Callable[[], float]] = {
        "scipy.linalg.sqrtm": matrix_root,
        "frechet_distance": lambda: frechet_distance(reference, generated),
        "FrechetReference.distance": lambda: cached.distance(generated),
    }
    values = {method: function() for method, function in methods.items()}  # the warm-up
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    cpu_seconds: dict[str, list[float]] = {method: [] for method in methods}  # tells how busy the machine was
    for _ in range(repeats):
        for method, function in methods.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            seconds[method].append(time.perf_counter() - start)
            cpu_seconds[method].append(time.process_time() - cpu_start)
    baseline = statistics.median(seconds["scipy.linalg.sqrtm"])
    return {
        "case": name,
        "num_samples": num_samples,
        "num_samples_reference": len(samples[0]),
        "condition_reference": float(np.linalg.cond(reference.sigma)),
        "exact": exact,
        "methods": [
            {
                "method": method,
                "median_seconds": statistics.median(seconds[method]),
                "median_cpu_seconds": statistics.median(cpu_seconds[method]),
                "seconds": seconds[method],
                "times_faster": baseline / statistics.median(seconds[method]),
                "distance": values[method],
                "relative_difference_to_sqrtm": values[method] / values["scipy.linalg.sqrtm"] - 1,
                "relative_error": values[method] / exact - 1,
            }
            for method in methods
        ],
    }


def print_table(record: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    print(f"{record['dim']} features, {record['threads']} thread(s), median of {record['repeats']}\n")
    for case in record["cases"]:
        counts = f"{case['num_samples']} samples against {case['num_samples_reference']}"
        print(f"{case['case']}: {counts}, condition of the reference {case['condition_reference']:.1e}")
        print(f"{'':28}{'seconds':>9}{'CPU':>9}{'faster':>9}{'distance':>18}{'to sqrtm':>11}{'to exact':>11}")
        for row in case["methods"]:
            print(
                f"{row['method']:28}{row['median_seconds']:9.3f}{row['median_cpu_seconds']:9.3f}{row['times_faster']:8.1f}x{row['distance']:18.10f}"
                f"{row['relative_difference_to_sqrtm']:11.1e}{row['relative_error']:11.1e}"
            )
        print()


if __name__ == "__main__":
    main()
