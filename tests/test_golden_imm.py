"""IMM reproduces the reference numbers: every case of golden.json, by its kind."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from imm.loss import IMMLoss
from imm.networks import DiT, SongUNet
from imm.precond import F_TYPES, IMMPrecond
from imm.recipe import IMMRecipe
from imm.sampler import IMMSettings, generate
from imm.schedule import SCHEDULES
from imm.vae import Codec, LatentScale
from neon.data.images import from_uint8, to_uint8
from neon.merge import merge_state
from neon.nn.autoencoder import as_bytes
from neon.sampling import one_hot
from tests.golden.recipe import fill_module
from tests.goldens import (
    DEVICE,
    GOLDEN_DIR,
    GoldenCase,
    Replayed,
    as_array,
    copied_parameters,
    load_arrays,
    load_golden,
    number_in,
    run_case,
    train_on,
)
from tests.replay import RecordedNoise

FOLDER = GOLDEN_DIR / "imm"
CASES: dict[str, dict] = load_golden(FOLDER)["cases"]
PUBLISHED_DEFAULTS = {"sample_t_mode": "lognormal", "min_tr_gap": None}
"""of the original's loss, where ours are those of ImageNet-256"""
SMALL = {"img_resolution": 2, "img_channels": 1, "model_type": "DiT", "hidden_size": 4, "depth": 0, "num_heads": 1}
"""any network, where a case is about what surrounds it"""


class Golden(GoldenCase):
    def __init__(self, name: str) -> None:
        super().__init__(CASES[name], *load_arrays(FOLDER / CASES[name]["file"], "in_", "out_"))
        self.config: dict[str, Any] = self.case["config"]
        self.tolerance: dict[str, Any] = self.case["tolerance"]
        self.unmatched = set(self.outputs)

    def named(self, prefix: str) -> Iterator[str]:
        """What follows `prefix` in the names of the outputs."""
        return (name.removeprefix(prefix) for name in self.outputs if name.startswith(prefix))

    def matches(
        self, got: Tensor | np.ndarray, name: str, *, atol: float | None = None, rtol: float | None = None
    ) -> None:
        """`got` is output `name` in shape, dtype and, within the tolerances (by default the case's), value.

        Where one tolerance is given, the other is 0.
        """
        if atol is None and rtol is None:
            atol, rtol = self.tolerance["atol"], self.tolerance["rtol"]
        got, name = self.expected(got, name)
        expected = self.outputs[name]
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
        self.compare(got, expected, rtol=rtol or 0, atol=atol or 0, name=name)
        self.unmatched.discard(name)

    def precond(self, **keywords: object) -> IMMPrecond:
        """The network of the case, filled; `keywords` over those of the case."""
        network = IMMPrecond(**{**self.config["precond"], **self.config["model"], **keywords}).to(DEVICE)
        return fill_module(network.eval().requires_grad_(False))  # type: ignore[return-value]

    def combinations(self) -> Iterator[tuple[str, IMMPrecond]]:
        """The name of each combination of the case, and its network."""
        for combination in self.config["combos"]:
            keywords = dict(zip(("f_type", "noise_schedule", "temb_type"), combination, strict=True))
            yield "__".join(combination), self.precond(**keywords)

    def recorded(self, group: int, suffix: str = "") -> RecordedNoise:
        """The draws of a loss in its order; those of a group are given to all its images."""
        times = [self.tensor(name + suffix).repeat_interleave(group, dim=0) for name in ("u_t", "u_s")]
        label = self.optional("u_label" + suffix)
        return RecordedNoise([*times, *([] if label is None else [label]), self.tensor("noise" + suffix)])


def loss_of(config: dict[str, Any]) -> IMMLoss:
    keywords = {**PUBLISHED_DEFAULTS, **config}
    assert keywords.pop("sample_repeat") == 1
    return IMMLoss(**keywords)


