"""Neon as an adapter: loaded at scale 1 it makes the base (1 + w) theta_base - w theta_self_trained."""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neon.checkpoint import TensorSpec, stream_safetensors
from neon.checkpoint.common import listing
from neon.checkpoint.safetensors_format import aligned
from neon.errors import RequestError
from neon.merge.adapters.formats import FORMATS, AdapterFormat
from neon.merge.adapters.layers import LoRA
from neon.merge.adapters.names import CONFIG, Style
from neon.merge.adapters.update import Factors, LayerUpdate, updates
from neon.merge.components import choose_components
from neon.merge.extrapolate import check_weight, merge_tensor
from neon.merge.pair import Pair, PathLike, open_pair
from neon.merge.streaming import FORMULA, provenance_of, told_of
from neon.runtime.atomic_folder import atomic_folder
from neon.runtime.files import check_writable, sha256_file, write_json
from neon.runtime.hub import in_words

USUAL_RANK = 16


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What an adapter of `write_adapter` holds and what it leaves out."""

    output: str
    w: float
    formula: str
    adapter_format: Style
    base: str
    base_sha256: str
    self_trained: str
    self_trained_sha256: str
    exact: bool
    """its factors are those of the adapter that was given, times -w"""
    kept: float
    """norm of the update that it holds over that of the whole update"""
    layers: dict[str, float]
    """the same of each weight that has factors, by name in the base"""
    ranks: dict[str, int]
    whole: tuple[str, ...]
    """tensors that are stored as they are after the merge"""
    lost: tuple[str, ...]
    """tensors whose update the format cannot hold"""
    share_lost: float
    """norm of their update over that of the whole update"""
    warnings: tuple[str, ...]


def write_adapter(
    base: PathLike,
    self_trained: PathLike,
    w: float,
    output: PathLike,
    *,
    adapter_format: Style | None = None,
    rank: int | None = None,
    components: Sequence[str] = (),
    variant: str | None = None,
    key: str | None = None,
    self_trained_key: str | None = None,
    overwrite: bool = False,
) -> AdapterReport:
    """Write the update -w (theta_self_trained - theta_base) as a LoRA adapter of the base.

    From an adapter: its own factors times -w, at its own ranks. From two networks: the best factors of `rank` for each
    linear layer and convolution, by a randomised decomposition that is the same every time; what is none of these is
    stored whole where the format can.

    Args:
        output: a folder for PEFT and diffusers, a .safetensors file for kohya; it appears whole or not at all.
        adapter_format: by default that of the adapter given, or PEFT's.
        rank: by default 16; of an adapter that is given, there is nothing to choose.
        components: as `variant`, those of `merge_folders`, of which one is written.

    Raises:
        RequestError: as `open_pair` and `merge_folders`; w is 0 or not finite, there is nothing to hold, the rank is
            below 1 or not to be chosen, or the output exists or cannot be written.
        WorkError: the disk is full or fails.
    """
    check_weight(w)
    if w == 0:
        raise RequestError("w = 0 is the base: no adapter is needed for it; name another merge weight")
    base, self_trained = _chosen(Path(base), Path(self_trained), components, variant, (key, self_trained_key))
    with open_pair(base, self_trained, key, self_trained_key) as pair:
        style: Style = adapter_format or (pair.adapter.contents.style if pair.adapter else "peft")
        _check_rank(pair, rank)
        form = FORMATS[style](pair.base.path, list(pair.base.specs), _given(pair, style))
        place = Path(output).resolve()
        for file in (*pair.base.files, *pair.self_trained.files):
            if place in (real := file.resolve(), *real.parents):
                raise RequestError(f"{output}: is or holds the input {file}; choose another name")
        with _whole(Path(output), form.weights_name, overwrite=overwrite) as path:
            found = list(updates(pair.base, pair.self_trained, pair.adapter, pair.roles, w, rank or USUAL_RANK))
            adapter = _Adapter(form, found)
            if not adapter.factors:
                raise RequestError(
                    f"{pair.base.path} and {pair.self_trained.path}: no layer differs that an adapter of the format "
                    f"{style!r} can hold; merge them into weights"
                )
            hashes = sha256_file(pair.base.path), sha256_file(pair.self_trained.path)
            sampler = told_of(None, pair.self_trained)
            adapter.save(path, pair, w, provenance_of(pair.base, pair.self_trained, w, hashes, sampler))
        return AdapterReport(
            output=str(output),
            w=w,
            formula=FORMULA,
            adapter_format=style,
            base=in_words(pair.base.path),
            base_sha256=hashes[0],
            self_trained=in_words(pair.self_trained.path),
            self_trained_sha256=hashes[1],
            exact=_is_exact(pair),
            warnings=(*pair.notes, *adapter.warnings()),
            **adapter.figures(),
        )


def _chosen(
    base: Path,
    self_trained: Path,
    components: Sequence[str],
    variant: str | None,
    keys: tuple[str | None, str | None],
) -> tuple[Path, Path]:
    """What opens the network that the adapter is of, and its self-trained weights."""
    if not base.is_dir():
        if components or variant:
            raise RequestError(f"--{'component' if components else 'variant'}: is of folders, and {base} is a file")
        return base, self_trained
    merged = choose_components(base, self_trained, components, variant, keys).merged
    if len(merged) > 1:
        raise RequestError(
            f"--component: an adapter is of one network, and {len(merged)} are named; write one for each"
        )
    return merged[0].base.path, merged[0].self_trained


class _Adapter:
    """Factors and whole tensors under the names of a format."""

    def __init__(self, form: AdapterFormat, found: Collection[LayerUpdate]) -> None:
        self.form, self.found = form, found
        self.tensors = {one.name: form.tensors(one.name, one.factors) for one in found if one.factors}
        self.factors: dict[str, Factors] = {
            one.name: one.factors for one in found if one.factors and self.tensors[one.name]
        }
        self.whole = form.whole([one.name for one in found if one.name not in self.factors], self.factors)

    @property
    def lost(self) -> list[LayerUpdate]:
        return [one for one in self.found if one.name not in self.factors and one.name not in self.whole]

    def figures(self) -> dict[str, Any]:
        total = _length(one.norm for one in self.found)
        kept = _length(one.norm if one.name in self.whole else one.kept for one in self.found if one not in self.lost)
        layers = {one.name: one.kept / one.norm if one.norm else 1.0 for one in self.found if one.name in self.factors}
        return {
            "kept": kept / total if total else 1.0,
            "layers": layers,
            "ranks": {name: one.rank for name, one in self.factors.items()},
            "whole": tuple(self.whole),
            "lost": tuple(one.name for one in self.lost),
            "share_lost": _length(one.norm for one in self.lost) / total if total else 0.0,
        }

    def warnings(self) -> list[str]:
        if not self.lost:
            return []
        return [
            f"the format cannot hold what changes in {listing(one.name for one in self.lost)}: "
            f"{self.figures()['share_lost']:.2%} of the update's norm is lost; --adapter-format peft holds more, and a "
            "merge without --as-adapter all of it"
        ]

    def save(self, file: Path, pair: Pair, w: float, provenance: Mapping[str, str]) -> None:
        """Write the tensors to `file`, and the config of PEFT beside it."""
        config = self.form.config(self.factors, self.whole)
        held = {name: tensor for name in self.factors for name, tensor in self.tensors[name].items()}
        names = {held: name for name, held in self.whole.items()}
        layout = aligned({**{name: TensorSpec.of(tensor) for name, tensor in held.items()},
                          **{name: pair.base.specs[theirs] for name, theirs in names.items()}})  # fmt: skip
        with stream_safetensors(file, layout, {**self.form.metadata(config), **provenance}) as writer:
            for name in layout:
                if name in held:
                    writer.write(held[name].reshape(-1).contiguous())
                else:
                    writer.write(_merged(pair, names[name], w).reshape(-1))
        if self.form.weights_name == FORMATS["peft"].weights_name:
            write_json(file.with_name(CONFIG), config)


def _merged(pair: Pair, name: str, w: float) -> Any:
    base = pair.base.tensor(name)
    if name not in pair.roles.merged:
        return base
    return merge_tensor(base, pair.self_trained.tensor(name), w, name=name)


def _length(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm * norm for norm in norms))


def _given(pair: Pair, style: Style) -> dict[str, Any]:
    """The adapter's own names of layers, where it is written as what it was read from."""
    if pair.adapter is None or pair.adapter.contents.style != style:
        return {}
    return {name: one.layer for name, one in pair.adapter.changes.items() if isinstance(one, LoRA)}


