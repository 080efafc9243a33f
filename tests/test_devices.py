"""What a GPU would make of the code, told without one: operations that mix devices, and waits for the host.

Tensors on a pretended device have a shape, a dtype and a device, and no values (torch's FakeTensorMode); those on the
CPU are real. An operation on both raises, as on a GPU. Whatever makes the host wait is written down with the function
that asks for it: reading a value, fetching a tensor, sending one unless `non_blocking`, counting a mask.

Not told: kernels (their results, limits, and which of them attention takes), generators, several processes, time and
memory. Gradients are passed back on the device "meta", as torch's engine asks the driver for the streams of CUDA.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from edm.model import EDM
from edm.settings import AblationSettings, EDMSettings
from imm.model import IMM
from imm.recipe import IMMRecipe
from imm.sampler import IMMSettings
from neon.data.augment import AUGMENT_DIM
from neon.data.images import ArrayDataset, ImageDataset
from neon.errors import RequestError
from neon.evaluate import features_in_order, sampled_images
from neon.merge import LiveMerge
from neon.metrics import InceptionScore, Manifold, Moments
from neon.metrics.inception_score import NUM_CLASSES
from neon.metrics.small import SmallFeatures
from neon.model import GenerativeModel
from neon.noise import ImageNoise, Noise
from neon.precision import FP16, FP32, Precision
from neon.recipe import Recipe
from neon.runtime.blocks import rows_in_order
from neon.runtime.distributed import Processes
from neon.sampling import check_label, one_hot, sample_block, write_samples
from neon.selftrain import TrainingRun, check_trainable, visit
from tests.tiny import (
    CONFIG,
    tiny_colour_images,
    tiny_edm,
    tiny_images,
    tiny_imm,
    tiny_sd_vae,
    tiny_vae,
    tiny_var,
    tiny_xar,
)
from VAR.recipe import VARRecipe
from VAR.sampler import VARSettings
from xAR.model import XARModel
from xAR.recipe import XARRecipe
from xAR.sampler import XARSettings

ROOT = Path(__file__).parent.parent
CODE = tuple(str(ROOT / folder) for folder in ("neon", "edm", "VAR", "xAR", "imm"))
aten = torch.ops.aten


class Pretended(FakeTensorMode):
    """A device that is not there: tensors on it are fake, those on the CPU real, and waits for it are counted."""

    avoid_device_init = True  # also where there is a GPU

    def __init__(self, device: str = "cuda") -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.waits: list[str] = []
        """what was asked of the device, and by which function, in order"""
        self.marks = 0
        """how often something was sent to the host without a wait"""
        self._list: FrameType | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(self._is_there(leaf) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait("reads")
            return torch.ones((), dtype=args[0].dtype).item()
        if func in (aten._to_copy.default, aten.copy_.default):
            moved, to = (args[0], kwargs.get("device")) if func is aten._to_copy.default else (args[1], args[0].device)
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if to is not None and to.type == "cpu" and moved.device.type != "cpu":
                if waits:
                    self._wait("fetches a tensor")
                return torch.zeros(moved.shape, dtype=kwargs.get("dtype") or moved.dtype)
            if waits and to is not None and to.type != "cpu" and moved.device.type == "cpu":
                self._wait("sends a tensor")
        if func is aten.index_put_.default and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self._wait("counts a mask")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _is_there(self, leaf: Any) -> bool:
        return isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == self.device.type)

    def _wait(self, what: str) -> None:
        frame, made_list = sys._getframe(2), None
        while frame.f_back is not None and not frame.f_code.co_filename.startswith(CODE):
            made_list = frame if frame.f_code.co_name == "tolist" else made_list
            frame = frame.f_back
        while frame.f_back is not None and frame.f_code.co_name.startswith("<"):  # within a generator, say
            frame = frame.f_back
        if made_list is None or made_list is not self._list:  # fake tensors read a list value by value
            self.waits.append(f"{frame.f_globals['__name__']}.{frame.f_code.co_name} {what}")
        self._list = made_list

    def put(self, module: nn.Module) -> nn.Module:
        """Move a module there, in place, as `Module.to` does."""
        return module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


class PretendedEvent:
    """A mark among what the device is to do, which a thread may wait for beside the one that asks for work."""

    def __init__(self, gpu: Pretended) -> None:
        self.gpu = gpu

    def record(self, stream: object) -> None:
        self.gpu.marks += 1

    def synchronize(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.gpu.waits.append("an event is waited for")


class EmptyNoise:
    """Draws on a device, without values."""

    def __init__(self, batch: int, device: torch.device | str) -> None:
        self.batch, self.device = batch, device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.batch, *shape, dtype=dtype, device=self.device)

    uniform = exponential = normal

    def integers(self, high: int, *shape: int) -> Tensor:
        return self.normal(*shape, dtype=torch.int64)

    def restarted(self) -> "EmptyNoise":
        return self


@contextlib.contextmanager
def pretended(device: str = "cuda") -> Iterator[Pretended]:
    """A pretended device, on which noise has no values and torch's global generator needs no care."""
    gpu = Pretended(device)

    def empty(seeds: Sequence[int], device: torch.device | str = "cpu") -> Noise:
        return ImageNoise(seeds) if device == "cpu" else EmptyNoise(len(seeds), device)  # type: ignore[return-value]

    with (
        mock.patch("neon.sampling.ImageNoise", empty),
        mock.patch("neon.selftrain.visits.ImageNoise", empty),
        mock.patch("torch.random.fork_rng", lambda *_: contextlib.nullcontext()),
        mock.patch("torch.cuda.current_stream", lambda *_: None),
        mock.patch("torch.cuda.Event", lambda: PretendedEvent(gpu)),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("neon.selftrain.run.room_of", lambda *_: 1 << 60),
        gpu,
    ):
        yield gpu