def cropped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The part of a tensor that a case holds."""
    if tensor.ndim != len(shape):
        tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor[tuple(slice(size) for size in shape)]


def dit_forward(golden: Golden) -> None:
    network = DiT(**golden.config)
    golden.matches(network.pos_embed, "pos_embed_init", atol=golden.tolerance["pos_embed"])
    fill_module(network.to(DEVICE).eval().requires_grad_(False))
    x, t, s, labels = (*(golden.tensor(name) for name in ("x", "t", "s")), golden.optional("labels"))
    golden.matches(network(x, t, s, labels), "full")
    golden.matches(network(x, t, None, labels), "no_s")
    golden.matches(network(x, t[:1], s[:1], labels), "single_time")
    golden.matches(network.t_embedder(t), "temb")
    assert network.s_embedder is not None
    golden.matches(network.s_embedder(s), "semb")
    golden.matches(network.x_embedder(x), "patches")


def songunet_forward(golden: Golden) -> None:
    network = SongUNet(**golden.config).to(DEVICE)
    fill_module(network.eval().requires_grad_(False))
    x, t, s = (golden.tensor(name) for name in ("x", "t", "s"))
    labels, augment = golden.optional("labels"), golden.optional("augment_labels")
    golden.matches(network(x, t, s, labels), "plain")
    golden.matches(network(x, t, None, labels), "no_s")
    golden.matches(network(x, t[:1], s[:1], labels), "single_time")
    if augment is not None:
        golden.matches(network(x, t, s, labels, augment), "augment")
    golden.matches(network.map_noise(t.to(network.embedding_dtype)), "noise_embedding_raw")


def precond_forward(golden: Golden) -> None:
    x, t, s, labels = (*(golden.tensor(name) for name in ("x", "t", "s")), golden.optional("labels"))
    scalars = golden.tensor("t_scalar"), golden.tensor("s_scalar")
    scale = float(golden.inputs["cfg_scale"])
    for tag, network in golden.combinations():
        calls: dict[str, Callable[[], Tensor]] = {
            "forward": lambda network=network: network(x, t, s, labels),
            "cfg": lambda network=network: network.cfg_forward(x, *scalars, labels, cfg_scale=scale),
            "nocfg": lambda network=network: network.cfg_forward(x, *scalars, labels, cfg_scale=None),
            "default_labels": lambda network=network: network(x, t, s),
            "float32": lambda network=network: network(x.float(), t.float(), s.float(), labels),
        }
        for name, call in calls.items():
            if f"{name}__{tag}" in golden.recorded_names():
                golden.matches(call(), f"{name}__{tag}")


class Recorded(torch.nn.Module):
    """A network that answers with `F`, or `F_pair` when asked for twice the batch, and remembers the question."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        answers = golden.tensor("F"), golden.tensor("F_pair")
        self.answers = {len(answer): answer for answer in answers}
        self.given: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        self.given = x, t, s
        return self.answers[len(x)]


def precond_dtype(golden: Golden) -> None:
    tolerances = {
        kind: {name: golden.tolerance[f"{kind}_{name}"] for name in ("atol", "rtol")}
        for kind in ("loose", "given", "network")
    }
    dtypes = {"32": torch.float32, "64": torch.float64}
    labels, scale = golden.optional("labels"), float(golden.inputs["cfg_scale"])
    for combination, network in golden.combinations():
        real, network.model = network.model, Recorded(golden)
        for tag in sorted({name.split("__")[1] for name in golden.recorded_names() if name.endswith(combination)}):
            x_bits, t_bits = (part[1:] for part in tag.split("_"))
            ending = f"__{tag}__{combination}"
            x = golden.tensor("x").to(dtypes[x_bits])
            times = [golden.tensor(name).to(dtypes[t_bits]) for name in ("t", "s")]
            golden.matches(network(x, *times, labels), "forward" + ending)
            for name, given in zip("xts", network.model.given, strict=True):
                golden.matches(given, f"given_{name}{ending}", **tolerances["given"])
            scalars = [golden.tensor(name).to(dtypes[t_bits]) for name in ("t_scalar", "s_scalar")]
            for name, cfg_scale in (("nocfg", None), ("cfg", scale)):
                found = network.cfg_forward(x, *scalars, labels, cfg_scale=cfg_scale)
                if name + ending in golden.recorded_names():
                    golden.matches(found, name + ending)
                elif f"loose_{name}{ending}" in golden.recorded_names():
                    golden.matches(found, f"loose_{name}{ending}", **tolerances["loose"])
            if "network" + ending in golden.recorded_names():
                with mock.patch.object(network, "model", real):
                    golden.matches(network(x, *times, labels), "network" + ending, **tolerances["network"])


def schedule(golden: Golden) -> None:
    t, s, y, x, noise, nt = (golden.tensor(name) for name in ("t", "s", "y", "x", "noise", "nt"))
    sigma_data, weights = golden.config["sigma_data"], IMMLoss(a=golden.config["a"], b=golden.config["b"])
    for name, path in SCHEDULES.items():
        network = IMMPrecond(
            **SMALL, noise_schedule=name, f_type="identity", T=golden.config["T"], eps=golden.config["eps"]
        )
        golden.matches(np.array([network.nt_low, network.nt_high]), f"nt_range__{name}")
        golden.matches(path.log_snr(t), f"logsnr__{name}")
        golden.matches(path.ratio(t).log(), f"lognt__{name}")
        golden.matches(path.log_snr_slope(t), f"dlogsnr_dt__{name}")
        golden.matches(path.time(nt), f"nt_to_t__{name}")
        golden.matches(path.alpha(t), f"alpha__{name}")
        golden.matches(path.sigma(t), f"sigma__{name}")
        golden.matches(path.mix(y, noise, t), f"add_noise__{name}")
        golden.matches(path.mix(y, noise, s), f"ddim_noise__{name}")
        for f_type, coefficients in F_TYPES.items():
            skip, out = coefficients(path, t, s, sigma_data)
            output = {"identity": "ddim"}.get(f_type, f_type) + f"__{name}"
            if output in golden.recorded_names():
                golden.matches(skip * x + out * y, output)
            golden.matches(weights.kernel_weight(out), f"kernel_w__{f_type}__{name}")
            golden.matches(weights.weight(path, t), f"outer_w__{f_type}__{name}")


