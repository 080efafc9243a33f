"""What VAR published: its networks by name, and that sampling them is fast, exact and each image's own affair."""

# ruff: noqa: N999 - named after the architecture, as its folder is spelled

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from neon.errors import RequestError
from neon.noise import ImageNoise
from tests.replay import RecordedNoise
from VAR import quantizer
from VAR.published import PATCH_NUMS, PUBLISHED, TOKENIZER, published_settings, recognise, recognise_tokenizer
from VAR.quantizer import phi_of_scales
from VAR.sampler import VARSettings, draw_tokens, filter_logits, generate, generate_tokens, sample_scales
from VAR.transformer import VAR
from VAR.vqvae import USAGE_BUFFER, VQVAE, fit_usage_buffer

MANIFESTS = {
    path.stem.removeprefix("manifest_"): json.loads(path.read_text())
    for path in (Path(__file__).parent / "golden" / "VAR").glob("manifest_*.json")
}
TRANSFORMERS = sorted(name for name, manifest in MANIFESTS.items() if manifest["_meta"]["network"] == "transformer")
TOKENIZERS = sorted(MANIFESTS.keys() - set(TRANSFORMERS))
SIDES = (1, 2, 3, 4)
LENGTH = sum(side**2 for side in SIDES)


def row_of(name: str) -> str:
    return MANIFESTS[name]["_meta"]["published_file"].removesuffix(".pth")


def on_meta(name: str) -> VAR | VQVAE:
    with torch.device("meta"):
        if name in TRANSFORMERS:
            return VAR(**PUBLISHED[row_of(name)].network)
        return VQVAE(**TOKENIZER, patch_nums=PATCH_NUMS[MANIFESTS[name]["_meta"]["resolution"]])


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {entry: tuple(value[0]) for entry, value in MANIFESTS[name].items() if entry != "_meta"}


