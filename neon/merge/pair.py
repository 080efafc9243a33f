"""Opening base and self-trained weights as one pair: the same for files that are merged and for sweeps over w.

The files may differ in format, in the nesting of their state dict and in the words that wrappers put into names.
"""

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neon.checkpoint import Checkpoint, open_checkpoint
from neon.checkpoint.naming import Renamed, fitted
from neon.errors import RequestError, warn
from neon.merge.adapters import AdaptedCheckpoint, adapted, is_over, weights_of
from neon.merge.entries import Roles, check_pair, roles_of
from neon.merge.extrapolate import Change, differ
from neon.merge.ties import under_names_of
from neon.model import Network, buffers_of, described, load_weights

_BUFFER_BYTES = 1 << 22  # large enough for sequential disk speed, small enough to stay in a shared cache

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Pair:
    """Both files, open, and what becomes of their entries."""

    base: Checkpoint
    self_trained: Checkpoint
    """under the names of the base"""
    roles: Roles
    notes: tuple[str, ...]
    """what a user should know, in sentences"""
    adapter: AdaptedCheckpoint | None = None
    """the self-trained side, where it is an adapter over the base"""


@contextlib.contextmanager
def open_pair(
    base: PathLike,
    self_trained: PathLike,
    key: str | None = None,
    self_trained_key: str | None = None,
) -> Iterator[Pair]:
    """Open both files and refuse what cannot be merged.

    Args:
        self_trained: a file of weights, or a LoRA adapter (a file or its folder) that is read as what it makes of the
            base.
        key: nesting of the base's state dict (see `open_checkpoint`), and of the self-trained one if it has it.
        self_trained_key: nesting of the self-trained state dict.

    Raises:
        RequestError: a file cannot be read, their weights are not of one network, or are quantised.
    """
    with open_both(base, self_trained, key, self_trained_key) as (b, original, s, notes):
        _check_same_network(b, s)
        buffers = buffers_of(b)
        if buffers is None and (said := buffers_of(original)) is not None:
            buffers = frozenset(name for name, held in s.names_held.items() if held in said)
        try:
            roles = roles_of(b.specs, s.specs, lambda name: values_differ(b, s, name), buffers)
        except RequestError as error:
            raise _of_both(b, s, error) from None
        adapter = original if isinstance(original, AdaptedCheckpoint) else None
        yield Pair(b, s, roles, (*notes, *roles.notes), adapter)


@contextlib.contextmanager
def open_both(
    base: PathLike, self_trained: PathLike, key: str | None = None, self_trained_key: str | None = None
) -> Iterator[tuple[Checkpoint, Checkpoint, Renamed, list[str]]]:
    """Both files as `open_pair` opens them, whether or not they can be merged.

    Yields the base; the self-trained file as it is, and under the names of the base where they fit; and what a user
    should know, in sentences.
    """
    with open_checkpoint(base, key) as b, open_self_trained(self_trained, key, self_trained_key, b) as original:
        view, notes = under_names_of(b, original)
        yield b, original, view, [*(original.notes if isinstance(original, AdaptedCheckpoint) else ()), *notes]


def check_same_network(
    base: PathLike, self_trained: PathLike, key: str | None = None, self_trained_key: str | None = None
) -> None:
    """Raise a RequestError, naming both files, unless their weights are of one network and can be merged."""
    with open_pair(base, self_trained, key, self_trained_key):
        pass


def load_self_trained(
    network: torch.nn.Module,
    base: PathLike,
    self_trained: PathLike,
    key: str | None = None,
    self_trained_key: str | None = None,
) -> dict[str, torch.Tensor]:
    """The self-trained weights of a pair, on the CPU, under the names of a network that holds the base.

    Warns of what a user should know. Arguments and errors as `open_pair`.
    """
    own, change = network.state_dict(), Change()
    with open_pair(base, self_trained, key, self_trained_key) as pair:
        for note in pair.notes:
            warn(note)
        names = fitted(own, pair.self_trained.specs)
        if names is None:  # nor do the base's fit the network: who puts both into it says so
            return {name: pair.self_trained.tensor(name) for name in pair.self_trained.specs}
        state = {name: pair.self_trained.tensor(held) for name, held in names.items()}
        for name, held in names.items():
            if held in pair.roles.merged:
                change.add(own[name].cpu(), state[name])
    if (text := change.warning()) is not None:
        warn(f"{self_trained}: {text}")
    return state


