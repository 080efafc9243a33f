"""Files behind a URL, fetched whole or not at all; and the one door to these and to the Hugging Face Hub."""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neon.errors import NoConnectionError, RequestError, WorkError, one_line
from neon.runtime.files import disk_full, write_failure
from neon.runtime.hub import fetched, is_hub_name
from neon.runtime.signals import Stopped

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes  # imports torch, for which no --help should wait

CACHE_VARIABLE = "NEON_CACHE"
TIMEOUT_SECONDS = 60.0
"""after which a server that says nothing is given up, or one that sends less than `MIN_BYTES` in this time"""
MIN_BYTES = 60_000
RETRY_PAUSES = (1.0, 2.0)
"""seconds before a server is asked again that has answered one of `TRANSIENT`"""
TRANSIENT = (408, 429, 500, 502, 503, 504)
_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 512
_MAX_ZIP_END = 65557
"""bytes in which the end of a zip archive begins: its record and the longest comment"""
_ARCHIVES = (".pth", ".pt", ".ckpt", ".npz", ".zip")
_BINARY = (*_ARCHIVES, ".pkl", ".safetensors")


def is_url(name: str) -> bool:
    """Whether `name` is to be downloaded rather than opened."""
    return name.startswith(("http://", "https://"))


def user_cache() -> Path:
    """The folder of the user's caches: `$XDG_CACHE_HOME`, else `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def cache_folder() -> Path:
    """Where downloads lie: `$NEON_CACHE`, else `neon` in the user's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache() / "neon")


def cached_path(url: str) -> Path:
    """Where the file behind `url` lies once it is downloaded: its own name, in a folder of its address.

    Raises:
        RequestError: `url` cannot be parsed.
    """
    try:
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path).replace("\0", "_")).name
    except ValueError as error:
        raise RequestError(f"{url}: not a valid address ({error}); check it") from error
    address = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder() / address / (name if name.strip(".") else "file")


def local_file(name: str | os.PathLike[str]) -> Path:
    """`name` itself if it is a path; of a URL or a name on the Hub the file behind it, from the cache if it is there.

    Raises:
        RequestError, WorkError: as `download`, or `fetched`.
    """
    name = os.fspath(name)
    if is_hub_name(name):
        return fetched(name)
    if not is_url(name):
        return Path(name)
    path = cached_path(name)
    before = _inode(path)  # looked at first: one that another process brings from now on is not fetched again
    wrong = substitute(path) if before else ""
    if wrong is not None:
        found = f" (there: {wrong})" if wrong else ""
        print(f"downloading {one_line(name)} to {path}{found}", file=sys.stderr)
        download(name, path, before=before)
    return path


def shared_file(name: str, processes: "Processes") -> Path:
    """`local_file` for several processes: one of each node downloads, the main one first (nodes may share a disk)."""
    if not (is_url(name) or is_hub_name(name)):
        return Path(name)
    processes.on_main(lambda: local_file(name))
    failure: RequestError | WorkError | None = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            local_file(name)
        except (RequestError, WorkError) as error:
            failure = error
    processes.raise_first(failure)
    return cached_path(name) if is_url(name) else fetched(name)


def substitute(path: Path) -> str | None:
    """What lies at `path` (or grows there as `path`.part) instead of a file of its name, if it is such a thing.

    That is nothing, a web page, a Git LFS pointer; in the place of weights or statistics also text, or the beginning
    of a file.
    """
    size, suffix = path.stat().st_size, Path(path.name.removesuffix(".part")).suffix
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(max(0, size - _MAX_ZIP_END))
        tail = file.read()
    text = b"".join(head.replace(b"\0", b"").split()).lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        return "an HTML page in its place (a login page?)"
    if text.startswith(b"versionhttps://git-lfs"):
        return "a Git LFS pointer in its place"
    if not head:
        return "an empty file"
    is_text = all(byte < 127 and (byte >= 32 or chr(byte).isspace()) for byte in head)
    first_protocol = suffix == ".pkl" and head[:1] in (b"(", b"c") and tail.endswith(b".")  # pickles that are text
    if suffix in _BINARY and is_text and not first_protocol:
        return f"a text in its place ({one_line(head[:40].decode())!r})"
    if suffix in _ARCHIVES and head.startswith(b"PK\x03\x04") and b"PK\x05\x06" not in tail:
        return "cut short, no end of archive"
    if suffix == ".pkl" and re.match(rb"\x80[\x02-\x05]", head) and not tail.endswith(b"."):
        return "cut short, no end of pickle"
    return None