def lively(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Larger weights than initial ones, so that tokens and classes matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator).mul_(parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vqvae() -> VQVAE:
    return lively(
        VQVAE(vocab=40, code_channels=6, base_channels=32, channel_mult=(1, 2), res_blocks=1, patch_nums=SIDES)
    )


@pytest.fixture(scope="module")
def transformer() -> VAR:
    return tiny_transformer()


def tiny_transformer(**keywords: object) -> VAR:
    chosen = {"classes": 5, "depth": 3, "width": 32, "heads": 2, "patch_nums": SIDES, "vocab": 40, "code_channels": 6}
    return lively(VAR(**{**chosen, **keywords}))


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_a_published_network_is_built_with_the_tensors_of_its_file_in_order(name: str) -> None:
    manifest = dict(MANIFESTS[name])
    meta = manifest.pop("_meta")
    network = on_meta(name)
    built = [(entry, list(tensor.shape), str(tensor.dtype)) for entry, tensor in network.state_dict().items()]
    assert built == [(entry, shape, f"torch.{dtype}") for entry, (shape, dtype) in manifest.items()]
    assert sum(parameter.numel() for parameter in network.parameters()) == meta["parameter_count"]


def test_every_published_transformer_has_a_row_with_the_keywords_of_its_file() -> None:
    assert len(MANIFESTS) == 7
    assert PUBLISHED.keys() == {row_of(name) for name in TRANSFORMERS}
    for name in TRANSFORMERS:
        row, meta = PUBLISHED[row_of(name)], MANIFESTS[name]["_meta"]
        assert row.network == {key: meta[key] for key in row.network}
        assert 16 * row.network["patch_nums"][-1] == meta["resolution"]
        network = on_meta(name)
        assert network.drop_path_rates[-1] == pytest.approx(meta["drop_path_max"])
        assert network.label_drop == meta["label_drop"]


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_a_published_network_is_recognised_by_its_shapes(name: str) -> None:
    if name in TRANSFORMERS:
        found = recognise(shapes_of(name))
        assert found == PUBLISHED[row_of(name)].network
        assert published_settings(json.loads(json.dumps(found))) == PUBLISHED[row_of(name)].settings
    else:
        assert recognise_tokenizer(shapes_of(name)) == TOKENIZER


@pytest.mark.parametrize(
    "keywords",
    [{}, {"shared_adaln": True}, {"l2_norm_attention": False, "width": 128}, {"mlp_ratio": 2.5}, {"depth": 1}],
)
def test_a_network_of_your_own_is_recognised_too(keywords: dict) -> None:
    network = tiny_transformer(**keywords)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = recognise(shapes, network.lvl_1L)
    assert found["patch_nums"] == list(SIDES)
    assert published_settings(found) is None
    VAR(**found).load_state_dict(network.state_dict())


@pytest.mark.parametrize("keywords", [{"phi_count": 0}, {"phi_count": 1}, {"phi_count": 3}, {"quant_conv_kernel": 1}])
def test_a_tokenizer_of_your_own_is_recognised_too(keywords: dict) -> None:
    tokenizer = VQVAE(
        vocab=9, code_channels=6, base_channels=32, channel_mult=(2, 1, 3), res_blocks=1, patch_nums=SIDES, **keywords
    )
    found = recognise_tokenizer({name: tuple(tensor.shape) for name, tensor in tokenizer.state_dict().items()})
    VQVAE(**found, patch_nums=SIDES).load_state_dict(tokenizer.state_dict())
    assert found | keywords == found


def test_what_is_missing_from_another_network_is_named() -> None:
    shapes = shapes_of(TRANSFORMERS[0])
    with pytest.raises(RequestError, match=r"word_embed\.weight.*transformer of VAR"):
        recognise({name: shape for name, shape in shapes.items() if not name.startswith("word_embed")})
    with pytest.raises(RequestError, match=r"quantize\.embedding\.weight.*tokenizer of VAR"):
        recognise_tokenizer(shapes)
    with pytest.raises(RequestError, match="681 positions; expected 680 or 2240"):
        recognise({**shapes, "lvl_1L": (1, 681)})


def test_the_tokenizer_file_of_one_resolution_fits_the_other(vqvae: VQVAE) -> None:
    longer = VQVAE(**{**tokenizer_keywords(), "patch_nums": (1, 2, 3, 4, 5)})
    state = vqvae.state_dict()
    longer.load_state_dict(fit_usage_buffer(state, 5))
    assert torch.equal(longer.quantize.embedding.weight, vqvae.quantize.embedding.weight)
    assert len(longer.state_dict()[USAGE_BUFFER]) == 5
    counted = {**state, USAGE_BUFFER: torch.ones_like(state[USAGE_BUFFER])}
    assert torch.equal(fit_usage_buffer(counted, len(state[USAGE_BUFFER]))[USAGE_BUFFER], counted[USAGE_BUFFER])


def tokenizer_keywords() -> dict:
    return {"vocab": 40, "code_channels": 6, "base_channels": 32, "channel_mult": (1, 2), "res_blocks": 1}


def test_scales_share_the_residual_convolutions_as_published() -> None:
    # Ties at 2/9 and 7/9 of the way, and at the middle, go to the finer scales' convolution.
    assert {count: "".join(map(str, phi_of_scales(count, 4))) for count in range(2, 11)} == {
        2: "03", 3: "023", 4: "0123", 5: "01223", 6: "001233", 7: "0012233", 8: "00112233", 9: "001122233",
        10: "0011122333",
    }  # fmt: skip


def test_codes_are_looked_up_in_pieces_as_if_at_once(vqvae: VQVAE) -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    at_once = vqvae.tokens(images)
    with mock.patch.object(quantizer, "DISTANCES_AT_ONCE", 100):
        assert torch.equal(vqvae.tokens(images), at_once)
    assert torch.equal(vqvae.tokens(images[1:2]), at_once[1:2])


def test_images_of_another_size_are_refused_by_name(vqvae: VQVAE) -> None:
    with pytest.raises(ValueError, match="16 x 16; expected 8 x 8"):
        vqvae.tokens(torch.zeros(1, 3, 16, 16))


def test_training_a_tokenizer_pulls_codes_to_the_encoder_and_a_quarter_as_hard_back() -> None:
    quantize = quantizer.MultiScaleQuantizer(vocab=40, code_channels=6, patch_nums=SIDES)
    features = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    quantised, loss = quantize.training_forward(features)
    sums = torch.stack(quantize.feature_maps(quantize.encode(features.detach())))
    torch.testing.assert_close(quantised, sums[-1])
    codes, convs = quantize.embedding.weight, quantize.quant_resi["qresi_ls"][1].weight
    squares = (sums - features).square().mean()
    torch.testing.assert_close(loss, 1.25 * squares)
    pulls = torch.autograd.grad(loss, (codes, convs, features), retain_graph=True)
    expected = torch.autograd.grad(squares, (codes, convs, features))
    for pull, whole, weight in zip(pulls, expected, (1, 1, 0.25), strict=True):
        torch.testing.assert_close(pull, weight * whole)
    (through,) = torch.autograd.grad(quantised.sum(), features)
    assert torch.equal(through, torch.ones_like(features))


def test_every_part_of_a_tokenizer_learns_and_it_reconstructs_better_after_a_few_steps() -> None:
    torch.manual_seed(0)
    tokenizer = VQVAE(**tokenizer_keywords(), patch_nums=SIDES)
    images = torch.linspace(-1, 1, 8).expand(4, 3, 8, 8) * torch.tensor([1, -1, 0.5, 0])[:, None, None, None]
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
    errors = []
    for _ in range(12):
        reconstructions, loss = tokenizer.training_forward(images)
        errors.append((reconstructions - images).square().mean())
        optimizer.zero_grad()
        (errors[-1] + loss).backward()
        assert all(p.grad is not None for p in tokenizer.parameters())
        optimizer.step()
    assert errors[-1] < errors[0] / 2


def test_in_training_branches_are_dropped_at_their_rate_and_the_rest_makes_up_for_it() -> None:
    network = tiny_transformer(depth=2, drop_path_max=0.2, label_drop=0.0)
    codes = torch.randn(2, LENGTH - 1, 6, generator=torch.Generator().manual_seed(0))

    def logits(draw: float) -> Tensor:
        noise = RecordedNoise([torch.ones(2), torch.full((2, 2), draw)])  # two branches of the second block
        return network(torch.tensor([0, 1]), codes, noise)

    network.train()
    kept, dropped = logits(0.0), logits(1.0)
    assert torch.equal(logits(0.79), kept) and torch.equal(logits(0.81), dropped)
    for weight in (network.blocks[1].ada_lin[1].weight, network.blocks[1].ada_lin[1].bias):
        weight[: 2 * 32] /= 0.8  # what multiplies the two branches
    torch.testing.assert_close(kept, network(torch.tensor([0, 1]), codes), rtol=1e-5, atol=1e-5)


def test_positions_see_their_own_scale_and_coarser_ones_only(transformer: VAR) -> None:
    codes = torch.randn(1, LENGTH - 1, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2])
    logits = transformer(labels, codes)
    changed = codes.clone()
    changed[:, 6] += 1  # a position of the third scale, the eighth of the sequence
    differs = (transformer(labels, changed) != logits).any(dim=2)[0]
    assert not differs[:5].any() and differs[5:].all()
    # The input may end after any scale.
    torch.testing.assert_close(transformer(labels, codes[:, :4]), logits[:, :5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keywords", [{}, {"shared_adaln": True}, {"l2_norm_attention": False}])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_sampling_scale_by_scale_equals_computing_all_coarser_scales_again(
    vqvae: VQVAE, keywords: dict, guidance: float
) -> None:
    network = tiny_transformer(**keywords)
    labels, settings = torch.tensor([0, 4, 5]), VARSettings(guidance=guidance, top_k=20, top_p=0.9)
    scales = list(sample_scales(network, vqvae, labels, ImageNoise([1, 2, 3]), settings))
    tokens = torch.cat([scale.tokens for scale in scales], dim=1)
    codes = vqvae.quantize.teacher_forcing_input(tokens)
    noise, drawn = ImageNoise([1, 2, 3]), []
    for k, (scale, positions) in enumerate(zip(scales, network.slices, strict=True)):
        known = codes[:, : positions.stop - 1]
        with_class = network(labels, known)[:, positions]
        without = network(torch.full_like(labels, 5), known)[:, positions]
        logits = with_class + guidance * k / (len(SIDES) - 1) * (with_class - without)
        torch.testing.assert_close(scale.logits, logits, rtol=1e-4, atol=1e-4)
        drawn.append(draw_tokens(filter_logits(logits, 20, 0.9), noise.exponential(SIDES[k] ** 2, 40)))
    assert torch.equal(torch.cat(drawn, dim=1), tokens)
    assert len(tokens.unique()) > 10


def test_an_image_does_not_depend_on_the_batch_it_is_sampled_in(transformer: VAR, vqvae: VQVAE) -> None:
    seeds, labels = [3, 1, 4, 1, 5], torch.tensor([0, 1, 2, 3, 5])
    for settings in (VARSettings(guidance=2.0), VARSettings(guidance=0.0, top_k=0, top_p=0.0)):
        together = generate_tokens(transformer, vqvae, labels, ImageNoise(seeds), settings)
        for i in range(len(seeds)):
            own = generate_tokens(transformer, vqvae, labels[i : i + 1], ImageNoise(seeds[i : i + 1]), settings)
            assert torch.equal(own, together[i : i + 1])
    assert not torch.equal(together[1], together[3])  # one seed, two classes


def test_images_are_what_the_tokens_decode_to(transformer: VAR, vqvae: VQVAE) -> None:
    labels, settings = torch.tensor([1, 2]), VARSettings()
    images = generate(transformer, vqvae, labels, ImageNoise([1, 2]), settings)
    tokens = generate_tokens(transformer, vqvae, labels, ImageNoise([1, 2]), settings)
    assert images.dtype == torch.float32 and images.shape == (2, 3, 8, 8)
    assert 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(images * 2 - 1, vqvae.decode(vqvae.quantize.feature_maps(tokens)[-1]))


def test_guidance_towards_no_class_is_none_and_towards_a_class_is_some(transformer: VAR, vqvae: VQVAE) -> None:
    def tokens(label: int, guidance: float) -> Tensor:
        settings = VARSettings(guidance=guidance)
        return generate_tokens(transformer, vqvae, torch.tensor([label]), ImageNoise([1]), settings)

    assert torch.equal(tokens(5, 4.0), tokens(5, 0.0))
    assert not torch.equal(tokens(1, 4.0), tokens(1, 0.0))
    assert torch.equal(tokens(1, 4.0)[:, :1], tokens(1, 0.0)[:, :1])  # it begins with nothing


def test_a_low_temperature_draws_the_likeliest_tokens(transformer: VAR, vqvae: VQVAE) -> None:
    labels = torch.tensor([1, 2])
    cold, greedy = (
        generate_tokens(transformer, vqvae, labels, ImageNoise([1, 2]), settings)
        for settings in (VARSettings(temperature=1e-4, top_k=0, top_p=0), VARSettings(top_k=1))
    )
    assert torch.equal(cold, greedy)


def test_tokens_are_drawn_with_the_probabilities_of_their_logits() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -math.inf])
    tokens = draw_tokens(logits, ImageNoise([0]).exponential(40000, 5)[0])
    frequencies = torch.bincount(tokens, minlength=5) / len(tokens)
    torch.testing.assert_close(frequencies, logits.softmax(0), rtol=0, atol=0.01)
    assert frequencies[4] == 0


