"""Which reader opens a file, decided by its content and never by its suffix."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from neon.checkpoint.common import Checkpoint
from neon.checkpoint.folders import file_in, is_index, open_index, open_shards
from neon.checkpoint.header import is_safetensors
from neon.checkpoint.pickle_format import PickleCheckpoint, is_pickle
from neon.checkpoint.safetensors_format import SafetensorsCheckpoint
from neon.checkpoint.torch_format import is_torch, open_torch
from neon.errors import RequestError, reason

_HEAD_BYTES = 512


class _Format(NamedTuple):
    recognises: Callable[[bytes], bool]
    open: Callable[[Path, str | None], Checkpoint]


# A new format is one row: what its first bytes look like and what opens it.
_FORMATS = (
    _Format(is_torch, open_torch),
    _Format(is_pickle, PickleCheckpoint.open),  # after torch, whose old files are pickles of their own kind
    _Format(is_safetensors, SafetensorsCheckpoint.open),
)


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Open a checkpoint of any readable format; nothing stored in the file is executed.

    Args:
        path: a file, an index of shards (`*.index.json`), or a folder that holds one checkpoint.
        key: dotted name of the nesting that holds the state dict ("model_ema", "trainer.var_wo_ddp"; "" is the
            file itself). By default the first present of model_ema, ema, trainer.var_wo_ddp, var_wo_ddp,
            state_dict, model and net, else the file itself.

    Raises:
        RequestError: no such file, a folder of many, an empty or truncated file, something other than weights (HTML
            page, Git LFS pointer), an unknown format, an unknown key, a pickle that names what was made to be run, or
            no tensors in it.
    """
    path = Path(path)
    if path.is_dir():
        found = _in_folder(path)
        if isinstance(found, list):
            return open_shards(path, found, lambda file: _open_file(file, key))
        path = found
    head = _read_head(path)
    if is_index(head) and not is_safetensors(head):
        return open_index(path, lambda file: _open_file(file, key))
    return _open_file(path, key)


def _in_folder(path: Path) -> Path | list[Path]:
    try:
        return file_in(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({reason(error)}); check its permissions") from error


def _open_file(path: Path, key: str | None) -> Checkpoint:
    head = _read_head(path)
    for form in _FORMATS:
        if form.recognises(head):
            return form.open(path, key)
    raise RequestError(f"{path}: {_name_accident(head)}")


def load_state(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """The state dict of a checkpoint as tensors of its own on the CPU; arguments and errors as `open_checkpoint`."""
    with open_checkpoint(path, key) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def _read_head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; check the path or download the checkpoint first") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({reason(error)}); check the path and its permissions") from error
    if not head:
        raise RequestError(f"{path}: the file is empty; download or write it again")
    return head


def _name_accident(head: bytes) -> str:
    """What lies in place of a checkpoint, and what to do about it."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run `git lfs pull` or download the file itself"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        return "an HTML page, not the weights; the download was answered by a web page, download the file itself"
    return (
        f"unknown format (begins with {head[:12]!r}); expected safetensors, a torch .pth/.pt/.ckpt file or a "
        "NVIDIA-style .pkl, download it again or convert it first"
    )
