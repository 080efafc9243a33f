"""What IMM published: its networks by name and shape, how they are sampled, and what the networks promise."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from imm.loss import IMMLoss
from imm.networks import MODELS, DiT, SongUNet
from imm.precond import IMMPrecond
from imm.published import PRESETS, PUBLISHED, canonical, published_row, recognise
from imm.sampler import IMMSettings, generate
from neon.checkpoint import TensorSpec

MANIFESTS = {
    path.stem.removeprefix("manifest_"): json.loads(path.read_text())
    for path in (Path(__file__).parent / "golden" / "imm").glob("manifest_*.json")
}
NETWORKS: dict[str, dict[str, Any]] = {
    "im256": PUBLISHED["imagenet256_ts_a2"].network,
    "cifar10": PUBLISHED["cifar10"].network,
    "cifar10_train": {**PUBLISHED["cifar10"].network, "augment_dim": 9},
}
"""keywords of IMMPrecond by manifest"""
COUNTS = {
    "XL": (676_735_504, 676_624_960, 677_012_224),
    "L": (459_399_184, 459_300_928, 459_645_184),
    "B": (131_288_080, 131_214_400, 131_472_640),
    "S": (33_203_728, 33_166_912, 33_296_128),
}
"""parameters of a DiT of ImageNet's latents with patches of 2, 4 and 8"""
SMALL_DIT = {"img_resolution": 8, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SMALL_UNET = {
    "img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 16, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [4],
}  # fmt: skip


def on_meta(keywords: dict[str, Any]) -> IMMPrecond:
    with torch.device("meta"):
        return IMMPrecond(**keywords)


def lively(network: nn.Module) -> Any:
    """Larger weights than initial ones, so that classes and times matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator).mul_(parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
    return network.eval().requires_grad_(False)


def dit(**keywords: Any) -> DiT:
    return lively(DiT(**{**SMALL_DIT, **keywords}))


def unet(**keywords: Any) -> SongUNet:
    return lively(SongUNet(**{**SMALL_UNET, **keywords}))


def images(channels: int) -> Tensor:
    return torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(1))


T, S = torch.tensor([900.0, 500.0, 300.0]), torch.tensor([700.0, 100.0, 0.0])
CLASSES = torch.eye(5)[[0, 4, 2]]


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_published_network_is_built_with_the_tensors_of_its_file_in_order(name: str) -> None:
    assert NETWORKS.keys() <= MANIFESTS.keys()
    manifest = dict(MANIFESTS[name])
    meta = manifest.pop("_meta")
    network = on_meta(NETWORKS[name])
    built = [(entry, list(tensor.shape), str(tensor.dtype)) for entry, tensor in network.state_dict().items()]
    assert built == [(entry, shape, f"torch.{dtype}") for entry, (shape, dtype) in manifest.items()]
    assert sum(parameter.numel() for parameter in network.parameters()) == meta["total_parameters"]
    assert [entry for entry, _ in network.named_buffers()] == meta["buffers"]
    frozen = [entry for entry, parameter in network.named_parameters() if not parameter.requires_grad]
    assert frozen == meta["parameters_not_requiring_grad_after_construction"]


@pytest.mark.parametrize("size", COUNTS)
def test_a_transformer_of_a_published_size_has_its_number_of_parameters(size: str) -> None:
    for patch_size, count in zip((2, 4, 8), COUNTS[size], strict=True):
        with torch.device("meta"):
            network = MODELS[f"DiT_{size}_{patch_size}"](img_resolution=32)
        assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("name", ["im256", "cifar10"])
def test_a_published_network_samples_without_the_host_waiting_for_a_value(name: str) -> None:
    # Tensors on the meta device hold no values: reading one, as a GPU would have to be waited for, fails.
    network = on_meta(NETWORKS[name])
    latents = torch.empty(2, network.img_channels, 32, 32, device="meta")
    labels = torch.empty(2, network.label_dim, device="meta") if network.label_dim else None
    row = published_row(NETWORKS[name])
    assert row is not None
    with mock.patch.object(torch, "autocast", lambda *args, **keywords: nullcontext()):  # which meta has not
        assert generate(network, latents, labels, row.settings).shape == latents.shape


def test_the_published_runs_are_told_by_their_numbers() -> None:
    ts_a2, s_a1, cifar10 = (PUBLISHED[name] for name in ("imagenet256_ts_a2", "imagenet256_s_a1", "cifar10"))
    assert ts_a2.settings == s_a1.settings == IMMSettings(num_steps=8, guidance=1.5)
    assert cifar10.settings == IMMSettings(num_steps=2, guidance=1.0, mid_nt=(1.4,))
    assert (ts_a2.fid_base, ts_a2.fid_neon, s_a1.fid_base, cifar10.fid_base) == (1.99, 1.46, None, 1.98)
    assert [(row.loss.a, row.loss.k) for row in (ts_a2, s_a1, cifar10)] == [(2, 12), (1, 12), (1, 15)]
    assert cifar10.loss == IMMLoss(a=1, k=15, min_tr_gap=None)


def test_presets_are_found_by_their_published_names() -> None:
    for n in (1, 2, 4, 8):
        assert PRESETS[f"{n}_steps_cfg1.5_pushforward_uniform"] == IMMSettings(num_steps=n, guidance=1.5)
    assert PRESETS["1_step"] == IMMSettings(num_steps=1, guidance=1.0)
    assert PRESETS["2_step"] == PRESETS["2_steps"] == IMMSettings(num_steps=2, guidance=1.0, mid_nt=(1.4,))
    assert len(PRESETS) == 7


def test_a_network_is_found_by_its_keywords_whatever_their_spelling() -> None:
    for row in PUBLISHED.values():
        assert published_row(row.network) is row
        assert published_row(json.loads(json.dumps(canonical(row.network)))) is row
    ts_a2, cifar10 = (PUBLISHED[name] for name in ("imagenet256_ts_a2", "cifar10"))
    by_numbers = {
        "img_resolution": 32, "img_channels": 4, "label_dim": 1000, "num_classes": 1000, "model_type": "DiT",
        "temb_type": "stride", "mixed_precision": "fp16", "embedding_kwargs": {"embedding_type": "positional"},
        "patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16, "skip": False, "temb_mult": 1,
    }  # fmt: skip
    assert published_row(by_numbers) is ts_a2
    as_trained = {
        **cifar10.network, "channel_mult": (2, 2, 2), "dropout": 0.9, "augment_dim": 9, "num_classes": 0,
        "embedding_type": "positional", "resample_filter": [1, 1], "time_scale": 1000,
    }  # fmt: skip
    del as_trained["label_dim"]
    assert published_row(as_trained) is cifar10


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("imagenet256_ts_a2", {"model_type": "DiT_L_2"}),
        ("imagenet256_ts_a2", {"qk_norm": True}),
        ("imagenet256_ts_a2", {"T": 0.9}),
        ("cifar10", {"model_channels": 64}),
        ("cifar10", {"temb_type": "stride"}),
        ("cifar10", {"model_type": "DhariwalUNet"}),
    ],
)
def test_another_network_is_not_taken_for_a_published_one(name: str, other: dict) -> None:
    assert published_row({**PUBLISHED[name].network, **other}) is None


def test_canonical_keywords_build_the_same_network() -> None:
    keywords = {
        "img_resolution": 8, "img_channels": 4, "label_dim": 5, "num_classes": 5, "model_type": "DiT_S_4", "depth": 1,
        "logger": "ignored",
    }  # fmt: skip
    spelled_out = canonical(keywords)
    assert spelled_out["temb_type"] == "identity" and spelled_out["depth"] == 1 and "logger" not in spelled_out
    first, second = (on_meta(each).state_dict() for each in (keywords, spelled_out))
    assert {name: tensor.shape for name, tensor in first.items()} == {n: t.shape for n, t in second.items()}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_published_state_dict_is_recognised_by_its_shapes(name: str) -> None:
    manifest = {entry: tuple(value[0]) for entry, value in MANIFESTS[name].items() if entry != "_meta"}
    found = recognise(manifest)
    assert found == recognise({entry: TensorSpec(shape, torch.float32) for entry, shape in manifest.items()})
    assert found is not None and ("temb_type" in found) == name.startswith("cifar10")
    row = published_row({"temb_type": "stride", **json.loads(json.dumps(found))})
    assert row is PUBLISHED["imagenet256_ts_a2" if name == "im256" else "cifar10"]
    assert found.get("augment_dim", 0) == NETWORKS[name].get("augment_dim", 0)
    assert found.get("dropout", 0) == NETWORKS[name].get("dropout", 0)


@pytest.mark.parametrize(
    "keywords",
    [
        {"model_type": "DiT", "hidden_size": 128, "num_heads": 2, "depth": 3, "img_channels": 4, "patch_size": 4},
        {"model_type": "DiT_S_2", "depth": 1, "mlp_ratio": 2.5, "num_classes": 7, "label_dim": 7},
        {"model_type": "DiT", "hidden_size": 32, "num_heads": 4, "depth": 1, "qk_norm": True,
         "embedding_kwargs": {"embedding_type": "fourier", "frequency_embedding_size": 64}},
        {**SMALL_UNET, "label_dim": 4},
        {**SMALL_UNET, "augment_dim": 9, "channel_mult": [1, 2, 2], "num_blocks": 2, "channel_mult_emb": 2},
        {**SMALL_UNET, "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
         "resample_filter": [1, 3, 3, 1]},
        {**SMALL_UNET, "encoder_type": "skip", "decoder_type": "skip", "attn_resolutions": []},
    ],
)  # fmt: skip
def test_a_network_of_your_own_is_recognised_too(keywords: dict) -> None:
    own = {"img_resolution": 8, "img_channels": 3, "eps": 0.0, **keywords}
    own = {name: value for name, value in own.items() if name not in ("in_channels", "out_channels")}
    network = on_meta(own)
    state = network.state_dict()
    found = json.loads(json.dumps(recognise({name: tuple(tensor.shape) for name, tensor in state.items()})))
    assert published_row({"temb_type": "stride", **found}) is None
    rebuilt = on_meta(found)
    assert [(name, t.shape) for name, t in rebuilt.state_dict().items()] == [(n, t.shape) for n, t in state.items()]
    for name in ("num_heads", "attn_resolutions", "encoder_type", "resample_filter"):
        assert found.get(name) == canonical(own).get(name)
    assert (rebuilt.label_dim, rebuilt.f_type) == (network.label_dim or found["label_dim"], found["f_type"])


def test_a_state_dict_of_another_architecture_is_not_recognised() -> None:
    # A DiT and a U-Net of one time, and IMM's network without its preconditioning.
    for network in (dit(s_embed=False), unet(s_embed=False)):
        assert recognise({f"model.{name}": tuple(t.shape) for name, t in network.state_dict().items()}) is None
    assert recognise({name: tuple(tensor.shape) for name, tensor in dit().state_dict().items()}) is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_heads": 3}, "hidden_size is 32 and num_heads 3"),
        ({"hidden_size": 30}, "hidden_size is 30"),
        ({"patch_size": 3}, "img_resolution is 8 and patch_size 3"),
        ({"temb_mult": 2}, "temb_mult is 2"),
        ({"embedding_kwargs": {"embedding_type": "rotary"}}, "embedding_type 'rotary' is unknown"),
        ({"embedding_kwargs": {"use_mlp": False}}, "use_mlp is False"),
    ],
)
def test_a_transformer_that_cannot_be_is_refused_by_name(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DiT(**{**SMALL_DIT, **wrong})


@pytest.mark.parametrize("keyword", ["embedding_type", "encoder_type", "decoder_type"])
def test_a_u_net_that_cannot_be_is_refused_by_name(keyword: str) -> None:
    with pytest.raises(ValueError, match=f"{keyword} 'wavelet' is unknown"):
        SongUNet(**{**SMALL_UNET, keyword: "wavelet"})


def test_no_class_is_a_row_of_zeros_or_none_and_every_class_another_one() -> None:
    network, x = dit(), images(4)
    none = network(x, T, S, torch.zeros(3, 5))
    torch.testing.assert_close(network(x, T, S, None), none)
    torch.testing.assert_close(network(x, T, S, torch.zeros(1, 5)), none)
    for label in range(5):
        assert (network(x, T, S, torch.eye(5)[[label] * 3]) - none).abs().max() > 0.01


@pytest.mark.parametrize("kind", [DiT, SongUNet])
def test_an_image_depends_on_its_own_row_and_one_row_holds_for_all(kind: type) -> None:
    network, channels = (dit(), 4) if kind is DiT else (unet(label_dim=5), 3)
    x = images(channels)
    together = network(x, T, S, CLASSES)
    for i in range(3):
        alone = network(x[i, None], T[i, None], S[i, None], CLASSES[i, None])
        torch.testing.assert_close(alone, together[i, None], rtol=1e-4, atol=1e-5)
    one = network(x, T[:1], S[:1], CLASSES[:1])
    torch.testing.assert_close(
        one, network(x, T[:1].expand(3), S[:1].expand(3), CLASSES[:1].expand(3, 5)), rtol=1e-4, atol=1e-5
    )
    assert (network(x, T, S + 50, CLASSES) - together).abs().max() > 1e-3


def test_tokens_are_read_and_written_in_the_same_order() -> None:
    # With a last layer that takes each token's own patch back out, the network is the identity.
    network = dit(depth=0, hidden_size=16, num_heads=1)
    nn.init.zeros_(network.pos_embed)
    for module in (network.x_embedder.proj, network.final_layer.linear, network.final_layer.adaLN_modulation[1]):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    for row, column, channel in ((r, c, k) for r in range(2) for c in range(2) for k in range(4)):
        feature = (row * 2 + column) * 4 + channel
        network.x_embedder.proj.weight[feature, channel, row, column] = 1
    network.final_layer.linear.weight.copy_(torch.eye(16))
    x = images(4)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)  # [B, row, column, C, 2, 2]
    normed = torch.nn.functional.layer_norm(patches, patches.shape[3:], eps=1e-6)
    expected = normed.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    torch.testing.assert_close(network(x, T, S, CLASSES), expected)


@pytest.mark.parametrize("kind", [DiT, SongUNet])
def test_a_network_computes_in_half_precision_where_asked(kind: type) -> None:
    network, channels = (dit(qk_norm=True), 4) if kind is DiT else (unet(label_dim=5), 3)
    x = images(channels)
    expected = network(x, T, S, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, T, S, CLASSES)
    error = (half.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_the_embedding_of_a_u_net_is_double_precision_throughout() -> None:
    network = unet(label_dim=5, augment_dim=9)
    augment = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    embedding = network.embed(T, CLASSES, augment, S)
    exact = unet(label_dim=5, augment_dim=9).double().embed(T.double(), CLASSES.double(), augment.double(), S.double())
    assert embedding.dtype == torch.float64 and torch.equal(embedding, exact)
    assert unet(embedding_type="fourier").embed(T, None, None, S).dtype == torch.float32


def test_what_is_dropped_in_training_is_not_dropped_in_sampling() -> None:
    x = images(4)
    for keywords in ({"dropout": 0.5}, {"class_dropout_prob": 0.999}):
        network = dit(**keywords)
        sampled = network(x, T, S, CLASSES)
        assert torch.equal(network(x, T, S, CLASSES), sampled)
        torch.manual_seed(0)
        assert not torch.equal(network.train()(x, T, S, CLASSES), sampled)
    network = unet(label_dim=5, label_dropout=1.0, dropout=0.0).train()
    x = images(3)
    torch.testing.assert_close(network(x, T, S, CLASSES), network(x, T, S, torch.zeros(3, 5)))
    assert not torch.equal(network(x, T, S, CLASSES), network.eval()(x, T, S, CLASSES))


def test_an_untrained_network_starts_as_published() -> None:
    torch.manual_seed(0)
    network = DiT(img_resolution=8, in_channels=4, hidden_size=192, depth=1, num_heads=3, num_classes=50)
    assert not network(images(4), T, S, None).any()
    block = network.blocks[0]
    assert network.s_embedder is not None
    for weight, expected in (
        (block.attn.qkv.weight, math.sqrt(2 / (192 + 3 * 192))),
        (block.mlp.fc2.weight, math.sqrt(2 / (192 + 4 * 192))),
        (network.x_embedder.proj.weight, math.sqrt(2 / (192 + 16))),
        (network.y_embedder.embedding_table.weight, 0.02),
        *((embedder.mlp[i].weight, 0.02) for embedder in (network.t_embedder, network.s_embedder) for i in (0, 2)),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.1)
    for name, tensor in network.state_dict().items():
        assert not ((name.endswith("bias") or "adaLN" in name) and tensor.any()), name
    assert SongUNet(**SMALL_UNET)(images(3), T, S).abs().max() < 1e-3