NCSNPP: dict[str, Any] = {
    "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1],
}  # fmt: skip


def edm_of(precond: str, **network: object) -> EDM:
    """An EDM network of another preconditioning than EDM's own."""
    keywords = {**CONFIG["network"], **network}
    return EDM({"precond": precond, "network": keywords}).eval().requires_grad_(False)


def two_networks() -> EDM:
    return tiny_edm().combine(tiny_edm(seed=1).network, 0.5)


def augmented_edm() -> EDM:
    return EDM(tiny_edm(augment_dim=AUGMENT_DIM).config, augment=0.5).eval().requires_grad_(False)


def pixel_xar() -> XARModel:
    transformer = {"classes": 3, "width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "grid": 4}
    return XARModel({"transformer": {**transformer, "latent_channels": 12}, "pixel_patch": 2})


def unmirrored_xar() -> XARModel:
    whole = tiny_xar()
    model = XARModel(whole.config, mirrors=False).eval().requires_grad_(False)
    model.set_vae(tiny_vae())
    return model


def latent_imm(precision: Precision = FP32, **network: object) -> IMM:
    model = tiny_imm(precision=precision, **network)
    model.set_codec(tiny_sd_vae())
    return model


def pixel_imm(precision: Precision = FP32, **loss: object) -> IMM:
    return tiny_imm(
        precision=precision, loss=loss, img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=8,
        channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4],
    )  # fmt: skip


Case = tuple[Callable[[], GenerativeModel], Any]

