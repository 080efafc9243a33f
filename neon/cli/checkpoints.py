"""`neon merge`, `neon inspect` and `neon convert`: checkpoints in every published format."""

import dataclasses
import json as json_module
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from neon.cli.command_line import Weights, number
from neon.cli.flags import File, Key
from neon.errors import RequestError, shown

if TYPE_CHECKING:
    from neon.checkpoint import Checkpoint

AdapterFormatName = Literal["peft", "diffusers", "kohya"] | None
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge two checkpoints: theta_neon = (1 + w) theta_base - w theta_self_trained.

    w = 0 is the base, w = -1 the self-trained model, w > 0 Neon. Several w cost one read of the inputs. The same as
    `python neon_merge.py`.

    Example: neon merge --base base.pth --self-trained tuned.pth -w 0.5 1 1.5 --output "neon_w{w}.pth"
    """

    base: Path
    """base weights: safetensors, .pth, .pt, .ckpt or a published .pkl"""
    self_trained: Path
    """weights fine-tuned on the base's own samples, or a LoRA of the base that was: its file or folder"""
    w: Weights
    """merge weights"""
    output: str
    """file to write (.safetensors, .pth, .pt, .ckpt, .pkl if the base is one); several w need {w} in it"""
    key: Key = None
    """nesting of the state dict, such as model_ema; chosen and printed if not given"""
    self_trained_key: Key = None
    """the same for the self-trained file"""
    overwrite: bool = False
    """replace an existing output"""
    as_adapter: bool = False
    """write a LoRA that makes the merge of the base, loaded at scale 1; output: its folder, or a file for kohya"""
    adapter_format: AdapterFormatName = None
    """of --as-adapter: by default that of the adapter given, or peft"""
    rank: int | None = None
    """of --as-adapter from two networks: 16 by default; an adapter's own ranks are kept"""
    json: File = None
    """also write the report to this file"""

    def __call__(self) -> None:
        if self.as_adapter:
            self._write_adapter()
        elif given := [flag for flag in ("adapter_format", "rank") if getattr(self, flag) is not None]:
            raise RequestError(f"--{given[0].replace('_', '-')}: goes with --as-adapter")
        else:
            self._write_weights()

    def _write_adapter(self) -> None:
        from neon.merge.adapters.writing import write_adapter
        from neon.runtime.files import check_writable, write_json

        if len(self.w) > 1:
            raise RequestError(f"-w {' '.join(self.w)}: --as-adapter writes one; its scale in use stands for other w")
        if self.json is not None:
            check_writable(self.json, overwrite=True)
        report = write_adapter(
            self.base,
            self.self_trained,
            number("-w", self.w[0]),
            self.output,
            adapter_format=self.adapter_format,
            rank=self.rank,
            key=self.key,
            self_trained_key=self.self_trained_key,
            overwrite=self.overwrite,
        )
        print(f"{report.formula}, as an adapter of {report.base}")
        for name, share in report.layers.items():
            print(shown(f"  {name}  rank {report.ranks[name]}, {share:.1%} of the update's norm"))
        how = "the adapter's own factors" if report.exact else "truncated"
        print(f"w = {report.w:g}  {report.output}  ({report.adapter_format}, {len(report.layers)} layers, {how})")
        print(f"kept          {report.kept:.2%} of the update's norm, {len(report.whole)} tensors stored whole")
        for warning in dict.fromkeys(report.warnings):
            print(f"neon merge: warning: {warning}", file=sys.stderr)
        if self.json is not None:
            write_json(self.json, dataclasses.asdict(report))

    def _write_weights(self) -> None:
        from tqdm import tqdm

        from neon.checkpoint.common import listing
        from neon.merge import merge_files
        from neon.runtime.files import check_writable, write_json

        if self.json is not None:
            check_writable(self.json, overwrite=True)
        with tqdm(unit="B", unit_scale=True, desc="merging", delay=2, leave=False, file=sys.stderr) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            reports = merge_files(
                self.base,
                self.self_trained,
                [number("-w", text) for text in self.w],
                self.output,
                key=self.key,
                self_trained_key=self.self_trained_key,
                overwrite=self.overwrite,
                progress=progress,
            )
        first = reports[0]
        print(first.formula)
        print(f"base          {first.base}{_key_text(first.base_key, first.base_candidates)}")
        print(f"self-trained  {first.self_trained}{_key_text(first.self_trained_key, first.self_trained_candidates)}")
        buffers = f" (of these {len(first.buffers)} as buffers: {listing(first.buffers, 1)})" if first.buffers else ""
        print(f"tensors       {first.merged_tensors} merged, {first.copied_tensors} copied{buffers}")
        for report in reports:
            kept = f"update off by {report.relative_error:.2%}, {report.share_lost:.2%} of it lost in rounding"
            print(f"w = {report.w:<8g}  {report.output}  ({kept})")
        for warning in dict.fromkeys(text for report in reports for text in report.warnings):
            print(f"neon merge: warning: {warning}", file=sys.stderr)
        if self.json is not None:
            write_json(self.json, [dataclasses.asdict(report) for report in reports])


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a checkpoint holds; nothing stored in it is executed.

    Example: neon inspect neon_w1.safetensors
    """

    file: tyro.conf.Positional[Path]
    """checkpoint of any readable format"""
    key: Key = None
    """nesting of the state dict, such as model_ema; chosen and printed if not given"""
    json: bool = False
    """print JSON"""

    def __call__(self) -> None:
        facts = self._facts()
        tensors = facts.pop("tensors")
        if self.json:
            print(json_module.dumps({**facts, "tensors": tensors}, indent=2))
            return
        metadata = facts.pop("metadata")
        facts["key"] = facts["key"] or "(the file itself)"
        facts["candidates"] = ", ".join(name or "(the file itself)" for name in facts["candidates"])
        if "adapter" in facts:
            from neon.merge.adapters.facts import adapter_text

            facts["adapter"] = adapter_text(facts["adapter"])
        for name, value in facts.items():
            if value is not None:
                print(shown(f"{name:<13} {value:,}" if isinstance(value, int) else f"{name:<13} {value}"))
        for name, value in metadata.items():
            if name not in (*facts, "buffers", "lora_adapter_metadata"):  # as long as a network has layers
                print(shown(f"{name:<13} {value}"))
        print(f"tensors       {len(tensors)}")
        names = {name: shown(name) for name in tensors}
        width = max(map(len, names.values()))
        for name, tensor in tensors.items():
            print(f"  {names[name]:<{width}}  {tensor['dtype']:<9} {tensor['shape']}")

    def _facts(self) -> dict[str, Any]:
        from neon.runtime.files import sha256_file

        read = self._read_header() or self._read_checkpoint()
        return {
            "file": str(self.file),
            "format": read.format,
            "bytes": sum(file.stat().st_size for file in read.files),
            "sha256": sha256_file(self.file),
            "architecture": read.described.get("architecture"),
            "config": read.described.get("config"),
            "key": read.key,
            "candidates": list(read.candidates),
            "parameters": sum(math.prod(t["shape"]) for t in read.tensors.values() if "float" in t["dtype"]),
            "metadata": read.metadata,
            **({} if read.adapter is None else {"adapter": read.adapter}),
            "tensors": read.tensors,
        }

    def _read_header(self) -> "_Contents | None":
        """That of a safetensors file that says of what architecture it is, without torch; None: another file."""
        from neon.checkpoint.header import METADATA, dtype_name, entries_in_order, is_safetensors, read_header

        if self.key or not self.file.is_file():
            return None
        with open(self.file, "rb") as file:
            if not is_safetensors(file.read(16)):
                return None
        try:
            header, _ = read_header(self.file)
        except RequestError:  # or it begins like one
            return None
        metadata: dict[str, str] = header.get(METADATA, {})
        if "architecture" not in metadata:
            return None
        tensors = {
            name: {"shape": entry["shape"], "dtype": dtype_name(self.file, name, entry["dtype"])}
            for name, entry in entries_in_order(header)
        }
        return _Contents((self.file,), "safetensors", "", ("",), metadata, metadata, tensors)

    def _read_checkpoint(self) -> "_Contents":
        from neon.checkpoint import open_checkpoint
        from neon.merge.adapters import weights_of
        from neon.merge.adapters.facts import adapter_facts
        from neon.model import described

        with open_checkpoint(weights_of(self.file), self.key) as checkpoint:
            tensors = {
                name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
                for name, spec in checkpoint.specs.items()
            }
            return _Contents(
                checkpoint.files,
                checkpoint.format,
                checkpoint.key,
                checkpoint.candidates,
                checkpoint.metadata,
                described(checkpoint),
                tensors,
                adapter_facts(checkpoint, self.file),
            )


class _Contents(NamedTuple):
    """What `neon inspect` reads in a checkpoint."""

    files: Sequence[Path]
    format: str
    key: str
    candidates: Sequence[str]
    metadata: dict[str, str]
    """as the file has it"""
    described: dict[str, str]
    """with architecture and config, if they are recognised"""
    tensors: dict[str, dict[str, Any]]
    """shape and dtype by name"""
    adapter: dict[str, Any] | None = None
    """of a LoRA: its kind, ranks, alphas and targets"""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write any readable checkpoint as flat safetensors.

    Example: neon convert base.pth base.safetensors --key model_ema
    """

    file: tyro.conf.Positional[Path]
    """checkpoint of any readable format"""
    output: tyro.conf.Positional[Path]
    """file to write; ends in .safetensors"""
    key: Key = None
    """nesting of the state dict, such as model_ema; chosen and printed if not given"""
    overwrite: bool = False
    """replace an existing output"""

    def __call__(self) -> None:
        source = convert_checkpoint(self.file, self.output, self.key, overwrite=self.overwrite)
        used = _key_text(source.key, source.candidates)
        print(f"{self.file}{used} -> {self.output} ({len(source.specs)} tensors)")


