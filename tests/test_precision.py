"""What is computed in and on: one default, said otherwise by flags, recorded where it is another."""

import pytest
import torch

from neon.errors import RequestError
from neon.precision import BF16, ENCODING, FP16, FP32, TF32, Precision, decide
from neon.runtime.distributed import device_type

GPU, CPU = torch.device("cuda"), torch.device("cpu")
CONVOLUTIONS = Precision(name="tf32", tf32_convolutions=True)
"""as EDM's networks were sampled"""
PLAIN_FP16 = Precision(name="fp16", autocast=torch.float16, reduced_sums=False)
"""as IMM's were trained"""


@pytest.mark.parametrize(
    ("asked", "published", "tf32", "switches", "recorded"),
    [
        (None, CONVOLUTIONS, None, (False, True), {"precision": "tf32"}),
        (None, CONVOLUTIONS, False, (False, False), {"precision": "fp32"}),
        (None, CONVOLUTIONS, True, (True, True), {"precision": "tf32"}),
        (None, FP32, True, (True, True), {"precision": "tf32"}),
        ("fp32", TF32, None, (False, False), {"precision": "fp32"}),
        ("tf32", FP32, True, (True, True), {"precision": "tf32"}),
        ("bf16", FP32, True, (True, True), {"precision": "bf16"}),
        ("bf16", FP32, False, (False, False), {"precision": "bf16", "tf32": False}),
        (None, PLAIN_FP16, None, (False, False), {"precision": "fp16"}),
        (None, PLAIN_FP16, True, (True, True), {"precision": "fp16", "tf32": True}),
    ],
)
def test_tf32_is_as_published_unless_it_is_said(
    asked: str | None, published: Precision, tf32: bool | None, switches: tuple[bool, bool], recorded: dict[str, object]
) -> None:
    found = decide(asked, published, GPU, tf32)
    assert (found.tf32, found.tf32_convolutions) == switches
    assert found.recorded == recorded
    assert (found.autocast, found.reduced_sums) == (
        decide(asked, published, GPU).autocast, decide(asked, published, GPU).reduced_sums,
    )  # fmt: skip


@pytest.mark.parametrize("tf32", [None, True, False])
def test_a_cpu_knows_no_tf32(tf32: bool | None) -> None:
    assert decide(None, CONVOLUTIONS, CPU, tf32) == FP32
    assert decide("bf16", FP32, CPU, tf32) == BF16
    assert decide(None, ENCODING, CPU, tf32).recorded == {"precision": "fp32"}
    assert decide("fp16", FP32, CPU, tf32) == FP16


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(RequestError, match="--precision tf32 and --tf32 0: they contradict each other"):
        decide("tf32", FP32, GPU, False)


@pytest.mark.parametrize(("asked", "gpus", "found"), [(None, 0, "cpu"), (None, 2, "cuda"), ("cpu", 2, "cpu")])
def test_the_device_is_a_gpu_where_there_is_one(asked: str | None, gpus: int, found: str) -> None:
    assert device_type(asked, gpus) == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "mps",
            "--device mps: not served, for samplers, .* float64.*expected cpu or cuda, of which this machine has 1$",
        ),
        ("tpu", "--device tpu: not served; expected cpu or cuda, of which this machine has 1$"),
    ],
)
def test_another_device_is_refused_by_name(asked: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        device_type(asked, 1)
