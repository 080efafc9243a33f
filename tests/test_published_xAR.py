"""What xAR published: its networks by name, and that sampling them is fast, exact and each image's own affair."""

# ruff: noqa: N999 - named after the architecture, as its folder is spelled

import json
import math
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from neon.data.images import from_uint8
from neon.errors import RequestError
from neon.nn.autoencoder import as_bytes
from neon.noise import ImageNoise
from tests.replay import RecordedNoise
from xAR import transformer as transformer_module
from xAR.finetune import PRESETS
from xAR.loss import flow_loss
from xAR.published import PUBLISHED, published_settings, recognise
from xAR.recipe import XARRecipe, images_in_batches
from xAR.sampler import XARSettings, flow_times, generate_latents
from xAR.transformer import XAR, from_cells, time_index, to_cells, xar_base
from xAR.vae import AutoencoderKL, center_crop, posterior

MANIFESTS = {
    path.stem.removeprefix("manifest_"): json.loads(path.read_text())
    for path in (Path(__file__).parent / "golden" / "xAR").glob("manifest_*.json")
}
TRANSFORMERS = sorted(name for name in MANIFESTS if name.startswith("xar_"))


def on_meta(name: str) -> XAR | AutoencoderKL:
    with torch.device("meta"):
        return getattr(transformer_module, name)() if name in TRANSFORMERS else AutoencoderKL()


