"""`neon merge` and `neon convert`: checkpoints in every published format."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from neon.cli.command_line import Weights, number
from neon.cli.flags import File, Key
from neon.cli.merge_recipe import words_of_merge
from neon.errors import RequestError, shown

if TYPE_CHECKING:
    from neon.checkpoint import Checkpoint
    from neon.merge import FolderReport, MergeReport
    from neon.merge.precision import Precision
    from neon.merge.streaming import Progress

DTypeName = Literal["float32", "bfloat16", "float16"]
Rounding = Literal["nearest", "stochastic"]
AdapterFormatName = Literal["peft", "diffusers", "kohya"] | None
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge two checkpoints: theta_neon = (1 + w) theta_base - w theta_self_trained.

    w = 0 is the base, w = -1 the self-trained model, w > 0 Neon. Several w cost one read of the inputs. The same as
    `python neon_merge.py`.

    Folders of transformers and diffusers models are merged into folders, see docs/merging.md.

    Example: neon merge --base base.pth --self-trained tuned.pth -w 0.5 1 1.5 --output "neon_w{w}.pth"
    """

    base: Path
    """base weights: safetensors, .pth, .pt, .ckpt or a published .pkl; or the folder of a model or pipeline;
    hf:ORG/REPO is one on the Hub"""
    self_trained: Path
    """weights fine-tuned on the base's own samples, or a LoRA of the base that was: its file or folder"""
    w: Weights
    """merge weights"""
    w_of: Annotated[list[str], tyro.conf.arg(metavar="PATTERN=W [..]")] = dataclasses.field(default_factory=list)
    """another w for tensors by their names, such as "*norm*=0"; the first pattern that matches counts"""
    output: str
    """file to write (.safetensors, .pth, .pt, .ckpt, .pkl if the base is one), or folder if the base is one; several w
    need {w} in it"""
    key: Key = None
    """nesting of the state dict, such as model_ema; chosen and printed if not given"""
    self_trained_key: Key = None
    """the same for the self-trained file"""
    component: Annotated[list[str], tyro.conf.arg(metavar="NAME [NAME ...]")] = dataclasses.field(default_factory=list)
    """of folders: the components of a pipeline to merge, such as transformer; by default the one that differs"""
    variant: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """of folders: the variant to merge, such as fp16; by default the weights without one"""
    shard_size: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """of folders: the most bytes of a file, such as 5GB; by default cut as the base's are"""
    dtype: DTypeName | None = None
    """of the merged weights; by default the base's"""
    rounding: Rounding = "nearest"
    """to 16 bits; stochastic keeps small updates on average"""
    seed: int | None = None
    """of stochastic rounding; 0 by default"""
    overwrite: bool = False
    """replace an existing output"""
    as_adapter: bool = False
    """write a LoRA that makes the merge of the base, loaded at scale 1; output: its folder, or a file for kohya"""
    adapter_format: AdapterFormatName = None
    """of --as-adapter: by default that of the adapter given, or peft"""
    rank: int | None = None
    """of --as-adapter from two networks: 16 by default; an adapter's own ranks are kept"""
    recipe: File = None
    """merge.yaml of a merge, or one written by hand, in place of flags; flags beside it win"""
    export_mergekit: File = None
    """also write the merge as a recipe of mergekit to this file"""
    json: File = None
    """also write the report to this file"""

    @classmethod
    def with_recipe(cls, words: Sequence[str]) -> list[str]:
        """The words of a command line, after those of the recipe that it names."""
        return words_of_merge(words)

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

        for flag in ("shard_size", "dtype", "seed", "w_of", "export_mergekit"):
            if getattr(self, flag) not in (None, []):
                raise RequestError(f"--{flag.replace('_', '-')}: is of weights, not of an adapter; leave it out")
        if self.rounding != "nearest":
            raise RequestError(f"--rounding {self.rounding}: is of weights, not of an adapter; leave it out")
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
            components=self.component,
            variant=self.variant,
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

        from neon.merge import is_folder_merge
        from neon.runtime.files import atomic_write, check_writable, write_json

        if self.json is not None:
            check_writable(self.json, overwrite=True)
        mergekit = self._mergekit()
        merge = self._merge_folders if is_folder_merge(self.base, self.output) else self._merge_files
        with tqdm(unit="B", unit_scale=True, desc="merging", delay=2, leave=False, file=sys.stderr) as bar:
            reports = merge(_Bar(bar))
        for warning in dict.fromkeys(text for report in reports for text in report.warnings):
            print(f"neon merge: warning: {shown(warning)}", file=sys.stderr)
        if self.export_mergekit is not None:
            with atomic_write(self.export_mergekit) as file:
                file.write(mergekit)
        if self.json is not None:
            write_json(self.json, [dataclasses.asdict(report) for report in reports])

    def _merge_files(self, progress: "Progress") -> "Sequence[MergeReport]":
        from neon.merge import merge_files

        for flag, value in (
            ("--component", self.component),
            ("--variant", self.variant),
            ("--shard-size", self.shard_size),
        ):
            if value:
                raise RequestError(
                    f"{flag}: is of folders merged into a folder; name a folder as --base and, without a suffix, as "
                    "--output"
                )
        reports = merge_files(**self._asked(progress))
        print(reports[0].formula)
        _show_inputs(reports[0])
        for report in reports:
            print(f"w = {report.w:<8g}  {report.output}  ({_kept(report)})")
        return reports

    def _merge_folders(self, progress: "Progress") -> "Sequence[FolderReport]":
        from neon.merge import merge_folders

        reports = merge_folders(
            **self._asked(progress), components=self.component, variant=self.variant, shard_size=self.shard_size
        )
        first = reports[0]
        print(first.formula)
        for name, merged in first.components.items():
            if name:
                print(f"component     {name}")
            _show_inputs(merged)
        print(shown(f"copied        {', '.join(first.copied) or 'nothing'}"))
        for left_out in first.left_out:
            print(shown(f"left out      {left_out}"))
        for report in reports:
            print(f"w = {report.w:<8g}  {report.output}  ({'; '.join(map(_kept, report.components.values()))})")
        return reports

    def _asked(self, progress: "Progress") -> dict[str, Any]:
        """What is asked of a merge of files and of one of folders alike, by the names of their arguments."""
        return {
            "base": self.base,
            "self_trained": self.self_trained,
            "ws": self._ws(),
            "output": self.output,
            "key": self.key,
            "self_trained_key": self.self_trained_key,
            "overwrite": self.overwrite,
            "progress": progress,
            "precision": self._precision(),
            "patterns": self._patterns(),
        }

    def _precision(self) -> "Precision":
        from neon.merge.precision import Precision

        return Precision(dtype=self.dtype, rounding=self.rounding, seed=self.seed)

    def _patterns(self) -> dict[str, float]:
        found = dict[str, float]()
        for text in self.w_of:
            pattern, equals, w = text.rpartition("=")
            if not equals or not pattern:
                raise RequestError(f"--w-of {text}: expected a pattern of names and its w, such as *norm*=0")
            found[pattern] = number(f"--w-of {pattern}", w)
        return found

    def _mergekit(self) -> bytes:
        """What --export-mergekit writes; nothing without it."""
        if self.export_mergekit is None:
            return b""
        import yaml

        from neon.merge.recipe import mergekit_recipe
        from neon.runtime.files import check_writable

        check_writable(self.export_mergekit, overwrite=True)
        recipe = mergekit_recipe(self.base, self.self_trained, self._ws(), self._patterns(), self._precision())
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()

    def _ws(self) -> list[float]:
        return [number("-w", text) for text in self.w]


class _Bar:
    """What shows the progress of a merge, of which each component begins anew."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, done: int, total: int) -> None:
        if done < self._bar.n:
            self._bar.reset(total)
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def _show_inputs(report: "MergeReport") -> None:
    from neon.checkpoint.common import listing

    print(f"base          {report.base}{_key_text(report.base_key, report.base_candidates)}")
    print(f"self-trained  {report.self_trained}{_key_text(report.self_trained_key, report.self_trained_candidates)}")
    buffers = f" (of these {len(report.buffers)} as buffers: {listing(report.buffers, 1)})" if report.buffers else ""
    print(f"tensors       {report.merged_tensors} merged, {report.copied_tensors} copied{buffers}")


def _kept(report: "MergeReport") -> str:
    return (
        f"update off by {report.relative_error:.2%}, {report.share_lost:.2%} of it lost in rounding, "
        f"{report.share_kept:.2%} kept on average"
    )


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
