"""VAR reproduces the reference numbers: every case of golden.json, by its kind."""

# ruff: noqa: N999 - named after the architecture, as its folder is spelled

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neon.data.images import from_uint8
from neon.merge import merge_state
from neon.model import balanced_labels
from neon.selftrain import snapshot_steps
from tests.golden.recipe import fill, fill_module
from tests.goldens import (
    DEVICE,
    GOLDEN_DIR,
    GoldenCase,
    copied_parameters,
    load_arrays,
    load_golden,
    number_in,
    run_case,
    train_on,
)
from tests.replay import RecordedNoise
from VAR import model as model_module
from VAR.model import TOKENS, VARModel, token_dtype
from VAR.preprocess import enlarge
from VAR.published import PUBLISHED
from VAR.quantizer import MultiScaleQuantizer
from VAR.recipe import VARRecipe, epoch_order
from VAR.sampler import (
    VARSettings,
    draw_tokens,
    filter_logits,
    generate,
    sample_scales,
    smooth_codes,
    smooth_temperature,
)
from VAR.settings import ENLARGEMENT
from VAR.transformer import VAR
from VAR.vqvae import VQVAE

FOLDER = GOLDEN_DIR / "VAR"
CASES: dict[str, dict] = load_golden(FOLDER)["cases"]
SCRIPTS: dict = load_golden(Path(__file__).parent / "golden/VAR")["scripts"]
KEPT = ("attn_bias_for_masking",)
MISNAMED = {"tau": "weights"}
"""arrays whose group of tolerances is not the start of their name"""


class Golden(GoldenCase):
    def __init__(self, name: str) -> None:
        [self.arrays] = load_arrays(FOLDER / CASES[name]["file"], "")
        super().__init__(CASES[name], self.arrays)

    def tensor(self, name: str) -> Tensor:
        """Integers as int64, as indices are."""
        tensor = super().tensor(name)
        return tensor if tensor.is_floating_point() else tensor.long()

    def matches(self, got: Tensor | np.ndarray | float, name: str) -> None:
        """`got` agrees with what is stored of array `name`, as its tolerance says."""
        got, array = self.expected(got, name)
        expected, tolerance = self.arrays[array], self.tolerance(array)
        if isinstance(tolerance, str):
            share = number_in(tolerance, r"below (\S+) times the largest entry", 1e-4)
            tolerance = {} if tolerance.startswith("exact") else {"atol": share * np.abs(expected).max()}
        assert tolerance.keys() <= {"rtol", "atol"}
        self.compare(got, expected, **tolerance, name=array)

    def tolerance(self, name: str) -> dict[str, float] | str:
        """Of the group with the longest name that `name` starts with, be it in the singular, or of the others."""
        groups: dict = self.case["tolerance"]
        name = MISNAMED.get(name.split("_")[0], name)
        found = [group for group in groups if name.startswith((group, group.removesuffix("s")))]
        return groups[max(found, key=len)] if found else groups.get("others") or groups["all"]

    def tokenizer(self) -> VQVAE:
        return fill_module(VQVAE(**self.case["config"]["tokenizer"]).to(DEVICE).eval().requires_grad_(False))

    def transformer(self) -> VAR:
        network = VAR(**self.case["config"]["transformer"]).to(DEVICE).eval().requires_grad_(False)
        fill_module(network, KEPT)
        for name in self.arrays:
            if name.startswith("override/"):
                network.state_dict()[name.removeprefix("override/")].copy_(self.tensor(name))
        return network


def tokenizer(golden: Golden) -> None:
    vqvae, image = golden.tokenizer(), golden.tensor("img")
    if "parameter_count" in golden.case:
        assert sum(p.numel() for p in vqvae.parameters()) == golden.case["parameter_count"]
    golden.matches(vqvae.encoder(image), "enc")
    golden.matches(vqvae.features(image), "feat")

    def decoded(feature_map: Tensor) -> Tensor:
        return vqvae.decoder(vqvae.post_quant_conv(feature_map))

    if "code" in golden.arrays:
        golden.matches(decoded(golden.tensor("code")), "dec_unclamped")
        return
    tokens = vqvae.tokens(image)
    golden.matches(tokens, "idx")
    sums = vqvae.quantize.feature_maps(tokens)
    golden.matches(sums[-1], "fhat_last")
    golden.matches(torch.stack(sums)[:, :1], "fhat_scales")
    golden.matches(vqvae.quantize.teacher_forcing_input(tokens), "tf_input")
    golden.matches(vqvae.decode(vqvae.quantize.feature_maps(tokens)[-1]), "rec")
    golden.matches(torch.stack([vqvae.decode(s[:1]) for s in sums]), "rec_scales")
    golden.matches(decoded(sums[-1][:1]), "rec_unclamped")