def lively(network: XAR, seed: int = 0) -> XAR:
    """Larger weights than initial ones, so that classes and times matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator).mul_(parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
    return network.eval().requires_grad_(False)


def tiny(**keywords: object) -> XAR:
    """Cells of 2 x 2 positions with 3 channels, 5 classes."""
    chosen = {
        "classes": 5, "width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 2, "latent_channels": 3, "grid": 4,
    }  # fmt: skip
    return lively(XAR(**{**chosen, **keywords}))


@pytest.fixture(scope="module")
def transformer() -> XAR:
    return tiny()


def latents(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_a_published_network_is_built_with_the_tensors_of_its_file_in_order(name: str) -> None:
    manifest = dict(MANIFESTS[name])
    meta = manifest.pop("_meta")
    network = on_meta(name)
    built = [(entry, list(tensor.shape), str(tensor.dtype)) for entry, tensor in network.state_dict().items()]
    assert built == [(entry, shape, f"torch.{dtype}") for entry, (shape, dtype) in manifest.items()]
    assert len(built) == meta["entries"]
    assert sum(parameter.numel() for parameter in network.parameters()) == meta["parameters"]


def test_every_published_transformer_has_a_row_and_is_recognised_by_its_shapes() -> None:
    assert PUBLISHED.keys() == set(TRANSFORMERS) and len(MANIFESTS) == 4
    for name in TRANSFORMERS:
        shapes = {entry: value[0] for entry, value in MANIFESTS[name].items() if entry != "_meta"}
        found = json.loads(json.dumps(recognise(shapes)))
        assert found == PUBLISHED[name].network
        assert published_settings(found) == PUBLISHED[name].settings


@pytest.mark.parametrize(
    "keywords", [{}, {"cells_per_side": 4}, {"grid": 6, "cells_per_side": 3}, {"encoder_depth": 3}]
)
def test_a_network_of_your_own_is_recognised_too(keywords: dict) -> None:
    network = tiny(**keywords)
    found = recognise({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, network.mask)
    assert published_settings(found) is None
    rebuilt = XAR(**found)
    assert (rebuilt.grid, rebuilt.cells_per_side) == (network.grid, network.cells_per_side)
    rebuilt.load_state_dict(network.state_dict())


def test_what_is_missing_from_another_network_is_named() -> None:
    with pytest.raises(RequestError, match=r"no class_emb\.weight.*transformer of xAR"):
        recognise({"encoder.conv_in.weight": (128, 3, 3, 3)})


def test_the_published_runs_are_told_by_their_numbers() -> None:
    base, large, huge = (PUBLISHED[f"xar_{size}"] for size in ("base", "large", "huge"))
    assert [(row.settings.num_steps, row.settings.guidance) for row in (base, large, huge)] == [
        (40, 2.7), (50, 2.3), (50, 2.2),
    ]  # fmt: skip
    assert huge.fid_neon is None
    for row, rate in ((base, 1e-6 * 3_750_144 / 29_952 / 250), (large, 1e-6 * 3_750_144 / 29_952 / 10_000)):
        assert row.fid_base is not None and row.fid_neon is not None
        assert row.fid_neon < row.fid_base
        recipe = XARRecipe(warmup_epochs=PRESETS[row.name].warmup_epochs)
        assert recipe.lr_at(3_750_144) == pytest.approx(rate)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="width is 36 and heads 2"):
        tiny(width=36)
    with pytest.raises(ValueError, match="grid is 5 and cells_per_side 2"):
        tiny(grid=5)
    with pytest.raises(ValueError, match="cells_per_side 1"):
        tiny(cells_per_side=1)


@pytest.mark.parametrize("wrong", [{"num_steps": 2}, {"guidance": math.nan}, {"guidance": math.inf}])
def test_settings_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        XARSettings(**wrong)


def test_cells_are_squares_of_the_latent_row_by_row() -> None:
    latent = torch.arange(16).view(1, 1, 4, 4)
    assert to_cells(latent, 2)[0, :, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    for cells_per_side in (2, 3, 6):
        other = torch.randn(2, 3, 6, 6)
        assert torch.equal(from_cells(to_cells(other, cells_per_side)), other)


def test_positions_see_their_own_cell_and_earlier_ones_only(transformer: XAR) -> None:
    cells, times, labels = to_cells(latents(1), 2), torch.tensor([[100, 200, 300, 400]]), torch.tensor([2])
    velocity = transformer(cells, times, labels)
    changed = cells.clone()
    changed[:, 2, 1] += 1
    later = times.clone()
    later[:, 2] += 1
    for differs in (transformer(changed, times, labels) != velocity, transformer(cells, later, labels) != velocity):
        assert [bool(cell.any()) for cell in differs[0]] == [False, False, True, True]
        assert differs[0, 2:].any(dim=2).all()
    # There may be fewer cells.
    torch.testing.assert_close(transformer(cells[:, :3], times[:, :3], labels), velocity[:, :3])


@pytest.mark.parametrize("keywords", [{}, {"grid": 6, "cells_per_side": 3}])
@pytest.mark.parametrize(
    "settings",
    [XARSettings(num_steps=4, guidance=3.0), XARSettings(num_steps=3, guidance=1.0, stochastic=False)],
    ids=["guided", "deterministic"],
)
def test_sampling_cell_by_cell_equals_computing_all_earlier_cells_again(settings: XARSettings, keywords: dict) -> None:
    network, labels = tiny(**keywords), torch.tensor([0, 4, 5])
    sampled = to_cells(generate_latents(network, labels, ImageNoise([1, 2, 3]), settings), network.cells_per_side)
    noise, times = ImageNoise([1, 2, 3]), flow_times(settings)
    assert len(times) == settings.num_steps + 1
    for i in range(network.num_cells):
        scale = 1 + (settings.guidance - 1) * i / (network.num_cells - 1)
        x = noise.normal(network.cell_length, 3).double()
        draws = torch.zeros(3, settings.num_steps, network.cell_length, 3, dtype=torch.float64)
        if settings.stochastic:
            draws[:, :-1] = noise.normal(settings.num_steps - 1, network.cell_length, 3, dtype=torch.float64)
        for j, (t, after) in enumerate(pairwise(times)):
            indices = torch.zeros(3, i + 1, dtype=torch.int64)  # cells before are clean
            indices[:, i] = time_index(t)
            cells = torch.cat([sampled[:, :i], x.float()[:, None]], dim=1)
            with_class, without = (
                network(cells, indices, each)[:, i].double() for each in (labels, torch.full_like(labels, 5))
            )
            v = without + scale * (with_class - without)
            if settings.stochastic:  # by the score of the path, which 2t of diffusion asks for
                score = -((1 - t) * v + x) / t
                v = v - t * score
            x = x + (after - t) * v + (2 * t * (t - after)).sqrt() * draws[:, j]
        torch.testing.assert_close(sampled[:, i], x.float(), rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_the_batch_it_is_sampled_in(transformer: XAR) -> None:
    seeds, labels = [3, 1, 4, 1, 5], torch.tensor([0, 1, 2, 3, 5])
    for settings in (XARSettings(num_steps=3), XARSettings(num_steps=3, guidance=1.0, stochastic=False)):
        together = generate_latents(transformer, labels, ImageNoise(seeds), settings)
        for i in range(len(seeds)):
            own = generate_latents(transformer, labels[i : i + 1], ImageNoise(seeds[i : i + 1]), settings)
            torch.testing.assert_close(own, together[i : i + 1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[1], together[3], atol=0.01)  # one seed, two classes


def test_guidance_begins_with_the_second_cell_and_is_none_at_1_or_less_or_towards_no_class(transformer: XAR) -> None:
    def cells(label: int, guidance: float) -> Tensor:
        settings = XARSettings(num_steps=3, guidance=guidance)
        return to_cells(generate_latents(transformer, torch.tensor([label]), ImageNoise([1]), settings), 2)

    plain = cells(1, 1.0)
    assert torch.equal(cells(1, 0.5), plain) and torch.equal(cells(1, -1.0), plain)
    guided = cells(1, 4.0)
    assert torch.equal(guided[:, 0], plain[:, 0])
    assert all(not torch.allclose(guided[:, i], plain[:, i], atol=0.01) for i in (1, 2, 3))
    torch.testing.assert_close(cells(5, 4.0), cells(5, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 4 * 3 + 3), (2.0, 3 + 2 * (3 * 3 + 3))])
def test_nothing_is_computed_without_a_class_that_is_then_thrown_away(
    transformer: XAR, guidance: float, rows: int
) -> None:
    # Per image: 3 calls for each of 4 cells, and one each to remember 3; twice as many rows where guided.
    seen: list[int] = []
    hook = transformer.pred.register_forward_hook(lambda *args: seen.append(len(args[2])))
    generate_latents(transformer, torch.tensor([1]), ImageNoise([1]), XARSettings(num_steps=3, guidance=guidance))
    hook.remove()
    assert sum(seen) == rows


@pytest.mark.parametrize("stochastic", [True, False])
def test_sampling_and_training_never_make_the_host_wait_for_a_value(stochastic: bool) -> None:
    # Tensors on the meta device hold no values: reading one, as a GPU would have to be waited for, fails.
    with torch.device("meta"):
        network = XAR(width=32, heads=1, encoder_depth=1, decoder_depth=1)
        labels = torch.empty(2, dtype=torch.int64)
        vae = AutoencoderKL(ch=32)
        kinds = [(64, 16), (2, 64, 16)] if stochastic else [(64, 16)]
        draws = [torch.empty(2, *shape) for _ in range(4) for shape in kinds]
        settings = XARSettings(num_steps=3, stochastic=stochastic)
        found = generate_latents(network, labels, RecordedNoise(draws), settings)
        images = vae.decode(found)
        assert images.shape == (2, 3, 256, 256)
        encoded = vae.posterior_sample(vae.moments(images), torch.empty(2, 16, 16, 16))
        draws = [torch.empty(2), torch.empty(2, 4), torch.empty(2, 4, 64, 16)]
        loss = flow_loss(network.train(), encoded, labels, RecordedNoise(draws))
    assert loss.shape == (2,)
    loss.sum().backward()


def test_half_precision_keeps_latents_and_losses_in_float32_and_close(transformer: XAR) -> None:
    labels, settings = torch.tensor([1, 2]), XARSettings(num_steps=4)
    exact = generate_latents(transformer, labels, ImageNoise([1, 2]), settings)
    loss = flow_loss(transformer, latents(2), labels, ImageNoise([1, 2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = generate_latents(transformer, labels, ImageNoise([1, 2]), settings)
        half = flow_loss(transformer, latents(2), labels, ImageNoise([1, 2]))
    assert found.dtype == half.dtype == torch.float32
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()
    torch.testing.assert_close(half, loss, rtol=0.05, atol=0)


def test_the_loss_of_an_image_is_its_own_and_needs_its_class_unless_dropped(transformer: XAR) -> None:
    x, labels, seeds = latents(3), torch.tensor([1, 2, 3]), [5, 6, 7]
    together = flow_loss(transformer, x, labels, ImageNoise(seeds))
    for i in range(3):
        own = flow_loss(transformer, x[i : i + 1], labels[i : i + 1], ImageNoise(seeds[i : i + 1]))
        torch.testing.assert_close(own, together[i : i + 1])
    classless = tiny(label_drop=1.0)
    dropped = flow_loss(classless, x, labels, ImageNoise(seeds))
    assert torch.equal(dropped, flow_loss(classless, x, labels.flip(0), ImageNoise(seeds)))
    assert not torch.allclose(dropped, together)


def test_a_network_learns_what_it_is_shown_and_samples_it() -> None:
    torch.manual_seed(0)
    network = XAR(
        classes=2, width=64, heads=2, encoder_depth=1, decoder_depth=1, latent_channels=1, grid=4, label_drop=0.0
    ).train()
    pictures = torch.stack(
        [torch.linspace(-1, 1, 4).expand(1, 4, 4), torch.linspace(1, -1, 4)[:, None].expand(1, 4, 4)]
    )
    labels = torch.arange(2).repeat(32)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(150):
        optimizer.zero_grad()
        flow_loss(network, pictures[labels], labels, ImageNoise(range(64 * step, 64 * step + 64))).mean().backward()
        optimizer.step()
    for stochastic in (True, False):
        settings = XARSettings(num_steps=12, guidance=1.0, stochastic=stochastic)
        sampled = generate_latents(network.eval(), torch.arange(2).repeat(8), ImageNoise(range(16)), settings)
        assert (sampled - pictures.repeat(8, 1, 1, 1)).abs().mean() < 0.25


def test_dropout_acts_in_training_only_and_can_be_set_anew() -> None:
    network, labels, times = tiny(), torch.tensor([1]), torch.tensor([[500] * 4])
    cells = to_cells(latents(1), 2)
    assert torch.equal(network(cells, times, labels), network(cells, times, labels))
    network.train()
    assert not torch.equal(network(cells, times, labels), network(cells, times, labels))
    network.set_dropout(0.0, 0.0)
    torch.testing.assert_close(network(cells, times, labels), network.eval()(cells, times, labels))


def test_an_untrained_network_starts_as_published() -> None:
    torch.manual_seed(0)
    network = XAR(width=192, heads=3, encoder_depth=1, decoder_depth=1)
    block = network.encoder_blocks[0]
    for weight, expected in (
        (network.class_emb.weight, 0.02),
        (network.encoder_pos_embed_learned, 0.02),
        (network.decoder_pos_embed_learned, 0.02),
        (block.attn.qkv.weight, math.sqrt(2 / (192 + 3 * 192))),
        (block.ada_lin[1].weight, math.sqrt(2 / (192 + 6 * 192))),
        (network.pred.weight, math.sqrt(2 / (192 + 16))),
        (network.time_embed.mlp[0].weight, math.sqrt(2 / (192 + 256))),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.1)
    for name, tensor in network.state_dict().items():
        assert not (name.endswith("bias") and tensor.any()), name
    assert torch.all(network.encoder_norm.weight == 1)


def test_weight_decay_spares_biases_and_normalisations() -> None:
    with torch.device("meta"):
        network = xar_base()
    decayed, spared = XARRecipe().optimizer(network).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.02, 0.0)
    counts = [(len(g["params"]), sum(p.numel() for p in g["params"])) for g in (decayed, spared)]
    assert counts == [(104, 172_432_128), (104, 206_096)]


def test_batches_of_an_epoch_are_those_of_the_published_loader() -> None:
    num_images, batch, world = 1000, 96, 4
    recipe = XARRecipe(batch_size=batch)
    whole = images_in_batches(num_images, batch)
    assert whole == 960 and XARRecipe().images_per_epoch == 29_952
    visits = recipe.visits(num_images, seed=1)
    for epoch in range(2):
        samplers = [DistributedSampler(range(num_images), world, rank, seed=1) for rank in range(world)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        local = torch.tensor([list(sampler) for sampler in samplers])[:, : whole // world].split(batch // world, dim=1)
        for theirs in local:
            assert sorted(islice(visits, batch)) == sorted(theirs.flatten().tolist())
    assert sorted(islice(recipe.visits(10, seed=0), 20)) == sorted([*range(10)] * 2)  # fewer than a batch


def test_the_average_of_weights_moves_by_steps_or_is_none() -> None:
    assert XARRecipe().averages and XARRecipe(batch_size=7).average_decay(0) == 0.9999
    assert not XARRecipe(ema_rate=0.0).averages


def test_pixels_survive_the_way_into_the_network_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    inputs = from_uint8(levels)
    assert (inputs.min(), inputs.max()) == (-1, 1)
    assert torch.equal(as_bytes(inputs, rounded=True), levels)
    assert (levels.int() - as_bytes(inputs).int()).abs().max() <= 1  # cut off, just below


def test_images_of_the_right_size_are_not_touched_by_the_crop() -> None:
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    assert torch.equal(center_crop(image, 8), image)
    wide = torch.cat([torch.zeros(3, 8, 2, dtype=torch.uint8), image, torch.zeros(3, 8, 2, dtype=torch.uint8)], dim=2)
    assert torch.equal(center_crop(wide, 8), image)


def test_samples_of_the_posterior_have_its_mean_and_spread() -> None:
    moments = torch.tensor([0.5, 2 * math.log(0.1)]).view(1, 2, 1, 1)
    draws = ImageNoise([0]).normal(1, 20_000, 1)
    samples = AutoencoderKL.posterior_sample(moments, draws) / 0.2325
    assert samples.mean().item() == pytest.approx(0.5, abs=0.01)
    assert samples.std().item() == pytest.approx(0.1, rel=0.02)
    assert posterior(torch.tensor([0.0, 99.0]).view(1, 2, 1, 1)).stddev.item() == pytest.approx(math.exp(10))
