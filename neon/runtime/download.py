"""Where published files lie: in their usual folders, or behind a URL, from where they are fetched once into a cache."""

import hashlib
import os
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from neon.errors import RequestError, WorkError
from neon.runtime.distributed import Processes
from neon.runtime.files import atomic_write

CACHE_VARIABLE = "NEON_CACHE"
TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 20


def is_url(name: str) -> bool:
    """Whether `name` is to be downloaded rather than opened."""
    return name.startswith(("http://", "https://"))


def cache_folder() -> Path:
    """Where downloads lie: `$NEON_CACHE`, else `neon` in the user's cache folder."""
    if CACHE_VARIABLE in os.environ:
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "neon"


def cached_path(url: str) -> Path:
    """Where the file behind `url` lies once it is downloaded: its own name, in a folder of its address."""
    address = hashlib.sha256(url.encode()).hexdigest()[:16]
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "file"
    return cache_folder() / address / name


def local_file(name: str | os.PathLike[str]) -> Path:
    """`name` itself if it is a path; if it is a URL, the file behind it, downloaded unless it is in the cache.

    A download appears in the cache whole or not at all.

    Raises:
        RequestError: the server refuses, or answers with a web page.
        WorkError: the connection breaks, the file comes short, or the disk is full.
    """
    name = os.fspath(name)
    if not is_url(name):
        return Path(name)
    path = cached_path(name)
    if not path.exists():
        print(f"downloading {name} to {path}", file=sys.stderr)
        _download(name, path)
    return path


def shared_file(name: str, processes: Processes) -> Path:
    """`local_file` for several processes: one of them downloads, and on every other node another one."""
    if is_url(name):
        processes.on_main(lambda: local_file(name))
    return local_file(name)


def usual_file(
    name: str, folders: Sequence[str], what: str, fetch: str, flag: str, *, cached: Path | None = None
) -> Path:
    """The published file (or folder) `name` where it usually lies: in one of `folders`, or at `cached`.

    Raises:
        RequestError: it is nowhere there; the message says how to fetch it, and the `flag` that names another.
    """
    places = [Path(folder) / name for folder in folders]
    if cached is not None:
        places.append(cached)
    for place in places:
        if place.exists():
            return place
    raise RequestError(
        f"{name}: {what} is missing; looked for {', '.join(map(str, places))}; fetch it with `{fetch}`, "
        f"or name it with {flag}"
    )


def _download(url: str, path: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "neon"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise RequestError(f"{url}: the server answered with a web page, not a file; check the address")
            expected = int(answer.headers.get("Content-Length") or -1)
            free = shutil.disk_usage(_existing_parent(path)).free
            if expected > free:
                raise WorkError(f"{path}: the disk is full ({expected} bytes to come, {free} free); free some space")
            with atomic_write(path) as file, _bar(expected) as bar:
                size = 0
                while chunk := answer.read(_CHUNK_BYTES):
                    file.write(chunk)
                    size += len(chunk)
                    bar.update(len(chunk))
                if expected not in (-1, size):
                    raise WorkError(f"{url}: the download ended after {size} of {expected} bytes; run again")
    except urllib.error.HTTPError as error:
        raise RequestError(f"{url}: the server answers {error.code} ({error.reason}); check the address") from error
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise WorkError(f"{url}: download failed ({reason}); check the connection, or download it to {path}") from error


def _bar(total: int) -> tqdm:
    return tqdm(total=max(total, 0) or None, unit="B", unit_scale=True, delay=2, leave=False, file=sys.stderr)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
