"""Names on the Hugging Face Hub, `hf:ORG/REPO[/FILE][@REVISION]`, fetched into the cache of huggingface_hub.

Its cache, HF_ENDPOINT, HF_HUB_OFFLINE and token are as in all its programs. Of several processes that ask for the same
file one downloads, since it locks what it writes. Nothing that is code is fetched for a folder.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath

from neon.errors import NoConnectionError, RequestError, WorkError, one_line
from neon.runtime.files import disk_full

PREFIX = "hf:"
_NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<inside>[^@]+))?(?:@(?P<revision>[^@]+))?", re.ASCII)
_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/(.+))?$", re.ASCII)
_FETCHED = (
    *("*.safetensors", "*.json", "*.txt", "*.md", "*.jinja", "LICENSE*"),
    *("*.model", "*.tiktoken", "*.vocab", "*.bpe", "*.spm"),  # of tokenizers
)
"""what of a folder is fetched: weights, and what is read or copied beside them"""
_BIN = ("pytorch_model*.bin", "diffusion_pytorch_model*.bin", "adapter_model*.bin", "pytorch_lora_weights*.bin")
"""the weights of a folder that has no safetensors"""
_LOG_IN = "`hf auth login`, or HF_TOKEN"


@dataclass(frozen=True)
class HubName:
    """What a name stands for."""

    repository: str
    inside: str = ""
    """a file, or a folder, in it"""
    revision: str | None = None
    """branch, tag or commit; None: the main branch"""

    @property
    def is_file(self) -> bool:
        """Whether it names a file: its last part ends as files do."""
        return PurePosixPath(self.inside).suffix[1:2].isalpha()


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is meant as one on the Hub."""
    return os.fspath(name).startswith(PREFIX)


def parsed(name: str | os.PathLike[str]) -> HubName:
    """What `name` stands for; a RequestError if it is not well formed."""
    match = _NAME.fullmatch(os.fspath(name))
    inside = (match["inside"] or "") if match else ""
    if match is None or {"", ".", ".."} & set(inside.split("/") if inside else ()):
        raise RequestError(
            f"{os.fspath(name)}: not a name on the Hub; expected hf:ORG/REPO, then /FILE and @REVISION if need be"
        )
    return HubName(match["repository"], inside, match["revision"])


def hub_name(path: str | os.PathLike[str]) -> str | None:
    """The name, with the commit, of what lies at `path` in the cache of the Hub; None: another path."""
    match = _CACHED.search(Path(path).absolute().as_posix())
    return match and f"{PREFIX}{match[1]}/{match[2]}{f'/{match[4]}' if match[4] else ''}@{match[3]}"


def in_words(path: str | os.PathLike[str]) -> str:
    """`path`, or LABEL=path, as a record of a run holds it: where it lies in the Hub's cache, by its name there."""
    label, place = _labelled(path, hub_name)
    return label + (hub_name(place) or place)


def short_name(path: str | os.PathLike[str]) -> str:
    """How a file or folder is called in cards and provenance: as on the Hub, else by its last part.

    In what folders of this machine it lies is nobody's business.
    """
    return hub_name(path) or Path(path).name


def fetched(name: str | os.PathLike[str]) -> Path:
    """Where `name` lies in the cache, a file or a folder, after it was fetched there unless it is there already.

    A repository that is one file of weights, as `neon improve` makes them, is that file.

    Raises:
        RequestError: the name is not well formed, there is no such repository, file or revision, or not for this user,
            or it is not in the cache of one who is offline by choice.
        NoConnectionError: the Hub cannot be reached.
        WorkError: the download fails.
    """
    from huggingface_hub import hf_hub_download

    text, wanted = os.fspath(name), parsed(name)
    try:
        if wanted.is_file and not wanted.inside.endswith(".index.json"):
            return Path(hf_hub_download(wanted.repository, wanted.inside, revision=wanted.revision))
        return _model_in(text, wanted)
    except (RequestError, WorkError):
        raise
    except Exception as error:  # what its HTTP client raises is not of one kind, and changes between versions
        raise failure(error, text) from error


def with_fetched(value: str | os.PathLike[str]) -> str:
    """`value`, a path, a name on the Hub or LABEL=name, with the path that the name was fetched to in its place.

    Errors as of `fetched`.
    """
    label, name = _labelled(value, is_hub_name)
    return f"{label}{fetched(name)}" if is_hub_name(name) else os.fspath(value)


def output_path(name: str | os.PathLike[str]) -> Path:
    """`name` as that of an output; a RequestError if it is one on the Hub."""
    if is_hub_name(name):
        raise RequestError(f"{os.fspath(name)}: an output is written here; `neon push` brings a folder to the Hub")
    return Path(name)


def _labelled(value: str | os.PathLike[str], is_one: Callable[[str], object]) -> tuple[str, str]:
    """ "LABEL=" and the rest of `value`, if that `is_one`; else nothing and all of it."""
    label, equals, rest = os.fspath(value).partition("=")
    return (label + equals, rest) if equals and is_one(rest) else ("", os.fspath(value))


