"""Where the time of sampling goes in the two networks that make least of the card: kernels, launches, waits."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.networks import changed, subjects
from gpu.rows import Figures, Rows
from gpu.timing import sample
from neon.precision import BF16, FP32

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
BATCH = 16
"""where no part `speed` chose one"""


def measure(rows: Rows, record: Path) -> None:
    """Rows of the slowest two by the part `speed` of `record`: what a batch waits for, then its costliest kernels."""
    for name, batch in _slowest(rows, record):
        model = subjects(rows.tiny)[name]
        rows.add(name, lambda n=name, b=batch, m=model: _profile(rows, n, b, m))  # type: ignore[misc]


def _slowest(rows: Rows, record: Path) -> list[tuple[str, int]]:
    known = subjects(rows.tiny)
    found: Sequence[Mapping[str, Any]] = ()
    if record.exists():
        found = json.loads(record.read_text())["parts"].get("speed", {}).get("rows", ())
    eager = [row for row in found if row["status"] == "ok" and " eager " in row["row"] and "bf16" in row["row"]]
    eager.sort(key=lambda row: row.get("share_of_matmul", 0.0))
    chosen = [(row["row"].split()[0], row["batch"]) for row in eager[:2] if row["row"].split()[0] in known]
    return chosen if len(chosen) == 2 else [(name, 2 if rows.tiny else BATCH) for name in list(known)[1:3]]


def _profile(rows: Rows, name: str, batch: int, subject: Any) -> Figures:
    device = rows.device
    cuda = device.type == "cuda"
    model = subject.on(device, BF16 if cuda else FP32)
    settings = changed(model, subject.short)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    sample(model, batch, settings, device)
    plain = sample(model, batch, settings, device).total
    with profile(activities=activities, acc_events=True) as trace:
        sample(model, batch, settings, device)
    events = trace.key_averages()
    if cuda:
        kernels = [(e.key, e.self_device_time_total, e.count) for e in events if e.device_type == DeviceType.CUDA]
    else:
        kernels = [(e.key, e.self_cpu_time_total, e.count) for e in events]
    kernels.sort(key=lambda kernel: -kernel[1])
    busy = sum(microseconds for _, microseconds, _ in kernels) / 1e6

    def total(names: Sequence[str], of: Callable[[Any], float]) -> float:
        return sum(of(event) for event in events if event.key in names)

    return {
        "batch": batch,
        "wall_s": plain,
        "busy_s": busy,
        "busy_share": busy / plain,
        "kernels": sum(count for _, _, count in kernels),
        "launches": int(total(LAUNCHES, lambda event: event.count)),
        "launching_s": total(LAUNCHES, lambda event: event.self_cpu_time_total) / 1e6,
        "waits": int(total(WAITS, lambda event: event.count)),
        "waiting_s": total(WAITS, lambda event: event.self_cpu_time_total) / 1e6,
        "top": {key[:90]: round(microseconds / 1e6 / busy, 4) for key, microseconds, _ in kernels[:10]},
    }