def download(
    url: str, path: Path, flaw: Callable[[Path], str | None] = substitute, *, before: int | None = None
) -> None:
    """Fetch `url` to `path`, which appears whole or not at all.

    What has come lies in `path`.part until then; a later call continues it (RFC 9110: Range, If-Range) if the server
    still has the same version, by its ETag or Last-Modified, which `path`.part.origin keeps.

    Args:
        flaw: What is wrong with a file that has come, if anything; it is not kept then.
        before: The inode of the file at `path` that is to be replaced, 0: of none; by default what is there now.

    Raises:
        RequestError: the address is not valid, the server refuses, or `path` cannot be written.
        NoConnectionError: the server cannot be reached.
        WorkError: the transfer breaks off or stalls, the answer is no file or has a flaw, or the disk is full.
    """
    part, origin = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.origin")
    before = _inode(path) if before is None else before
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_locked(part) as file:
            try:
                if _inode(path) != before:  # another process has brought it meanwhile
                    return
                with _resume_or_start(url, file, origin, path) as answer:
                    _receive(url, answer, file, part)
                os.fsync(file.fileno())
                wrong = flaw(part)
                origin.unlink(missing_ok=True)
                if wrong is not None:
                    raise WorkError(f"{url}: {wrong}")
                os.replace(part, path)
            finally:  # what cannot be continued is not kept
                if not (origin.exists() and part.exists() and part.stat().st_size):
                    part.unlink(missing_ok=True)
                    origin.unlink(missing_ok=True)
    except Stopped as stop:
        stop.kept = f"what has come of {path.name}" if origin.exists() else ""
        raise
    except OSError as error:
        raise write_failure(error, path) from error


def _inode(path: Path) -> int:
    """0: there is nothing."""
    return path.stat().st_ino if path.exists() else 0


def _open_locked(part: Path) -> io.FileIO:
    """`part`, open for appending, once no other process writes it."""
    while True:
        file = open(part, "ab", buffering=0)  # noqa: SIM115 - the caller closes it
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if _inode(part) == os.fstat(file.fileno()).st_ino:
            return file
        file.close()  # who held it has renamed or removed it


def _resume_or_start(url: str, file: io.FileIO, origin: Path, path: Path) -> HTTPResponse:
    """The answer that brings what `file` lacks; what is in it is dropped if the server cannot continue it."""
    start, address = file.seek(0, os.SEEK_END), f"{url}\n".encode()
    known = origin.read_bytes() if origin.exists() else b""
    answer = None
    if start and known.startswith(address):
        version = known.removeprefix(address).decode("latin-1")
        answer = _get(url, path, {"Range": f"bytes={start}-", "If-Range": version})
        follows = answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if answer.status == 206 and follows and _version(answer) in ("", version) and not _encoding(answer):
            return answer
    file.truncate(0)
    origin.unlink(missing_ok=True)
    if answer is None or answer.status != 200:
        answer = _get(url, path, {})
    if answer.status != 200:
        reason = one_line(answer.reason)
        raise RequestError(f"{url}: the server answers {answer.status} ({reason}), no file; check the address")
    if answer.headers.get_content_type() == "text/html":
        raise RequestError(f"{url}: the server answered with a web page, not a file; check the address")
    if encoding := _encoding(answer):
        raise WorkError(f"{url}: the server sends it in the encoding {encoding}, unasked; take it from another address")
    if version := _version(answer):
        origin.write_bytes(address + version.encode("latin-1"))
    return answer


