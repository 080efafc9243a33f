"""Reading ahead: the same training for any number of workers, killed or not, and one line when a worker fails."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from neon.checkpoint import load_state
from neon.data.encoded import ExampleSet, encode_set
from neon.data.images import ArrayDataset, ImageDataset, TrainingImages, pack_set, write_images, write_labels
from neon.data.loading import read_ahead, usual_workers
from neon.errors import RequestError, WorkError
from neon.evaluate import tally_images
from neon.metrics.small import SmallFeatures
from neon.model import GenerativeModel
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.runtime.signals import answered
from neon.selftrain import TrainingRun, train
from neon.selftrain.visits import Visits, read
from tests.programs import Killed, dies_after
from tests.test_signals import signalled_after
from tests.tiny import tiny_colour_images, tiny_edm, tiny_tokenizer, tiny_var, tiny_xar
from VAR.model import VARModel

CPU = torch.device("cpu")


def cropping_var() -> VARModel:
    model = VARModel(tiny_var().config, enlargement=1.5)
    model.set_tokenizer(tiny_tokenizer())
    model.load_state_dict(tiny_var().state_dict())
    return model


def colour_edm() -> GenerativeModel:
    return tiny_edm(img_channels=3, dropout=0.1)


MODELS: dict[str, Callable[[], GenerativeModel]] = {"edm": colour_edm, "VAR": cropping_var, "xAR": tiny_xar}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of coloured images with their classes."""
    folder, real = tmp_path_factory.mktemp("images"), tiny_colour_images(20)
    write_images(folder / "set", range(len(real)), real.images)
    assert real.labels is not None
    write_labels(folder / "set", real.labels.tolist(), len(real))
    pack_set(folder / "set", folder / "set.zip")
    return folder / "set.zip"


def workers_alive() -> list[BaseProcess]:
    """Those of DataLoader; the processes that other tests keep are started otherwise."""
    return [child for child in multiprocessing.active_children() if isinstance(child, ForkProcess)]


def weights(model: GenerativeModel, dataset: TrainingImages, folder: Path, workers: int) -> torch.Tensor:
    """What four steps of two micro-batches come to."""
    *_, last = train(
        model, dataset, folder, num_steps=4, snapshot_steps=[], recipe=Recipe(batch_size=8, lr=1e-3), seed=1,
        processes=Processes(), micro_batch=4, state_every_seconds=0.0, workers=workers,
    )  # fmt: skip
    assert not workers_alive()
    return torch.cat([tensor.flatten() for tensor in load_state(last.path).values()])


@pytest.mark.parametrize("name", MODELS)
def test_workers_change_no_bit_and_a_killed_run_goes_on(tmp_path: Path, images: Path, name: str) -> None:
    make, dataset = MODELS[name], ImageDataset(images)
    alone = weights(make(), dataset, tmp_path / "0", 0)
    if name == "VAR":
        assert torch.equal(weights(make(), dataset, tmp_path / "1", 1), alone)
        with dies_after(2, TrainingRun, "one_step"), pytest.raises(Killed):
            weights(make(), dataset, tmp_path / "2", 2)
    assert torch.equal(weights(make(), dataset, tmp_path / "2", 2), alone)


def test_a_gpu_gets_the_crops_of_a_cpu() -> None:
    # A GPU draws other noise, but only from `encode` on.
    model, images = cropping_var(), tiny_colour_images(4)
    on_cpu, for_gpu = (
        read(model, images, torch.device(device), Visits([0, 1], [5, 6])) for device in ("cpu", "meta")
    )  # fmt: skip
    assert torch.equal(on_cpu.examples, for_gpu.examples) and on_cpu.examples.dtype == torch.uint8
    assert on_cpu.noise_state is not None and for_gpu.noise_state is None


def test_a_damaged_image_is_named_as_without_workers(tmp_path: Path) -> None:
    real = tiny_colour_images(8)
    write_images(tmp_path / "set", range(8), real.images)
    dataset = ImageDataset(tmp_path / "set")
    (tmp_path / "set" / "00000005.png").write_bytes(b"nothing")
    for workers in (0, 2):
        with pytest.raises(RequestError, match=r"set: 00000005\.png cannot be read as an image") as failure:
            weights(tiny_edm(img_channels=3, label_dim=0), dataset, tmp_path / f"out{workers}", workers)
        assert "worker" not in str(failure.value) and not failure.value.shared
    assert not workers_alive()


class Deadly(ArrayDataset):
    """Images whose reader is killed."""

    def examples(self, indices: object) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_is_killed_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # DataLoader looks every five seconds.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    real = tiny_colour_images(8)
    with pytest.raises(WorkError, match=r"reads images ahead was killed.*by --workers 0"):
        weights(colour_edm(), Deadly(real.images, real.labels, "deadly"), tmp_path, 1)
    assert not workers_alive()


def test_ctrl_c_of_a_terminal_reaches_workers_too_and_the_step_is_finished(tmp_path: Path, images: Path) -> None:
    loss = TrainingRun._loss

    def interrupted(*args: object) -> torch.Tensor:
        for worker in workers_alive():
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(worker.pid or 0, number)
        return loss(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        patch.setattr(TrainingRun, "_loss", interrupted)
        with signalled_after(3, TrainingRun, "_loss", signal.SIGINT), answered():
            weights(colour_edm(), ImageDataset(images), tmp_path, 2)
    assert str(stopped.value).endswith("goes on from step 2 of 4")


def test_scores_and_encodings_read_ahead_to_the_same_bits(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, small = ImageDataset(images), SmallFeatures("s", tiny_colour_images(1).image_shape, 4, 3)
    read_by_workers = []

    def made(workers: int) -> tuple[torch.Tensor, torch.Tensor]:
        for module in ("neon.data.encoded", "neon.evaluate.features"):
            monkeypatch.setattr(f"{module}.usual_workers", lambda *_: workers)
        [tally] = tally_images(dataset, [small], batch_size=3, processes=Processes(), keep_features=True)
        folder = tmp_path / f"set{workers}"
        encode_set(
            lambda images: images.float().flatten(1), dataset, folder, kind="x", image_shape=dataset.image_shape,
            batch_size=3, processes=Processes(), identity={}, fresh=False,
        )  # fmt: skip
        assert not workers_alive()
        return tally.features, ExampleSet(folder, "x").examples(range(len(dataset)))

    found = made(0)
    monkeypatch.setattr(
        "neon.data.loading.DataLoader", lambda *args, **kwargs: read_by_workers.append(1) or DataLoader(*args, **kwargs)
    )
    for alone, ahead in zip(found, made(2), strict=True):
        assert torch.equal(alone, ahead)
    assert len(read_by_workers) == 2


def test_workers_leave_the_global_generator_and_handlers_as_they_were() -> None:
    torch.manual_seed(3)
    state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    assert list(read_ahead(lambda item: torch.full((2,), item), range(5), workers=2, device=CPU))[4].tolist() == [4, 4]
    assert torch.equal(torch.get_rng_state(), state) and signal.getsignal(signal.SIGCHLD) == handler


def test_by_default_workers_read_for_gpus_as_far_as_shared_memory_has_room() -> None:
    gpu = Processes(device=torch.device("cuda", 0))
    assert usual_workers(Processes(), 1) == 0
    assert usual_workers(gpu, 1 << 60) == 0 <= usual_workers(gpu, 1)
