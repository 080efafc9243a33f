"""EDM reproduces the reference numbers: every case of golden.json, by its kind."""

import math
import re
from collections.abc import Callable
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from edm.loss import EDMLoss, VELoss, VPLoss
from edm.model import EDM
from edm.precond import PRECONDS, Precond
from edm.sampler import integrate, noise_levels
from edm.settings import AblationSettings, EDMSettings, SamplerSettings
from neon.data.augment import AugmentPipe
from neon.data.images import ArrayDataset, subset_indices, to_uint8, visit_order
from neon.merge import merge_tensor
from neon.metrics import FrechetReference, Manifold, Moments, Statistics
from neon.model import extrapolated
from neon.nn.unet import Conv2d, UNetBlock
from neon.noise import ImageNoise
from neon.recipe import Recipe
from tests.golden.recipe import fill_module
from tests.goldens import (
    DEVICE,
    GOLDEN_DIR,
    GoldenCase,
    copied_parameters,
    load_arrays,
    load_golden,
    number_in,
    run_case,
    train_in_order,
)
from tests.replay import RecordedNoise

FOLDER = GOLDEN_DIR / "edm"
CASES: dict[str, dict] = load_golden(FOLDER)["cases"]
SCALE_OF_SECOND = 0.97
"""of two networks: what the parameters of the other one are multiplied by, unless a case says otherwise"""
LOSSES = {loss.__name__: loss for loss in (EDMLoss, VPLoss, VELoss)}


class Golden(GoldenCase):
    def __init__(self, name: str) -> None:
        [self.arrays] = load_arrays(FOLDER / CASES[name]["file"], "")
        super().__init__(CASES[name], self.arrays)

    def matches(self, got: Tensor | np.ndarray | float, name: str) -> None:
        got, array = self.expected(got, name)
        self.compare(got, self.arrays[array], rtol=self.case["rtol"], atol=self.case["atol"], name=array)

    def network(self) -> Precond:
        network = PRECONDS[self.case["precond"]](**self.case["config"]).to(DEVICE).eval().requires_grad_(False)
        keeps_tables = "every floating entry" not in self.words()
        keep = tuple(n for n in network.state_dict() if keeps_tables and (n == "u" or n.endswith("resample_filter")))
        return fill_module(network, keep)


def fill_lone(module: torch.nn.Module) -> torch.nn.Module:
    module.to(DEVICE).eval().requires_grad_(False)
    return fill_module(module, keep=tuple(n for n in module.state_dict() if "filter" in n))


def network_forward(golden: Golden) -> None:
    network, labels = golden.network(), golden.optional("class_labels")
    if "param_count" in golden.case:
        assert sum(p.numel() for p in network.parameters()) == golden.case["param_count"]
    seen: list[tuple[float, float]] = []
    entries = [network.model.get_submodule(name) for name in golden.case["blocks"]]
    hooks = [
        entry.register_forward_hook(lambda _m, _i, out: seen.append((float(out.double().mean()), float(out.std()))))
        for entry in entries
    ]
    golden.matches(network(golden.tensor("x"), golden.tensor("sigma"), labels), "denoised")
    for hook in hooks:
        hook.remove()
    golden.matches(np.array(seen), "block_mean_std")
    x, sigma = golden.tensor("x"), golden.tensor("sigma")
    calls: dict[str, Callable[[], Tensor]] = {
        "denoised_label_none": lambda: network(x, sigma, None),
        "denoised_augment": lambda: network(x, sigma, labels, augment_labels=golden.tensor("augment_labels")),
        "raw_F": lambda: network.model(golden.tensor("raw_x"), golden.tensor("raw_noise_labels"), labels),
        "raw_map_noise": lambda: network.model.map_noise(golden.tensor("raw_noise_labels")),
        "sigma_limits_inf": lambda: torch.tensor([network.sigma_min, network.sigma_max]),
        "sigma_out": lambda: network.sigma(golden.tensor("sigma_in")),
        "sigma_inv_out": lambda: network.sigma_inv(golden.tensor("sigma_inv_in")),
        "u": lambda: network.u,
        "round_out": lambda: network.round_sigma(golden.tensor("round_in")),
        "round_index": lambda: network.round_sigma(golden.tensor("round_in"), return_index=True),
    }
    inputs = {"x", "sigma", "class_labels", "augment_labels", "raw_x", "raw_noise_labels", "denoised", "block_mean_std"}
    inputs |= {"sigma_in", "sigma_inv_in", "round_in"}
    for name in golden.recorded_names() - inputs:
        golden.matches(calls[name](), name)