def _get(url: str, path: Path, headers: dict[str, str]) -> HTTPResponse:
    """The answer to a GET of `url`: one of success, or 416 (no such range)."""
    for pause in (*RETRY_PAUSES, None):
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "neon", **headers})
            return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code == 416 and headers:
                return error  # type: ignore[return-value]  # it is an answer as well
            error.close()
            if error.code not in TRANSIENT:
                reason = one_line(error.reason)
                raise RequestError(f"{url}: the server answers {error.code} ({reason}); check the address") from error
            if pause is None:
                raise WorkError(f"{url}: the server answers {error.code}; try again later") from error
            time.sleep(pause)
        except (InvalidURL, ValueError) as error:
            raise RequestError(f"{url}: not a valid address ({one_line(error)}); check it") from error
        except OSError as error:
            reason = one_line(getattr(error, "reason", error))
            raise NoConnectionError(
                f"{url}: no connection ({reason}); check the network and run again, or save the file as {path}"
            ) from error
        except HTTPException as error:
            raise WorkError(f"{url}: the server's answer is not HTTP ({one_line(error)}); check the address") from error
    raise AssertionError("the last pause is None")


def _version(answer: HTTPResponse) -> str:
    """What tells this version of a file from others: its strong ETag, else when it was modified; empty: nothing."""
    etag = answer.headers.get("ETag", "")
    return one_line(etag if etag.startswith('"') else answer.headers.get("Last-Modified", ""))


def _encoding(answer: HTTPResponse) -> str:
    """The Content-Encoding, such as gzip; empty: the bytes are those of the file."""
    return one_line(answer.headers.get("Content-Encoding", "")).lower().removeprefix("identity")


def _receive(url: str, answer: HTTPResponse, file: io.FileIO, part: Path) -> None:
    """Append the body to `file`; it must be as long as its headers say, and faster than `MIN_BYTES` a minute."""
    size, total = file.seek(0, os.SEEK_END), _total(url, answer, file.tell())
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - size > free:
        raise WorkError(f"{part}: the disk is full ({total - size} bytes to come, {free} free); free some space")
    since, came, reason = time.monotonic(), 0, "the server ended it"
    with _bar(size, total) as bar:
        try:
            while chunk := answer.read1(_CHUNK_BYTES):
                _write(chunk, file, part)
                bar.update(len(chunk))
                size, came = size + len(chunk), came + len(chunk)
                if (seconds := time.monotonic() - since) > TIMEOUT_SECONDS:
                    if came < MIN_BYTES:
                        raise TimeoutError(f"{came} bytes in {seconds:.0f} s")
                    since, came = time.monotonic(), 0
            if total in (None, size):
                return
        except (OSError, HTTPException) as error:
            reason = one_line(error)
    expected = "" if total is None else f" of {total}"
    raise WorkError(f"{url}: broken off after {size}{expected} bytes ({reason}); run again to go on")


def _total(url: str, answer: HTTPResponse, start: int) -> int | None:
    """How long the whole file is, of which `start` bytes are there; None: the server does not say."""
    total = re.fullmatch(r"bytes [0-9]+-[0-9]+/([0-9]{1,18})", answer.headers.get("Content-Range", "").strip())
    if answer.status == 206 and total is not None:
        return int(total[1])
    length = answer.headers.get("Content-Length")
    if length is None or answer.chunked:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", length.strip()):
        raise WorkError(f"{url}: the server says a length of {one_line(length)!r}; take it from another address")
    return start + int(length)


def _write(chunk: bytes, file: io.FileIO, part: Path) -> None:
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise disk_full(error, part) from error


def _bar(done: int, total: int | None) -> Any:
    from tqdm import tqdm

    from neon.runtime.progress import seconds_between_updates

    settings = {"unit": "B", "unit_scale": True, "delay": 2, "leave": False, "file": sys.stderr}
    return tqdm(initial=done, total=total, mininterval=seconds_between_updates(), **settings)
