"""Merging checkpoint files: formats, nestings, provenance, memory, and that nothing is left half-written."""

import errno
import json
import math
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import neon.runtime.files
from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.errors import RequestError, WorkError
from neon.merge import merge_files, merge_state, merge_tensor
from neon.runtime.files import sha256_file
from tests.tiny import pair, toy_state


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with base and self-trained weights in both formats, nested differently."""
    base, self_trained = toy_state(), toy_state(1.0)
    about = {"architecture": "toy", "config": '{"width": 30}'}
    save_safetensors(tmp_path / "base.safetensors", base, about)
    save_safetensors(tmp_path / "tuned.safetensors", self_trained, about)
    torch.save({"model_ema": OrderedDict(base), "model": toy_state(0.5), "epoch": 3}, tmp_path / "base.pth")
    torch.save({"trainer": {"var_wo_ddp": self_trained}}, tmp_path / "tuned.pth")
    return tmp_path


def assert_is_merge(state: dict[str, torch.Tensor], w: float) -> None:
    expected = merge_state(toy_state(), toy_state(1.0), w)
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.stem not in ("base", "tuned"))


@pytest.mark.parametrize("base", ["base.safetensors", "base.pth"])
@pytest.mark.parametrize("self_trained", ["tuned.safetensors", "tuned.pth"])
@pytest.mark.parametrize("output", ["neon_{w}.safetensors", "neon_{w}.pth"])
def test_files_of_any_two_formats_are_merged_for_many_w(toy: Path, base: str, self_trained: str, output: str) -> None:
    reports = merge_files(toy / base, toy / self_trained, [-1, 0, 1.5], toy / output)
    assert [Path(report.output).name for report in reports] == [output.replace("{w}", w) for w in ("-1", "0", "1.5")]
    for report in reports:
        assert_is_merge(load_state(report.output), report.w)
        assert (report.merged_tensors, report.copied_tensors, report.warnings) == (3, 1, ())


def test_a_torch_output_keeps_everything_else_of_the_base(toy: Path) -> None:
    merge_files(toy / "base.pth", toy / "tuned.pth", [1.5], toy / "neon.pth")
    content = torch.load(toy / "neon.pth")
    assert list(content) == ["model_ema", "model", "epoch"]
    assert isinstance(content["model_ema"], OrderedDict)
    assert_is_merge(content["model_ema"], 1.5)
    assert torch.equal(content["model"]["net.weight"], toy_state(0.5)["net.weight"])
    assert content["epoch"] == 3


def test_keys_choose_the_state_dicts(toy: Path) -> None:
    torch.save({"model": toy_state(0.5), "ema": toy_state(2.0)}, toy / "tuned2.pth")
    [report] = merge_files(toy / "base.pth", toy / "tuned2.pth", [1.0], toy / "a.safetensors")
    assert (report.base_key, report.self_trained_key) == ("model_ema", "ema")
    assert report.base_candidates == ("model_ema", "model")
    [report] = merge_files(toy / "base.pth", toy / "tuned2.pth", [1.0], toy / "b.safetensors", key="model")
    assert (report.base_key, report.self_trained_key) == ("model", "model")
    [report] = merge_files(
        toy / "base.pth", toy / "tuned2.pth", [1.0], toy / "c.safetensors", key="model", self_trained_key="ema"
    )
    assert (report.base_key, report.self_trained_key) == ("model", "ema")
    [report] = merge_files(toy / "base.pth", toy / "tuned.safetensors", [1.0], toy / "d.safetensors", key="model")
    assert (report.base_key, report.self_trained_key) == ("model", "")


def test_the_output_records_formula_weight_and_inputs(toy: Path) -> None:
    for suffix in ("safetensors", "pth"):
        base, self_trained, output = (toy / f"{name}.{suffix}" for name in ("base", "tuned", "neon"))
        merge_files(base, self_trained, [1.5], output)
        if suffix == "pth":
            record = json.loads((toy / "neon.pth.json").read_text())
            assert record["base_key"] == "model_ema"
        else:
            with open_checkpoint(output) as checkpoint:
                record = checkpoint.metadata
            assert record["architecture"] == "toy"
            assert record["config"] == '{"width": 30}'
        assert record["formula"] == "theta_neon = (1 + w) * theta_base - w * theta_self_trained"
        assert float(record["w"]) == 1.5
        assert (record["base"], record["base_sha256"]) == (base.name, sha256_file(base))
        assert (record["self_trained"], record["self_trained_sha256"]) == (self_trained.name, sha256_file(self_trained))
        assert record["neon_version"] == neon.__version__


def test_tensors_may_lie_in_another_order_with_another_dtype(toy: Path) -> None:
    shuffled = {name: tensor.double() for name, tensor in reversed(toy_state(1.0).items())}
    save_safetensors(toy / "other.safetensors", shuffled, {"note": "unrelated"})
    merge_files(toy / "base.safetensors", toy / "other.safetensors", [1.5], toy / "neon.safetensors")
    merged = load_state(toy / "neon.safetensors")
    torch.testing.assert_close(merged["net.weight"], merge_state(toy_state(), toy_state(1.0), 1.5)["net.weight"])
    assert merged["net.weight"].dtype == torch.float32


def test_tensors_larger_than_a_buffer_are_merged_in_pieces(tmp_path: Path) -> None:
    base, self_trained = pair(torch.float32, (1100, 1000))
    save_safetensors(tmp_path / "a.safetensors", {"x": base}, {})
    save_safetensors(tmp_path / "b.safetensors", {"x": self_trained}, {})
    seen: list[tuple[int, int]] = []
    merge_files(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        [1.5],
        tmp_path / "c.safetensors",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert torch.equal(load_state(tmp_path / "c.safetensors")["x"], merge_tensor(base, self_trained, 1.5))
    assert len(seen) > 1
    assert seen[-1] == (4_400_000, 4_400_000)


def test_parameters_saved_as_such_stay_parameters(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    torch.save({"w": weight}, tmp_path / "a.pth")
    torch.save({"w": weight.detach() + 1}, tmp_path / "b.pth")
    merge_files(tmp_path / "a.pth", tmp_path / "b.pth", [1.0], tmp_path / "c.pth")
    merged = torch.load(tmp_path / "c.pth")["w"]
    assert isinstance(merged, torch.nn.Parameter)
    assert merged.tolist() == [0.0, 0.0, 0.0]


def test_files_of_two_architectures_or_configurations_are_refused(toy: Path) -> None:
    for about in ({"architecture": "other"}, {"config": '{"width": 31}'}):
        save_safetensors(toy / "other.safetensors", toy_state(1.0), about)
        with pytest.raises(RequestError, match=f"differ in {next(iter(about))}"):
            merge_files(toy / "base.safetensors", toy / "other.safetensors", [1.0], toy / "neon.safetensors")
    save_safetensors(toy / "other.safetensors", toy_state(1.0), {"config": '{ "width":30 }'})
    merge_files(toy / "base.safetensors", toy / "other.safetensors", [1.0], toy / "neon.safetensors")


def test_the_same_file_twice_is_merged_with_a_warning(toy: Path) -> None:
    [report] = merge_files(toy / "base.safetensors", toy / "base.safetensors", [1.5], toy / "neon.safetensors")
    assert report.warnings == ("base and self-trained are equal: nothing to extrapolate",)
    assert report.base_sha256 == report.self_trained_sha256
    assert_is_merge(load_state(report.output), 0.0)


def test_low_precision_files_report_how_much_of_the_update_survives(toy: Path) -> None:
    base = {"x": torch.linspace(1, 2, 1000).bfloat16()}
    save_safetensors(toy / "a.safetensors", base, {})
    save_safetensors(toy / "b.safetensors", {"x": base["x"].float() * 1.0001}, {})
    [report] = merge_files(toy / "a.safetensors", toy / "b.safetensors", [1.0], toy / "c.safetensors")
    assert report.share_lost > 0.9
    assert report.relative_error > 0.9
    assert "rounding spoils the update" in report.warnings[0]


@pytest.mark.parametrize(
    ("ws", "output", "message"),
    [
        ([float("nan")], "neon.safetensors", "finite"),
        ([1.0, math.inf], "neon_{w}.safetensors", "finite"),
        ([], "neon.safetensors", "no w"),
        ([1.0, 2.0], "neon.safetensors", r"put \{w\} into it"),
        ([1.0, 1.0], "neon_{w}.safetensors", "given twice"),
        ([0.0, -0.0], "neon_{w}.safetensors", "given twice"),
        ([1.0], "neon.bin", "unknown output format"),
        ([1.0], "neon", "unknown output format"),
        ([1.0], "base.safetensors", "the output is the input"),
        ([1.0], "tuned.safetensors", "the output is the input"),
        ([1.0], "link.safetensors", "the output is the input"),
        ([1.0], "hardlink.safetensors", "the output is the input"),
        ([1.0], "base.pth", "already exists"),
        ([1.0], "base.pth/neon.safetensors", "cannot write here"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(toy: Path, ws: list[float], output: str, message: str) -> None:
    (toy / "link.safetensors").symlink_to(toy / "base.safetensors")
    (toy / "hardlink.safetensors").hardlink_to(toy / "tuned.safetensors")
    before = left_over(toy)
    overwrite = message != "already exists"
    with pytest.raises(RequestError, match=message):
        merge_files(toy / "base.safetensors", toy / "tuned.safetensors", ws, toy / output, overwrite=overwrite)
    assert left_over(toy) == before
    assert_is_merge(load_state(toy / "base.safetensors"), 0.0)


def test_weights_whose_names_would_collide_when_rounded_get_names_in_full(toy: Path) -> None:
    reports = merge_files(
        toy / "base.safetensors", toy / "tuned.safetensors", [1.0, 1.0000001], toy / "neon_{w}.safetensors"
    )
    assert [Path(report.output).name for report in reports] == ["neon_1.safetensors", "neon_1.0000001.safetensors"]


class FullDisk:
    """Stands for a file on a disk that is full after the first `room` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room -= len(memoryview(data).cast("B"))
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@pytest.mark.parametrize("output", ["neon_{w}.safetensors", "neon_{w}.pth"])
def test_a_full_disk_leaves_nothing_half_written(toy: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    def small_open(path: Any, mode: str = "r", **options: Any) -> Any:
        file = open(path, mode, **options)  # noqa: SIM115
        return FullDisk(file, 4000) if mode == "wb" else file

    before = left_over(toy)
    monkeypatch.setattr(neon.runtime.files, "open", small_open, raising=False)
    with pytest.raises(WorkError, match=r"the disk is full"):
        merge_files(toy / "base.pth", toy / "tuned.pth", [0.5, 1.5], toy / output)
    assert left_over(toy) == before


def test_a_full_disk_keeps_the_file_that_was_to_be_overwritten(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_files(toy / "base.pth", toy / "tuned.pth", [0.5], toy / "neon.safetensors")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(neon.runtime.files.os, "fsync", fail)
    with pytest.raises(WorkError, match=r"the disk is full"):
        merge_files(toy / "base.pth", toy / "tuned.pth", [1.5], toy / "neon.safetensors", overwrite=True)
    assert left_over(toy) == ["neon.safetensors"]
    assert_is_merge(load_state(toy / "neon.safetensors"), 0.5)


def test_an_overflow_writes_none_of_the_outputs(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "base.safetensors", {"a": torch.ones(3), "x": torch.tensor([6e4]).half()}, {})
    save_safetensors(tmp_path / "tuned.safetensors", {"a": torch.zeros(3), "x": torch.tensor([5e4]).half()}, {})
    with pytest.raises(WorkError, match=r"x: 1 elements overflow torch\.float16 at w = 1\.5"):
        merge_files(
            tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", [0.1, 1.5], tmp_path / "n_{w}.safetensors"
        )
    assert left_over(tmp_path) == []


PEAK_OF_MERGE = """
import pathlib, sys, torch, neon.merge
def memory(field):  # not getrusage: its peak includes that of the process that started this one
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(field)[1].split()[0])
before = memory("VmRSS:")
neon.merge.merge_files(sys.argv[1], sys.argv[2], [0.5, 1.5], sys.argv[3])
print((memory("VmHWM:") - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its peak memory from /proc")
def test_merging_large_files_takes_the_memory_of_a_few_buffers(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_safetensors(tmp_path / name, {f"x{i}": torch.full((25_000_000,), value) for i in range(3)}, {})
    command = [sys.executable, "-c", PEAK_OF_MERGE, *(str(tmp_path / n) for n in ("a", "b", "neon_{w}.safetensors"))]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert float(run.stdout) < 100, "MB above the interpreter for two files of 300 MB"
    with open_checkpoint(tmp_path / "neon_0.5.safetensors") as merged:
        assert merged.tensor("x2").eq(0.5).all()
    for path in tmp_path.iterdir():
        path.unlink()
