"""Reading checkpoints of every format safely, writing them atomically, and naming what is wrong with a file."""

import argparse
import errno
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from neon.checkpoint import TensorSpec, load_state, open_checkpoint, save_safetensors
from neon.checkpoint.safetensors_format import aligned, stream_safetensors
from neon.cli.checkpoints import convert_checkpoint
from neon.errors import RequestError, WorkError
from neon.runtime.files import sha256_file

STATE = {
    "layer.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "layer.scale": torch.tensor(2.0, dtype=torch.bfloat16),
    "steps": torch.tensor([7], dtype=torch.int64),
    "empty": torch.zeros(0, 3),
}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def refusal(path: Path, key: str | None = None) -> str:
    """The one line a wrong file is refused with."""
    with pytest.raises(RequestError) as caught:
        load_state(path, key)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_safetensors_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", STATE, {"architecture": "toy"})
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.key == ""
        assert checkpoint.metadata == {"architecture": "toy"}
        assert checkpoint.shape("layer.weight") == (3, 4)
        assert checkpoint.dtype("layer.scale") == torch.bfloat16
        assert_same({name: checkpoint.tensor(name) for name in checkpoint.names()}, STATE)


@pytest.mark.parametrize("header_bytes", [0x280, 0x380, 0x480, 0x580])
def test_a_safetensors_file_that_begins_like_a_pickle_is_read(tmp_path: Path, header_bytes: int) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors(path, STATE, {"padding": ""})
    unpadded = int.from_bytes(path.read_bytes()[:8], "little")
    save_safetensors(path, STATE, {"padding": "x" * (header_bytes - unpadded)})
    assert path.read_bytes()[:2] == bytes([0x80, header_bytes >> 8])
    assert_same(load_state(path), STATE)


def test_the_safetensors_library_and_neon_read_each_other(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "ours.safetensors", STATE, {})
    assert_same(load_file(tmp_path / "ours.safetensors"), STATE)
    save_file(STATE, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert_same(load_state(tmp_path / "theirs.safetensors"), STATE)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(
                [
                    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
                    *(torch.bool, torch.uint8, torch.int64, torch.uint16, torch.complex64),
                ]
            ),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_mixture_of_names_dtypes_and_shapes_survives_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    state = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in table.items()}
    path = tmp_path_factory.mktemp("trip") / "a.safetensors"
    save_safetensors(path, state, {})
    header_length = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_length % 8 == 0
    read = load_state(path)
    assert read.keys() == state.keys()
    for name in state:
        assert (read[name].dtype, read[name].shape) == (state[name].dtype, state[name].shape)
        assert torch.equal(read[name].to(torch.complex64), state[name].to(torch.complex64))


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"model": {"x": 0}, "model_ema": {"x": 1}, "ema": {"x": 0}}, "model_ema"),
        ({"model": {"x": 0}, "ema": {"x": 1}}, "ema"),
        ({"trainer": {"var_wo_ddp": {"x": 1}, "vae_local": {"x": 0}}, "epoch": 3}, "trainer.var_wo_ddp"),
        ({"var_wo_ddp": {"x": 1}, "state_dict": {"x": 0}}, "var_wo_ddp"),
        ({"state_dict": {"x": 1}, "model": {"x": 0}}, "state_dict"),
        ({"model": {"x": 1}, "optimizer": {"state": {0: {"step": 5}}}}, "model"),
        ({"x": 1}, ""),
    ],
)
def test_the_state_dict_is_found_where_publishers_put_it(tmp_path: Path, content: dict[str, Any], key: str) -> None:
    def with_tensors(value: Any) -> Any:
        return (
            {k: torch.tensor(v) if k == "x" else with_tensors(v) for k, v in value.items()}
            if isinstance(value, dict)
            else value
        )

    torch.save(with_tensors(content), tmp_path / "a.pth")
    with open_checkpoint(tmp_path / "a.pth") as checkpoint:
        assert checkpoint.format == "torch"
        assert checkpoint.key == key
        assert key in checkpoint.candidates
        assert checkpoint.names() == ["x"]
        assert checkpoint.tensor("x") == 1


