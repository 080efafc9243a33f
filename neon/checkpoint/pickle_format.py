"""NVIDIA-style pickles (.pkl and training-state .pt): read as records, written as copies with other tensor bytes.

A file is a dictionary of networks and settings, or a network itself. A network is a tree of records whose
`_parameters`, `_buffers` and `_modules` give the names of its state dict, in that order.
"""

import contextlib
import gc
import mmap
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from neon.checkpoint.common import (
    Checkpoint,
    Constructor,
    TensorSpec,
    bytes_of,
    choose_key,
    find_nestings,
    listing,
    read_values,
)
from neon.checkpoint.unpickler import (
    Blob,
    Budget,
    Corrupt,
    Machine,
    Record,
    Refused,
    Setting,
    Storage,
    Tensor,
    network_global,
    typed_storage,
)
from neon.errors import RequestError
from neon.runtime.files import atomic_write

_ZIP = b"PK\x03\x04"
_PERSISTENT = b"torch_utils.persistence"
_LOCAL_HEADER = 30
_COPY_BYTES = 1 << 22
_MAX_DEPTH = 64  # of modules in modules and of values in keywords; published networks nest five deep
_MAX_NAME = 1000
_MAX_VALUES = 10_000  # in the keywords of a constructor
_MAX_TIED = 8  # bytes of all tensors per byte of the file
_SHOWN = 100
_EXPECTED = "expected a network, a state dict or a dictionary that holds one"


def is_pickle(head: bytes) -> bool:
    # Safetensors with a header of 640 bytes, for one, begin alike: four bytes of its length, four zeros, its bracket.
    return len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5 and head[4:9] != b"\0\0\0\0{"


def is_training_state(path: Path) -> bool:
    """Whether a torch archive holds networks of NVIDIA's layout, which torch's own restricted reader refuses."""
    # A broken archive can raise anything here; the reader it is left to says what is wrong with it.
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("/data.pkl") and entry.compress_type == zipfile.ZIP_STORED:
                return _PERSISTENT in archive.read(entry)
    return False