def convert_checkpoint(path: Path, output: Path, key: str | None = None, *, overwrite: bool = False) -> "Checkpoint":
    """Write the state dict of `path` to `output` as safetensors, tied tensors in full; returns the (closed) input.

    Metadata is carried over; the architecture and config of a published pickle, and the source's name, key and
    sha256 are added to it.

    Raises:
        RequestError: as `open_checkpoint`, or `output` is not a .safetensors name, is the input, or exists.
        WorkError: the disk is full or fails while writing.
    """
    import torch

    from neon.checkpoint import open_checkpoint, stream_safetensors
    from neon.checkpoint.safetensors_format import aligned, check_storable
    from neon.model import described
    from neon.runtime.files import check_not_input, check_writable, sha256_file

    if output.suffix != ".safetensors":
        raise RequestError(f"{output}: convert writes safetensors; end the name in .safetensors")
    with open_checkpoint(path, key) as source:
        for file in source.files:
            check_not_input(output, file)
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


def _key_text(key: str, candidates: Sequence[str]) -> str:
    """Which state dict of a file was used, where there is a choice to know about."""
    if candidates == ("",):
        return ""
    others = ", ".join(other or "the file itself" for other in candidates if other != key)
    return shown(f" [{key or 'the file itself'}{f'; also there: {others}' if others else ''}]")