SAMPLED: dict[str, Case] = {
    "EDM": (tiny_edm, EDMSettings(num_steps=3, S_churn=1)),
    "EDM, guided, Euler": (tiny_edm, EDMSettings(num_steps=3, solver="euler", guidance=0.5)),
    "EDM, two networks": (two_networks, EDMSettings(num_steps=3, S_churn=1)),
    "VAR, two networks": (lambda: tiny_var().combine(tiny_var(seed=1).network, 0.5), VARSettings(top_k=9)),
    "xAR, two networks": (lambda: tiny_xar().combine(tiny_xar(seed=1).network, 0.5), XARSettings(num_steps=3)),
    "IMM, two networks": (lambda: latent_imm().combine(tiny_imm(seed=1).network, 0.5), IMMSettings(num_steps=2)),
    "EDM, float16": (lambda: tiny_edm(use_fp16=True), EDMSettings(num_steps=3)),
    "EDM, ADM": (lambda: tiny_edm(model_type="DhariwalUNet"), EDMSettings(num_steps=3)),
    "EDM, VP": (lambda: edm_of("VPPrecond"), AblationSettings(num_steps=3, schedule="vp", scaling="vp")),
    "EDM, NCSN++": (lambda: tiny_edm(**NCSNPP), EDMSettings(num_steps=3, S_churn=1)),
    "EDM, VE": (lambda: edm_of("VEPrecond"), AblationSettings(num_steps=3, discretization="ve", schedule="ve")),
    "EDM, iDDPM": (lambda: edm_of("iDDPMPrecond"), AblationSettings(num_steps=3, S_churn=1, discretization="iddpm")),
    "VAR": (tiny_var, VARSettings(top_k=9)),
    "VAR, smooth, not guided": (tiny_var, VARSettings(top_k=9, smooth=True, guidance=0)),
    "VAR, one modulation": (lambda: tiny_var(shared_adaln=True, l2_norm_attention=False), VARSettings(top_k=0)),
    "xAR": (tiny_xar, XARSettings(num_steps=3)),
    "xAR, the flow itself, not guided": (tiny_xar, XARSettings(num_steps=3, stochastic=False, guidance=1)),
    "xAR, pixels": (pixel_xar, XARSettings(num_steps=3)),
    "IMM": (latent_imm, IMMSettings(num_steps=2)),
    "IMM, restart": (latent_imm, IMMSettings(num_steps=2, restart=True, discretization="edm")),
    "IMM, ratios, not guided": (latent_imm, IMMSettings(num_steps=2, mid_nt=(0.7,), guidance=1)),
    "IMM, U-Net": (pixel_imm, IMMSettings(num_steps=2)),
}

ROUNDING = "edm.precond.round_sigma fetches a tensor"
"""the table of iDDPM, of which the noise levels of a run are made; twice a batch, before the network is called"""


@pytest.mark.parametrize("name", SAMPLED)
def test_a_batch_is_sampled_on_the_gpu_without_waiting_for_it(name: str) -> None:
    make, settings = SAMPLED[name]
    model = make()
    with pretended() as gpu:
        gpu.put(model)
        if model.second:
            gpu.put(model.second[0])
        for label in (None, 1, torch.tensor([2, 0, 1])) if name in ("EDM", "VAR", "xAR", "IMM") else (None,):
            images, _ = sample_block(model, range(3), range(3), settings, Processes(device=gpu.device), label)
            assert images.device == gpu.device and images.dtype == torch.uint8
    assert gpu.waits == ([ROUNDING] * 2 if name == "EDM, iDDPM" else [])


def test_a_set_of_images_is_written_while_the_next_batch_is_sampled(tmp_path: Path) -> None:
    model = tiny_edm()
    with pretended() as gpu:
        gpu.put(model)
        settings, group = EDMSettings(num_steps=2), Processes(device=gpu.device)
        write_samples(model, range(7), settings, tmp_path, batch_size=3, processes=group)
    # The classes of a batch are told when all images are there.
    assert gpu.waits == ["neon.sampling.labels_of reads"] * 3
    assert gpu.marks == 3 and len(ImageDataset(tmp_path)) == 7


