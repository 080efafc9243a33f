"""Images per second with random weights, from seeds to uint8 on the host: network and the rest apart.

The batch is the larger of a short search where that is faster, else the smaller. `eager` is the model as it is built,
`channels_last` the same with channels innermost in memory, `compiled` by `compile_parts`.
"""

import statistics

import torch

from gpu.networks import Subject, changed, peak_tflops, subjects
from gpu.rows import Figures, Rows
from gpu.timing import matmul_tflops, sample
from neon.model import GenerativeModel
from neon.precision import NAMED

LONG = 5.0
"""seconds of a batch from which one timed run is enough"""
WORTH = 1.05
"""a larger batch is taken if it makes images so many times as fast"""


def measure(rows: Rows) -> None:
    """Rows by how much they tell: every network as it is, then compiled, then what is left."""
    batches: dict[str, int] = {}
    matmul: dict[str, float] = {}

    def add(name: str, subject: Subject, mode: str, precision: str) -> None:
        rows.add(f"{name} {mode} {precision}", lambda: _speed(rows, name, subject, mode, precision, batches, matmul))

    known = subjects(rows.tiny)
    edm = {name: subject for name, subject in known.items() if "edm" in name}
    if rows.device.type == "cpu":  # no TF32 there, and half precision is emulated on most
        plan = [(known, "eager", "fp32"), (known, "compiled", "fp32"), (edm, "channels_last", "fp32")]
    else:
        plan = [
            (known, "eager", "bf16"), (known, "eager", "tf32"), (known, "compiled", "bf16"),
            (edm, "channels_last", "bf16"), (known, "eager", "fp16"), (known, "compiled", "tf32"),
        ]  # fmt: skip
    for group, mode, precision in plan:
        for name, subject in group.items():
            add(name, subject, mode, precision)


def _speed(
    rows: Rows,
    name: str,
    subject: Subject,
    mode: str,
    precision: str,
    batches: dict[str, int],
    matmul: dict[str, float],
) -> Figures:
    device = rows.device
    model = subject.on(device, NAMED[precision])
    if mode == "channels_last":
        model.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch documents it
    if mode == "compiled":
        model.compile_parts()
    if precision not in matmul:
        matmul[precision] = matmul_tflops(device, NAMED[precision])
    if name not in batches:
        batches[name] = _best_batch(model, subject, device)
    batch = _that_fits(model, subject, batches[name], device)
    settings = changed(model, subject.short if rows.tiny else {})
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    runs = [sample(model, batch, settings, device)]
    while len(runs) < 3 and runs[0].total < LONG:
        runs.append(sample(model, batch, settings, device))
    network, total = (statistics.median(getattr(run, part) for run in runs) for part in ("network", "total"))
    figures = {
        "batch": batch,
        "images_per_s": batch / total,
        "network_s": network,
        "decoder_s": total - network,
        "matmul_tflops": matmul[precision],
    }
    if subject.tflop and not rows.tiny:
        figures["share_of_matmul"] = subject.tflop * batch / total / matmul[precision]
        peak = peak_tflops(device, precision)
        if peak is not None:
            figures["share_of_peak"] = subject.tflop * batch / total / peak
    if device.type == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return figures


def _best_batch(model: GenerativeModel, subject: Subject, device: torch.device) -> int:
    """The smallest of the batches that is about as fast as any that fits."""
    if device.type == "cpu":
        return 1 if subject.tflop else subject.batches[0]
    settings = changed(model, subject.short)
    best, speed = subject.batches[0], 0.0
    for batch in subject.batches:
        try:
            sample(model, batch, settings, device)
            found = batch / sample(model, batch, settings, device).total
        except torch.OutOfMemoryError:
            break
        if found < WORTH * speed:
            break
        best, speed = batch, found
    torch.cuda.empty_cache()
    return best


def _that_fits(model: GenerativeModel, subject: Subject, batch: int, device: torch.device) -> int:
    """`batch`, or the largest of its halves that fits; the warm-up."""
    while True:
        try:
            sample(model, batch, changed(model, subject.short), device)
            return batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            torch.cuda.empty_cache()