def sampler(golden: Golden) -> None:
    network, labels = golden.precond(), golden.optional("labels")
    latents = golden.tensor("z") * network.sigma_data
    step = network.cfg_forward
    for run in golden.config["runs"]:
        middle, guidance = tuple(run.get("mid_nt") or ()), run.get("cfg_scale")
        settings = IMMSettings(
            num_steps=run.get("num_steps", len(middle) + 1),
            guidance=1.0 if guidance is None else guidance,
            discretization=run.get("discretization", "uniform"),
            mid_nt=middle,
            restart=run["sampler"].startswith("restart"),
        )
        single = "float32" in run["sampler"]
        draws, times = iter(golden.tensor("restart_noise")), []

        def watched(x: Tensor, t: Tensor, s: Tensor, *rest: Any, times: list = times) -> Tensor:
            times.append((float(t), float(s)))
            return step(x, t, s, *rest)

        with mock.patch.object(network, "cfg_forward", watched):
            found = generate(
                network, latents, labels, settings,
                draw_noise=lambda draws=draws: next(draws), dtype=torch.float32 if single else torch.float64,
            )  # fmt: skip
        golden.matches(found, run["name"])
        limit = golden.tolerance["times_float32" if single else "times"]
        golden.matches(np.array(times), f"{run['name']}__times", atol=limit)


def loss(golden: Golden) -> None:
    network, formula = golden.precond().train().requires_grad_(True), loss_of(golden.config["loss"])
    images, labels, augment_labels = (
        golden.tensor("images"),
        golden.optional("labels"),
        golden.optional("augment_labels"),
    )
    seen: dict[str, tuple[Tensor, ...]] = {}
    watched = ("times", "jumps", "similarities")

    def watch(name: str) -> Callable[..., tuple[Tensor, ...]]:
        original = getattr(IMMLoss, name)

        def call(*args: Any) -> tuple[Tensor, ...]:
            seen[name] = original(*args)
            return seen[name]

        return call

    noise = golden.recorded(formula.matrix_size)
    with mock.patch.multiple(IMMLoss, **{name: watch(name) for name in watched}):
        found = formula(network, images, labels, noise, augment_labels)
    assert noise.used_up()
    t, r, s = seen["times"]
    exact = {"rtol": golden.tolerance["weights_and_times_rtol"]}
    for name, time in (("t", t), ("r", r), ("s", s)):
        golden.matches(time, name, **exact)
    golden.matches(torch.stack([t, r, s]).flatten(1), "scalar_times", **exact)
    golden.matches(formula.kernel_weight(network.coefficients(t, s).out).flatten(), "w", **exact)
    golden.matches(formula.weight(network.schedule, t).flatten(), "wout", **exact)
    for name, reached in zip(("f_st", "f_sr"), seen["jumps"], strict=True):
        golden.matches(reached, name, atol=golden.tolerance["f_atol"])
    near = {"rtol": golden.tolerance["loss_rtol"]}
    for name, similarity in zip(("st_st", "sr_sr", "cross"), seen["similarities"], strict=True):
        golden.matches(similarity, f"sim_{name}", **near)
    golden.matches(found, "loss", **near)
    golden.matches(found.mean(), "mean_loss", **near)

    found.mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert all(p.grad is not None for p in network.parameters())
    norm_limit = {"rtol": golden.tolerance["grad_norm_rtol"]}
    norms = {name: gradient.double().norm() for name, gradient in gradients.items()}
    golden.matches(torch.stack(list(norms.values())).norm(), "grad_norm", **norm_limit)
    for name in golden.named("gradnorm__"):
        golden.matches(norms[name], f"gradnorm__{name}", **norm_limit)
    share = number_in(golden.tolerance["grad_entries"], r"atol ([\de.-]+) \* max", 1e-4)
    for name in golden.named("grad__"):
        expected = golden.outputs[f"grad__{name}"]
        part = cropped(gradients[name], expected.shape)
        golden.matches(part, f"grad__{name}", atol=share * np.abs(expected).max())