def test_labels_are_looked_at_while_they_are_on_the_host(tmp_path: Path) -> None:
    wrong = torch.tensor([0, 3])
    model, images = tiny_edm(), ArrayDataset(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), wrong, "images")
    with pytest.raises(RequestError, match="labels run from 0 to 3; the model knows classes 0 to 2"):
        check_label(model, wrong)
    with pytest.raises(RequestError, match="images: labels run from 0 to 3"):
        check_trainable(model, images, batch_size=2, micro_batch=2)
    with pretended() as gpu:
        with pytest.raises(RequestError, match="labels run from 0 to 3"):
            one_hot(wrong, 3, gpu.device)
        assert one_hot(gpu.empty(2, dtype=torch.int64), 3, gpu.device).shape == (2, 3)
    assert gpu.waits == []


def test_tokens_are_sampled_on_the_gpu_without_waiting_for_it() -> None:
    model = tiny_var()
    with pretended() as gpu:
        gpu.put(model)
        noise = EmptyNoise(3, gpu.device)
        tokens = model.sample_tokens(noise, model.labels(range(3), noise), VARSettings(top_k=9))
        assert tokens.device == gpu.device
    assert gpu.waits == []


class Encoded(ArrayDataset):
    """Examples that are encoded already."""

    encoded = True

    def __init__(self, examples: Tensor) -> None:
        self.images, self.labels, self.path = examples, torch.arange(len(examples)) % 3, Path("encoded")


def large_images() -> ArrayDataset:
    return ArrayDataset(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8) % 3, "large")


TRAINED: dict[str, tuple[Callable[[], GenerativeModel], Callable[[], ArrayDataset]]] = {
    "EDM": (tiny_edm, tiny_images),
    "EDM, float16": (lambda: tiny_edm(use_fp16=True), tiny_images),
    "EDM, ADM": (lambda: tiny_edm(model_type="DhariwalUNet", label_dropout=0.5), tiny_images),
    "EDM, NCSN++": (lambda: tiny_edm(**NCSNPP), tiny_images),
    "EDM, VP": (lambda: edm_of("VPPrecond"), tiny_images),
    "EDM, VE": (lambda: edm_of("VEPrecond"), tiny_images),
    "EDM, iDDPM": (lambda: edm_of("iDDPMPrecond"), tiny_images),
    "EDM, augmented": (augmented_edm, tiny_images),
    "VAR, images": (tiny_var, tiny_colour_images),
    "VAR, tokens": (tiny_var, lambda: Encoded(torch.zeros(8, 21, dtype=torch.uint16))),
    "xAR, images": (tiny_xar, tiny_colour_images),
    "xAR, moments": (tiny_xar, lambda: Encoded(torch.zeros(8, 2, 8, 4, 4))),
    "xAR, never mirrored": (unmirrored_xar, lambda: Encoded(torch.zeros(8, 2, 8, 4, 4))),
    "xAR, pixels": (pixel_xar, tiny_colour_images),
    "IMM, images": (latent_imm, large_images),
    "IMM, moments": (latent_imm, lambda: Encoded(torch.zeros(8, 8, 2, 2))),
    "IMM, U-Net, lognormal": (lambda: pixel_imm(sample_t_mode="lognormal", min_tr_gap=None), tiny_images),
}

WAITS = {
    "EDM, augmented": ["neon.data.augment.warp reads"],  # how wide the margin is: a shape
}
"""what the host must know of a micro-batch"""


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_loss_is_computed_on_the_gpu_without_waiting_for_it(name: str) -> None:
    make, images = TRAINED[name]
    model, dataset = make(), images()
    model.network.train().requires_grad_(True)
    with pretended() as gpu:
        gpu.put(model)
        loss = model.training_loss(*visit(model, dataset, range(4), range(4), gpu.device))
        assert loss.device == gpu.device and loss.requires_grad
    assert gpu.waits == WAITS.get(name, [])


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_reach_every_weight_on_its_device(name: str) -> None:
    make, images = TRAINED[name]
    model, dataset = make(), images()
    model.network.train().requires_grad_(True)
    # There is no autocast on this device; none is asked for here.
    with mock.patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()), pretended("meta") as gpu:
        gpu.put(model)
        loss = model.training_loss(*visit(model, dataset, range(4), range(4), gpu.device))
        gpu.waits.clear()
        loss.mean().backward()
        reached = [p for p in model.network.parameters() if p.grad is not None]
        assert len(reached) > 0.9 * len([*model.network.parameters()])
        assert all(p.grad is not None and p.grad.device == p.device == gpu.device for p in reached)
    assert gpu.waits == []


