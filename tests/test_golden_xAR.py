"""xAR reproduces the reference numbers: every case of golden.json, by its kind."""

# ruff: noqa: N999 - named after the architecture, as its folder is spelled

import re
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel

from neon.nn.autoencoder import as_bytes
from tests.golden.recipe import fill_module
from tests.goldens import (
    DEVICE,
    GOLDEN_DIR,
    GoldenCase,
    Replayed,
    copied_parameters,
    load_arrays,
    load_golden,
    run_case,
    train_on,
)
from tests.replay import RecordedNoise
from xAR import transformer as transformer_module
from xAR.loss import flow_loss
from xAR.recipe import XARRecipe
from xAR.sampler import XARSettings, flow_steps, flow_times, generate_latents
from xAR.transformer import (
    XAR,
    Rotation,
    from_cells,
    raster_of_positions,
    rms_norm,
    sinusoids,
    time_index,
    to_cells,
)
from xAR.vae import AutoencoderKL, center_crop, posterior

FOLDER = GOLDEN_DIR / "xAR"
CASES: dict[str, dict] = load_golden(FOLDER)["cases"]
KEYWORDS = {
    "width": "width", "heads": "heads", "encoder_depth": "encoder_depth", "decoder_depth": "decoder_depth",
    "label_drop_prob": "label_drop", "attn_dropout": "attn_dropout", "proj_dropout": "proj_dropout",
}  # fmt: skip
"""of XAR, by their name in a case"""
ROTATED = {"train": slice(0, 256), "cell2": slice(128, 192), "cell2_pair": slice(64, 192)}
"""positions of the rotated inputs"""
ROPE_ROWS = [0, 1, 8, 63, 64, 127, 130, 200, 255]
"""of the rotary tables, those that a case holds unless it names others"""


class Golden(GoldenCase):
    def __init__(self, name: str) -> None:
        super().__init__(CASES[name], *load_arrays(FOLDER / CASES[name]["file"], "in:", "out:"))
        self.config: dict[str, Any] = self.case["config"]
        self.unmatched = set(self.outputs)

    def by_image(self, name: str, axis: int = 1) -> Tensor:
        """An input whose images are counted along `axis`, images first."""
        return self.tensor(name).movedim(axis, 0)

    def matches(self, got: Tensor | np.ndarray | float | list, name: str) -> None:
        """`got` agrees with output `name` within the tolerances of the case, integers within the absolute one."""
        got, name = self.expected(got, name)
        expected = self.outputs[name]
        assert got.shape == expected.shape, name
        self.unmatched.discard(name)
        if expected.dtype.kind == "U":
            np.testing.assert_array_equal(got, expected, err_msg=name)
            return
        rtol = self.case["rtol"]
        if expected.dtype.kind in "uib":
            rtol, got, expected = 0, got.astype(np.int64), expected.astype(np.int64)
        self.compare(got, expected, rtol=rtol, atol=self.case["atol"], name=name)

    def transformer(self, **keywords: object) -> XAR:
        constructor = getattr(transformer_module, self.config.get("constructor", "XAR"))
        config = {own: self.config[name] for name, own in KEYWORDS.items() if name in self.config}
        network = constructor(**{"attn_dropout": 0.0, "proj_dropout": 0.0, **config, **keywords})
        return filled(network.to(DEVICE).eval().requires_grad_(False))

    def recorded(self, step: int | None = None) -> RecordedNoise:
        """The draws of a loss, in the order of `flow_loss`; `step` where the first axis counts iterations."""
        uniform, normals, noise = (
            self.tensor(name) if step is None else self.tensor(name)[step]
            for name in ("label_uniform", "time_normal", "noise")
        )
        return RecordedNoise([uniform, normals.view(-1, len(uniform)).T, noise.transpose(0, 1)])


def filled(network: torch.nn.Module) -> Any:
    kept = tuple(name for name in network.state_dict() if name == "mask" or ".attn.rope." in name)
    return fill_module(network, kept)