class PickleCheckpoint(Checkpoint):
    """A pickle whose tensors were located and not read: opening costs no more than a look at what lies between them."""

    format = "pickle"

    def __init__(
        self,
        path: Path,
        file: IO[bytes],
        tensors: Mapping[str, Tensor],
        *,
        key: str,
        candidates: tuple[str, ...],
        content: Any,
        is_archive: bool,
    ) -> None:
        specs = {name: TensorSpec(tensor.shape, tensor.storage.dtype) for name, tensor in tensors.items()}
        super().__init__(path, specs, key=key, candidates=candidates)
        self._file = file
        self._tensors = dict(tensors)
        self._content = content
        self._is_archive = is_archive
        self._flat: tuple[str, torch.Tensor] | None = None

    @classmethod
    def open(cls, path: Path, key: str | None) -> "PickleCheckpoint":
        """A plain pickle, as the networks are published."""
        return cls._open(path, key, is_archive=False)

    @classmethod
    def open_training_state(cls, path: Path, key: str | None) -> "PickleCheckpoint":
        """A torch archive of networks (see `is_training_state`)."""
        return cls._open(path, key, is_archive=True)

    @classmethod
    def _open(cls, path: Path, key: str | None, *, is_archive: bool) -> "PickleCheckpoint":
        file = open(path, "rb")  # noqa: SIM115 - closed by close()
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, _no_garbage_collection():
                budget = Budget(len(data))
                content = _read_archive(file, data, budget) if is_archive else _read_pickle(data, budget)
            nestings = find_nestings(content, lambda value: next(_tensors_in(value, budget), None) is not None)
            if not nestings:
                kind = content.class_name if isinstance(content, Record) else type(content).__name__
                raise RequestError(
                    f"{path}: unknown format, a pickle without tensors by name (it holds a {kind}); {_EXPECTED}"
                )
            key = choose_key(path, nestings, key)
            tensors = _named_tensors(nestings[key], budget)
        except BaseException as error:
            file.close()
            if isinstance(error, RequestError) or not isinstance(error, Exception):
                raise
            raise _refusal(path, error) from None
        return cls(
            path,
            file,
            tensors,
            key=key,
            candidates=tuple(nestings),
            content=nestings[key],
            is_archive=is_archive,
        )

    @property
    def constructor(self) -> Constructor | None:
        network = self._content
        if not isinstance(network, Record) or "_init_kwargs" not in network.state:
            return None
        if network.state.get("_init_args"):
            raise RequestError(
                f"{self.path}: {network.class_name} was built with positional arguments, whose meaning the file does "
                "not say; expected keywords only"
            )
        try:
            keywords = _as_json(network.state["_init_kwargs"], Budget(0, steps=_MAX_VALUES))
            return Constructor(network.class_name, dict(keywords))
        except (Refused, Corrupt, TypeError, ValueError) as error:
            raise RequestError(
                f"{self.path}: {network.class_name} was built with keywords that cannot be read ({error}); expected "
                "numbers, texts, lists and dictionaries"
            ) from None

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        tensor = self._tensors[name]
        if tensor.is_contiguous:
            self._read_blob(name, tensor.blob, start * out.element_size(), out)
            return
        if self._flat is None or self._flat[0] != name:
            # One tensor is kept flattened: that is a copy, to be made once and not per chunk.
            values = torch.empty(tensor.extent, dtype=out.dtype)
            self._read_blob(name, tensor.blob, 0, values)
            self._flat = (name, values.as_strided(tensor.shape, tensor.strides).reshape(-1))
        out.copy_(self._flat[1][start : start + out.numel()])

    def _read_blob(self, name: str, blob: Blob, offset: int, out: torch.Tensor) -> None:
        if isinstance(blob.data, bytes):
            view = bytes_of(out)
            view[:] = blob.data[blob.start + offset : blob.start + offset + len(view)]
        else:
            read_values(self._file, blob.start + offset, out, self.path, name)

    @property
    def layout(self) -> dict[str, TensorSpec]:
        """The specs in the order of the values in the file, in which a copy is written."""
        return dict(sorted(self.specs.items(), key=lambda item: self._tensors[item[0]].blob.start))

    def check_copyable(self) -> None:
        """Raise a RequestError unless every tensor has bytes of its own in the file that a copy can replace."""
        what = f"{self.path}: cannot be copied with other weights"
        instead = "write .safetensors or .pth instead"
        if self._is_archive:
            raise RequestError(f"{what}, it is a training state; {instead}")
        end, last = 0, ""
        for name, spec in self.layout.items():
            tensor = self._tensors[name]
            if isinstance(tensor.blob.data, bytes) or not tensor.is_contiguous:
                raise RequestError(f"{what}, {name} does not lie in it as plain bytes in order; {instead}")
            if spec.nbytes and tensor.blob.start < end:
                raise RequestError(f"{what}, {last} and {name} share their values; {instead}")
            end, last = max(end, tensor.blob.stop), name

    @contextlib.contextmanager
    def stream_copy(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator["PickleWriter"]:
        """A writer of a copy of this file that differs in the values of the chosen state dict only.

        Values are to be written in the order of `layout`. `path` appears when the block ends well.

        Raises:
            RequestError: as `check_copyable` and `atomic_write`.
            WorkError: as `atomic_write`.
        """
        self.check_copyable()
        blobs = [self._tensors[name].blob for name, spec in self.layout.items() if spec.nbytes]
        with atomic_write(path, overwrite=overwrite) as file:
            writer = PickleWriter(file, self._file, blobs)
            yield writer
            writer.finish()

    def save_with(
        self, path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], *, overwrite: bool = True
    ) -> None:
        """Write a copy of this file with `tensors` as the values of the state dict, rounded to its dtypes.

        Raises:
            RequestError: names or shapes differ from the file's, or as `stream_copy`.
            WorkError: as `stream_copy`.
        """
        odd = [name for name in {**self.specs, **tensors} if not self._fits(name, tensors.get(name))]
        if odd:
            raise RequestError(
                f"{path}: a copy of {self.path} takes its names and shapes; these differ: {listing(odd)}"
            )
        with self.stream_copy(path, overwrite=overwrite) as writer:
            for name, spec in self.layout.items():
                writer.write(tensors[name].detach().to("cpu", spec.dtype).reshape(-1))

    def _fits(self, name: str, tensor: torch.Tensor | None) -> bool:
        return tensor is not None and name in self.specs and tuple(tensor.shape) == self.specs[name].shape

    def close(self) -> None:
        self._file.close()


class PickleWriter:
    """Copies a pickle and puts other values where the tensors' lie; takes them in that order, in chunks of any size."""

    def __init__(self, file: IO[bytes], source: IO[bytes], blobs: list[Blob]) -> None:
        self._file = file
        self._source = source
        self._blobs = iter(blobs)
        self._end = 0  # of the last tensor begun
        self._left = 0  # bytes of it still to be written

    def write(self, values: torch.Tensor) -> None:
        """Append `values` (1-D, contiguous, CPU) of the tensor whose turn it is."""
        view = bytes_of(values)
        if view and not self._left:
            blob = next(self._blobs)
            self._copy(blob.start - self._end)
            self._end, self._left = blob.stop, blob.size
        assert len(view) <= self._left, "more values than the tensor has"
        self._left -= len(view)
        self._file.write(view)

    def finish(self) -> None:
        """Copy what follows the last tensor."""
        assert not self._left and next(self._blobs, None) is None, "not all tensors were written"
        self._copy(None)

    def _copy(self, count: int | None) -> None:
        """Copy `count` bytes of the source from the end of the last tensor on, or all that is left."""
        self._source.seek(self._end)
        while count is None or count > 0:
            part = self._source.read(_COPY_BYTES if count is None else min(count, _COPY_BYTES))
            if not part:
                break
            self._file.write(part)
            count = None if count is None else count - len(part)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Leave the many new containers alone while a pickle is read: looking through them takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refusal(path: Path, error: Exception) -> RequestError:
    if isinstance(error, Refused):
        return RequestError(f"{path}: refused, {error}; ask for a plain state dict or safetensors")
    if isinstance(error, OSError):
        return RequestError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions")
    reason = str(error) if isinstance(error, Corrupt) else type(error).__name__  # of others, any text may come
    return RequestError(f"{path}: truncated or corrupt pickle ({reason}); download it again")


