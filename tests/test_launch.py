"""Several processes of one machine: they join, the worst exit code wins, and none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from neon.errors import RequestError, WorkError
from neon.runtime import lifeline
from neon.runtime.distributed import processes
from neon.runtime.launch import run_in_processes
from tests.idle import die
from tests.workers import ended, environment_of, free_port

ROOT = Path(__file__).parent.parent


def join_and_fail_in_the_last(arguments: list[str]) -> int:
    with processes("cpu") as group:
        torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # imports what would hold on to the process group
        everybody = group.gather(torch.tensor([group.rank]))
        assert [int(rank) for rank in everybody] == [0, 1]
        assert group.from_main(f"from {group.rank}") == "from 0"
        try:
            group.on_main(refuse)
        except RequestError as error:
            Path(arguments[0], f"refused-{group.rank}").write_text(str(error))
        group.barrier()
    threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]  # on Linux
    Path(arguments[0], f"threads-{group.rank}").write_text(" ".join(name for name in threads if "gloo" in name))
    return 3 if group.rank == 1 else 0


def refuse() -> None:
    raise RequestError("no")


def test_processes_join_and_a_refusal_in_the_main_one_reaches_all(tmp_path: Path) -> None:
    """And one that left the group has no thread of it, which could crash its exit."""
    assert run_in_processes(join_and_fail_in_the_last, [str(tmp_path)], 2) == 3
    assert [(tmp_path / f"refused-{rank}").read_text() for rank in (0, 1)] == ["no", "no"]
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in (0, 1)] == ["", ""]


@pytest.mark.skipif(sys.platform != "linux", reason="children follow their parent into death on Linux only")
@pytest.mark.parametrize("early", [False, True])
def test_no_process_outlives_a_killed_parent(tmp_path: Path, early: bool) -> None:
    write_torch(tmp_path)
    script = tmp_path / "parent.py"
    script.write_text(
        "from neon.runtime.launch import run_in_processes\nfrom tests.idle import sleep\n"
        f"if __name__ == '__main__':\n    run_in_processes(sleep, [{str(tmp_path)!r}], 2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"NEON_TESTS_LATE": "1"} if early else {})}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    deadline = time.monotonic() + 60
    reached = [tmp_path / "pid-0", tmp_path / "pid-1"]
    while not (len(children(parent.pid)) == 3 if early else all(path.exists() for path in reached)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    left = children(parent.pid)  # with early, these still import
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(map(alive, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(left) == 3 and not any(map(alive, left))
    assert early == (not any(path.exists() for path in reached))


def write_torch(folder: Path) -> None:
    """What stands for torch in children that only wait: it takes seconds to import."""
    (folder / "torch.py").write_text("def set_num_threads(number: int) -> None:\n    pass\n")


def children(pid: int) -> list[int]:
    """The two of `pid`, and what multiprocessing starts to clean up after them."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torch(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as children find it
    with pytest.raises(WorkError, match=r"process 1 was killed \(SIGKILL\)"):
        run_in_processes(die, [], 2)


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            ValueError("MASTER_ADDR expected, but not set"),
            RequestError,
            "RANK is set.* MASTER_ADDR expected.* torchrun",
        ),
        (torch.distributed.DistNetworkError("port: 1, EADDRINUSE"), WorkError, "no connection between.*EADDRINUSE"),
    ],
)
def test_a_group_that_cannot_be_joined_is_told_in_one_line(
    raised: Exception, expected: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(backend: str) -> None:
        raise raised

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(expected, match=message), processes("cpu"):
        pass


def wait_in_vain(rank: int, port: int, dies: int) -> None:
    """Of three processes one dies, and the others are where no exchange tells them."""
    os.environ.update(environment_of(rank, 3, port))
    lifeline.GRACE_SECONDS = 0.3
    with processes("cpu") as group:
        group.barrier()
        if rank == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


@pytest.mark.parametrize("dies", [0, 2])
def test_a_process_that_dies_ends_those_that_wait_for_it(
    dies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    port, begun = free_port(), time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: ended(wait_in_vain, rank, port, dies), range(3)))
    assert time.monotonic() - begun < 30
    assert found.pop(dies)[0] == -signal.SIGKILL
    assert [code for code, _ in found] == [1, 1]
    assert all("another process of this run ended early" in text for _, text in found)


def leave_alone(rank: int, port: int) -> None:
    """One of two processes is done before the other."""
    os.environ.update(environment_of(rank, 2, port))
    lifeline.GRACE_SECONDS = 0.1
    with processes("cpu") as group:
        group.barrier()
        if rank == 0:
            time.sleep(0.5)


def test_one_that_ends_well_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: ended(leave_alone, rank, port)[0], range(2))) == [0, 0]
