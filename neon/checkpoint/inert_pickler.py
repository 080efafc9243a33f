"""Writing what `Machine` read: tensors become torch's, and objects that were never made are written as they stood."""

import mmap
import pickle
from typing import Any

import torch

from neon.checkpoint.unpickler import Blob, Global, Record, Setting, Storage, Tensor

_Pickler: Any = pickle._Pickler  # written in Python; the one in C asks nobody how a global is written


def inert_pickler(data: mmap.mmap) -> type[Any]:
    """A class of picklers, for torch to derive its own from; `data` is the file that was read, mapped writable."""
    tensors = _LiveTensors(data)

    class InertPickler(_Pickler):
        def save(self, obj: Any, save_persistent_id: bool = True) -> None:
            if isinstance(obj, Tensor):
                obj = tensors.of(obj)
            elif isinstance(obj, Blob):
                obj = obj.read() if isinstance(obj.data, bytes) else data[obj.start : obj.stop]
            if not isinstance(obj, Global | Record | Setting):
                super().save(obj, save_persistent_id)
            elif id(obj) in self.memo:
                self.write(self.get(self.memo[id(obj)][0]))
            elif isinstance(obj, Global):
                self.write(pickle.GLOBAL + f"{obj.module}\n{obj.bare_name}\n".encode())
                self.memoize(obj)
            else:
                self._save_inert(obj)

        def _save_inert(self, obj: Record | Setting) -> None:
            origin = obj.origin
            assert origin is not None, "everything that is read has one"
            self.save(origin.maker)
            self.save(origin.arguments)
            self.write(pickle.REDUCE if origin.role == "call" else pickle.NEWOBJ)
            self.memoize(obj)
            for item in origin.items:
                self.save(item)
                self.write(pickle.APPEND)
            for key, value in origin.entries.items():
                self.save(key)
                self.save(value)
                self.write(pickle.SETITEM)
            for state in origin.state:
                self.save(state)
                self.write(pickle.BUILD)

    return InertPickler


class _LiveTensors:
    """Tensors of torch that look into the mapped file, and share their storages as they do there."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._storages: dict[Storage, torch.UntypedStorage] = {}
        self._tensors: dict[Tensor, torch.Tensor] = {}

    def of(self, tensor: Tensor) -> torch.Tensor:
        if tensor not in self._tensors:
            if tensor.storage not in self._storages:
                self._storages[tensor.storage] = self._storage(tensor.storage.blob)
            values = torch.empty(0, dtype=tensor.dtype)
            values.set_(self._storages[tensor.storage], tensor.offset, tensor.shape, tensor.strides)
            if tensor.parameter is not None:
                values = torch.nn.Parameter(values, tensor.parameter)
            self._tensors[tensor] = values
        return self._tensors[tensor]

    def _storage(self, blob: Blob) -> torch.UntypedStorage:
        if not blob.size:
            return torch.UntypedStorage(0)
        source: Any = bytearray(blob.data) if isinstance(blob.data, bytes) else self._data
        return torch.frombuffer(source, dtype=torch.uint8, count=blob.size, offset=blob.start).untyped_storage()