def _is_exact(pair: Pair) -> bool:
    """Whether the update is factors that were given."""
    changes = pair.adapter.changes.values() if pair.adapter else ()
    return pair.adapter is not None and not any(isinstance(one, LoRA) and one.has_magnitude for one in changes)


def _check_rank(pair: Pair, rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise RequestError(f"--rank {rank}: expected 1 or more")
    if rank is not None and _is_exact(pair):
        raise RequestError(
            f"--rank {rank}: {pair.self_trained.path} is an adapter, whose ranks are kept; leave the flag out"
        )


@contextlib.contextmanager
def _whole(output: Path, name: str | None, *, overwrite: bool) -> Iterator[Path]:
    """The file to write an adapter's tensors to; `output`, it or its folder, appears when the block ends well.

    Args:
        name: of the file in the folder; None: the output is the file.
    """
    if (output.suffix == ".safetensors") != (name is None):
        kind = "a folder, name it without .safetensors" if name else "one file, end its name in .safetensors"
        raise RequestError(f"{output}: an adapter of this format is {kind}")
    if name is None:
        check_writable(output, overwrite=overwrite)
        yield output
    else:
        with atomic_folder(output, overwrite=overwrite, may_be_replaced=_is_adapter) as folder:
            yield folder / name


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds what an adapter written before is made of, and nothing else."""
    return {path.name for path in folder.iterdir()} <= {CONFIG, *(form.weights_name for form in FORMATS.values())}