def net_train(golden: Golden) -> None:
    network = golden.transformer().train()
    label, times = golden.tensor("label"), golden.by_image("time_index")
    golden.matches(network.condition(label, times).transpose(0, 1).flatten(0, 1), "condition")
    seen: list[Tensor] = []
    network.encoder_norm.register_forward_hook(lambda *args: seen.append(args[2]))
    golden.matches(velocity_of_tokens(network, golden), "velocity")
    golden.matches(seen[0].flatten(1, 2), "encoder_out")


def velocity_of_tokens(network: XAR, golden: Golden) -> Tensor:
    cells = golden.tensor("tokens").unflatten(1, (network.num_cells, -1))
    return network(cells, golden.by_image("time_index"), golden.tensor("label")).flatten(1, 2)


def dropout(golden: Golden) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # a GPU's other kernels divide by the share that is kept, here 0
        golden.matches(velocity_of_tokens(golden.transformer(attn_dropout=1.0).train(), golden), "attention")
    golden.matches(velocity_of_tokens(golden.transformer(proj_dropout=1.0).train(), golden), "projection")


def dropout_masks(golden: Golden) -> None:
    network = golden.transformer().train()
    kinds = [golden.tensor(name) for name in ("keep_projection", "keep_gated", "keep_output")]
    masks = iter([kind[block] for block in range(len(kinds[0])) for kind in kinds])

    def recorded(x: Tensor, p: float, training: bool) -> Tensor:
        assert training and p == golden.config["proj_dropout"]
        return x * next(masks).view_as(x) / (1 - p)

    with mock.patch.object(torch.nn.functional, "dropout", recorded):
        golden.matches(velocity_of_tokens(network, golden), "velocity")
    assert next(masks, None) is None


def loss(golden: Golden) -> None:
    network, noise = golden.transformer().train().requires_grad_(True), golden.recorded()
    found = flow_loss(network, golden.tensor("latent"), golden.tensor("label"), noise)
    assert noise.used_up() and found.shape == golden.tensor("label").shape
    golden.matches(found.mean(), "loss")
    named = dict(network.named_parameters())
    golden.matches(list(named), "param_names")
    gradients = [gradient.flatten() for gradient in torch.autograd.grad(found.mean(), list(named.values()))]
    golden.matches(torch.cat(gradients).norm(), "grad_norm")
    golden.matches(torch.stack([gradient.norm() for gradient in gradients]), "param_grad_norm")
    largest = [gradient.abs().argmax() for gradient in gradients]
    golden.matches(torch.stack(largest), "param_grad_argmax")
    golden.matches(torch.stack([g[place] for g, place in zip(gradients, largest, strict=True)]), "param_grad_max")


def optim(golden: Golden) -> None:
    """Through the project's own loop, on a set of the recorded latents, in the recorded order, once per average."""
    keywords = dict(golden.config["optim"])
    steps, batch = golden.inputs["label"].shape
    images_per_epoch = keywords.pop("iterations_per_epoch") * batch
    for number, rate in enumerate(keywords.pop("ema_rates")):
        network = golden.transformer().requires_grad_(True)
        draws = [golden.recorded(step) for step in range(steps)]
        model = Replayed(network, (3, 256, 256), network.classes, partial(flow_loss, network), draws)
        before = copied_parameters(network)
        golden.matches(list(before), "param_names")
        recipe = XARRecipe(batch_size=batch, images_per_epoch=images_per_epoch, ema_rate=rate, **keywords)
        run = train_on(
            model, recipe, "latents", golden.tensor("latent").flatten(0, 1), golden.tensor("label").flatten()
        )
        golden.matches([entry["loss"] for entry in run.log], "loss")
        golden.matches(run.grad_norms, "grad_norm")
        golden.matches([entry["lr"] for entry in run.log], "lr")
        after = {"moved_norm": copied_parameters(network), f"ema{number}_moved_norm": run.weights}
        for name, weights in after.items():
            golden.matches(torch.stack([(weights[key] - start).norm() for key, start in before.items()]), name)
        for prefix, weights in (("param:", after["moved_norm"]), (f"ema{number}:", run.weights)):
            for name in golden.recorded_names():
                if name.startswith(prefix):
                    golden.matches(weights[name.removeprefix(prefix)], name)