def quantiser(golden: Golden) -> None:
    whole = torch.nn.Module()
    whole.quantize = MultiScaleQuantizer(**golden.case["config"]["quantiser"]).requires_grad_(False)
    fill_module(whole.to(DEVICE))
    tokens = whole.quantize.encode(golden.tensor("feat"))
    golden.matches(tokens, "idx")
    golden.matches(np.array(whole.quantize.phi_index), "phi_index")
    sums = whole.quantize.feature_maps(tokens)
    golden.matches(sums[-1], "fhat_last")
    golden.matches(torch.stack([s.flatten(1).norm(dim=1) for s in sums]), "fhat_norms")
    golden.matches(whole.quantize.teacher_forcing_input(tokens), "tf_input")


def gradients(loss: Tensor, network: VAR) -> dict[str, Tensor]:
    named = dict(network.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))


def total_norm(grads: dict[str, Tensor]) -> Tensor:
    return torch.stack([grad.double().norm() for grad in grads.values()]).norm()


def forward(golden: Golden) -> None:
    network, target = golden.transformer().requires_grad_(True), golden.tensor("target")
    assert sum(p.numel() for p in network.parameters()) == golden.case["parameter_count"]
    logits = network(golden.tensor("label"), golden.tensor("x"))
    golden.matches(logits, "logits")
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    golden.matches(loss, "loss")
    grads = gradients(loss, network)
    golden.matches(total_norm(grads), "grad_norm")
    assert list(grads) == golden.case["param_names"]
    golden.matches(torch.stack([grad.double().norm() for grad in grads.values()]), "param_grad_norms")
    assert [name for name, grad in grads.items() if not grad.any()] == golden.case["params_with_zero_grad"]
    for name in golden.recorded_names():
        if name.startswith("grad/"):
            golden.matches(grads[name.removeprefix("grad/")], name)
    smooth = F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=golden.case["label_smoothing"])
    golden.matches(smooth, "loss_smooth")
    golden.matches(total_norm(gradients(smooth, network)), "grad_norm_smooth")


def forward_train_mode(golden: Golden) -> None:
    network = golden.transformer().train().requires_grad_(True)
    kept = np.repeat([1 - rate for rate in network.drop_path_rates if rate > 0], 2)
    golden.compare(kept, golden.arrays["path_keep_prob"], rtol=1e-7, name="path_keep_prob")
    # Recorded is whether a branch was kept: a uniform of 0 keeps it, one of 1 does not.
    noise = RecordedNoise([golden.tensor("label_uniform"), 1 - golden.tensor("path_keep").T])
    logits = network(golden.tensor("label"), golden.tensor("x"), noise)
    assert noise.used_up()
    golden.matches(logits, "logits")
    loss = F.cross_entropy(logits.flatten(0, 1), golden.tensor("target").flatten())
    golden.matches(loss, "loss")
    golden.matches(total_norm(gradients(loss, network)), "grad_norm")


def forward_eval_drop(golden: Golden) -> None:
    network, labels, x = golden.transformer(), golden.tensor("label"), golden.tensor("x")
    noise = RecordedNoise([golden.tensor("label_uniform")])
    logits = network(labels, x, noise)
    assert noise.used_up()
    golden.matches(logits, "logits")
    golden.matches((logits != network(labels, x)).any(dim=(1, 2)), "dropped")


def sample(golden: Golden) -> None:
    vqvae, network, labels = golden.tokenizer(), golden.transformer(), golden.tensor("label")
    keywords = dict(golden.case["config"]["sampler"])
    settings = VARSettings(guidance=keywords.pop("cfg"), **keywords)
    none = torch.ones(len(labels), network.length, network.vocab)  # where one token is left, draws do not matter
    recorded = [
        golden.tensor(name) if name in golden.arrays else none.to(DEVICE) for name in ("exp_pick", "exp_gumbel")
    ]
    kinds = recorded if settings.smooth else recorded[:1]
    draws = [kind[:, positions] for positions in network.slices for kind in kinds]
    noise = RecordedNoise(draws)
    scales = list(sample_scales(network, vqvae, labels, noise, settings))
    assert noise.used_up()
    golden.matches(torch.cat([scale.logits for scale in scales], dim=1), "logits")
    if "idx" in golden.arrays:
        golden.matches(torch.cat([scale.tokens for scale in scales], dim=1), "idx")
    golden.matches(scales[-1].feature_map, "fhat")
    golden.matches(torch.stack([scale.feature_map.flatten(1).norm(dim=1) for scale in scales]), "fhat_norms")
    golden.matches(generate(network, vqvae, labels, RecordedNoise(draws), settings), "img")


