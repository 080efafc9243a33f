"""EDM reproduces the reference numbers: every case of golden.json, by its kind."""

import json
import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edm.layers import Conv2d, UNetBlock
from edm.loss import EDMLoss
from edm.precond import EDMPrecond
from edm.sampler import EDMSettings, integrate, noise_levels
from neon.dataset import to_uint8, visit_order
from neon.merge import merge_tensor
from neon.metrics import FrechetReference, Manifold, Moments, Statistics
from neon.noise import ImageNoise
from tests.golden.recipe import fill_module
from tests.replay import RecordedNoise

FOLDER = Path(os.environ.get("NEON_GOLDEN_DIR", Path(__file__).parent / "golden")) / "edm"
CASES: dict[str, dict] = json.loads((FOLDER / "golden.json").read_text())["cases"]
PRECONDS = {"EDMPrecond": EDMPrecond}
LOSSES = {"EDMLoss": EDMLoss}

# What is not built yet. A case listed here must fail (strict xfail); a kind that no one handles fails too.
LATER = {
    "ablation": lambda name, case: name.startswith("ablation_"),
    "VP, VE and iDDPM preconditioning": lambda name, case: case.get("precond", "EDMPrecond") not in PRECONDS,
    "VP and VE losses": lambda name, case: case.get("loss", "EDMLoss") not in LOSSES,
    "augmentation": lambda name, case: case["kind"] == "augmentation",
    "two networks": lambda name, case: "two networks" in case["kind"],
    "published order of files": lambda name, case: name in ("seed_batches", "dataset_subset"),
    "published training loop": lambda name, case: case["kind"] == "fine-tuning loop",
}


class Golden:
    """One case: its description, its arrays, and the comparison with its tolerances."""

    def __init__(self, name: str) -> None:
        self.case = CASES[name]
        with np.load(FOLDER / self.case["file"]) as arrays:
            self.arrays = dict(arrays)

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.arrays else None

    def matches(self, got: Tensor | np.ndarray | float, name: str) -> None:
        np.testing.assert_allclose(
            np.asarray(got), self.arrays[name], rtol=self.case["rtol"], atol=self.case["atol"], err_msg=name
        )

    def network(self) -> EDMPrecond:
        network = PRECONDS[self.case["precond"]](**self.case["config"]).eval().requires_grad_(False)
        keeps_filters = "every floating entry" not in self.case["weights"]
        keep = tuple(n for n in network.state_dict() if keeps_filters and n.endswith("resample_filter"))
        return fill_module(network, keep)


def fill_lone(module: torch.nn.Module) -> torch.nn.Module:
    return fill_module(module.eval().requires_grad_(False), keep=tuple(n for n in module.state_dict() if "filter" in n))


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
    }
    inputs = {"x", "sigma", "class_labels", "augment_labels", "raw_x", "raw_noise_labels", "denoised", "block_mean_std"}
    for name in golden.arrays.keys() - inputs:
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
    settings = EDMSettings(**golden.case["sampler"])
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
    np.testing.assert_allclose(to_uint8(out).int(), golden.arrays["uint8"].astype(int), rtol=0, atol=1)
    assert len(levels) == golden.case["nfe"]


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


def training_loss(golden: Golden) -> None:
    network = golden.network().train().requires_grad_(True)
    images = golden.tensor("images_u8").float() / 127.5 - 1
    noise = RecordedNoise([golden.tensor("rnd"), golden.tensor("noise")])
    y, augment_labels = golden.optional("y"), golden.optional("augment_labels")
    loss = LOSSES[golden.case["loss"]]()(
        network, images if y is None else y, golden.optional("labels"), noise, augment_labels
    )
    golden.matches(loss.detach(), "loss")
    (loss.sum() / len(images)).backward()
    parameters = dict(network.named_parameters())
    golden.matches(np.array([parameters[n].grad.double().norm() for n in golden.case["grad_names"]]), "grad_norms")
    assert all(parameters[n].grad is None for n in golden.case["no_grad_names"])
    for name in golden.arrays:
        if name.startswith("grad/"):
            golden.matches(parameters[name.removeprefix("grad/")].grad, name)


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
    moments = Moments(features.shape[1])
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
    "noise levels": levels,
    "random streams": random_streams,
    "image post-processing": post_processing,
    "training order of images": training_order,
    "training loss": training_loss,
    "weight merge": weight_merge,
    "Frechet distance": frechet,
    "feature statistics": feature_statistics,
    "precision / recall / density / coverage": precision_recall,
}


def cases() -> list:
    found = []
    for name, case in CASES.items():
        later = [what for what, covers in LATER.items() if covers(name, case)]
        marks = [pytest.mark.xfail(reason=f"not built yet: {later[0]}", strict=True)] if later else []
        found.append(pytest.param(name, id=name, marks=marks))
    return found


@pytest.mark.parametrize("name", cases())
def test_golden(name: str) -> None:
    golden = Golden(name)
    kind = golden.case["kind"]
    assert kind in HANDLERS, f"no handler for cases of kind {kind!r}"
    HANDLERS[kind](golden)