def test_smooth_images_differ_from_drawn_ones_and_have_no_tokens(transformer: VAR, vqvae: VQVAE) -> None:
    labels, smooth = torch.tensor([1]), VARSettings(smooth=True)
    images = [generate(transformer, vqvae, labels, ImageNoise([1]), s) for s in (smooth, VARSettings())]
    assert not torch.allclose(images[0], images[1], atol=0.01)
    with pytest.raises(ValueError, match="smooth"):
        generate_tokens(transformer, vqvae, labels, ImageNoise([1]), smooth)


@pytest.mark.parametrize(
    "wrong",
    [{"guidance": -0.1}, {"guidance": math.nan}, {"top_k": -1}, {"top_p": 1.1}, {"temperature": 0.0}],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VARSettings(**wrong)


@pytest.mark.parametrize("sides", [(), (4,), (1, 2, 2), (2, 1), (0, 1)])
def test_scales_that_do_not_grow_are_refused(sides: tuple[int, ...]) -> None:
    for build in (VAR, VQVAE):
        with torch.device("meta"), pytest.raises(ValueError, match="patch_nums"):
            build(patch_nums=sides or (1,))


@pytest.mark.parametrize("settings", [VARSettings(), VARSettings(guidance=0, smooth=True)])
@pytest.mark.parametrize("shared_adaln", [False, True])
def test_sampling_and_training_never_make_the_host_wait_for_a_value(shared_adaln: bool, settings: VARSettings) -> None:
    # Tensors on the meta device hold no values: reading one, as a GPU would have to be waited for, fails.
    with torch.device("meta"):
        transformer = VAR(depth=3, width=64, heads=1, patch_nums=SIDES, shared_adaln=shared_adaln)
        vqvae = VQVAE(base_channels=32, patch_nums=SIDES)
        labels = torch.empty(2, dtype=torch.int64)
    kinds = 2 if settings.smooth else 1
    draws = [torch.empty(2, side**2, 4096, device="meta") for side in SIDES for _ in range(kinds)]
    images = generate(transformer, vqvae, labels, RecordedNoise(draws), settings)
    assert images.shape == (2, 3, 64, 64)
    tokens = vqvae.tokens(images)
    draws = [
        torch.empty(2, device="meta"),
        torch.empty(2, 4, device="meta"),
    ]  # of labels, of two branches in two blocks
    logits = transformer.train()(labels, vqvae.quantize.teacher_forcing_input(tokens), RecordedNoise(draws))
    assert logits.shape == (2, LENGTH, 4096)
    logits.sum().backward()


def test_half_precision_keeps_logits_and_images_in_float32_and_close(transformer: VAR, vqvae: VQVAE) -> None:
    labels = torch.tensor([1, 2])
    codes = torch.randn(2, LENGTH - 1, 6, generator=torch.Generator().manual_seed(0))
    pictures = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact = transformer(labels, codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = transformer(labels, codes)
        scales = list(sample_scales(transformer, vqvae, labels, ImageNoise([1, 2]), VARSettings()))
        images = generate(transformer, vqvae, labels, ImageNoise([1, 2]), VARSettings())
        tokens = vqvae.tokens(pictures)
    assert logits.dtype == scales[-1].logits.dtype == scales[-1].feature_map.dtype == images.dtype == torch.float32
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()
    assert torch.equal(tokens, vqvae.tokens(pictures))


def test_an_untrained_network_starts_as_published() -> None:
    torch.manual_seed(0)
    width, depth = 192, 4
    network = VAR(classes=50, depth=depth, width=width, heads=3, patch_nums=SIDES, vocab=300, code_channels=8)
    shared = VAR(classes=5, depth=2, width=width, heads=3, patch_nums=SIDES, vocab=30, shared_adaln=True)
    std = math.sqrt(1 / 3 / width)
    block, gammas = network.blocks[1], 2 * width
    for weight, expected in (
        (network.class_emb.weight, std),
        (network.pos_1LC, std),
        (block.attn.mat_qkv.weight, std),
        (block.attn.proj.weight, std / math.sqrt(2 * depth)),
        (block.ffn.fc2.weight, std / math.sqrt(2 * depth)),
        (block.ada_lin[1].weight[:gammas], std * 1e-5),
        (block.ada_lin[1].weight[gammas:], std / 2),
        (network.head_nm.ada_lin[1].weight, std / 2),
        (network.head.weight, std * 0.02),
        (shared.shared_ada_lin[1].weight, std),
        (shared.blocks[1].ada_gss[:, :, :2], 1e-5 / math.sqrt(width)),
        (shared.blocks[1].ada_gss[:, :, 2:], 0.5 / math.sqrt(width)),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.1)
    assert torch.all(block.attn.scale_mul_1H11 == math.log(4))
    for name, tensor in network.state_dict().items():
        assert not (name.endswith("bias") and tensor.any()), name