def time_sampling(golden: Golden) -> None:
    for variant in golden.config["variants"]:
        formula = loss_of(variant["loss"])
        times = formula.times(IMMPrecond(**SMALL, **variant["precond"]), golden.tensor("u_t"), golden.tensor("u_s"))
        lognormal = formula.sample_t_mode == "lognormal"
        golden.matches(
            torch.stack(times).flatten(1),
            f"trs__{variant['tag']}",
            atol=golden.tolerance["atol"],
            rtol=golden.tolerance["lognormal_rtol" if lognormal else "rtol"],
        )


def finetune(golden: Golden) -> None:
    """Through the project's own loop, on a set of the recorded latents, in the recorded order."""
    keywords = dict(golden.config["optimizer"])
    assert keywords.pop("name") == "AdamW"
    steps, batch = golden.config["steps"], golden.config["batch"]

    network, formula = golden.precond(), loss_of(golden.config["loss"])
    draws = [golden.recorded(formula.matrix_size, f"_{step}") for step in range(steps)]

    def loss_of_step(latents: Tensor, labels: Tensor | None, noise: RecordedNoise) -> Tensor:
        return formula(network, latents, one_hot(labels, network.label_dim, DEVICE), noise)

    model = Replayed(network, golden.inputs["images_0"].shape[1:], network.label_dim, loss_of_step, draws)
    model.batch_multiple = formula.matrix_size
    before = copied_parameters(network)
    recipe = IMMRecipe(batch_size=batch, ema_beta=golden.config["ema_beta"], **keywords)
    examples, labels = torch.cat([golden.tensor(f"images_{step}") for step in range(steps)]), golden.optional("labels")
    run = train_on(model, recipe, "latents", examples, None if labels is None else labels.argmax(dim=1).repeat(steps))
    golden.matches(np.array([entry["loss"] for entry in run.log]), "losses", rtol=golden.tolerance["losses_rtol"])
    share = number_in(golden.tolerance["deltas"], r"atol = ([\d.]+) \* max", 0.02)
    enough = number_in(golden.tolerance["deltas"], r">= (\d+)% of the entries", 98) / 100
    for kind, weights in (("net", copied_parameters(network)), ("ema", run.weights)):
        for name in golden.named(f"{kind}_delta__"):
            expected = golden.outputs[f"{kind}_delta__{name}"]
            delta = cropped(weights[name].double() - before[name].double(), expected.shape).numpy()
            assert delta.shape == expected.shape, name
            furthest = np.quantile(np.abs(delta - expected), enough, method="inverted_cdf")
            golden.compare(furthest, 0.0, atol=share * np.abs(expected).max(), name=f"{kind} {name}")
            golden.unmatched.discard(f"{kind}_delta__{name}")


def neon_merge(golden: Golden) -> None:
    base, aux = ({name: golden.tensor(f"{kind}_{name}") for name in ("w", "b", "n")} for kind in ("base", "aux"))
    for number, w in enumerate(golden.inputs["ws"].tolist()):
        for name, merged in merge_state(base, aux, w).items():
            golden.matches(merged, f"{name}_{number}")


def encoder(golden: Golden) -> None:
    from diffusers.models import AutoencoderKL  # takes seconds

    scale = LatentScale(**golden.config["encoder"])
    codec = Codec(fill_module(AutoencoderKL(**golden.config["vae"])), scale).to(DEVICE).eval()
    for got, name in zip(scale.scale_and_bias(DEVICE), ("scale", "bias"), strict=True):
        golden.matches(got.flatten(), name)
    with torch.no_grad():
        moments = codec.moments(golden.tensor("pixels"))
        golden.matches(moments, "raw")
        latents = codec.scale.latents(moments, golden.tensor("noise"))
        golden.matches(latents, "final")
        golden.matches(codec.decode_float(latents), "sample_float")
        pixels = {"pixels": codec.decode(latents), "pixels2": codec.decode(golden.tensor("latents2"))}
    for name, got in pixels.items():  # a value next to a whole number may fall on either side of it
        golden.matches(got, name, atol=1)
        assert (as_array(got) != golden.outputs[name]).mean() < 0.005
    golden.matches(as_bytes(golden.tensor("vae_float")), "vae_uint8", atol=0)
    golden.matches(to_uint8(golden.tensor("rgb")), "rgb_uint8", atol=0)
    golden.matches(from_uint8(golden.tensor("pixels")), "rgb_encoded")


HANDLERS: dict[str, Callable[[Golden], None]] = {
    "dit_forward": dit_forward,
    "songunet_forward": songunet_forward,
    "precond_forward": precond_forward,
    "precond_dtype": precond_dtype,
    "schedule": schedule,
    "sampler": sampler,
    "loss": loss,
    "time_sampling": time_sampling,
    "finetune": finetune,
    "neon_merge": neon_merge,
    "encoder": encoder,
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, record_property: Callable[[str, object], None]) -> None:
    golden = Golden(name)
    run_case(golden, HANDLERS, record_property)
    assert not golden.unmatched