def sample(golden: Golden) -> None:
    start = golden.by_image("start_noise")
    draws = [start[:, cell] for cell in range(start.shape[1])]
    num_steps = golden.config.get("steps")
    if "step_noise" in golden.inputs:
        fresh = golden.by_image("step_noise", axis=2)  # [B, cell, step, P, c]
        draws = [draw for cell, first in enumerate(draws) for draw in (first, fresh[:, cell])]
        num_steps = fresh.shape[2] + 1
    network = golden.transformer()
    for guidance in golden.config["cfg"]:
        settings = XARSettings(num_steps=num_steps, guidance=guidance, stochastic="step_noise" in golden.inputs)
        noise = RecordedNoise(draws)
        golden.matches(generate_latents(network, golden.tensor("label"), noise, settings), f"latent_cfg{guidance}")
        assert noise.used_up()


def cached_cells(golden: Golden) -> None:
    network = golden.transformer()
    times = {call: time_index(golden.tensor(f"time_{call}")) for call in ("first", "later")}
    for call, indices in times.items():
        golden.matches(indices, f"index_{call}")
    generation = network.start(golden.tensor("label"))
    for cell in range(network.num_cells):
        if cell > 0:
            network.remember(generation, golden.tensor("context")[cell - 1])
        for call, indices in times.items():
            found = network.velocity(generation, golden.tensor(f"noisy_{call}")[cell], int(indices[cell]))
            golden.matches(found, f"cell{cell}_{call}")
    remembered = generation.finished
    for place, memory in (("encoder0", generation.memory[0]), ("decoder_last", generation.memory[-1])):
        keys, values = memory.first(len(generation.given), remembered)
        golden.matches(keys, f"cache_k_{place}")
        golden.matches(values, f"cache_v_{place}")


def full_base(golden: Golden) -> None:
    network = golden.transformer()
    generation = network.start(golden.tensor("label"))
    noisy, context = golden.tensor("noisy"), golden.tensor("context")
    later = time_index(golden.tensor("time_later")).tolist()
    golden.matches(network.velocity(generation, noisy[0], 1000), "cell0_first")
    golden.matches(network.velocity(generation, noisy[1], later[0]), "cell0_later")
    network.remember(generation, context)
    golden.matches(network.velocity(generation, noisy[2], 1000), "cell1_first")
    golden.matches(network.velocity(generation, noisy[3], later[1]), "cell1_later")


def time(golden: Golden) -> None:
    for num_steps in golden.inputs["num_steps"].tolist():
        settings = XARSettings(num_steps=num_steps)
        golden.matches(flow_times(settings), f"t_{num_steps}")
        golden.matches([step.time for step in flow_steps(settings)], f"index_{num_steps}")
    golden.matches(sinusoids(golden.tensor("sinusoid_t")), "sinusoid")