def _read_pickle(data: mmap.mmap, budget: Budget) -> Any:
    machine = Machine(Blob(data, 0, len(data)), budget, network_global)
    content = machine.run()
    if machine.rest.size:
        raise Corrupt(f"{machine.rest.size} bytes follow its end")
    return content


def _read_archive(file: IO[bytes], data: mmap.mmap, budget: Budget) -> Any:
    """The content of a torch archive: a pickle in `<name>/data.pkl` and storages in `<name>/data/<key>`."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: _located(data, entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("/data.pkl"))
    folder = name.removesuffix("data.pkl")
    if f"{folder}byteorder" in entries and entries[f"{folder}byteorder"].read() != b"little":
        raise Refused("it was written on a big-endian machine")

    def storage(identity: Any) -> Storage:
        dtype, key, numel = typed_storage(identity)
        blob = entries[f"{folder}data/{key}"]
        if blob.size != numel * dtype.itemsize:
            raise Corrupt(f"a storage claims {numel} elements of {dtype} and has {blob.size} bytes")
        return Storage(blob, dtype)

    machine = Machine(entries[name], budget, network_global, persistent=storage)
    content = machine.run()
    if machine.rest.size:
        raise Corrupt(f"{machine.rest.size} bytes follow the end of {name}")
    return content


def _located(data: mmap.mmap, entry: zipfile.ZipInfo) -> Blob:
    header = data[entry.header_offset : entry.header_offset + _LOCAL_HEADER]
    if not header.startswith(_ZIP) or entry.compress_type != zipfile.ZIP_STORED:
        raise Corrupt(f"{entry.filename[:_SHOWN]!r} does not lie in the archive as torch writes it")
    name_length, extra_length = struct.unpack("<HH", header[-4:])
    start = entry.header_offset + _LOCAL_HEADER + name_length + extra_length
    if start + entry.file_size > len(data):
        raise Corrupt("the archive ends early")
    return Blob(data, start, start + entry.file_size)


def _tensors_in(content: Any, budget: Budget) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a network, or the tensors of a dictionary."""
    budget.spend()
    if isinstance(content, Record):
        yield from _state_of(content, "", 0, budget)
    elif isinstance(content, dict):
        for name, value in content.items():
            budget.spend()
            if isinstance(name, str) and isinstance(value, Tensor):
                yield name, value


def _state_of(module: Record, prefix: str, depth: int, budget: Budget) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a module below `prefix`: its parameters, its buffers, then its children's."""
    if depth > _MAX_DEPTH:
        raise Corrupt(f"modules nest more than {_MAX_DEPTH} deep")
    left_out = module.state.get("_non_persistent_buffers_set", ())
    for table in ("_parameters", "_buffers", "_modules"):
        for name, value in module.state.get(table, {}).items():
            budget.spend()
            if not isinstance(name, str) or len(prefix) + len(name) > _MAX_NAME:
                raise Corrupt(f"{module.class_name} names one of its {table[1:]} by no usual text")
            if table == "_modules" and isinstance(value, Record):
                yield from _state_of(value, f"{prefix}{name}.", depth + 1, budget)
            elif table != "_modules" and isinstance(value, Tensor):
                if table != "_buffers" or name not in left_out:
                    yield prefix + name, value
            elif value is not None:
                raise Corrupt(f"{module.class_name} holds a {type(value).__name__} among its {table[1:]}")


def _named_tensors(content: Any, budget: Budget) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    total = 0
    for name, tensor in _tensors_in(content, budget):
        if name in tensors:
            raise Corrupt(f"two tensors are called {name[:_SHOWN]!r}")
        tensors[name] = tensor
        total += tensor.blob.size
    if total > _MAX_TIED * budget.file_bytes:
        raise Refused("its tensors share their values so often that they do not fit in memory")
    return tensors


def _as_json(value: Any, budget: Budget, depth: int = 0) -> Any:
    budget.spend()
    if depth > _MAX_DEPTH:
        raise Corrupt("values nest too deep")
    if isinstance(value, Setting):
        if isinstance(value.content, str) and ("${" in value.content or value.content == "???"):
            raise Corrupt("one stands for another value of the configuration that it was part of")
        return _as_json(value.content, budget, depth + 1)
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _MAX_NAME):
        return value
    if isinstance(value, list | tuple):
        return [_as_json(item, budget, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _as_json(item, budget, depth + 1) for name, item in value.items()}
    raise Corrupt(f"one is a {type(value).__name__}")