@pytest.mark.parametrize("name", ["VAR", "xAR", "IMM", "IMM, restart", "IMM, U-Net"])
def test_half_precision_mixes_no_dtypes_on_a_gpu(name: str) -> None:
    make, settings = SAMPLED[name]
    model = make(precision=FP16)
    images = {(1, 8, 8): tiny_images, (3, 8, 8): tiny_colour_images, (3, 16, 16): large_images}[model.image_shape]()
    with pretended() as gpu:
        gpu.put(model)
        assert sample_block(model, range(3), range(3), settings, Processes(device=gpu.device))[0].dtype == torch.uint8
        model.network.train().requires_grad_(True)
        loss = model.training_loss(*visit(model, images, range(4), range(4), gpu.device))
        assert loss.dtype in (torch.float32, torch.float64)


RECIPES: dict[str, Recipe] = {
    "Adam": Recipe(batch_size=4, ema_halflife_kimg=1, ema_rampup_ratio=0.05),
    "VAR": VARRecipe(batch_size=4),
    "xAR": XARRecipe(batch_size=4),
    "IMM": IMMRecipe(batch_size=4),
}
READ = "neon.selftrain.run.one_step reads"


def training_run(folder: Path, device: torch.device, recipe: Recipe, model: GenerativeModel) -> TrainingRun:
    return TrainingRun(model, tiny_images(), folder, recipe, 0, Processes(device=device), recipe.batch_size)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_an_optimiser_step_waits_for_its_loss_only(tmp_path: Path, name: str, scaled: bool) -> None:
    recipe = replace(RECIPES[name], scale_losses=scaled)

    def gradients(run: TrainingRun, *_: object) -> Tensor:
        for parameter in run.parameters:
            parameter.grad = torch.empty_like(parameter)
        return torch.empty(2, device=run.processes.device)

    model = tiny_edm()
    with pretended() as gpu, mock.patch.object(TrainingRun, "_gradients", gradients):
        gpu.put(model)
        run = training_run(tmp_path, gpu.device, recipe, model)
        run.one_step()
        gpu.waits.clear()
        run.one_step()
    # With scaled losses torch's scaler looks for an overflow, right after the loss was waited for.
    assert gpu.waits == [READ] * (2 if scaled else 1)


def test_a_whole_step_of_training_waits_once(tmp_path: Path) -> None:
    model = tiny_edm()
    with pretended("meta") as gpu:
        gpu.put(model)
        run = training_run(tmp_path, gpu.device, Recipe(batch_size=4, ema_halflife_kimg=1), model)
        run.micro_batch = 2
        run.one_step()
        gpu.waits.clear()
        run.one_step()
    assert gpu.waits == [READ]


