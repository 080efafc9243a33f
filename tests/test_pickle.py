"""NVIDIA-style pickles, of IMM too: read as published, copied with other weights byte for byte, and never executed."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edm.precond import EDMPrecond
from imm.precond import IMMPrecond
from neon.checkpoint import PickleCheckpoint, load_state, open_checkpoint, save_safetensors
from neon.cli.app import main
from neon.cli.checkpoints import convert_checkpoint
from neon.errors import RequestError
from neon.merge import merge_files, merge_state
from neon.nn.unet import Linear
from tests.pickles import (
    NUMPY_MODULES,
    Call,
    EasyDict,
    Persistent,
    configured,
    configured_keywords,
    dumps,
    imm_snapshot,
    named,
    old_style,
    persistent,
    program,
    published_modules,
    save_training_state,
    snapshot,
    text,
    write_imm_pickle,
)
from tests.test_merge_files import PEAK_OF_MERGE
from tests.tiny import CONFIG, tiny_edm

GOLDEN = Path(__file__).parent / "golden"
FIXTURES = sorted((GOLDEN / "edm" / "pkl_fixtures").glob("*.pkl"))
KEYWORDS: Any = CONFIG["network"]
IMM_KEYWORDS: dict[str, dict[str, Any]] = {
    "DiT": {
        "img_resolution": 4, "img_channels": 4, "label_dim": 3, "num_classes": 3, "mixed_precision": "fp16",
        "temb_type": "stride", "model_type": "DiT", "hidden_size": 8, "depth": 2, "num_heads": 2, "qk_norm": True,
        "embedding_kwargs": {"frequency_embedding_size": 8},
    },
    "SongUNet": {
        "img_resolution": 8, "img_channels": 3, "label_dim": 0, "mixed_precision": None, "noise_schedule": "fm",
        "f_type": "simple_edm", "eps": 0.006, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [4], "resample_filter": [1, 1],
    },
}  # fmt: skip
CANARY = "a setting of the logger that nobody else is to see"
State = dict[str, torch.Tensor]

# Events of the interpreter that a loader has no business with. The hook outlives a test, hence the switch.
_FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "exec", "compile")
_seen: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in _FORBIDDEN:
        _seen.append(f"{event} {arguments}")


sys.addaudithook(_watch)


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    global _seen
    _seen = []
    try:
        yield
        assert _seen == []
    finally:
        _seen = None


def refusal(path: Path, content: bytes | None = None) -> str:
    """The one line a pickle is refused with, while nothing in it runs."""
    if content is not None:
        path.write_bytes(content)
    with nothing_runs(), pytest.raises(RequestError) as caught:
        load_state(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 400
    return str(caught.value)


def assert_same(left: State, right: State) -> None:
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def linear(keywords: dict[str, Any] | None = None, arguments: tuple[Any, ...] = ()) -> Persistent:
    """A network of one small layer."""
    return persistent(Linear(2, 3).requires_grad_(False), keywords or {}, arguments)


def module(**tables: dict[str, Any]) -> Persistent:
    """A network of the given `parameters`, `buffers` and `modules`."""
    empty: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    return Persistent("Network", {**empty, **{f"_{name}": table for name, table in tables.items()}})


def tiny_imm(kind: str, seed: int = 0) -> IMMPrecond:
    """A network of IMM whose parameters are all random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = IMMPrecond(**IMM_KEYWORDS[kind])
        for parameter in network.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


