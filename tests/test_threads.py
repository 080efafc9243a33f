"""Threads on a CPU: as OMP_NUM_THREADS says, else few enough for the machine, one for small networks; recorded."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from neon.errors import RequestError
from neon.runtime import threads
from neon.runtime.distributed import Processes
from neon.runtime.run_folder import run_folder
from neon.runtime.threads import available_cpus, threads_for, use_threads

CPU = torch.device("cpu")


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of 16 processors, on which torch would use them all; no limits of this one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(threads, "_DEFAULT", 16)
    threads._tell_of_one.cache_clear()
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def v1(group: str, quota: int) -> dict[str, str]:
    """The files of a control group of the first version."""
    return {f"{group}/cpu.cfs_quota_us": str(quota), f"{group}/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"cpu.max": "max 100000"}, 16),
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        ("0::/\n", {"cpu.max": "1000 100000"}, 1),
        ("0::/\n", {"cpu.max": "1 0"}, 16),
        ("0::/\n", {"cpu.max": "garbage"}, 16),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "max 100000"}, 4),
        ("0::/../above\n", {"cpu.max": "200000 100000"}, 2),
        ("4:cpu,cpuacct:/job\n3:memory:/\n", v1("cpu/job", 500000), 5),
        ("4:cpu,cpuacct:/of/the/host\n", v1("cpu", 200000), 2),
        ("4:cpu,cpuacct:/\n", v1("cpu", -1), 16),
        ("", {}, 16),
    ],
)
def test_processors_are_counted_by_affinity_and_quota(
    sixteen: None, tmp_path: Path, membership: str, files: dict[str, str], cpus: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "membership").write_text(membership)
    assert available_cpus(tmp_path, tmp_path / "membership") == cpus


def test_small_networks_take_one_thread_and_large_ones_what_there_is(
    sixteen: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threads, "available_cpus", lambda: 2)
    use_threads(CPU)
    assert Processes().threads == 2
    small, large = nn.Linear(10, 10), nn.Linear(threads.SMALL // 10, 10, device="meta")
    use_threads(CPU, small)
    assert Processes().threads == 1 and "one thread of 2" in capsys.readouterr().err
    use_threads(CPU, small, large, object())
    assert Processes().threads == 2
    for name, value in {"OMP_NUM_THREADS": "2", "RANK": "0"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            use_threads(CPU, small)
            assert Processes().threads == 2
    use_threads(torch.device("cuda"), small)
    assert capsys.readouterr().err == ""
    assert Processes().threads == 2 and Processes(device=torch.device("cuda")).threads is None


def test_a_block_leaves_the_threads_of_its_caller_and_says_its_own_once(
    sixteen: None, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(3)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), threads_for(CPU, nn.Linear(10, 10)):
            assert Processes().threads == 1
            _ = 1 / 0
        assert Processes().threads == 3
    assert capsys.readouterr().err.count("one thread of") == 1


def test_a_run_goes_on_with_other_threads_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_folder(tmp_path, {"seed": 0}, threads=8) as folder:
        assert json.loads((folder / "run.json").read_text())["threads"] == 8
    for same in (8, None):
        with run_folder(tmp_path, {"seed": 0}, threads=same):
            assert capsys.readouterr().err == ""
    with run_folder(tmp_path, {"seed": 0}, threads=2):
        assert "began with 8 threads and goes on with 2" in capsys.readouterr().err
    with pytest.raises(RequestError, match="other settings"), run_folder(tmp_path, {"seed": 1}, threads=8):
        pass