def _model_in(name: str, wanted: HubName) -> Path:
    """The folder of a model, or the one file of weights, or the index of shards that was named."""
    inside = PurePosixPath(wanted.inside)
    sub = (inside.parent if wanted.is_file else inside).as_posix()
    folder = _snapshot(wanted, sub, _FETCHED)
    if without := _without_safetensors(folder):
        _snapshot(wanted, sub, [f"{place}{pattern}" for place in without for pattern in _BIN])
    if wanted.inside and not folder.is_dir():
        raise RequestError(f"{name}: not in the repository {wanted.repository}; was it renamed there?")
    if wanted.is_file:
        if not (folder / inside.name).is_file():
            raise RequestError(f"{name}: not in the repository {wanted.repository}; was it renamed there?")
        return folder / inside.name
    weights = [path for ending in ("safetensors", "bin") for path in sorted(folder.rglob(f"*.{ending}"))]
    if not weights:
        raise RequestError(f"{name}: no weights as safetensors in it; name a file, as hf:{wanted.repository}/FILE")
    described = any((folder / file).is_file() for file in ("config.json", "model_index.json", "adapter_config.json"))
    return weights[0] if len(weights) == 1 and weights[0].parent == folder and not described else folder


def _snapshot(wanted: HubName, sub: str, patterns: Sequence[str]) -> Path:
    """The folder `sub` of the repository, with the files in the cache whose names fit one of `patterns`."""
    from huggingface_hub import snapshot_download

    below = "" if sub == "." else f"{escape(sub)}/"
    names = [f"{below}{pattern}" for pattern in patterns]
    return Path(snapshot_download(wanted.repository, revision=wanted.revision, allow_patterns=names), sub)


def _without_safetensors(folder: Path) -> list[str]:
    """Places below `folder`, as patterns begin, of models whose weights are not safetensors."""
    models = {path.parent for path in folder.rglob("config.json")} or {folder}
    places = [model for model in models if not any(model.glob("*.safetensors"))]
    return sorted("" if place == folder else f"{escape(place.relative_to(folder).as_posix())}/" for place in places)


def download_from_hub(repository: str, name: str, path: Path, flaw: Callable[[Path], str | None]) -> None:
    """Fetch file `name` of a repository of the Hugging Face Hub to `path`, which appears whole or not at all.

    A connection that breaks is taken up again, but a download that is killed starts anew: huggingface_hub (2.4)
    writes to a name of its own in every run. Until the file is whole, `path`.part is the folder that it works in.

    Raises:
        RequestError: no such repository or file, or not for this user.
        NoConnectionError: the Hub cannot be reached.
        WorkError: the download fails, the disk is full, or the file has a `flaw`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = path.with_name(f"{path.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        found = Path(hf_hub_download(repository, name, local_dir=folder))
    except Exception as error:
        if _is_disk_full(error):
            raise disk_full(error, folder) from error
        if isinstance(error, LocalEntryNotFoundError):
            raise _unreachable(error, repository) from error
        raise failure(error, repository, name) from error
    else:
        if (wrong := flaw(found)) is not None:
            raise WorkError(f"{repository}: {wrong}")
        os.replace(found, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def failure(error: Exception, name: str, file: str = "") -> RequestError | WorkError:
    """What to say of an `error` of huggingface_hub about `name`, and about a `file` in it if it does not name that."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) and constants.HF_HUB_OFFLINE:
        return RequestError(f"{name}: not whole in the cache, and HF_HUB_OFFLINE is set; unset it to fetch it")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _unreachable(error, name)
    if isinstance(error, errors.GatedRepoError):
        return RequestError(f"{name}: gated; ask for access on its page and log in ({_LOG_IN})")
    if isinstance(error, errors.RepositoryNotFoundError):
        return RequestError(
            f"{name}: Hugging Face has no such repository, or not for you; if it asks for a login: {_LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"{name}: no such revision; expected a branch, a tag or a commit of the repository")
    if isinstance(error, errors.EntryNotFoundError):
        where = f"{file}: not in the repository {name}" if file else f"{name}: no such file in the repository"
        return RequestError(f"{where}; was it renamed there?")
    if isinstance(error, errors.HFValidationError):
        return RequestError(f"{name}: not a name on the Hub ({one_line(error)[:200]})")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        if (status := error.response.status_code) in (401, 403):
            return RequestError(f"{name}: Hugging Face does not let you ({status}); log in as one it does ({_LOG_IN})")
        return WorkError(f"{name}: Hugging Face refuses ({one_line(error)[:200]}); try again later")
    if _is_disk_full(error):
        return WorkError(f"{name}: the disk is full ({one_line(error)[:200]}); make room, or move HF_HOME")
    if type(error).__name__ in ("ConnectError", "ConnectionError", "ConnectTimeout"):
        return _unreachable(error, name)
    return WorkError(f"{name}: huggingface_hub failed ({one_line(error)[:200]}); run again")


def _unreachable(error: Exception, name: str) -> WorkError:
    """What to say where the Hub does not bring it, and no cache has it."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = one_line(error.__cause__ or error)[:200]
    if isinstance(error.__cause__, HfHubHTTPError):
        return WorkError(f"{name}: Hugging Face refuses ({cause}); try again later")
    return NoConnectionError(f"{name}: no connection to Hugging Face ({cause}); check the network and run again")


def _is_disk_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