def load_self_trained_network(
    network: Network,
    base: PathLike,
    self_trained: PathLike,
    key: str | None = None,
    self_trained_key: str | None = None,
) -> Network:
    """The self-trained network of a pair, a copy of a `network` that holds the base: for `GenerativeModel.combine`.

    Its buffers are its own. Warns of what a user should know. Arguments and errors as `open_pair`.
    """
    state = load_self_trained(network, base, self_trained, key, self_trained_key)
    second = copy.deepcopy(network)
    load_weights(second, state, self_trained)
    return second


def open_self_trained(
    path: PathLike, base_key: str | None, key: str | None, base: Checkpoint | None = None
) -> Checkpoint:
    """The self-trained file of a pair, at its own key, else at that of the base if it has it; errors as `open_pair`.

    An adapter is opened over the `base`; without one it is the file of its factors, which has the metadata.
    """
    file = _open_weights(weights_of(Path(path)), base_key, key)
    return file if base is None or not is_over(file, base) else adapted(file, Path(path), base)


def _open_weights(path: Path, base_key: str | None, key: str | None) -> Checkpoint:
    if key is None and base_key is not None:
        with contextlib.suppress(RequestError):  # the published pairs differ in nesting: then its own usual place
            return open_checkpoint(path, base_key)
    try:
        return open_checkpoint(path, key)
    except RequestError as error:
        raise RequestError(str(error).replace("--key", "--self_trained_key")) from None


def _check_same_network(base: Checkpoint, self_trained: Checkpoint) -> None:
    """Refuse weights that do not fit each other, and those of two networks that happen to have the same shapes."""
    try:
        check_pair(base.specs, self_trained.specs)
    except RequestError as error:
        raise _of_both(base, self_trained, error, hint=_other_nestings(base, self_trained)) from None
    ours, theirs = described(base), described(self_trained)
    # A config that was guessed from shapes says no more than these, which were compared.
    both_say = says_its_config(base) and says_its_config(self_trained)
    for entry in ("architecture", "config") if both_say else ("architecture",):
        a, b = _parsed(ours.get(entry)), _parsed(theirs.get(entry))
        if a is not None and b is not None and a != b:
            raise RequestError(
                f"base and self-trained differ in {entry}: {base.path} has {str(a)[:200]}, "
                f"{self_trained.path} has {str(b)[:200]}; both must come from the same network"
            )


def says_its_config(file: Checkpoint) -> bool:
    """Whether a file says how its network is built; of a bare state dict shapes tell what they can."""
    return "config" in file.metadata or file.has_constructor


def _of_both(base: Checkpoint, self_trained: Checkpoint, error: RequestError, hint: str = "") -> RequestError:
    return RequestError(f"{base.path} and {self_trained.path}: {error}{hint}")


def _other_nestings(base: Checkpoint, self_trained: Checkpoint) -> str:
    """What else there is to choose, if a file holds several state dicts."""
    return "".join(
        f"; {file.path.name} was read at {file.key or 'its top'} and has {', '.join(others)} too: {flag} chooses"
        for file, flag in ((base, "--key"), (self_trained, "--self_trained_key"))
        if (others := [name or "its top" for name in file.candidates if name != file.key])
    )


def _parsed(text: str | None) -> object:
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def values_differ(base: Checkpoint, self_trained: Checkpoint, name: str) -> bool:
    """Whether a tensor of two files differs in any value; reading ends at the first piece that does."""
    return any(differ(*parts) for _, parts in read_pieces(name, (base, self_trained), [new_buffer(), new_buffer()]))


def new_buffer() -> torch.Tensor:
    """Memory for one piece of a tensor of any dtype."""
    return torch.empty(_BUFFER_BYTES, dtype=torch.uint8)


def view_as(buffer: torch.Tensor, dtype: torch.dtype, count: int) -> torch.Tensor:
    """The first `count` elements of `dtype` in a buffer."""
    return buffer[: count * dtype.itemsize].view(dtype)


def read_pieces(
    name: str, files: Sequence[Checkpoint], buffers: Sequence[torch.Tensor], widest: int = 1
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """One tensor of each file, side by side: where a piece starts, and its elements, which live until the next.

    A piece fits a buffer of `new_buffer` also as elements of `widest` bytes.
    """
    dtypes, numel = [file.dtype(name) for file in files], files[0].specs[name].numel
    step = _BUFFER_BYTES // max(widest, *(dtype.itemsize for dtype in dtypes))
    for start in range(0, numel, step):
        count = min(step, numel - start)
        parts = [view_as(buffer, dtype, count) for buffer, dtype in zip(buffers, dtypes, strict=False)]
        for file, part in zip(files, parts, strict=True):
            file.read(name, start, part)
        yield start, parts