def layout(golden: Golden) -> None:
    latent = golden.tensor("latent")
    cells = to_cells(latent, 2)
    golden.matches(cells, "cells")
    assert torch.equal(from_cells(cells), latent)
    raster = raster_of_positions(16, 2)
    golden.matches(raster, "raster_of_sequence")
    rows = re.search(r"rope rows: ([\d,]+\d)", golden.words())
    stored = [int(row) for row in rows[1].split(",")] if rows else ROPE_ROWS
    for channels in golden.config["head_dims"]:
        rotation = Rotation(channels, raster // 16, raster % 16).to(DEVICE)
        golden.matches(rotation.freqs, f"rope_freqs_{channels}")
        golden.matches(rotation.freqs_cos[stored], f"rope_cos_{channels}")
        golden.matches(rotation.freqs_sin[stored], f"rope_sin_{channels}")
        x = golden.tensor(f"rope_in_{channels}")
        for name, positions in ROTATED.items():
            length = positions.stop - positions.start
            golden.matches(rotation(x[:, :, :length], positions), f"rope_out_{name}_{channels}")
    mask = (
        XAR(width=16, heads=1, encoder_depth=1, decoder_depth=1).mask[0, 0].unflatten(0, (4, 64)).unflatten(2, (4, 64))
    )
    allowed = mask[:, 0, :, 0] == 0
    golden.matches(allowed, "mask_cell_allowed")
    assert torch.equal(mask == 0, allowed[:, None, :, None].expand_as(mask))
    assert mask[~allowed[:, None, :, None].expand_as(mask)].isneginf().all()


def rmsnorm(golden: Golden) -> None:
    x = golden.tensor("x")
    plain, weighted = (rms_norm(golden.config["width"], weighted=weighted).to(DEVICE) for weighted in (False, True))
    weighted.load_state_dict({"weight": golden.tensor("weight")})
    for name, norm in (("plain", plain), ("weighted", weighted)):
        golden.matches(norm(x), name)
        golden.matches(np.array(list(norm.state_dict()), dtype=str), f"state_{name}")


def lr(golden: Golden) -> None:
    images_per_epoch = 10_000
    images = np.rint(golden.inputs["epoch"] * images_per_epoch).astype(int)
    for name, schedule in golden.config["schedules"].items():
        recipe = XARRecipe(images_per_epoch=images_per_epoch, **schedule)
        golden.matches([recipe.lr_at(seen) for seen in images.tolist()], name)


def uint8(golden: Golden) -> None:
    for dtype in (torch.float32, torch.float16):
        for rule, rounded in (("truncate", False), ("round", True)):
            decoded = golden.tensor("decoded").to(dtype)
            golden.matches(as_bytes(decoded, rounded), f"{rule}_{str(dtype).removeprefix('torch.')}")


def labels(golden: Golden) -> None:
    for number, (num_images, classes, batch, devices) in enumerate(golden.inputs["cases"].tolist()):
        whole = num_images - num_images % classes
        num_batches = -(-whole // (batch * devices))
        golden.matches([num_batches, batch * devices], f"case{number}_batches")
        # The published program fills up the last batch with class 0, of which it keeps no image.
        published = torch.arange(classes).repeat_interleave(num_images // classes)[: num_batches * batch * devices]
        filled_up = torch.nn.functional.pad(published, (0, num_batches * batch * devices - len(published)))
        golden.matches(filled_up, f"case{number}_labels")


def crop(golden: Golden) -> None:
    for name, pixels in golden.inputs.items():
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        golden.matches(center_crop(image, golden.config["size"]).permute(1, 2, 0), name)


def autoencoder(golden: Golden) -> None:
    config = golden.config
    vae = AutoencoderKL(config["latent_channels"], config["channel_multipliers"], config["base_channels"])
    fill_module(vae.to(DEVICE).eval().requires_grad_(False))
    moments = vae.moments(golden.tensor("image"))
    golden.matches(moments, "moments")
    found = posterior(moments)
    golden.matches(found.mean, "mean")
    golden.matches(found.stddev, "std")
    golden.matches(kl_divergence(found, Normal(0.0, 1.0)).sum((1, 2, 3)), "kl")
    golden.matches(vae.posterior_sample(moments, golden.tensor("posterior_noise")), "scaled_sample")
    golden.matches(vae.decode(golden.tensor("scaled_latent")), "decoded")


def gaussian(golden: Golden) -> None:
    found = posterior(golden.tensor("moments"))
    golden.matches(found.mode, "mode")
    golden.matches(2 * found.stddev.log(), "logvar")
    golden.matches(found.stddev, "std")
    golden.matches(found.variance, "var")
    golden.matches(found.mean + found.stddev * golden.tensor("noise"), "sample")
    golden.matches(kl_divergence(found, Normal(0.0, 1.0)).sum((1, 2, 3)), "kl")
    golden.matches(-found.log_prob(golden.tensor("at")).sum((1, 2, 3)), "nll")


HANDLERS = {
    "net_train": net_train,
    "dropout": dropout,
    "dropout_masks": dropout_masks,
    "loss": loss,
    "optim": optim,
    "sample": sample,
    "sample_ode": sample,
    "cached_cells": cached_cells,
    "full_base": full_base,
    "time": time,
    "layout": layout,
    "rmsnorm": rmsnorm,
    "lr": lr,
    "uint8": uint8,
    "labels": labels,
    "crop": crop,
    "vae_small": autoencoder,
    "vae_full": autoencoder,
    "posterior": gaussian,
}


CPU_ONLY = {"lr", "labels", "crop"}
"""kinds that do not depend on the device"""


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, record_property: Callable[[str, object], None]) -> None:
    golden = Golden(name)
    run_case(golden, HANDLERS, record_property, CPU_ONLY)
    assert not golden.unmatched