def resampling_convolution(golden: Golden) -> None:
    x = golden.tensor("x")
    for name, config in golden.case["config"].items():
        out_channels = golden.arrays[name].shape[1]
        golden.matches(fill_lone(Conv2d(x.shape[1], out_channels, **config))(x), name)


def one_unet_block(golden: Golden) -> None:
    for tag, config in golden.case["config"].items():
        keywords = {k: v for k, v in config.items() if k not in ("keys", "num_heads_effective")}
        block = fill_lone(UNetBlock(**keywords))
        assert list(block.state_dict()) == config["keys"]
        assert block.num_heads == config["num_heads_effective"]
        emb = golden.tensor(f"{tag}_emb")
        golden.matches(block(golden.tensor(f"{tag}_x"), emb), f"{tag}_out")
        golden.matches(block(golden.tensor(f"{tag}_small_x"), emb), f"{tag}_small_out")


def sampler(golden: Golden) -> None:
    network, labels = golden.network(), golden.optional("class_labels")
    keywords = golden.case["sampler"]
    settings: SamplerSettings = (AblationSettings if "discretization" in keywords else EDMSettings)(**keywords)
    draws = iter(golden.tensor("noise") if "noise" in golden.arrays else ())
    levels: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(float(sigma))
        return network(x, sigma, labels)

    out = integrate(
        denoise,
        golden.tensor("latents"),
        settings,
        sigma_limits=(network.sigma_min, network.sigma_max),
        round_sigma=network.round_sigma,
        draw_noise=lambda: next(draws),
    )
    golden.matches(out, "out")
    golden.matches(np.array(levels), "net_sigmas")
    golden.compare(to_uint8(out).int(), golden.arrays["uint8"].astype(int), atol=1, name="uint8")
    assert len(levels) == golden.case["nfe"]


def two_networks(golden: Golden) -> None:
    network, second, labels = golden.network(), golden.network(), golden.optional("class_labels")
    scale = number_in(golden.words(), r"all parameters .* times (\d+\.\d+)", SCALE_OF_SECOND)
    for parameter in second.parameters():
        parameter.mul_(scale)
    settings = EDMSettings(**golden.case["sampler"])
    for name in golden.recorded_names() - {"latents", "class_labels"}:
        parsed = re.fullmatch(r"out_g(m?)(\d+)(?:p(\d+))?", name)
        assert parsed is not None
        sign, whole, fraction = parsed.groups(default="0")
        guidance = float(f"{'-' if sign else ''}{whole}.{fraction}")
        denoise = extrapolated(lambda x, s: network(x, s, labels), lambda x, s: second(x, s, labels), guidance)
        out = integrate(denoise, golden.tensor("latents"), settings, dtype=torch.float32, draw_at_rest=False)
        golden.matches(out, name)


def levels(golden: Golden) -> None:
    config = golden.case["config"]
    for name in golden.arrays:
        num_steps = int(name.rpartition("_")[2])
        if name.startswith("t_steps"):
            golden.matches(noise_levels(num_steps, **config), name)
        else:
            seen: list[float] = []

            def record(x: Tensor, sigma: Tensor, seen: list[float] = seen) -> Tensor:
                seen.append(float(sigma))
                return x

            integrate(record, torch.zeros(1, 1, 1, 1), EDMSettings(num_steps=num_steps, **config))
            golden.matches(np.array(seen), name)


def random_streams(golden: Golden) -> None:
    noise = ImageNoise(golden.arrays["seeds"].tolist())
    shape, num_classes = golden.case["config"]["shape"], golden.case["config"]["num_classes"]
    golden.matches(noise.normal(*shape), "latents")
    golden.matches(noise.integers(num_classes), "labels")
    golden.matches(noise.normal(*shape, dtype=torch.float64), "step_noise64")


def post_processing(golden: Golden) -> None:
    golden.matches(to_uint8(golden.tensor("x")), "out")


def training_order(golden: Golden) -> None:
    for name, order in golden.arrays.items():
        n, rank, world, seed = map(int, re.findall(r"\d+", name))
        assert list(islice(visit_order(n, seed), rank, world * len(order), world)) == order.tolist()