def filtering(golden: Golden) -> None:
    logits = golden.tensor("logits")
    ties = torch.tensor([[len(row.unique()) < len(row) for row in image] for image in logits], device=DEVICE)
    assert ties.any()
    for i, combination in enumerate(golden.case["config"]["combos"]):
        kept = filter_logits(logits, **combination)
        keep, probabilities = kept.isfinite(), kept.softmax(dim=-1)
        tokens = draw_tokens(kept, golden.tensor("exp_pick"))
        assert torch.equal(keep.sum(-1), golden.tensor(f"keep_{i}").sum(-1))
        if combination["top_p"] > 0:  # which of several equals goes was up to the sort
            for got, name in ((keep, "keep"), (tokens, "idx"), (probabilities, "prob")):
                got[ties] = golden.tensor(f"{name}_{i}")[ties].to(got.dtype)
        golden.matches(keep, f"keep_{i}")
        golden.matches(tokens, f"idx_{i}")
        golden.matches(probabilities, f"prob_{i}")


def smooth_mixture(golden: Golden) -> None:
    config = golden.case["config"]
    table = torch.from_numpy(fill("quantize.embedding.weight", (config["vocab"], config["code_channels"]))).to(DEVICE)
    logits = golden.tensor("logits")
    logits = logits.masked_fill(logits <= -1e9, -torch.inf)
    for i, progress in enumerate(config["ratios"]):
        draws = golden.tensor("exp_gumbel")
        golden.matches(smooth_codes(logits, draws, table, progress), f"code_{i}")
        golden.matches(smooth_codes(logits, draws, torch.eye(len(table), device=DEVICE), progress), f"weights_{i}")
        golden.matches(smooth_temperature(progress), f"tau_{i}")


def merge(golden: Golden) -> None:
    network = golden.transformer()
    base = network.state_dict()
    moved = [name for name in base if base[name].is_floating_point() and not name.endswith((*KEPT, "zero_k_bias"))]
    tuned = {**base}
    for name in moved:
        tuned[name] = base[name] + 0.05 * torch.from_numpy(fill(f"aux:{name}", tuple(base[name].shape))).to(DEVICE)
    merged = merge_state(base, tuned, golden.case["config"]["w"])
    for name in golden.arrays:
        if name.startswith("merged/"):
            entries = merged[name.removeprefix("merged/")].flatten()
            golden.matches(entries[: len(golden.arrays[name])], name)
    network.load_state_dict(merged)
    golden.matches(network(golden.tensor("label"), golden.tensor("x")), "logits")


def finetune_steps(golden: Golden) -> None:
    """Through the project's own loop, on a set of the recorded images' tokens, in the recorded order."""
    case, images, labels = golden.case, golden.tensor("img"), golden.tensor("label")
    steps, batch = labels.shape
    vqvae = golden.tokenizer()
    tokens = torch.stack([vqvae.tokens(of_step) for of_step in images])
    golden.matches(tokens, "idx")
    model = VARModel({"transformer": case["config"]["transformer"]})
    model.network = golden.transformer()
    model.set_tokenizer(vqvae)
    before = copied_parameters(model.network)
    recipe = VARRecipe(
        batch_size=batch,
        lr=case["peak_lr"],
        total_images=case.get("total_images", steps * batch),
        max_norm=case["clip"],
    )
    run = train_on(model, recipe, TOKENS, tokens.flatten(0, 1).to(token_dtype(vqvae)), labels.flatten())
    golden.matches(np.array([entry["loss"] for entry in run.log]), "loss")
    golden.matches(run.grad_norms, "grad_norm")
    golden.compare([entry["lr"] for entry in run.log], golden.arrays["lr"], rtol=1e-6, name="lr")
    changes = {name: weights - before[name] for name, weights in copied_parameters(model.network).items()}
    golden.matches(torch.cat([change.flatten() for change in changes.values()]).norm(), "moved")
    for name in golden.arrays:
        if name.startswith("delta/"):
            entries = changes[name.removeprefix("delta/")].flatten()[: len(golden.arrays[name])]
            share = number_in(case["tolerance"]["delta"], r"atol (\S+) \* peak learning rate", 1e-3)
            golden.compare(entries, golden.arrays[name], atol=share * case["peak_lr"], name=name)


