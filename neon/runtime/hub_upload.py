"""What of a folder belongs on the Hugging Face Hub, and bringing it there."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neon.errors import RequestError, reason
from neon.runtime.hub import PREFIX, failure
from neon.runtime.run_folder import RUN_FILE

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".pkl")
_TEXTS = (".json", ".md", ".html", ".csv", ".txt", ".yaml", ".yml", ".jinja")
_OTHERS = (".png", ".jpg", ".jpeg", ".webp", ".svg", ".model", ".tiktoken", ".vocab", ".bpe", ".spm")
_RECORDS = (RUN_FILE, "tune.json", "report.json")
"""of a run, which goes on by them; its page and scores.json say what others need"""
_CLEANED = ("README.md", "report.html", "scores.json", "config.json", "adapter_config.json", "model_index.json")
"""texts, besides indices, in which a path is cut to its last part"""
_AS_THEY_ARE = ("tokenizer", "vocab", "merges")
"""how names of texts begin that hold words of all kinds, which are no paths"""
_ABSOLUTE = re.compile(r"(?:(?<=[\s\"'`=(;])|^)(?:/[\w.+@-]+)+/([\w.+@-]+)")
"""a path of two parts or more that no address, tag or fraction is part of"""
_PIPELINE_FILE = "model_index.json"
_LARGEST_HEADER = 1 << 27
"""bytes of the header of a safetensors file, of which the format allows no more"""
_MAX_DEPTH = 2
"""of folders below that of a pipeline"""


@dataclass(frozen=True)
class Found:
    """What lies in a folder, relative to it."""

    files: tuple[str, ...]
    """to be uploaded"""
    left_out: dict[str, str]
    """and why not"""


def survey(folder: Path) -> Found:
    """Decide about each file of `folder`, and about each folder in it.

    Raises:
        RequestError: it is no folder, cannot be read, holds no weights, or more of the model than can be uploaded.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: not a folder; name that of a model, such as neon improve writes")
    files, left_out = list[str](), dict[str, str]()
    try:
        for path, why in _walk(folder, folder, _MAX_DEPTH if (folder / _PIPELINE_FILE).is_file() else 0):
            name = path.relative_to(folder).as_posix()
            if why is None:
                files.append(name)
            else:
                left_out[name] = why
    except OSError as error:
        raise RequestError(f"{folder}: cannot be read ({reason(error)}); check its permissions") from error
    if not any(name.endswith(_WEIGHTS) for name in files):
        raise RequestError(f"{folder}: holds no weights to upload; expected such as improved.safetensors in it")
    return Found(tuple(files), left_out)


def _walk(top: Path, folder: Path, depth: int) -> Iterator[tuple[Path, str | None]]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and depth and not path.name.startswith("."):
            yield from _walk(top, path, depth - 1)
        else:
            yield path, _reason_against(top, path)


def _reason_against(top: Path, path: Path) -> str | None:
    """Why a file stays here; None: it is uploaded."""
    if path.name.startswith("."):
        return "hidden"
    if not path.is_file():
        return "no file of a model" if not path.is_dir() else "a folder, no part of the model"
    if Path(os.path.realpath(top)) not in Path(os.path.realpath(path)).parents:
        return "a link to another place"
    if path.name in _RECORDS:
        return "record of the run"
    if path.suffix == ".py":
        return "code"
    if not path.name.startswith("LICENSE") and path.suffix not in (*_WEIGHTS, *_TEXTS, *_OTHERS):
        return "no weights, configuration, card or page"
    is_read = path.suffix in _TEXTS and not _is_cleaned(path) and not path.name.startswith(_AS_THEY_ARE)
    if is_read and (place := _place_of_machine(path)):
        return f"names {place}, a folder of this machine"
    return None


def _place_of_machine(path: Path) -> str | None:
    """A folder of this machine that a text names: those where people work, and those of homes anywhere."""
    around = (Path.home(), Path.cwd(), path.absolute().parent.parent, tempfile.gettempdir())
    places = {str(place) for place in around} - {"/"}
    found = re.search(
        rf"(?<![\w./-])(?:{'|'.join(map(re.escape, sorted(places)))}|/(?:home|Users)/[\w.-]+)(?=[/\"'\s]|$)",
        path.read_text("utf-8", errors="replace"),
    )
    return found and found[0]


def content_of(path: Path, scratch: Path) -> Path | bytes:
    """What is uploaded for a file: itself, or without the folders that its text or metadata names.

    Those are nobody's business. A copy of weights is made in the folder `scratch`.
    """
    if path.suffix == ".safetensors":
        return _without_places(path, scratch)
    if not _is_cleaned(path):
        return path
    text = path.read_text("utf-8", errors="surrogateescape")
    clean = _ABSOLUTE.sub(lambda match: match[1], text)
    return path if clean == text else clean.encode("utf-8", errors="surrogateescape")


def _without_places(path: Path, scratch: Path) -> Path:
    """The file of weights, or a copy of it whose metadata names the last parts of paths only."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length < _LARGEST_HEADER else {}
    metadata = {name: _ABSOLUTE.sub(r"\1", text) for name, text in header.get("__metadata__", {}).items()}
    if metadata == header.get("__metadata__", {}):
        return path
    text = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":"), ensure_ascii=False).encode()
    with tempfile.NamedTemporaryFile(dir=scratch, suffix=path.suffix, delete=False) as copy, open(path, "rb") as file:
        copy.write(file.read(8) + text.ljust(length))  # as long as before, so that the tensors stay where they are
        file.seek(8 + length)
        shutil.copyfileobj(file, copy)
    return Path(copy.name)


def _is_cleaned(path: Path) -> bool:
    return path.name in _CLEANED or path.name.endswith(".index.json")


def upload(folder: Path, files: Sequence[str], repository: str, *, private: bool) -> str:
    """Bring `files` of `folder` to a repository, made if it is not there; returns the address of the commit.

    Raises:
        RequestError: nobody is logged in, or not one who may write there.
        NoConnectionError, WorkError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    name = f"{PREFIX}{repository}"
    if get_token() is None:
        raise RequestError(f"{name}: nobody is logged in; `hf auth login`, or set HF_TOKEN to a token that may write")
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            operations = [CommitOperationAdd(file, content_of(folder / file, Path(scratch))) for file in files]
            title = f"Upload {folder.name or 'model'} by Neon"
            commit = api.create_commit(repository, operations, commit_message=title)
    except Exception as error:  # as in neon.runtime.hub
        raise failure(error, name) from error
    return commit.commit_url