def published_batches(num_seeds: int, max_batch: int, world_size: int, rank: int) -> list[range]:
    """Positions in the seed list of each batch that EDM's published sampling script gives process `rank`.

    As many parts as every process needs rounds, of near-equal size and possibly empty, dealt out in turn.
    """
    parts = -(-num_seeds // (max_batch * world_size)) * world_size
    size, longer = divmod(num_seeds, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return [range(starts[part], starts[part + 1]) for part in range(rank, parts, world_size)]


def seed_batches(golden: Golden) -> None:
    for tag in {name.rpartition("_")[0] for name in golden.arrays}:
        batches = published_batches(*map(int, re.findall(r"\d+", tag)))
        golden.matches(np.array([len(batch) for batch in batches]), f"{tag}_sizes")
        golden.matches(np.array([batch.start if batch else -1 for batch in batches]), f"{tag}_first")


def subset(golden: Golden) -> None:
    for name in golden.arrays:
        golden.matches(np.array(subset_indices(*map(int, re.findall(r"\d+", name)))), name)


def augmentation(golden: Golden) -> None:
    for tag, config in golden.case["config"].items():
        draws = [golden.tensor(name) for name in sorted(golden.arrays) if name.startswith(f"{tag}_draw")]
        # Published draws have images last where they have two axes; ours have one row per image.
        noise = RecordedNoise(draw.T if draw.ndim == 2 else draw for draw in draws)
        images, labels = AugmentPipe(**config)(golden.tensor("images"), noise)
        golden.matches(images, f"{tag}_out")
        golden.matches(labels, f"{tag}_labels")
        assert noise.used_up()


def training_loss(golden: Golden) -> None:
    network = golden.network().train().requires_grad_(True)
    images = golden.tensor("images_u8").float() / 127.5 - 1
    noise = RecordedNoise([golden.tensor("rnd"), golden.tensor("noise")])

    def recorded(_images: Tensor, _noise: object) -> tuple[Tensor, Tensor]:
        return golden.tensor("y"), golden.tensor("augment_labels")

    augment = recorded if "y" in golden.arrays else None
    loss = LOSSES[golden.case["loss"]]()(network, images, golden.optional("labels"), noise, augment)
    golden.matches(loss.detach(), "loss")
    (loss.sum() / len(images)).backward()
    parameters = dict(network.named_parameters())
    golden.matches(torch.stack([parameters[n].grad.double().norm() for n in golden.case["grad_names"]]), "grad_norms")
    assert all(parameters[n].grad is None for n in golden.case["no_grad_names"])
    for name in golden.recorded_names():
        if name.startswith("grad/"):
            golden.matches(parameters[name.removeprefix("grad/")].grad, name)


def training_loop(golden: Golden) -> None:
    """Through the project's own loop; what it would draw, and the order of images, are the recorded ones."""
    case, loop = golden.case, golden.case["loop"]
    model = EDM({"precond": case["precond"], "network": case["config"]})
    model.network = golden.network()
    before = copied_parameters(model.network)
    index, labels, image_labels = golden.tensor("index").cpu(), golden.optional("labels"), None
    if labels is not None:
        image_labels = torch.zeros(len(golden.arrays["images_u8"]), dtype=torch.int64)
        image_labels[index] = labels.argmax(2).cpu()
    dataset = ArrayDataset(golden.tensor("images_u8").permute(0, 3, 1, 2).cpu(), image_labels, "recorded images")
    rounds = zip(golden.tensor("rnd"), golden.tensor("noise"), strict=True)
    augmented = zip(golden.tensor("y"), golden.tensor("augment_labels"), strict=True)
    model.augment = lambda images, noise: next(augmented)
    losses = []

    def loss_of_round(examples: Tensor, labels: Tensor | None, noise: RecordedNoise) -> Tensor:
        losses.append(EDM.training_loss(model, examples, labels, noise))
        return losses[-1]

    assert case["optimizer"]["name"] == "Adam"
    recipe = Recipe(
        batch_size=loop["batch_size"],
        lr=case["optimizer"]["lr"],
        betas=tuple(case["optimizer"]["betas"]),
        eps=case["optimizer"]["eps"],
        lr_rampup_kimg=loop["lr_rampup_images"] / 1000,
        loss_scaling=loop["loss_scaling"],
        ema_halflife_kimg=loop["ema_halflife_images"] / 1000,
        ema_rampup_ratio=loop["ema_rampup_ratio"],
    )
    with (
        mock.patch("neon.selftrain.visits.ImageNoise", lambda seeds, device: RecordedNoise(next(rounds))),
        mock.patch.object(model, "training_loss", loss_of_round),
    ):
        run = train_in_order(
            model, dataset, recipe, index.flatten().tolist(), seed=loop["seed"], micro_batch=loop["batch_gpu"]
        )
    assert len(run.log) == loop["steps"]
    pixels = math.prod(golden.arrays["images_u8"].shape[1:])
    golden.matches(np.array([loss.mean().item() / pixels for loss in losses]), "loss_mean")
    golden.matches(np.array([entry["lr"] for entry in run.log]), "lr")
    golden.matches(run.grad_norms, "grad_norm")
    trained = copied_parameters(model.network)
    assert list(trained) == case["param_names"]
    for side, weights in (("net", trained), ("ema", run.weights)):
        changes = [(weights[name] - before[name]).double().norm().item() for name in case["param_names"]]
        # The gradient of these is zero in exact arithmetic: what Adam makes of its rounding is no result.
        compared = [name not in case["noise_dominated"] for name in case["param_names"]]
        key = f"{side}_delta_norm"
        golden.compare(
            np.array(changes)[compared], golden.arrays[key][compared], rtol=case["rtol"], atol=case["atol"], name=key
        )
        for name in golden.recorded_names():
            if name.startswith(f"{side}/"):
                golden.matches(weights[name.removeprefix(f"{side}/")], name)


def weight_merge(golden: Golden) -> None:
    for name in golden.arrays:
        if found := re.fullmatch(r"(buffer_)?w(\d+)p(\d+)", name):
            w = float(f"{found[2]}.{found[3]}")
            pair = ("buffer", "buffer") if found[1] else ("theta_r", "theta_s")
            golden.matches(merge_tensor(golden.tensor(pair[0]), golden.tensor(pair[1]), w), name)


def frechet(golden: Golden) -> None:
    for tag in {name.split("_")[0] for name in golden.arrays}:
        a = Statistics(mu=golden.arrays[f"{tag}_mu"], sigma=golden.arrays[f"{tag}_sigma"])
        b = Statistics(mu=golden.arrays[f"{tag}_mu_ref"], sigma=golden.arrays[f"{tag}_sigma_ref"])
        golden.matches(FrechetReference(b).distance(a), f"{tag}_fid")


def feature_statistics(golden: Golden) -> None:
    features = golden.tensor("features")
    moments = Moments(features.shape[1], DEVICE)
    for block in features.split(10):
        moments.update(block)
    golden.matches(moments.mean, "mu")
    golden.matches(moments.covariance, "sigma_unbiased")


def precision_recall(golden: Golden) -> None:
    for name in golden.arrays:
        if found := re.fullmatch(r"(\w)_k(\d+)", name):
            manifold = Manifold(golden.tensor(f"{found[1]}_real"), k=int(found[2]))
            scores = manifold.compare(golden.tensor(f"{found[1]}_fake"))
            golden.matches(np.array([scores.precision, scores.recall, scores.density, scores.coverage]), name)


HANDLERS = {
    "network forward": network_forward,
    "resampling convolution": resampling_convolution,
    "one U-Net block": one_unet_block,
    "sampler": sampler,
    "sampler (float32, output-space extrapolation between two networks)": two_networks,
    "noise levels": levels,
    "random streams": random_streams,
    "image post-processing": post_processing,
    "training order of images": training_order,
    "cutting the seed list into batches (dataset generation script)": seed_batches,
    "subset of a dataset when max_size < n": subset,
    "augmentation": augmentation,
    "training loss": training_loss,
    "fine-tuning loop": training_loop,
    "weight merge": weight_merge,
    "Frechet distance": frechet,
    "feature statistics": feature_statistics,
    "precision / recall / density / coverage": precision_recall,
}


CPU_ONLY = {
    "noise levels",
    "random streams",
    "training order of images",
    "cutting the seed list into batches (dataset generation script)",
    "subset of a dataset when max_size < n",
}
"""kinds that do not depend on the device"""


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, record_property: Callable[[str, object], None]) -> None:
    golden = Golden(name)
    run_case(golden, HANDLERS, record_property, CPU_ONLY)
