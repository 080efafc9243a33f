"""What the golden tests of every architecture share: files, device, comparison, and training through the own loop.

Cases were recorded on a CPU and run there, or on another device, float32 without TF32:
`NEON_GOLDEN_DEVICE=cuda pytest tests/test_golden_*.py`. With `--junitxml FILE -o junit_family=xunit1` the file says how
much of the tolerances each case used.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from neon.checkpoint import load_state
from neon.data.encoded import ExampleSet, write_index, write_shard
from neon.data.images import TrainingImages
from neon.model import GenerativeModel
from neon.noise import Noise
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.selftrain import LOG_FILE, train
from tests.replay import RecordedNoise

GOLDEN_DIR = Path(os.environ.get("NEON_GOLDEN_DIR", Path(__file__).parent / "golden"))

DEVICE = torch.empty(0, device=os.environ.get("NEON_GOLDEN_DEVICE", "cpu")).device
"""where networks and inputs of the cases are; with its number"""

DEVICE_TOLERANCE = 10
"""Factor on tolerances of floats off the CPU: sums are in another order there, and float32 convolutions round more.
With every operation rounded correctly, cases use up to 0.9 of the tolerances for the CPU (xAR's `time`: 3).
Integers, tokens among them, stay exact: no recorded choice is nearer to a tie than 5e-5, rounding being about 1e-6."""

GPU_SAMPLE: dict[str, tuple[str, ...]] = {
    "edm": (
        "ncsnpp_cond_filled_filters", "adm_cond", "sampler_fp32_two_networks", "loss_edm_cond_augment",
        "train_loop_cond", "fid", "neon_merge",
    ),
    "VAR": (
        "forward_plain", "forward_shared_adaln", "tokenizer_small", "filter", "sample_topk_topp_cfg",
        "finetune_steps_clipped", "merge",
    ),
    "xAR": ("net_train", "full_base", "loss_drop_edge", "vae_small", "sample", "optim"),
    "imm": ("dit_a", "songunet_labels", "sampler_dit", "loss_dit", "encoder", "finetune_dit", "neon_merge"),
}  # fmt: skip
"""By architecture, the cases that tell most about a GPU in little time."""
TINY_SAMPLE: dict[str, tuple[str, ...]] = {
    "edm": ("adm_cond", "loss_edm_cond_augment"),
    "VAR": ("forward_plain", "finetune_steps_clipped"),
    "xAR": ("net_train", "vae_small"),
    "imm": ("dit_a", "loss_dit"),
}
"""Those to try a run with."""


def load_golden(folder: Path) -> dict[str, Any]:
    """What golden.json says, its cases among it."""
    return json.loads((folder / "golden.json").read_text())


def load_arrays(path: Path, *prefixes: str) -> Iterator[dict[str, np.ndarray]]:
    """For each of `prefixes`, the arrays of a case that begin with it, by the rest of their names."""
    with np.load(path) as arrays:
        for prefix in prefixes:
            yield {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def as_array(got: Tensor | ArrayLike) -> np.ndarray:
    """What was computed, from whatever device."""
    return np.asarray(got.detach().cpu() if isinstance(got, Tensor) else got)


SUBSET = "_sub"
"""ends the name of an array of which every n-th entry is stored; n is in the `stride` of the case"""


def subset(got: np.ndarray, shape: tuple[int, ...], step: int) -> np.ndarray:
    """Every `step`-th entry of `got` along each axis that is longer in it than in `shape`; of all, if that is flat."""
    if len(shape) == 1:
        got = got.ravel()
    steps = [1 if have == want else step for have, want in zip(got.shape, shape, strict=True)]
    return got[tuple(slice(None, None, step) for step in steps)]


def number_in(text: object, pattern: str, otherwise: float) -> float:
    """The number that `pattern` finds in a text; `otherwise`, that of the recorded cases, where it tells none."""
    found = re.search(pattern, str(text))
    return float(found[1]) if found else otherwise


class GoldenCase:
    """One case: its description, its arrays, and the comparison with them."""

    def __init__(
        self, case: dict[str, Any], inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray] | None = None
    ) -> None:
        """`outputs` where they are told apart from the inputs."""
        self.case, self.inputs, self.outputs = case, inputs, inputs if outputs is None else outputs
        self.tolerance_used = 0.0
        """the largest difference, as a share of what is tolerated on the CPU"""

    def tensor(self, name: str) -> Tensor:
        """An input, on the device of the run."""
        return torch.from_numpy(self.inputs[name]).to(DEVICE)

    def optional(self, name: str) -> Tensor | None:
        """An input, or None where the case has none: one without entries, as labels of no class are, counts as none."""
        return self.tensor(name) if name in self.inputs and self.inputs[name].size else None

    def words(self) -> str:
        """What the case says in words of itself and its weights."""
        return "\n".join(str(self.case[name]) for name in ("what", "how", "notes", "weights") if name in self.case)

    def expected(self, got: Tensor | ArrayLike, name: str) -> tuple[np.ndarray, str]:
        """What of `got` is stored as output `name`, all or every n-th entry, and the name of that array."""
        array = name if name in self.outputs else name + SUBSET
        if not array.endswith(SUBSET):
            return as_array(got), array
        steps = self.case["stride"]
        if isinstance(steps, dict):  # by the name in the file
            [steps] = [steps[name] for name in (array, f"out:{array}", f"out_{array}") if name in steps]
        return subset(as_array(got), self.outputs[array].shape, steps), array

    def recorded_names(self) -> set[str]:
        """The outputs, by the names of the whole arrays."""
        return {name.removesuffix(SUBSET) for name in self.outputs}

    def compare(self, got: Tensor | ArrayLike, want: ArrayLike, *, rtol: float = 0, atol: float = 0, name: str) -> None:
        """|got - want| <= atol + rtol |want|, elementwise; floats off the CPU `DEVICE_TOLERANCE` times as far."""
        got, want = as_array(got), np.asarray(want)
        if got.shape == want.shape:
            with np.errstate(divide="ignore", invalid="ignore"):  # tolerances of 0, infinite values
                difference, tolerance = np.abs(got.astype(np.float64) - want), atol + rtol * np.abs(want)
                shares = np.divide(difference, tolerance, where=difference > 0, out=np.zeros(got.shape))
            self.tolerance_used = max(self.tolerance_used, shares.max(initial=0))
        factor = DEVICE_TOLERANCE if DEVICE.type != "cpu" and want.dtype.kind == "f" else 1
        np.testing.assert_allclose(got, want, rtol=factor * rtol, atol=factor * atol, err_msg=name)


Case = TypeVar("Case", bound=GoldenCase)


def run_case(
    golden: Case,
    handlers: Mapping[str, Callable[[Case], None]],
    record_property: Callable[[str, object], None],
    cpu_only: Collection[str] = (),
) -> None:
    """Compare a case by the handler of its kind; those of kinds that are `cpu_only` on the CPU alone."""
    kind = golden.case["kind"]
    assert kind in handlers, f"no handler for cases of kind {kind!r}"
    if DEVICE.type != "cpu" and kind in cpu_only:
        pytest.skip(f"{kind}: computed on the CPU, whatever the device")
    if DEVICE.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        handlers[kind](golden)
    finally:
        record_property("tolerance_used", float(f"{golden.tolerance_used:.3g}"))


def copied_parameters(network: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, on the CPU, where those of a snapshot are."""
    return {name: parameter.detach().cpu().clone() for name, parameter in network.named_parameters()}


class Replayed(GenerativeModel):
    """The network of a case, which is only trained: on examples and labels, with the recorded draws of each batch."""

    architecture = "replayed"

    def __init__(
        self,
        network: torch.nn.Module,
        image_shape: tuple[int, int, int],
        num_classes: int,
        loss: Callable[[Tensor, Any, RecordedNoise], Tensor],
        draws: Iterable[RecordedNoise],
    ) -> None:
        super().__init__()
        self.config = {}
        self.network, self.image_shape, self.num_classes = network, image_shape, num_classes
        self.loss, self.draws = loss, iter(draws)

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        return self.loss(examples, labels, next(self.draws))

    def labels(self, indices: Sequence[int], noise: Noise) -> Tensor | None:
        raise NotImplementedError

    def sample(self, noise: Noise, labels: Tensor | None, settings: Any) -> Tensor:
        raise NotImplementedError

    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Trained:
    """What a run of the project's own loop logged and came to."""

    log: list[dict[str, Any]]
    """of each step"""
    grad_norms: np.ndarray
    """of all gradients of a step together, before the recipe repairs them"""
    weights: dict[str, Tensor]
    """of the last snapshot: averages where the recipe averages"""


def train_in_order(
    model: GenerativeModel,
    dataset: TrainingImages,
    recipe: Recipe,
    order: Iterable[int],
    *,
    seed: int = 0,
    micro_batch: int | None = None,
) -> Trained:
    """Train on the images of a set in a recorded order, once."""
    indices, norms = list(order), []
    repair = type(recipe).repair_gradients

    def repair_watched(self: Recipe, parameters: Iterable[torch.nn.Parameter]) -> None:
        parameters = list(parameters)
        gradients = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        norms.append(torch.cat(gradients).double().norm().item())
        repair(self, parameters)

    with (
        TemporaryDirectory() as folder,
        mock.patch.multiple(type(recipe), visits=lambda *_: iter(indices), repair_gradients=repair_watched),
    ):
        snapshots = train(
            model, dataset, folder, num_steps=len(indices) // recipe.batch_size, snapshot_steps=[], recipe=recipe,
            seed=seed, processes=Processes(device=DEVICE), micro_batch=micro_batch,
        )  # fmt: skip
        log = [json.loads(line) for line in Path(folder, LOG_FILE).read_text().splitlines()]
        return Trained(log, np.array(norms), load_state(snapshots[-1].path))


def train_on(model: GenerativeModel, recipe: Recipe, kind: str, examples: Tensor, labels: Tensor | None) -> Trained:
    """Train on recorded examples of a kind as they come, kept as a set of the project's own."""
    with TemporaryDirectory() as folder:
        write_shard(folder, 0, examples, labels)
        write_index(folder, [range(len(examples))], model.image_shape, kind)
        return train_in_order(model, ExampleSet(folder, kind), recipe, range(len(examples)))
