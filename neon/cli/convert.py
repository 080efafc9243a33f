"""Any readable checkpoint to a flat safetensors file, tensor by tensor."""

import os
from pathlib import Path

import torch

from neon.checkpoint import Checkpoint, open_checkpoint, stream_safetensors
from neon.checkpoint.safetensors_format import aligned, check_storable
from neon.errors import RequestError
from neon.model import described
from neon.runtime.files import check_not_input, check_writable, sha256_file

CHUNK_ELEMENTS = 1 << 20


def convert_checkpoint(
    path: str | os.PathLike[str], output: str | os.PathLike[str], key: str | None = None, *, overwrite: bool = False
) -> Checkpoint:
    """Write the state dict of `path` to `output` as safetensors, tied tensors in full; returns the (closed) input.

    Metadata is carried over; the architecture and config of a published pickle, and the source's name, key and
    sha256 are added to it.

    Raises:
        RequestError: as `open_checkpoint`, or `output` is not a .safetensors name, is the input, or exists.
        WorkError: the disk is full or fails while writing.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise RequestError(f"{output}: convert writes safetensors; end the name in .safetensors")
    with open_checkpoint(path, key) as source:
        check_not_input(output, source.path)
        check_storable(output, source.specs)
        check_writable(output, overwrite=overwrite)
        metadata = {
            **described(source),
            "source": source.path.name,
            "source_key": source.key,
            "source_sha256": sha256_file(source.path),
        }
        layout = aligned(source.specs)
        with stream_safetensors(output, layout, metadata, overwrite=overwrite) as writer:
            for name, spec in layout.items():
                for start in range(0, spec.numel, CHUNK_ELEMENTS):
                    chunk = torch.empty(min(CHUNK_ELEMENTS, spec.numel - start), dtype=spec.dtype)
                    source.read(name, start, chunk)
                    writer.write(chunk)
    return source
