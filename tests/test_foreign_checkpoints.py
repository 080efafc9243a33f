"""Files that others wrote: what lies beside the weights, in several files or without names, or only seems small."""

import argparse
import collections
import contextlib
import datetime
import enum
import json
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edm.model import EDM
from neon.checkpoint import load_state, open_checkpoint, save_safetensors, save_torch
from neon.checkpoint.torch_format import TorchCheckpoint
from neon.cli.app import main
from neon.errors import RequestError, WorkError
from neon.merge import merge_files
from neon.model import described, load_model, save_model
from neon.runtime.files import sha256_file
from tests.pickles import NUMPY_MODULES, Persistent, configured, dumps, named, program, published_modules, text
from tests.test_checkpoint import STATE, assert_same, refusal, safetensors_bytes
from tests.test_pickle import linear, nothing_runs
from tests.tiny import CONFIG, tiny_edm, tiny_imm, tiny_tokenizer, tiny_var
from VAR.model import load_tokenizer
from xAR.model import load_vae

State = dict[str, torch.Tensor]


class Options:
    """A class of the training script, which no reader of its files has."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and vars(self) == vars(other)


class Mode(enum.Enum):
    """A choice among its options."""

    FAST = "fast"


class Settings(dict[str, Any]):
    """The same of dictionaries."""


BESIDE: dict[str, Any] = {
    "epoch": 3,
    "best_fid": np.float64(3.2),
    "curve": np.arange(6.0, dtype=np.float32).reshape(2, 3),
    "names": np.array(["a", "b"]),
    "generator": np.random.get_state(),
    "python": random.getstate(),
    "folder": pathlib.PurePosixPath("runs/1"),
    "started": datetime.datetime(2024, 5, 6, tzinfo=datetime.timezone.utc),
    "took": datetime.timedelta(hours=2),
    "recent": collections.deque([1, 2], maxlen=5),
    "by_class": collections.defaultdict(list, {1: [2]}),
    "counted": collections.Counter("aab"),
    "args": argparse.Namespace(depth=16, out=pathlib.PurePosixPath("x")),
    "seen": {1, 2},
    "frozen": frozenset([1]),
    "root": 1 + 2j,
    "raw": b"\x00\xff",
    "raw array": bytearray(b"ab"),
    "none": b"",
    "size": torch.Size([1, 2]),
    "device": torch.device("cpu"),
    "dtype": torch.bfloat16,
    "cells": {(0, 1): 2, torch.float32: 1},
    "large": 10**30,
    "mode": Mode.FAST,
    "options": Options(4),
    "settings": Settings(lr=0.1, inner=Settings(a=1)),
}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray | tuple):
        return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and bool(left == right)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_lies_beside_the_weights_is_read_and_kept_and_nothing_of_it_is_made(tmp_path: Path, zipped: bool) -> None:
    torch.save({"model": STATE, **BESIDE}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    torch.save({"model": {n: t + 1 if t.is_floating_point() else t for n, t in STATE.items()}}, tmp_path / "b.pth")
    with nothing_runs():
        assert_same(load_state(tmp_path / "a.pth"), STATE)
        merge_files(tmp_path / "a.pth", tmp_path / "b.pth", [-1], tmp_path / "c.pth")
    assert_same(load_state(tmp_path / "c.pth"), load_state(tmp_path / "b.pth"))
    kept = torch.load(tmp_path / "c.pth", weights_only=False)
    for name, value in BESIDE.items():
        assert same(value, kept[name]), name
    assert kept["by_class"].default_factory is list and kept["recent"].maxlen == 5


def test_a_function_of_a_stranger_is_noted_and_never_called(tmp_path: Path) -> None:
    called: list[str] = []
    stranger = types.ModuleType("stranger")
    vars(stranger)["run"] = called.append
    path = archive(
        tmp_path / "a.pth",
        b"}(" + text("x") + tensor() + text("y") + named("stranger", "run") + text("hello") + b"\x85Ru",
    )
    with mock.patch.dict(sys.modules, {"stranger": stranger}):
        assert list(load_state(path)) == ["x"]
        assert called == []
        torch.load(path, weights_only=False)
        assert called == ["hello"], "it would have done nothing anyway"


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_dtype_and_layout_are_those_that_torch_wrote(tmp_path: Path, zipped: bool) -> None:
    raw = torch.arange(32, dtype=torch.uint8)
    state = {str(dtype): raw.view(dtype).clone() for dtype in DTYPES}
    whole = torch.arange(24.0).reshape(4, 6)
    state |= {"whole": whole, "tied": whole, "turned": whole.t(), "part": whole[1:3, ::2], "row": whole[0]}
    state |= {"again": torch.ones(1, 2).expand(3, 2), "parameter": nn.Parameter(torch.ones(2)), "none": whole[:0]}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = load_state(tmp_path / "a.pth")
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes_in(found[name]) == bytes_in(tensor), name


def bytes_in(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_module_saved_whole_is_read_by_its_state_dict(tmp_path: Path, zipped: bool) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3))
    torch.save({"ema": module}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with nothing_runs():
        assert_same(load_state(tmp_path / "a.pth"), module.state_dict())


@pytest.mark.parametrize("numpy_module", NUMPY_MODULES)
def test_arrays_beside_a_published_network_are_passed_over(tmp_path: Path, numpy_module: str) -> None:
    encoder = Persistent("StabilityVAEEncoder", {"scale": np.float32([1, 2]), "bias": np.zeros((2, 3)), "_vae": None})
    content = dumps({"encoder": encoder, "ema": linear(), "resolution": np.int64(8)}, numpy_module=numpy_module)
    if numpy_module == NUMPY_MODULES[0]:  # as numpy 1 names what rebuilds an array
        name = b"numpy._core.multiarray"
        content = content.replace(bytes([len(name)]) + name, bytes([len(name) - 1]) + b"numpy.core.multiarray")
        content = reframed(content)
    (tmp_path / "a.pkl").write_bytes(content)
    with nothing_runs():
        assert list(load_state(tmp_path / "a.pkl")) == ["weight", "bias"]


def reframed(content: bytes) -> bytes:
    """`content`, which was cut, without the lengths of its frames."""
    assert content[2:3] == pickle.FRAME
    return content[:2] + content[11:]


def test_a_network_that_no_keywords_build_is_merged_and_shown(tmp_path: Path) -> None:
    for name in ("a.pkl", "b.pkl"):
        (tmp_path / name).write_bytes(dumps({"ema": linear({"table": np.zeros(2)}, (2, 3))}))
    merge_files(tmp_path / "a.pkl", tmp_path / "b.pkl", [1], tmp_path / "c.pkl")
    assert main(["inspect", str(tmp_path / "c.pkl")]) == 0
    with pytest.raises(RequestError, match="positional arguments"):
        load_model(tmp_path / "c.pkl")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_state_dict_is_read_with_what_lies_beside_it(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": linear(), "beside": BESIDE}, protocol=protocol))
    with nothing_runs():
        assert list(load_state(tmp_path / "a.pkl")) == ["weight", "bias"]


def test_settings_of_a_training_configuration_are_kept_in_copies(tmp_path: Path) -> None:
    configuration = configured({"lr": 0.1, "sizes": [1, 2], "net": {"width": 4}})
    content = {"model": {"x": torch.ones(2)}, "hyper_parameters": configuration}
    module = types.SimpleNamespace(__name__="published", Pickler=pickle.Pickler)
    with published_modules():
        torch.save(content, tmp_path / "a.pth", pickle_module=module)
        merge_files(tmp_path / "a.pth", tmp_path / "a.pth", [1], tmp_path / "b.pth")
        copies = [torch.load(tmp_path / name, weights_only=False)["hyper_parameters"] for name in ("a.pth", "b.pth")]
        assert dumps(copies[0]) == dumps(copies[1])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_only_a_chosen_tensor_must_be_a_plain_one(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.ones(2)}, "mask": {"m": torch.eye(3).to_sparse()}}, tmp_path / "a.pth")
    assert list(load_state(tmp_path / "a.pth")) == ["x"]


# Small files that swell


def archive(path: Path, *parts: bytes, storage: bytes = bytes(16), kind: int = zipfile.ZIP_STORED) -> Path:
    """A torch archive of a hand-made pickle and one storage, `0`."""
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("archive/data.pkl", program(*parts))
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")
        file.writestr("archive/data/0", storage)
    return path


def tensor(shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,), numel: int = 4) -> bytes:
    """The instructions that make a tensor of the storage."""
    identity = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(numel) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + identity + number(0) + sizes + b"\x89NtR"


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(raw)]) + raw


def entries(*pairs: bytes) -> bytes:
    return b"}(" + b"".join(pairs) + b"u"


def shared_dictionaries() -> bytes:
    """Dictionaries of 300 names for one another, three deep."""
    levels = b"".join(
        entries(*(text(f"k{index}") + b"h" + bytes([level]) for index in range(300))) + b"\x940" for level in range(5)
    )
    return entries() + b"\x940" + levels + entries(text("w") + tensor(), text("x") + b"h\x05")


SWELLING: dict[str, tuple[Callable[[], bytes], str]] = {
    "an array of 4 GB": (
        lambda: entries(text("w") + tensor(), text("x") + named("builtins", "bytearray") + number(1 << 32) + b"\x85R"),
        "builtins.bytearray with unknown arguments",
    ),
    "one number for ever": (lambda: entries(text("w") + tensor((1 << 40,), (0,))), "repeats elements"),
    "one storage a million times": (
        lambda: entries(*(text(f"w{index}") + tensor((1 << 17,), (0,)) for index in range(100))),
        "do not fit in memory",
    ),
    "shape of nothing": (lambda: entries(text("w") + tensor((0, 1 << 40, 1 << 40), (1, 1, 1))), "out of range"),
    "more than there is": (lambda: entries(text("w") + tensor((1 << 30,), (1,), 1 << 30)), "claims 1073741824"),
    "shared dictionaries": (shared_dictionaries, "more steps"),
    "nested keys": (
        lambda: entries(
            text("w") + tensor(), b")" + b"".join(b"\x94h" + bytes([level]) + b"\x86" for level in range(40)) + b"N"
        ),
        "uses a tuple as a key",
    ),
    "keys of one hash": (
        lambda: entries(text("w") + tensor(), *(number(index * ((1 << 61) - 1)) + b"N" for index in range(2000))),
        "uses a int as a key",
    ),
    "one state of many objects": (
        lambda: entries(
            text("w") + tensor(),
            text("s") + entries(*(number(index) + b"N" for index in range(10_000))) + b"\x94",
            text("x") + b"](" + (named("stranger", "Options") + b")\x81h\x00b") * 10_000 + b"e",
        ),
        "more steps",
    ),
    "one list of many sets": (
        lambda: entries(
            text("w") + tensor(),
            text("s") + b"](" + b"N" * 10_000 + b"e\x94",
            text("x") + b"](" + (named("builtins", "set") + b"h\x00\x85R") * 10_000 + b"e",
        ),
        "more steps",
    ),
    "one long name of many objects": (
        lambda: entries(
            text("w") + tensor(),
            text("s") + text("a" * 1_000_000) + b"\x94",
            text("x") + b"](" + (named("builtins", "getattr") + named("a", "B") + b"h\x00\x86R") * 10_000 + b"e",
        ),
        "unknown arguments",
    ),
    "deep lists": (lambda: entries(text("w") + tensor(), text("x") + b"]" * 100_000 + b"a" * 99_999), ""),
}


@pytest.mark.parametrize("kind", SWELLING)
def test_a_small_torch_file_cannot_fill_the_memory_or_keep_the_program_busy(tmp_path: Path, kind: str) -> None:
    make, expected = SWELLING[kind]
    start = time.process_time()
    path = archive(tmp_path / "a.pth", make())
    if expected:
        assert expected in refusal(path)
    else:
        assert list(load_state(path)) == ["w"]
    assert time.process_time() - start < 10


def test_members_are_unpacked_to_a_few_times_the_size_of_the_file(tmp_path: Path) -> None:
    zeros = bytes(1 << 25)
    path = archive(
        tmp_path / "a.pth", entries(text("w") + tensor((1 << 23,), (1,), 1 << 23)), storage=zeros,
        kind=zipfile.ZIP_DEFLATED,
    )  # fmt: skip
    assert path.stat().st_size < 100_000
    assert "unpacks to more than 8 times its size" in refusal(path)


def test_a_copy_of_what_nests_too_deep_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", entries(text("w") + tensor(), text("x") + b"]" * 100_000 + b"a" * 99_999))
    with open_checkpoint(path) as checkpoint, pytest.raises(RequestError, match="nests too deep to be copied"):
        assert isinstance(checkpoint, TorchCheckpoint)
        checkpoint.save_with(tmp_path / "b.pth", {"w": torch.zeros(4)})
    assert not (tmp_path / "b.pth").exists()


def test_a_program_of_torchscript_says_what_it_is_and_what_to_do(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            file.writestr(f"a/{name}", program(b"N"))
    message = refusal(tmp_path / "a.pt")
    assert "TorchScript" in message and "state_dict()" in message and "download" not in message


# Averages without names


def test_averages_in_a_list_take_the_names_of_the_raw_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Conv2d(3, 4, 1))
    module.register_buffer("sigmas", torch.ones(7))
    averages = [parameter.detach() + 5 for parameter in module.parameters()]
    content = {"model": module.state_dict(), "ema": {"decay": 0.999, "shadow_params": averages}}
    torch.save(content, tmp_path / "a.pth")
    expected = {name: tensor if name == "sigmas" else tensor + 5 for name, tensor in module.state_dict().items()}
    assert_same(load_state(tmp_path / "a.pth"), expected)
    assert "ema.shadow_params have no names" in capsys.readouterr().err
    assert_same(load_state(tmp_path / "a.pth", "model"), module.state_dict())
    assert capsys.readouterr().err == ""
    merge_files(tmp_path / "a.pth", tmp_path / "a.pth", [1], tmp_path / "b.pth")
    copy = torch.load(tmp_path / "b.pth")
    assert all(torch.equal(a, b) for a, b in zip(copy["ema"]["shadow_params"], averages, strict=True))
    assert torch.equal(copy["model"]["0.weight"], module.state_dict()["0.weight"])


@pytest.mark.parametrize("change", ["a buffer alike", "another shape"])
def test_averages_whose_order_is_not_told_are_said_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    state = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(2)}
    averages = [torch.zeros(3), torch.zeros(2)] if change == "a buffer alike" else [torch.zeros(4)] * 3
    torch.save({"model": state, "ema": {"shadow_params": averages}}, tmp_path / "a.pth")
    assert_same(load_state(tmp_path / "a.pth"), state)
    said = capsys.readouterr().err
    assert "ema.shadow_params" in said and "do not tell" in said and "'model'" in said


def test_averages_alone_are_named_in_the_refusal(tmp_path: Path) -> None:
    torch.save({"shadow_params": [torch.ones(2)]}, tmp_path / "a.pth")
    assert "lists of tensors in shadow_params" in refusal(tmp_path / "a.pth")


# Several files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """STATE in two files, with their index."""
    folder = tmp_path / "shards"
    folder.mkdir()
    where = {}
    for index, names in enumerate((["layer.weight", "empty"], ["layer.scale", "steps"]), 1):
        file = f"model-0000{index}-of-00002.safetensors"
        save_safetensors(folder / file, {name: STATE[name] for name in names}, {"format": "pt", "part": str(index)})
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_shards_are_one_checkpoint_by_their_index_or_folder(tmp_path: Path, shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    assert_same(load_state(index), STATE)
    assert_same(load_state(shards), STATE)
    with open_checkpoint(index) as checkpoint:
        assert checkpoint.metadata == {"format": "pt"} and len(checkpoint.files) == 2
        assert checkpoint.path == index
    save_safetensors(tmp_path / "tuned.safetensors", {n: t + t for n, t in STATE.items()}, {})
    [report] = merge_files(index, tmp_path / "tuned.safetensors", [-1], tmp_path / "out.safetensors")
    assert torch.equal(load_state(report.output)["layer.weight"], 2 * STATE["layer.weight"])
    assert report.base_sha256 == sha256_file(index)
    with pytest.raises(RequestError, match="the output is the input"):
        merge_files(index, index, [1], next(shards.glob("*-00001-*")), overwrite=True)
    index.unlink()
    assert_same(load_state(shards), STATE)
    for command in (["inspect", str(shards)], ["convert", str(shards), str(tmp_path / "one.safetensors")]):
        assert main(command) == 0
    assert_same(load_state(tmp_path / "one.safetensors"), STATE)
    next(shards.glob("*-00001-*")).unlink()
    assert_same(load_state(shards), {"layer.scale": STATE["layer.scale"], "steps": STATE["steps"]})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "no weight_map"),
        ("[" * 100_000, "unknown format"),
        ('{"a":' * 100_000, "no weight_map"),
        ('{"metadata": {}}', "no weight_map"),
        ('{"weight_map": []}', "does not say"),
        ('{"weight_map": {"a": 3}}', "lie beside it"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "lie beside it"),
        ('{"weight_map": {"a": "nul\\u0000"}}', "lie beside it"),
        ('{"weight_map": {"a": "nowhere.safetensors"}}', "nowhere.safetensors is not beside it"),
        ('{"weight_map": {"a": "index.json"}}', "unknown format"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "do not hold a"),
    ],
)
def test_what_is_wrong_with_an_index_is_named(shards: Path, content: str, expected: str) -> None:
    (shards / "index.json").write_text(content)
    assert expected in refusal(shards / "index.json")


def test_a_folder_must_hold_one_checkpoint(tmp_path: Path, shards: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    save_safetensors(shards / "model-00003-of-00003.safetensors", STATE, {})
    assert "name the file inside it" in refusal(shards)
    next(shards.glob("*-of-00003*")).unlink()
    next(shards.glob("*-00001-*")).rename(shards / "model-00001-of-00003.safetensors")
    assert "name the file inside it" in refusal(shards)
    one = tmp_path / "one"
    one.mkdir()
    (one / "config.json").write_text("{}")
    torch.save({"ema": STATE}, one / "pytorch_model.bin")
    with open_checkpoint(one) as checkpoint:
        assert (checkpoint.path, checkpoint.key) == (one / "pytorch_model.bin", "ema")


# Headers and configurations


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('{"a":{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]}}', "has the shape"),
        ('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
         "taken twice"),
        ('{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "half a character"),
        ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "numbers of a"),
        ('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "numbers of a"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "begins at byte 4"),
        ('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', "corrupt header"),
        ('{"__metadata__":{"a":3},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "table of texts"),
        ('{"__metadata__":{"a":"\\udfff"},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "half a character"),
        ('{"__metadata__":[],"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "table of texts"),
        ('{"a":' * 100_000, "corrupt header"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_header_is_named(tmp_path: Path, header: str, expected: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, bytes(4)))
    assert expected in refusal(tmp_path / "a.safetensors")


def test_a_header_is_read_where_its_file_does_not_fit(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}}).encode()
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 32))
    code = (
        "import pathlib, resource, sys; from neon.checkpoint.header import read_header; "
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31)); print(len(read_header(pathlib.Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "2\n"


def changed(**keywords: Any) -> str:
    network: Any = CONFIG["network"]
    return json.dumps({**CONFIG, "network": {**network, **keywords}})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{", "no JSON"),
        ("null", "is a NoneType"),
        ("[]", "is a list"),
        ('"edm"', "is a str"),
        ("[" * 100_000, "no JSON"),
        ('{"network": ' + "[" * 600 + "]" * 600 + "}", "no JSON|no edm network"),
        ("{}", "'network'"),
        ('{"network": null}', "no edm network"),
        (changed(img_channels=-1), "negative dimension"),
        (changed(model_channels=0), "division by zero"),
        (changed(model_channels=10**6), "do not fit the model"),
        (changed(num_blocks=10**7), "far more tensors"),
        (changed(img_resolution=2**60), "a number above"),
        (changed(img_resolution=10**400), "a number above"),
        (changed(model_type=[]), "unhashable"),
    ],
)
def test_a_config_that_no_network_has_is_refused_at_once(tmp_path: Path, config: str, expected: str) -> None:
    about = {"architecture": "edm", "config": config}
    save_safetensors(tmp_path / "a.safetensors", tiny_edm().network.state_dict(), about)
    start = time.process_time()
    with pytest.raises(RequestError, match=expected) as caught:
        load_model(tmp_path / "a.safetensors")
    assert str(caught.value).startswith(f"{tmp_path / 'a.safetensors'}: ")
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("load", "shapes"),
    [
        (load_vae, {"encoder.conv_in.weight": (), "post_quant_conv.weight": (4,)}),
        (load_vae, {"encoder.conv_in.weight": (0,), "post_quant_conv.weight": (4,)}),
        (load_vae, {"encoder.conv_in.weight": (32,), "post_quant_conv.weight": (1 << 40, 0)}),
        (load_tokenizer, {"encoder.conv_in.weight": ()}),
        (load_tokenizer, {"encoder.conv_in.weight": (0,)}),
        (load_tokenizer, {"quantize.embedding.weight": (4,)}),
        (load_tokenizer, {"quantize.embedding.weight": (1 << 40, 0)}),
        (load_tokenizer, {"quantize.ema_vocab_hit_SV": ()}),
    ],
)
def test_shapes_that_no_autoencoder_has_are_refused_at_once(
    tmp_path: Path, load: Callable[[Path], Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    whole = {**tiny_tokenizer().state_dict(), "encoder.down.0.block.0.conv2.weight": torch.zeros(32)}
    save_safetensors(tmp_path / "a.safetensors", {**whole, **{n: torch.zeros(s) for n, s in shapes.items()}}, {})
    with pytest.raises(RequestError) as caught:
        load(tmp_path / "a.safetensors", **({"patch_nums": (1, 2)} if load is load_tokenizer else {}))
    assert str(caught.value).startswith(f"{tmp_path / 'a.safetensors'}: ")


@pytest.mark.parametrize("tiny", [tiny_imm, tiny_var])
@pytest.mark.parametrize("bare", [True, False])
def test_a_network_of_another_architecture_is_named(tmp_path: Path, tiny: Callable[[], Any], bare: bool) -> None:
    model = tiny()
    if bare:
        save_torch(tmp_path / "a.pth", model.network.state_dict())
    else:
        save_model(tmp_path / "a.pth", model)
    with pytest.raises(RequestError, match=f"a network of {model.architecture}; this program is for edm"):
        load_model(tmp_path / "a.pth", only=EDM)


def test_names_of_a_published_network_with_other_shapes_are_of_no_architecture(tmp_path: Path) -> None:
    state = tiny_imm().network.state_dict()
    for name in state:
        save_torch(tmp_path / "a.pth", {other: tensor for other, tensor in state.items() if other != name})
        save_torch(tmp_path / "b.pth", {**state, name: state[name].reshape(-1)})
        for file in ("a.pth", "b.pth"):
            with open_checkpoint(tmp_path / file) as checkpoint, contextlib.suppress(RequestError):
                described(checkpoint)


def test_foreign_text_reaches_no_terminal_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"a\x1b[2J\nb": torch.ones(1)}
    save_safetensors(tmp_path / "a.safetensors", state, {"note\x07": "x\x1b]0;y\x07"})
    torch.save({"gen\x1b[31m": state}, tmp_path / "a.pth")
    for file in ("a.safetensors", "a.pth"):
        assert main(["inspect", str(tmp_path / file)]) == 0
        assert main(["convert", str(tmp_path / file), str(tmp_path / f"{file}.safetensors")]) == 0
    shown = capsys.readouterr()
    assert r"a\x1b[2J\nb" in shown.out and r"gen\x1b[31m" in shown.out
    assert not {"\x1b", "\x07"} & set(shown.out + shown.err)


# Damage


def written(path: Path, kind: str) -> bytes:
    state = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(3).bfloat16()}
    content = {
        "model": state,
        "ema": {"shadow_params": [state["x"] + 1, state["y"]]},
        "lr": np.float64(1),
        "to": Path("a"),
    }
    if kind == "safetensors":
        save_safetensors(path, state, {"architecture": "edm", "config": "{}"})
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "archive")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["archive", "stream", "safetensors"])
@settings(max_examples=150, deadline=None)
@given(
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    end=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_a_damaged_file_is_refused_or_read_and_nothing_runs(
    tmp_path_factory: pytest.TempPathFactory, kind: str, damage: list[tuple[float, int]], end: float
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    whole = written(path, kind)
    content = bytearray(whole)
    for position, value in damage:
        content[int(position * len(whole))] = value
    content = content[: max(1, int(end * len(whole)))]
    path.write_bytes(content)
    with nothing_runs(), contextlib.suppress(RequestError, WorkError), open_checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            assert checkpoint.tensor(name).nbytes <= 8 * len(content) + (1 << 20)
        described(checkpoint)