def test_a_key_overrides_the_choice_and_all_choices_are_visible(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.zeros(1)}, "model_ema": {"x": torch.ones(1)}}, tmp_path / "a.pth")
    with open_checkpoint(tmp_path / "a.pth", "model") as checkpoint:
        assert checkpoint.key == "model"
        assert set(checkpoint.candidates) == {"model", "model_ema"}
        assert checkpoint.tensor("x") == 0
    assert "present: model, model_ema" in refusal(tmp_path / "a.pth", "averaged")
    save_safetensors(tmp_path / "a.safetensors", STATE, {})
    assert "no nesting 'model'" in refusal(tmp_path / "a.safetensors", "model")


def test_a_torch_file_in_the_format_before_version_1_6_is_read(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_same(load_state(tmp_path / "a.pt"), STATE)


def test_a_torch_archive_that_someone_compressed_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as stored,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    assert_same(load_state(tmp_path / "b.pth"), STATE)


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.safetensors")
    save_safetensors(tmp_path / "b.pth", STATE, {})
    assert_same(load_state(tmp_path / "a.safetensors"), load_state(tmp_path / "b.pth"))


def test_arguments_kept_beside_the_weights_are_allowed(tmp_path: Path) -> None:
    torch.save({"model": OrderedDict(STATE), "args": argparse.Namespace(depth=16)}, tmp_path / "a.pth")
    assert_same(load_state(tmp_path / "a.pth"), STATE)


class Command:
    """Unpickling this in the ordinary way would run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "it_ran"
    content = {"model": STATE, "extra": Command(f"touch {mark}")}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / "a.pth")
    assert "system" in message
    assert "refused" in message
    assert not mark.exists()


@pytest.mark.parametrize("function", ["builtins.eval", "builtins.exec", "os.system", "subprocess.Popen", "torch.load"])
def test_a_pickle_that_names_a_function_is_refused(tmp_path: Path, function: str) -> None:
    mark = tmp_path / "it_ran"
    module, name = function.split(".")
    program = f"c{module}\n{name}\n(V__import__('os').mknod('{mark}')\ntR.".encode()
    torch.save(STATE, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as good,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_STORED) as bad,
    ):
        for entry in good.infolist():
            bad.writestr(entry.filename, program if entry.filename.endswith("data.pkl") else good.read(entry))
    assert "refused" in refusal(tmp_path / "b.pth")
    assert not mark.exists()


def safetensors_bytes(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


F32 = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
        (b"\n <html><head></head></html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"hello, this is not a checkpoint", "unknown format"),
        (b"GGUF" + bytes(60), "unknown format"),
        (pickle.dumps({"a": 1}), "unknown format"),
        (safetensors_bytes(F32, bytes(7)), "truncated"),
        (safetensors_bytes(F32)[:20], "truncated"),
        (safetensors_bytes("{not json}"), "corrupt header"),
        (safetensors_bytes('{"a":3}'), "corrupt header"),
        (safetensors_bytes(F32, bytes(9)), "corrupt header"),
        (safetensors_bytes(F32.replace("[2]", "[3]"), bytes(8)), "corrupt header"),
        (safetensors_bytes(F32.replace("[2]", "[-2]"), bytes(8)), "corrupt header"),
        (struct.pack("<Q", 1 << 60) + b"{}", "corrupt header"),
        (safetensors_bytes("{}"), "no tensors"),
        (safetensors_bytes('{"__metadata__":{"a":"b"}}'), "no tensors"),
        (b"PK\x03\x04" + bytes(100), "truncated"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content)
    assert expected in refusal(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nowhere.pth")
    assert "folder" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_torch_file_is_refused(tmp_path: Path, share: float, zipped: bool) -> None:
    torch.save({"model": {"x": torch.randn(1000)}}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: int(len(content) * share)])
    assert "download it again" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.zeros(1)], torch.zeros(1), argparse.Namespace(a=1)])
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert "without tensors by name" in refusal(tmp_path / "a.pth")


def test_a_torch_file_with_its_weights_in_an_unusual_place_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"generator": {"x": torch.ones(1)}}, tmp_path / "a.pth")
    assert load_state(tmp_path / "a.pth")["x"] == 1
    assert "the weights used are those of 'generator'" in capsys.readouterr().err
    torch.save({name: {"x": torch.ones(1)} for name in ("generator", "critic")}, tmp_path / "b.pth")
    assert "present: generator, critic; choose with --key" in refusal(tmp_path / "b.pth")
    assert load_state(tmp_path / "b.pth", "generator")["x"] == 1
    assert capsys.readouterr().err == ""


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("images/0.png", b"")
    assert "not a torch file" in refusal(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch says so whenever it loads one
def test_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.eye(3).to_sparse()}, tmp_path / "a.pth")
    assert "sparse" in refusal(tmp_path / "a.pth")


def test_a_tensor_read_shares_no_memory_with_the_file(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    save_safetensors(tmp_path / "a.safetensors", STATE, {})
    for name in ("a.pth", "a.safetensors"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            checkpoint.tensor("layer.weight").zero_()
            assert torch.equal(checkpoint.tensor("layer.weight"), STATE["layer.weight"])


def test_reading_a_part_of_a_tensor_gives_those_elements(tmp_path: Path) -> None:
    turned = {"x": torch.arange(12.0).reshape(3, 4).t()}
    torch.save(turned, tmp_path / "a.pth")
    save_safetensors(tmp_path / "a.safetensors", turned, {})
    for name in ("a.pth", "a.safetensors"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            part = torch.empty(3)
            checkpoint.read("x", 2, part)
            assert part.tolist() == turned["x"].reshape(-1)[2:5].tolist()


def test_conversion_flattens_tied_and_strided_tensors_and_records_the_source(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    state = {"embed": weight, "head": weight, "turned": weight.t(), "part": weight[1:3, ::2]}
    torch.save({"model": {"x": torch.zeros(1)}, "ema": state}, tmp_path / "a.pth")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert_same(load_state(tmp_path / "b.safetensors"), state)
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert checkpoint.metadata["source_key"] == "ema"
        assert checkpoint.metadata["source_sha256"] == sha256_file(tmp_path / "a.pth")


def test_conversion_carries_metadata(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", STATE, {"architecture": "toy", "config": "{}"})
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert checkpoint.metadata["architecture"] == "toy"
        assert checkpoint.metadata["config"] == "{}"
    assert_same(load_state(tmp_path / "b.safetensors"), STATE)


def test_the_hash_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors(path, STATE, {})
    before = path.read_bytes()
    with pytest.raises(RequestError, match="already exists"):
        save_safetensors(path, {"x": torch.zeros(1)}, {}, overwrite=False)
    assert path.read_bytes() == before
    save_safetensors(path, {"x": torch.zeros(1)}, {})
    assert list(load_state(path)) == ["x"]


def test_a_stream_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors(path, STATE, {})
    before = path.read_bytes()
    layout = {"x": TensorSpec((4,), torch.float32)}
    with pytest.raises(WorkError, match="disk is full"), stream_safetensors(path, layout, {}) as writer:
        writer.write(torch.zeros(2))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(AssertionError), stream_safetensors(path, layout, {}) as writer:
        writer.write(torch.zeros(2))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_wide_elements_come_first_so_that_every_tensor_is_aligned(tmp_path: Path) -> None:
    state = {"flag": torch.tensor([True]), "b": torch.zeros(3, dtype=torch.float16), "a": torch.zeros(2).double()}
    save_safetensors(tmp_path / "a.safetensors", state, {})
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in state.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    assert list(aligned({n: TensorSpec.of(t) for n, t in state.items()})) == ["a", "b", "flag"]
