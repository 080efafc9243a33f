"""Images are written by threads while the next batch is sampled: bounded, whole, and failures end the run."""

import dataclasses
import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from neon import sampling
from neon.data import images as files
from neon.errors import WorkError
from neon.runtime import background
from neon.runtime.background import BATCHES_AHEAD, Background
from neon.runtime.distributed import Processes
from neon.sampling import write_samples
from tests.tiny import tiny_edm


@pytest.mark.parametrize(("processors", "processes", "threads"), [(16, 8, 2), (2, 8, 1), (64, 1, 8)])
def test_threads_are_shared_among_the_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, processors: int, processes: int, threads: int
) -> None:
    monkeypatch.setattr(background, "available_cpus", lambda: processors)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with Background() as pool:
        assert pool._pool._max_workers == threads


def test_no_more_batches_wait_than_memory_is_meant_for() -> None:
    go, begun, handed = threading.Event(), threading.Semaphore(0), []

    def job() -> None:
        begun.release()
        go.wait()

    def caller() -> None:
        with Background() as pool:
            for batch in range(BATCHES_AHEAD + 2):
                pool.hand_in([job])
                handed.append(batch)

    thread = threading.Thread(target=caller)
    thread.start()
    begun.acquire()
    thread.join(0.2)
    assert handed == [*range(BATCHES_AHEAD)]
    go.set()
    thread.join()
    assert handed == [*range(BATCHES_AHEAD + 2)]


def test_one_piece_of_work_after_another_is_waited_for() -> None:
    done, gate = [], threading.Event()
    with Background(threads=1, ahead=1) as beside:
        beside.hand_in([lambda: done.append(gate.wait(10))])
        assert done == [], "it should not have been waited for"
        gate.set()
        beside.hand_in([lambda: done.append(2)])
        assert done[0] is True, "the second may begin when the first has ended"
        beside.wait()
        assert done == [True, 2]


def test_an_error_is_raised_by_who_waits_and_not_hidden_by_one_of_the_caller() -> None:
    def fail() -> None:
        raise WorkError("state.pt: the disk is full")

    with pytest.raises(WorkError, match="disk is full"), Background(threads=1, ahead=1) as beside:
        beside.hand_in([fail])
        beside.wait()
    with pytest.raises(WorkError, match="disk is full") as error, Background(threads=1, ahead=1) as beside:
        beside.hand_in([fail])
        raise ValueError("of the caller")
    assert isinstance(error.value.__context__, ValueError)


def test_a_failure_ends_what_is_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "MOST_THREADS", 1)
    done: list[int] = []

    def fail() -> None:
        raise WorkError("the disk is full")

    with pytest.raises(WorkError, match="the disk is full"), Background() as pool:
        pool.hand_in([lambda: done.append(1), fail])
        pool.hand_in([lambda: done.append(2)])
        pool.hand_in([lambda: done.append(3)])
    assert 3 not in done


@pytest.mark.parametrize("at", [1, 9])
def test_a_full_disk_ends_sampling_and_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    model, sampled, replace = tiny_edm(), [], os.replace
    settings = dataclasses.replace(model.default_settings, num_steps=2)
    write_samples(model, range(10), settings, tmp_path / "whole", batch_size=2, processes=Processes())

    def full(partial: Path, path: Path) -> None:
        if path.name == f"{at:08d}.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(partial, path)

    def counted(*args: object) -> object:
        sampled.append(args)
        return sample(*args)

    sample = sampling.sample_block
    with monkeypatch.context() as patched:
        patched.setattr("neon.runtime.files.os.replace", full)
        patched.setattr(sampling, "sample_block", counted)
        with pytest.raises(WorkError, match=rf"{at:08d}.png: the disk is full .* free some space and run again"):
            write_samples(model, range(10), settings, tmp_path / "full", batch_size=2, processes=Processes())
    if at == 1:
        assert len(sampled) <= 1 + BATCHES_AHEAD  # the others were not begun
    left = {file.name: file.read_bytes() for file in (tmp_path / "full").iterdir()}
    assert all(content == (tmp_path / "whole" / name).read_bytes() for name, content in left.items())
    assert files.image_name(at) not in left and "dataset.json" not in left
    write_samples(model, range(10), settings, tmp_path / "full", batch_size=2, processes=Processes())
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "full" / file.name).read_bytes()


def test_images_that_are_on_the_host_are_not_copied() -> None:
    images = torch.zeros(2, 3)
    assert background.on_host(images)() is images