@pytest.fixture
def network() -> EDMPrecond:
    return tiny_edm().network  # type: ignore[return-value]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_a_published_network_is_read_and_rebuilt_as_it_was(path: Path) -> None:
    with np.load(path.with_suffix(".io.npz")) as arrays:
        expected = {name: torch.from_numpy(values) for name, values in arrays.items()}
    with nothing_runs(), open_checkpoint(path) as checkpoint:
        state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        constructor = checkpoint.constructor
        assert (checkpoint.format, checkpoint.key) == ("pickle", "ema")
    assert_same(state, {k.removeprefix("state/"): v for k, v in expected.items() if k.startswith("state/")})
    assert constructor is not None
    assert constructor.class_name == "EDMPrecond"
    assert json.loads(json.dumps(constructor.keywords)) == constructor.keywords
    network = EDMPrecond(**constructor.keywords).eval().requires_grad_(False)
    assert list(network.state_dict()) == list(state)
    network.load_state_dict(state)
    denoised = network(expected["x"], expected["sigma"], expected.get("class_labels"))
    torch.testing.assert_close(denoised, expected["denoised"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("numpy_module", NUMPY_MODULES)
@pytest.mark.parametrize("location", ["cpu", "cuda:0"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_network_is_read_whatever_wrote_it(
    tmp_path: Path, network: EDMPrecond, numpy_module: str, location: str, protocol: int
) -> None:
    content = dumps(snapshot(network, KEYWORDS), numpy_module=numpy_module, location=location, protocol=protocol)
    (tmp_path / "a.pkl").write_bytes(content)
    with nothing_runs(), open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        assert_same({name: checkpoint.tensor(name) for name in checkpoint.names()}, network.state_dict())
        assert checkpoint.candidates == ("ema", "augment_pipe")
        assert checkpoint.constructor is not None
        assert checkpoint.constructor.keywords == KEYWORDS
    assert load_state(tmp_path / "a.pkl", "augment_pipe")["Hz_geom"].shape == (12,)
    with pytest.raises(RequestError, match="no nesting 'loss_fn' with tensors; present: ema, augment_pipe"):
        load_state(tmp_path / "a.pkl", "loss_fn")


@pytest.mark.parametrize("kind", IMM_KEYWORDS)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_network_of_imm_is_read_and_says_how_it_is_rebuilt(tmp_path: Path, kind: str, protocol: int) -> None:
    network = tiny_imm(kind)
    content = dumps(imm_snapshot(network, IMM_KEYWORDS[kind], CANARY), protocol=protocol)
    if kind == "DiT" and protocol == 4:  # as the version of timm that the published networks were trained with
        names = (b"timm.layers.attention", b"timm.models.vision_transformer")
        old, new = (pickle.SHORT_BINUNICODE + bytes([len(name)]) + name for name in names)
        assert old in content
        content = content.replace(old, new)
    (tmp_path / "a.pkl").write_bytes(content)
    with nothing_runs(), open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        assert (checkpoint.key, checkpoint.candidates) == ("ema", ("ema",))
        state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        constructor = checkpoint.constructor
    assert_same(state, network.state_dict())
    assert constructor is not None
    assert constructor.class_name == "IMMPrecond"
    assert constructor.keywords == IMM_KEYWORDS[kind]
    assert json.loads(json.dumps(constructor.keywords)) == constructor.keywords
    IMMPrecond(**constructor.keywords).load_state_dict(state)


def test_the_configurations_read_here_are_those_that_omegaconf_writes() -> None:
    genuine = (GOLDEN / "imm" / "pkl_fixtures" / "keywords_omegaconf23.pkl").read_bytes()
    network = {
        "img_resolution": 8, "img_channels": 3, "label_dim": 0, "mixed_precision": None, "noise_schedule": "fm",
        "f_type": "simple_edm", "eps": 0.006, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2],
        "attn_resolutions": [4], "resample_filter": [1, 1], "dropout": 0.2,
        "embedding_kwargs": {"scale": 1.0, "use_mlp": True, "sizes": [256, None, "x"]},
    }  # fmt: skip
    logger = {"project": "cifar10", "note": "text of a logger that nobody else is to see"}
    assert dumps(configured_keywords(configured({"logger": logger, "network": network}))) == genuine


@pytest.mark.parametrize("kind", IMM_KEYWORDS)
def test_of_the_training_configuration_only_the_keywords_are_ever_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    write_imm_pickle(tmp_path / "a.pkl", tiny_imm(kind), IMM_KEYWORDS[kind], canary=CANARY)
    assert CANARY.encode() in (tmp_path / "a.pkl").read_bytes()
    with nothing_runs(), open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        assert CANARY not in f"{checkpoint.constructor}{checkpoint.metadata}{checkpoint.candidates}{vars(checkpoint)}"
    for command in (["inspect"], ["inspect", "--json"], ["convert", str(tmp_path / "a.safetensors")]):
        assert main([command[0], str(tmp_path / "a.pkl"), *command[1:]]) == 0
    shown = capsys.readouterr()
    assert "blocks.1.attn.qkv.weight" in shown.out or "dec.8x8_aux_conv.weight" in shown.out
    assert CANARY not in shown.out + shown.err
    assert CANARY.encode() not in (tmp_path / "a.safetensors").read_bytes()
    assert_same(
        dict(sorted(load_state(tmp_path / "a.safetensors").items())),
        dict(sorted(load_state(tmp_path / "a.pkl").items())),
    )


def test_a_persistent_object_may_have_no_state(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": linear(), "encoder": Persistent("RGBEncoder", None)}))
    with nothing_runs():
        assert list(load_state(tmp_path / "a.pkl")) == ["weight", "bias"]


@pytest.mark.parametrize(("content", "key"), [({"ema": linear()}, "ema"), (linear(), ""), ({"net": linear()}, "net")])
def test_the_network_may_be_all_there_is(tmp_path: Path, content: Any, key: str) -> None:
    (tmp_path / "a.pkl").write_bytes(dumps(content))
    with open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        assert (checkpoint.key, checkpoint.candidates) == (key, (key,))
        assert checkpoint.names() == ["weight", "bias"]
        assert checkpoint.constructor is not None


def test_a_pickled_state_dict_is_read_and_says_nothing_of_a_constructor(tmp_path: Path) -> None:
    state = Linear(2, 3).state_dict()  # with versions of modules in an attribute
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(state))
    with open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        assert checkpoint.constructor is None
        assert torch.equal(checkpoint.tensor("weight"), state["weight"])


def test_keywords_of_the_publishers_types_become_json(tmp_path: Path) -> None:
    keywords = {
        "numbers": (np.float64(0.5), np.int64(3), np.float32(0.25), np.bool_(True)),
        "nested": EasyDict(init_mode="xavier_uniform", scale=np.sqrt(0.25)),
        "limit": float("inf"),
        "none": None,
    }
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": linear(keywords)}))
    with open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        assert checkpoint.constructor is not None
        assert checkpoint.constructor.class_name == "Linear"
        assert json.dumps(checkpoint.constructor.keywords) == (
            '{"numbers": [0.5, 3, 0.25, true], "nested": {"init_mode": "xavier_uniform", "scale": 0.5}, '
            '"limit": Infinity, "none": null}'
        )


def deep_list(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def doubling(make: Callable[[Any], Any], leaf: Any) -> Any:
    """A value of 2^40 parts that takes no more than 40 to write."""
    for _ in range(40):
        leaf = make(leaf)
    return leaf


def list_in_itself() -> Any:
    value = configured([1])
    value._content.append(value)
    return value


@pytest.mark.parametrize(
    ("keywords", "arguments", "expected"),
    [
        ({}, (2, 3), "positional arguments"),
        ({"table": torch.zeros(2)}, (), "one is a Tensor"),
        ({"kind": nn.ModuleDict}, (), "one is a Global"),
        ({"raw": b"abc"}, (), "one is a Blob"),
        ({"by": {1: 2}}, (), "one is a dict"),
        ({"deep": deep_list(200)}, (), "nest too deep"),
        ({"many": doubling(lambda value: [value, value], [])}, (), "more steps"),
        ({"layer": nn.Linear(1, 1)}, (), "one is a Record"),
        ({"list": list_in_itself()}, (), "nest too deep"),
        ({"list": configured([1, "${logger.note}"])}, (), "stands for another value"),
        ({"missing": configured("???")}, (), "stands for another value"),
        ({"by": configured({1: 2})}, (), "one is a dict"),
    ],
)
def test_keywords_that_are_no_json_leave_the_weights_readable(
    tmp_path: Path, keywords: dict[str, Any], arguments: tuple[Any, ...], expected: str
) -> None:
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": linear(keywords, arguments)}))
    assert load_state(tmp_path / "a.pkl")["weight"].shape == (3, 2)
    with open_checkpoint(tmp_path / "a.pkl") as checkpoint, pytest.raises(RequestError, match=expected):
        _ = checkpoint.constructor


def test_tensors_of_any_dtype_and_layout_are_read(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "half": torch.tensor([1.5, -2]).half(),
        "bfloat16": torch.tensor([1.5, -2]).bfloat16(),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "long": torch.tensor([[7]]),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "whole": whole,
        "tied": whole,
        "part": whole[1:3],
        "turned": whole.t(),
        "every second": whole[:, ::2],
        "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "large": torch.arange(100_000),
    }
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": module(buffers=tensors)}))
    assert_same(load_state(tmp_path / "a.pkl"), tensors)
    with open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        part = torch.empty(3)
        checkpoint.read("turned", 2, part)
        assert part.tolist() == whole.t().reshape(-1)[2:5].tolist()
        checkpoint.read("part", 2, part)
        assert part.tolist() == whole[1:3].reshape(-1)[2:5].tolist()


def test_buffers_that_no_state_dict_holds_are_left_out(tmp_path: Path) -> None:
    content = module(parameters={"bias": None, "weight": torch.ones(1)}, buffers={"cache": torch.ones(2)})
    content.state["_non_persistent_buffers_set"] = {"cache"}
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": content}))
    assert list(load_state(tmp_path / "a.pkl")) == ["weight"]


@pytest.mark.parametrize("kind", ["EDM", *IMM_KEYWORDS])
def test_a_training_state_is_read(tmp_path: Path, kind: str) -> None:
    optimizer_state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1}]}
    keywords = KEYWORDS if kind == "EDM" else IMM_KEYWORDS[kind]
    network = tiny_edm().network if kind == "EDM" else tiny_imm(kind)
    saved = imm_snapshot(network, keywords)["ema"]
    save_training_state(tmp_path / "training-state-000050.pt", saved, optimizer_state)
    with nothing_runs(), open_checkpoint(tmp_path / "training-state-000050.pt") as checkpoint:
        assert isinstance(checkpoint, PickleCheckpoint)
        assert (checkpoint.key, checkpoint.candidates) == ("net", ("net",))
        assert checkpoint.constructor is not None
        assert checkpoint.constructor.keywords == keywords
        assert_same({name: checkpoint.tensor(name) for name in checkpoint.names()}, network.state_dict())
        with pytest.raises(RequestError, match="it is a training state"):
            checkpoint.save_with(tmp_path / "b.pkl", network.state_dict())


def rewritten(source: Path, target: Path, name: str, content: bytes, kind: int = zipfile.ZIP_STORED) -> Path:
    """A copy of a torch archive with one entry replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, content if entry.filename.endswith(name) else old.read(entry))
    return target


def test_a_wrong_training_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "a.pt"
    save_training_state(state, linear(), {})
    with zipfile.ZipFile(state) as archive:
        data = archive.read("a/data.pkl")
    bad = tmp_path / "b.pt"
    torch.save({"x": torch.ones(1)}, bad)
    load_state(bad)  # imports what torch reads its files with
    assert "claims 6 elements" in refusal(rewritten(state, bad, "data/0", bytes(20)))
    assert "big-endian" in refusal(rewritten(state, bad, "byteorder", b"big"))
    assert "bytes follow its end" in refusal(rewritten(state, bad, "data.pkl", data + b"N."))
    hostile = data[:2] + b"cos\nsystem\nN\x85R0" + data[2:]
    assert "it names os.system" in refusal(rewritten(state, bad, "data.pkl", hostile))
    missing = data.replace(text("0"), text("9"))
    assert missing != data
    assert "the archive has no 'data/9'" in refusal(rewritten(state, bad, "data.pkl", missing))
    for share in (0.3, 0.6, 0.9, 0.99):
        bad.write_bytes(state.read_bytes()[: int(share * state.stat().st_size)])
        refusal(bad)


# Writing


def trusting_state(content: Any, prefix: str = "") -> State:
    """The state dict of a network as Python's own unpickler and torch rebuild it."""
    state = content["state"] if isinstance(content, dict) else vars(content)
    tensors = {**state["_parameters"], **state["_buffers"]}
    found = {prefix + name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
    for name, child in state["_modules"].items():
        found.update(trusting_state(child, f"{prefix}{name}."))
    return found


def replaced(content: bytes, old: State, new: State) -> bytes:
    """`content` with the raw values of tensors replaced."""
    for name, tensor in old.items():
        raw = tensor.numpy().tobytes()
        assert raw in content
        content = content.replace(raw, new[name].numpy().tobytes())
    return content


def test_a_copy_with_other_weights_differs_in_their_bytes_only(tmp_path: Path, network: EDMPrecond) -> None:
    base, other = network.state_dict(), tiny_edm(1).network.state_dict()
    content = dumps(snapshot(network, KEYWORDS))
    (tmp_path / "base.pkl").write_bytes(content)
    with open_checkpoint(tmp_path / "base.pkl") as checkpoint:
        assert isinstance(checkpoint, PickleCheckpoint)
        checkpoint.save_with(tmp_path / "copy.pkl", {name: tensor.double() for name, tensor in other.items()})
        with pytest.raises(RequestError, match="already exists"):
            checkpoint.save_with(tmp_path / "copy.pkl", other, overwrite=False)
        first = checkpoint.names()[0]
        for wrong in (dict(list(other.items())[1:]), {**other, "more": other[first]}, {**other, first: torch.ones(7)}):
            with pytest.raises(RequestError, match="takes its names and shapes"):
                checkpoint.save_with(tmp_path / "wrong.pkl", wrong)
    copy = (tmp_path / "copy.pkl").read_bytes()
    assert copy == replaced(content, base, other)
    assert_same(load_state(tmp_path / "copy.pkl"), other)
    with published_modules():
        assert_same(trusting_state(pickle.loads(copy)["ema"]), other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pkl", "copy.pkl"]


def test_tensors_without_bytes_of_their_own_cannot_be_copied_over(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    for tensors, expected in (
        ({"a": whole, "b": whole}, "a and b share their values"),
        ({"a": whole.t()}, "a does not lie in it as plain bytes"),
    ):
        (tmp_path / "a.pkl").write_bytes(dumps({"ema": module(buffers=tensors)}))
        with open_checkpoint(tmp_path / "a.pkl") as checkpoint:
            assert isinstance(checkpoint, PickleCheckpoint)
            with pytest.raises(RequestError, match=expected):
                checkpoint.save_with(tmp_path / "b.pkl", tensors)
    parts = {"second": whole[2:], "first": whole[:2], "none": whole[4:]}
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": module(buffers=parts)}))
    with open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        assert isinstance(checkpoint, PickleCheckpoint)
        checkpoint.save_with(tmp_path / "b.pkl", {name: tensor + 1 for name, tensor in parts.items()})
    assert_same(load_state(tmp_path / "b.pkl"), {name: tensor + 1 for name, tensor in parts.items()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and a self-trained network as .pkl and as .safetensors."""
    for name, seed in (("base", 0), ("tuned", 1)):
        model = tiny_edm(seed)
        (tmp_path / f"{name}.pkl").write_bytes(dumps(snapshot(model.network, KEYWORDS)))
        save_safetensors(tmp_path / f"{name}.safetensors", model.network.state_dict(), {})
    return tmp_path


@pytest.mark.parametrize(
    ("base", "tuned", "output"),
    [
        ("base.pkl", "tuned.pkl", "neon_{w}.pkl"),
        ("base.pkl", "tuned.safetensors", "neon_{w}.pkl"),
        ("base.safetensors", "tuned.pkl", "neon_{w}.safetensors"),
        ("base.pkl", "tuned.pkl", "neon_{w}.safetensors"),
        ("base.pkl", "tuned.pkl", "neon_{w}.pth"),
    ],
)
def test_pickles_are_merged_with_any_format(folder: Path, base: str, tuned: str, output: str) -> None:
    before, after = (tiny_edm(seed).network.state_dict() for seed in (0, 1))
    reports = merge_files(folder / base, folder / tuned, [-1, 0.5, 1.5], folder / output)
    for report in reports:
        expected = merge_state(before, after, report.w)
        merged = load_state(report.output)
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
        filters = [name for name in expected if name.endswith("resample_filter")]
        assert filters
        assert all(torch.equal(merged[name], before[name]) for name in filters)
        if output.endswith(".pkl"):
            content = (folder / base).read_bytes()
            assert Path(report.output).read_bytes() == replaced(content, before, expected)
            record = json.loads(Path(report.output + ".json").read_text())
            assert (record["base"], record["base_key"], float(record["w"])) == (base, "ema", report.w)
            assert [w for w in report.warnings if "source text" in w and "base.pkl" in w] == list(report.warnings)
            assert report.warnings
        else:
            assert report.warnings == ()


@pytest.mark.parametrize("kind", IMM_KEYWORDS)
@pytest.mark.parametrize("tuned", ["tuned.pkl", "tuned.safetensors"])
def test_a_merged_network_of_imm_opens_where_its_base_does(tmp_path: Path, kind: str, tuned: str) -> None:
    before, after = (tiny_imm(kind, seed) for seed in (0, 1))
    write_imm_pickle(tmp_path / "base.pkl", before, IMM_KEYWORDS[kind], canary=CANARY)
    write_imm_pickle(tmp_path / "tuned.pkl", after, IMM_KEYWORDS[kind])
    convert_checkpoint(tmp_path / "tuned.pkl", tmp_path / "tuned.safetensors")
    with nothing_runs():
        merge_files(tmp_path / "base.pkl", tmp_path / tuned, [1.5], tmp_path / "neon.pkl")
    expected = merge_state(before.state_dict(), after.state_dict(), 1.5)
    content, merged = ((tmp_path / name).read_bytes() for name in ("base.pkl", "neon.pkl"))
    assert merged == replaced(content, before.state_dict(), expected)
    with published_modules():
        opened = pickle.loads(merged)
    assert_same(trusting_state(opened["ema"]), expected)
    precision = torch.float16 if IMM_KEYWORDS[kind]["mixed_precision"] else torch.float32
    assert opened["ema"]["state"]["mixed_precision"] is precision


def test_a_pkl_is_written_only_as_a_copy_of_one(folder: Path) -> None:
    save_training_state(folder / "state.pt", persistent(tiny_edm().network, KEYWORDS), {})
    for base, expected in (("base.safetensors", "only as a copy of a base .pkl"), ("state.pt", "a training state")):
        with pytest.raises(RequestError, match=expected):
            merge_files(folder / base, folder / "tuned.pkl", [1.0], folder / "neon.pkl")
    assert not list(folder.glob("neon*"))
    merge_files(folder / "state.pt", folder / "tuned.pkl", [1.0], folder / "neon.safetensors")
    merge_files(folder / "base.pkl", folder / "tuned.pkl", [1.0], folder / "neon.pkl")
    assert_same(
        dict(sorted(load_state(folder / "neon.safetensors").items())),
        dict(sorted(load_state(folder / "neon.pkl").items())),
    )


# Hostile files


HOSTILE: dict[str, tuple[Callable[[str], bytes], str]] = {
    "REDUCE": (lambda c: dumps({"ema": linear(), "x": Call(os.system, (c,))}), f"it names {os.name}.system"),
    "GLOBAL": (lambda c: program(b"cos\nsystem\n", text(c), b"\x85R"), "it names os.system"),
    "STACK_GLOBAL": (lambda c: program(named("os", "system"), text(c), b"\x85R"), "it names os.system"),
    "eval": (lambda c: dumps({"x": Call(eval, (f"__import__('os').system({c!r})",))}), "it names builtins.eval"),
    "getattr": (lambda c: dumps({"x": Call(getattr, ("", "join"))}), "it calls builtins.getattr with unknown"),
    "attrgetter": (lambda c: program(named("operator", "attrgetter"), text("system"), b"\x85R"), "operator.attrgetter"),
    "dotted name": (
        lambda c: program(named("torch._utils", "_rebuild_tensor_v2.__globals__")),
        "it names torch._utils._rebuild_tensor_v2.__globals__",
    ),
    "dotted module": (lambda c: program(named("torch.storage.os", "system")), "it names torch.storage.os.system"),
    "unprintable name": (lambda c: program(named("os", "sys\ntem\x1b[2J")), r"it names 'os.sys\ntem"),
    "long name": (lambda c: program(named("os", "x" * 100_000)), "it names os.xxx"),
    "INST": (lambda c: program(b"(", text(c), b"ios\nsystem\n"), "the instruction INST"),
    "OBJ": (lambda c: program(b"(ccollections\nOrderedDict\no"), "the instruction OBJ"),
    "NEWOBJ": (lambda c: program(named("collections", "OrderedDict"), b")\x81"), "it calls collections.OrderedDict"),
    "NEWOBJ_EX": (lambda c: program(named("collections", "OrderedDict"), b")}\x92"), "the instruction NEWOBJ_EX"),
    "EXT1": (lambda c: program(b"\x82\x01"), "the instruction EXT1"),
    "EXT4": (lambda c: program(b"\x84\x01\x00\x00\x00"), "the instruction EXT4"),
    "unknown instruction": (lambda c: program(b"\xff"), "the instruction 255"),
    "copyreg": (lambda c: program(named("copyreg", "_reconstructor")), "copyreg._reconstructor"),
    "call of a class": (lambda c: program(named("torch", "FloatStorage"), b")R"), "it calls torch.FloatStorage"),
    "call of a text": (lambda c: program(text("os.system"), text(c), b"\x85R"), "it calls a str"),
    "__setstate__ of a dict": (
        lambda c: program(b"}}", text("__setstate__"), named("collections", "OrderedDict"), b"sb"),
        "sets the state of a dict",
    ),
    "attributes of a dictionary": (
        lambda c: program(named("collections", "OrderedDict"), b")R}", text("__class__"), b"Nsb"),
        "sets the state of a OrderedDict",
    ),
    "slots": (
        lambda c: program(named("torch.nn.modules.container", "ModuleDict"), b")\x81N}", text("x"), b"Ns\x86b"),
        "sets the state of a ModuleDict",
    ),
    "state of a function": (
        lambda c: program(named("torch._utils", "_rebuild_tensor_v2"), b"}", text("__code__"), b"Nsb"),
        "sets the state of a Global",
    ),
    "PERSID": (lambda c: program(b"Pid\n"), "the instruction PERSID"),
    "BINPERSID": (lambda c: program(text("id"), b"Q"), "persistent id"),
    "other codec": (lambda c: program(named("_codecs", "encode"), text(c), text("rot13"), b"\x86R"), "_codecs.encode"),
    "other dtype": (lambda c: program(named("numpy", "dtype"), text("O8"), b"\x85R"), "numpy.dtype"),
    "configuration": (
        lambda c: dumps({"ema": linear({"channel_mult": configured([1, Call(os.system, (c,))])})}),
        f"it names {os.name}.system",
    ),
    "default": (
        lambda c: program(named("collections", "defaultdict"), named("os", "system"), b"\x85R"),
        "it names os.system",
    ),
    "call of a layer": (lambda c: dumps({"x": Call(nn.Linear, (1, 2))}), "calls torch.nn.modules.linear.Linear"),
    "new layer of arguments": (
        lambda c: program(named("torch.nn", "Linear"), text(c), b"\x85\x81"),
        "it calls torch.nn.Linear with unknown arguments",
    ),
    "state of a layer anew": (
        lambda c: program(named("torch.nn", "Linear"), b")\x81}", text("x"), b"Nsb}b"),
        "sets the state of a Linear",
    ),
    "state of a persistent object": (
        lambda c: dumps(linear())[:-1] + b"}" + text("_modules") + b"}sb.",
        "sets the state of a Linear",
    ),
    "call of timm": (
        lambda c: program(named("timm.models", "create_model"), text(c), b"\x85R"),
        "it calls timm.models.create_model",
    ),
    "call of omegaconf": (
        lambda c: program(named("omegaconf.omegaconf", "OmegaConf"), text(c), b"\x85R"),
        "it calls omegaconf.omegaconf.OmegaConf",
    ),
    "call of a type": (lambda c: program(named("builtins", "dict"), b")R"), "it calls builtins.dict"),
    "call of a format": (lambda c: program(named("timm.layers.format", "Format"), b"N\x85R"), "unknown arguments"),
    "call of a dtype": (lambda c: program(named("torch", "float32"), b")R"), "it calls torch.float32"),
    "state of a dtype": (lambda c: program(named("torch", "float16"), b"}b"), "sets the state of a Global"),
    "similar module": (lambda c: program(named("torch.nnx", "Linear")), "it names torch.nnx.Linear"),
    "similar library": (
        lambda c: program(named("torchx.nn", "load"), text(c), b"\x85R"),
        "it holds a torchx.nn.load",
    ),
    "inside a layer": (
        lambda c: program(named("torch.nn.modules.module", "torch.os.system")),
        "it names torch.nn.modules.module.torch.os.system",
    ),
    "long module": (lambda c: program(named("torch.nn." + "x" * 100_000, "x")), "it names torch.nn.xxx"),
    "layer as a storage": (
        lambda c: tensor_pickle(STREAM.replace(b"ctorch\nFloatStorage\n", b"ctorch.nn\nLinear\n")),
        "it names torch.nn.Linear",
    ),
    "LONG4": (lambda c: program(b"\x8b\xff\xff\xff\x7f"), "the instruction LONG4"),
    "attribute": (
        lambda c: program(named("builtins", "getattr"), named("builtins", "dict"), text("get"), b"\x86R"),
        "it calls builtins.getattr with unknown",
    ),
}


# What runs in the ordinary way, and where it would leave its mark.
OBEYED = ("REDUCE", "GLOBAL", "STACK_GLOBAL", "eval", "INST", "configuration")


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_nothing_runs(tmp_path: Path, kind: str) -> None:
    make, expected = HOSTILE[kind]
    mark = tmp_path / "it_ran"
    content = make(f"touch {mark}")
    message = refusal(tmp_path / "a.pkl", content)
    assert expected in message
    assert not mark.exists()
    if kind in OBEYED:
        assert "are read from a pickle" in message
        with published_modules():
            pickle.loads(content)
        assert mark.exists(), "the pickle would have done nothing anyway"


STREAM = old_style(torch.arange(4.0)._typed_storage())  # of one storage
ELEMENTS = (4).to_bytes(8, "little") + np.arange(4, dtype=np.float32).tobytes()


def tensor_pickle(
    blob: bytes | Call = STREAM,
    offset: Any = 0,
    shape: Any = (4,),
    strides: Any = (1,),
    extra: tuple[Any, ...] = (),
) -> bytes:
    """A network of one tensor that looks into the storage of `blob`."""
    storage = Call(torch.storage._load_from_bytes, (blob,))
    arguments = (storage, offset, shape, strides, False, OrderedDict(), *extra)
    return dumps({"ema": {"x": Call(torch._utils._rebuild_tensor_v2, arguments)}})


def test_a_storage_that_names_something_else_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(tensor_pickle())
    assert load_state(tmp_path / "a.pkl")["x"].tolist() == [0, 1, 2, 3]
    mark = tmp_path / "it_ran"
    hostile = b"cos\nsystem\n" + text(f"touch {mark}") + b"\x85R0"
    ends = [index + 1 for index in range(len(STREAM)) if STREAM[index : index + 3] == b".\x80\x02"]
    assert len(ends) == 4, "five pickles in a stream"
    for start in (0, *ends):
        assert STREAM[start : start + 2] == b"\x80\x02"
        blob = STREAM[: start + 2] + hostile + STREAM[start + 2 :]
        assert "it names os.system" in refusal(tmp_path / "a.pkl", tensor_pickle(blob))
        inner = b"ctorch.storage\n_load_from_bytes\n0"
        blob = STREAM[: start + 2] + inner + STREAM[start + 2 :]
        assert "it names torch.storage._load_from_bytes" in refusal(tmp_path / "a.pkl", tensor_pickle(blob))
    archive = io.BytesIO()
    torch.save(torch.ones(3), archive)
    assert "refused" in refusal(tmp_path / "a.pkl", tensor_pickle(archive.getvalue()))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (ELEMENTS, ELEMENTS[:-1], "claims 4 elements"),
        (ELEMENTS, ELEMENTS + b"x", "claims 4 elements"),
        (ELEMENTS, (5).to_bytes(8, "little") + ELEMENTS[8:], "claims 4 elements"),
        (ELEMENTS, (1 << 63).to_bytes(8, "little") + ELEMENTS[8:], "claims 4 elements"),
        (b"K\x04Nt", b"\x8a\x07\xff\xff\xff\xff\xff\xff\x7fNt", "elements of torch.float32 and has 16 bytes"),
        (b"K\x04Nt", b"\x8a\x01\xffNt", "elements of torch.float32 and has 16 bytes"),
        (b"K\x04Nt", b"K\x04K\x01\x85t", "unknown layout"),
        (b"FloatStorage", b"SparseStorage", "it names torch.SparseStorage"),
        (b"FloatStorage", b"DoubleStorage", "claims 4 elements"),
        (text("storage"), text("module"), "not that of a storage"),
        (text("little_endian") + b"q\x02\x88", text("little_endian") + b"q\x02\x89", "not a little-endian"),
        (b"\x8a\x0a\x6c", b"\x8a\x0a\x6d", "not a little-endian"),
    ],
)
def test_a_storage_that_is_not_what_it_claims_is_refused(tmp_path: Path, old: bytes, new: bytes, expected: str) -> None:
    assert old in STREAM
    assert expected in refusal(tmp_path / "a.pkl", tensor_pickle(STREAM.replace(old, new)))


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "expected"),
    [
        (1, (4,), (1,), "reaches outside its storage of 4 elements"),
        (0, (5,), (1,), "reaches outside"),
        (0, (2, 2), (3, 1), "reaches outside"),
        (1 << 61, (1,), (1,), "reaches outside"),
        (-1, (1,), (1,), "out of range"),
        (0, (-4,), (1,), "out of range"),
        (3, (4,), (-1,), "out of range"),
        (1 << 70, (0,), (1,), "out of range"),
        (0, (0, 1 << 40, 1 << 40), (1, 1, 1), "out of range"),
        (0, (1 << 40,), (0,), "repeats elements"),
        (0, (1 << 30, 2), (1, 1), "reaches outside"),
        (0, (1 << 20, 2), (0, 1), "repeats elements"),
        (0, (4,), (), "unknown arguments"),
        (0, (1,) * 65, (1,) * 65, "unknown arguments"),
        (0, [4], (1,), "unknown arguments"),
        (0.0, (4,), (1,), "unknown arguments"),
        (0, (True,), (1,), "unknown arguments"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(
    tmp_path: Path, offset: Any, shape: Any, strides: Any, expected: str
) -> None:
    assert expected in refusal(tmp_path / "a.pkl", tensor_pickle(offset=offset, shape=shape, strides=strides))


def test_a_tensor_with_marks_of_its_own_is_refused(tmp_path: Path) -> None:
    assert "unknown arguments" in refusal(tmp_path / "a.pkl", tensor_pickle(extra=({"conj": True},)))
    (tmp_path / "a.pkl").write_bytes(tensor_pickle(extra=(None,)))
    assert load_state(tmp_path / "a.pkl")["x"].shape == (4,)


def module_in_itself() -> bytes:
    """A network whose only child is itself, which no pickler writes."""
    fields = [text(word) for word in ("type", "class", "class_name", "Network", "state")]
    state = b"}" + text("_modules") + b"}\x94s"  # the children are memo 0
    network = named("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}(" + b"".join(fields) + state
    make = b"u\x85R\x940"  # it is memo 1
    return program(network, make, b"h\x00", text("again"), b"h\x01s0", b"}", text("ema"), b"h\x01s")


def key_of_2_to_40_parts() -> bytes:
    pair = b"".join(b"\x94h" + bytes([level]) + b"\x86" for level in range(40))
    return program(b"}", b")", pair, b"Ns")


def one_text_decoded_again_and_again() -> bytes:
    decode = named("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86R0"
    return program(text("x" * 100_000), b"\x940", decode * 1000, b"N")


def many_ties() -> Persistent:
    large = torch.zeros(100_000)
    return module(buffers={f"x{index}": large for index in range(100)})


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a module in itself": (module_in_itself, "nest more than"),
    "modules by the power of two": (
        lambda: dumps({"ema": doubling(lambda child: module(modules={"a": child, "b": child}), module())}),
        "more steps",
    ),
    "dictionaries by the power": (
        lambda: dumps(doubling(lambda value: dict.fromkeys(map(str, range(300)), value), {})),
        "more steps",
    ),
    "one storage a hundred times": (lambda: dumps({"ema": many_ties()}), "do not fit in memory"),
    "keys that take for ever to hash": (key_of_2_to_40_parts, "uses a tuple as a key"),
    "one text decoded again and again": (one_text_decoded_again_and_again, "decodes to more bytes than it has"),
    "bytes of 2^60": (lambda: program(b"\x8e", (1 << 60).to_bytes(8, "little")), "it ends early"),
    "bytearray of 2^60": (lambda: program(b"\x96", (1 << 60).to_bytes(8, "little")), "it ends early"),
    "text of 2^60": (lambda: program(b"\x8d", (1 << 60).to_bytes(8, "little")), "it ends early"),
    "text of 4 GB": (lambda: program(b"X\xff\xff\xff\xff"), "it ends early"),
    "frame of 2^60": (lambda: program(b"\x95", (1 << 60).to_bytes(8, "little"), b"N"), "it ends early"),
    "many instructions": (lambda: program(b"N0" * 600_000, b"N"), "more steps"),
    "deep tuples": (lambda: program(b")", b"\x85" * 200_000), "unknown format"),
    "deep lists": (lambda: program(b"]" * 200_000, b"a" * 199_999), "unknown format"),
    "deep settings": (
        lambda: program(
            (named("omegaconf.nodes", "AnyNode") + b")\x81}" + text("_val")) * 50_000, b"N", b"sb" * 50_000
        ),
        "unknown format",
    ),
    "long names": (lambda: dumps({"ema": module(buffers={"x" * 2000: torch.ones(1)})}), "no usual text"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_cannot_fill_the_memory_or_keep_the_program_busy(tmp_path: Path, kind: str) -> None:
    make, expected = BOMBS[kind]
    assert expected in refusal(tmp_path / "a.pkl", make())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (dumps({"ema": linear()}) + b"\n", "1 bytes follow its end"),
        (dumps({"ema": linear()}) * 2, "bytes follow its end"),
        (dumps({"ema": Persistent("a class\nof mine", {})}), "unknown arguments"),
        (dumps({"loss_fn": Persistent("EDMLoss", {})}), "without tensors by name"),
        (dumps(Persistent("EDMLoss", {})), "it holds a EDMLoss"),
        (dumps({"ema": module(parameters={"x": 3})}), "Network holds a int among its parameters"),
        (dumps({"ema": module(modules={"x": torch.ones(1)})}), "Network holds a Tensor among its modules"),
        (
            dumps({"ema": module(buffers={"a.b": torch.ones(1)}, modules={"a": module(buffers={"b": torch.ones(1)})})}),
            "two tensors are called 'a.b'",
        ),
        (program(b"0N"), "drops a value"),
        (program(b"h\x05"), "KeyError"),
        (program(b"u"), "IndexError"),
        (program(b"NN"), "ValueError"),
        (program(b"(N"), "stops inside a container"),
        (program(b"NN\x87"), "lacks values"),
        (program(b"]Nb"), "sets the state"),
        (program(b"X\x01\x00\x00\x00\xff"), "UnicodeDecodeError"),
        (program(b"cos"), "ends early"),
        (b"\x80\x05\x80\x09N.", "unknown protocol"),
    ],
)
def test_what_is_wrong_with_a_pickle_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    assert expected in refusal(tmp_path / "a.pkl", content)


def test_a_pickle_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = dumps({"ema": linear()})
    for length in (*range(2, len(content) - 1, 7), len(content) - 1):
        assert "truncated" in refusal(tmp_path / "a.pkl", content[:length])


SMALL = dumps({"ema": linear({"in_features": 2, "scale": np.float64(0.5)})})
SMALL_IMM = dumps({"ema": module(modules={"0": nn.SiLU()}), **imm_snapshot(nn.Linear(2, 3), {"channel_mult": [1, 2]})})


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([SMALL, SMALL_IMM]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_a_damaged_pickle_is_refused_or_read_and_nothing_runs(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, damage: list[tuple[float, int]]
) -> None:
    content = bytearray(whole)
    for position, value in damage:
        content[2 + int(position * (len(whole) - 2))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(content)
    with nothing_runs(), contextlib.suppress(RequestError), open_checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            assert checkpoint.tensor(name).nbytes <= len(content)
        _ = checkpoint.constructor


@pytest.mark.skipif(sys.platform != "linux", reason="reads its peak memory from /proc")
def test_merging_large_pickles_takes_the_memory_of_a_few_buffers(tmp_path: Path) -> None:
    for name, value in (("a.pkl", 1.0), ("b.pkl", 2.0)):
        tensors = {f"x{index}": torch.full((10_000_000,), value) for index in range(2)}
        (tmp_path / name).write_bytes(dumps({"ema": tensors}))
    command = [sys.executable, "-c", PEAK_OF_MERGE, *(str(tmp_path / n) for n in ("a.pkl", "b.pkl", "neon_{w}.pkl"))]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert float(run.stdout) < 60, "MB above the interpreter for two files of 80 MB"
    with open_checkpoint(tmp_path / "neon_0.5.pkl") as merged:
        assert merged.tensor("x1").eq(0.5).all()
    for path in tmp_path.iterdir():
        path.unlink()