def preprocess(golden: Golden) -> None:
    side, ratio = golden.case["config"]["final_resolution"], golden.case["config"]["resize_ratio"]
    assert ratio == ENLARGEMENT
    for i, (top, left) in enumerate(golden.arrays["crop_offsets"].tolist()):
        image = torch.from_numpy(golden.arrays[f"image_{i}"]).permute(2, 0, 1)
        crop = enlarge(image, round(ratio * side))[:, top : top + side, left : left + side]
        golden.compare(from_uint8(crop), golden.arrays[f"out_{i}"], atol=1e-6, name=f"out_{i}")


HANDLERS: dict[str, Callable[[Golden], None]] = {
    "tokenizer": tokenizer,
    "quantiser": quantiser,
    "forward": forward,
    "forward_train_mode": forward_train_mode,
    "forward_eval_drop": forward_eval_drop,
    "sample": sample,
    "filter": filtering,
    "smooth_mixture": smooth_mixture,
    "merge": merge,
    "finetune_steps": finetune_steps,
    "preprocess": preprocess,
}


CPU_ONLY = {"preprocess"}
"""kinds that do not depend on the device"""


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, record_property: Callable[[str, object], None]) -> None:
    golden = Golden(name)
    run_case(golden, HANDLERS, record_property, CPU_ONLY)


@pytest.mark.parametrize("name", SCRIPTS["balanced_labels"])
def test_labels_of_an_evaluation_are_those_of_the_published_program(name: str) -> None:
    expected = SCRIPTS["balanced_labels"][name]
    num_images, seed = map(int, re.findall(r"\d+", name))
    labels = balanced_labels(num_images, PUBLISHED["var_d16"].network["classes"], seed)
    assert labels[: len(expected["first"])].tolist() == expected["first"]
    assert labels[-len(expected["last"]) :].tolist() == expected["last"]
    assert hashlib.sha256(labels.numpy().astype("<i8").tobytes()).hexdigest() == expected["sha256_int64_le"]


def test_images_become_bytes_by_the_published_rule() -> None:
    case = next(case for case in CASES.values() if case["kind"] == "sample")
    model = VARModel({"transformer": case["config"]["transformer"]})
    model.set_tokenizer(VQVAE(**case["config"]["tokenizer"]))
    images = torch.tensor(SCRIPTS["uint8"]["input"]).view(1, 3, 2, -1)
    with mock.patch.object(model_module, "generate", return_value=images):
        sampled = model.sample(RecordedNoise([]), torch.zeros(1, dtype=torch.int64), model.default_settings)
    assert sampled.flatten().tolist() == SCRIPTS["uint8"]["output"]


@pytest.mark.parametrize("schedule", [*SCRIPTS["finetune_schedule"], *SCRIPTS["finetune_schedule_paper"].values()])
def test_learning_rates_and_snapshots_are_those_of_the_published_loop(schedule: dict) -> None:
    batch, total = schedule["global_batch"], schedule["total_images"]
    recipe = VARRecipe(batch_size=batch, lr=schedule["target_lr"], total_images=total)
    steps = snapshot_steps(batch, total, schedule["save_interval"])
    assert steps[-1] == schedule["optimiser_steps"]
    rates = [recipe.lr_at(step * batch) for step in range(schedule["optimiser_steps"])]
    first = schedule.get("lr") or schedule["first_lr"]
    np.testing.assert_allclose(rates[: len(first)], first, rtol=1e-12)
    np.testing.assert_allclose(rates[-1], schedule.get("last_lr", first[-1]), rtol=1e-12)
    # The loop saves the base too, and not what the last step leads to.
    saved = [0, *steps[:-1]]
    for entry in schedule["saved"]:
        assert entry["steps_done"] in saved
        assert entry["file"] == f"ar-ckpt-images_{entry['steps_done'] * batch}.pth"
    assert len(saved) == schedule.get("n_saved", len(schedule["saved"]))


def test_images_are_visited_in_the_published_order_by_each_process() -> None:
    expected = SCRIPTS["data_order"]
    world = expected["world"]
    for rank, epochs in enumerate(expected["batches"]):
        for epoch, batches in enumerate(epochs):
            order = epoch_order(expected["dataset"], expected["global_batch"], epoch, world)
            local = torch.tensor(order).view(len(batches), world, -1)[:, rank]
            assert local.tolist() == batches