def test_a_run_that_continues_counts_its_steps_on_the_host(tmp_path: Path) -> None:
    # On the GPU every count would be read in every step: one wait for each tensor of weights.
    recipe = Recipe(batch_size=4, ema_halflife_kimg=1)
    run = training_run(tmp_path, torch.device("cpu"), recipe, tiny_edm())
    run.log(*run.one_step())
    run.save_state()
    model = tiny_edm()

    def load(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return torch_load(*args, **kwargs)

    torch_load = torch.load
    with pretended() as gpu, mock.patch("torch.load", load):
        gpu.put(model)
        run = training_run(tmp_path, gpu.device, recipe, model)
        run.resume()
        states = run.optimizer.state.values()
        assert len(states) == len(run.parameters)
        assert {state["step"].device.type for state in states} == {"cpu"}
        assert {state[key].device for state in states for key in ("exp_avg", "exp_avg_sq")} == {gpu.device}
        assert {average.device for average in run.average} == {gpu.device}


def test_features_of_images_are_gathered_without_waiting_for_the_gpu() -> None:
    model, extractor = tiny_edm(), SmallFeatures("tiny", (1, 8, 8), dim=4, num_classes=3)
    with pretended() as gpu, torch.no_grad():
        gpu.put(model)
        gpu.put(extractor)
        group = Processes(device=gpu.device)
        images = sampled_images(model, range(7), EDMSettings(num_steps=2), group)
        moments = Moments(extractor.dim, gpu.device)
        for (features,) in features_in_order(images, 7, [extractor], batch_size=3, processes=group, title="images"):
            moments.update(features)
    assert gpu.waits == []


class Two(Processes):
    """The first of two processes of which the other does the same."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor, tensor]


def test_of_several_processes_each_gives_its_gpu_a_batch_before_it_waits_for_the_last() -> None:
    with pretended() as gpu, torch.no_grad():

        def compute(block: range) -> Tensor:
            gpu.waits.append(f"asked for {block.start}")
            return gpu.empty(len(block), 4)

        group = Two(world_size=2, device=gpu.device)
        rows = [*rows_in_order(compute, 11, 4, batch_size=2, processes=group, title="images")]
    assert [len(part) for part in rows] == [2, 2, 2, 2, 2, 1]
    waits = "an event is waited for"
    assert gpu.waits == ["asked for 0", "asked for 4", waits, "asked for 8", waits, waits]


def test_an_inception_score_is_summed_without_waiting_for_the_gpu() -> None:
    with pretended() as gpu:
        score = InceptionScore(20, 2, device=gpu.device)
        gpu.waits.clear()
        score.update(gpu.empty(20, NUM_CLASSES))
    assert gpu.waits == []


def test_manifolds_are_compared_on_the_gpu_with_a_wait_for_each_share() -> None:
    with pretended() as gpu:
        manifold = Manifold(gpu.empty(200, 4), k=3)
        gpu.waits.clear()
        manifold.compare(gpu.empty(150, 4))
    reads = ["_checked", "_error", "_error", "_error", "_radii", "_radii", "_nearer", "_nearer", *["compare"] * 4]
    assert gpu.waits == [f"neon.metrics.manifold.{name} reads" for name in reads]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_merge_in_a_live_network_does_not_wait_for_the_gpu() -> None:
    network, base, trained = tiny_edm().network, tiny_edm().network.state_dict(), tiny_edm(seed=1).network.state_dict()
    with pretended() as gpu:
        gpu.put(network)
        live = LiveMerge(network, base, trained)
        gpu.waits.clear()
        for w in (0.0, 0.5, -1.0):
            live.set(w)
    assert gpu.waits == []


def test_the_pretended_device_tells_what_a_real_one_would() -> None:
    with pretended() as gpu:
        there, here = gpu.empty(3), torch.ones(3)
        assert (there + 1).is_cuda and (here + 1).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="two different devices"):
            there + here
        assert there.cpu().tolist() == [0, 0, 0]
        assert float(there[0]) == 1
        assert torch.stack([there, there]).tolist() == [[1, 1, 1], [1, 1, 1]]
        there[there > 0] = 0
        here.to(gpu.device)
        here.to(gpu.device, non_blocking=True)
        torch.tensor([1.0], device=gpu.device)
    assert [wait.split(" ", 1)[1] for wait in gpu.waits] == [
        "fetches a tensor",
        "reads",
        "reads",
        "counts a mask",
        "sends a tensor",
        "sends a tensor",
    ]
