"""Files behind a URL: fetched once, whole or not at all, and never half of one version and half of another."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from neon.cli.command_line import exit_code
from neon.errors import RequestError, WorkError
from neon.runtime import download as module
from neon.runtime.distributed import Processes
from neon.runtime.download import cached_path, local_file, shared_file

CONTENT = bytes(range(256)) * 5000
HALF = len(CONTENT) // 2
NEW = CONTENT[::-1]
ODD = {
    "error.safetensors": b'{"error": "no such file"}',
    "error.pth": b"<Error><Code>AccessDenied</Code></Error>",
    "error.npz": b"Not found\n",
    "short.npz": b"PK\x03\x04" + bytes(1000),
    "short.pkl": b"\x80\x04\x95" + bytes(1000),
}
"""answers of status 200 that are not what the name says"""


class Handler(BaseHTTPRequestHandler):
    """A server of one file; its address says what goes wrong."""

    asked: list[tuple[str, str | None, str | None]] = []  # noqa: RUF012 - shared by all requests of a test, on purpose
    content: bytes = CONTENT
    version: tuple[str, str] | None = ("ETag", '"1"')
    broken: bool = False
    """the connection ends after half of the file"""
    failures: int = 0
    """requests still to be answered by 503"""

    def do_GET(self) -> None:
        wanted, version = self.headers["Range"], self.headers["If-Range"]
        Handler.asked.append((self.path, wanted, version))
        name = self.path.rpartition("/")[2]
        if Handler.failures:
            Handler.failures -= 1
            return self.send_error(503)
        if name == "missing.pkl":
            return self.send_error(404)
        if name == "garbage.pkl":
            self.wfile.write(b"220 \x1b[31m ready\r\n\r\n")
            return
        if name == "mute.pkl":
            return time.sleep(0.5)
        if name == "moved.pkl":
            self.send_response(302)
            self.send_header("Location", "http://[bad")
            return self.end_headers()
        content = Handler.content
        if name == "login.pkl":
            content = b"\n<!DOCTYPE html><title>Please log in</title>"
        if name in ("empty.pkl", "none.pkl"):
            content = b""
        content = ODD.get(name, content)
        length = "many" if name == "length.pkl" else str(len(content))
        start = 0
        current = Handler.version is not None and version == Handler.version[1]
        if wanted is not None and (current or name == "careless.pkl") and name != "simple.pkl":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response({"none.pkl": 204, "part.pkl": 206}.get(name, 206 if start else 200))
        if start:
            end = start + 1000 if name == "sip.pkl" else len(content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            content, length = content[:end], str(end - start)
        if Handler.version is not None:
            self.send_header(*Handler.version)
        if name == "packed.pkl":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", "text/html; charset=utf-8" if name == "page.pkl" else "application/zip")
        if name != "endless.pkl":
            self.send_header("Content-Length", length)
        self.end_headers()
        try:
            if name == "trickle.pkl":
                for byte in content[start : start + 100]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            self.wfile.write(content[start:HALF] if Handler.broken or name == "silent.pkl" else content[start:])
            if name == "silent.pkl":
                time.sleep(1)
        except ConnectionError:  # the client has seen enough
            pass

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for name, value in {"asked": [], "content": CONTENT, "version": ("ETag", '"1"'), "broken": False}.items():
        monkeypatch.setattr(Handler, name, value)
    monkeypatch.setattr(Handler, "failures", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def broken_off(url: str) -> Path:
    """The part of `url` that has come when its connection breaks after half of it."""
    Handler.broken = True
    with pytest.raises(WorkError, match=rf"broken off after {HALF} of {len(CONTENT)} bytes .*; run again to go on"):
        local_file(url)
    Handler.broken = False
    Handler.asked.clear()
    return cached_path(url).with_name(f"{cached_path(url).name}.part")


def test_a_url_is_downloaded_once_with_a_message(server: str, tmp_path: Path, capsys) -> None:
    path = local_file(f"{server}/refs/a%20b.npz")
    assert path.name == "a b.npz" and path.read_bytes() == CONTENT
    assert f"downloading {server}/refs/a%20b.npz to {path}" in capsys.readouterr().err
    assert local_file(f"{server}/refs/a%20b.npz") == path
    assert len(Handler.asked) == 1
    assert leftovers(tmp_path / "cache") == [path]


def test_equal_names_of_different_addresses_do_not_meet(server: str) -> None:
    assert local_file(f"{server}/a/net.pkl") != local_file(f"{server}/b/net.pkl")


def test_a_path_is_left_alone() -> None:
    assert local_file("some/where.pkl") == Path("some/where.pkl")


def test_a_file_lies_in_the_cache_whatever_its_address_says(server: str, tmp_path: Path) -> None:
    for name in ("", "..", "a/%2e%2e", "%00", "a%2F..%2Fb"):
        assert local_file(f"{server}/{name}").parent.parent == tmp_path / "cache"


@pytest.mark.parametrize("version", [("ETag", '"1"'), ("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")])
def test_what_has_come_is_continued(server: str, tmp_path: Path, version: tuple[str, str]) -> None:
    Handler.version = version
    url = f"{server}/net.pkl"
    assert broken_off(url).read_bytes() == CONTENT[:HALF]
    path = local_file(url)
    assert Handler.asked == [("/net.pkl", f"bytes={HALF}-", version[1])]
    assert path.read_bytes() == CONTENT and leftovers(tmp_path / "cache") == [path]


@pytest.mark.parametrize("name", ["net.pkl", "careless.pkl"])
def test_a_file_that_has_changed_meanwhile_starts_anew(server: str, tmp_path: Path, name: str) -> None:
    url = f"{server}/{name}"  # a careless server sends the rest of the new version to whom has half of the old one
    broken_off(url)
    Handler.content, Handler.version = NEW, ("ETag", '"2"')
    path = local_file(url)
    assert path.read_bytes() == NEW and leftovers(tmp_path / "cache") == [path]


@pytest.mark.parametrize("name", ["simple.pkl", "careless.pkl"])
def test_a_file_that_the_server_cannot_continue_starts_anew(server: str, name: str) -> None:
    url = f"{server}/{name}"
    part = broken_off(url)
    part.write_bytes(bytes(len(CONTENT)))
    assert local_file(url).read_bytes() == CONTENT


@pytest.mark.parametrize("version", [("ETag", '"1"'), None])
def test_a_download_that_is_stopped_says_whether_it_goes_on(
    server: str, monkeypatch: pytest.MonkeyPatch, capsys, version: tuple[str, str] | None
) -> None:
    Handler.version = version
    url, write = f"{server}/net.pkl", module._write

    def write_and_stop(*arguments: Any) -> None:
        write(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "_write", write_and_stop)
    assert exit_code("neon", lambda: print(local_file(url))) == 143
    stopped = "neon: stopped" + ("" if version is None else "; the same command goes on from what has come of net.pkl")
    assert capsys.readouterr().err.splitlines()[-1] == stopped


@pytest.mark.parametrize("version", [None, ("ETag", 'W/"1"')])
def test_what_cannot_be_told_from_another_version_is_not_kept(
    server: str, tmp_path: Path, version: tuple[str, str] | None
) -> None:
    Handler.version = version
    part = broken_off(f"{server}/net.pkl")
    assert leftovers(tmp_path / "cache") == []
    part.write_bytes(CONTENT[:HALF])  # left by whomever
    assert local_file(f"{server}/net.pkl").read_bytes() == CONTENT
    assert Handler.asked == [("/net.pkl", None, None)]


def test_the_same_file_of_another_server_starts_anew(server: str, tmp_path: Path) -> None:
    broken_off(f"{server}/net.pkl")
    part = cached_path(f"{server}/net.pkl").with_name("net.pkl.part")
    module.download(f"{server}/other/net.pkl", part.with_name("net.pkl"))
    assert Handler.asked == [("/other/net.pkl", None, None)]


def test_two_downloads_of_one_file_are_one(server: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(local_file, [f"{server}/net.pkl"] * 2)
    assert first == second and first.read_bytes() == CONTENT
    assert len(Handler.asked) == 1 and leftovers(tmp_path / "cache") == [first]


def test_a_file_that_another_process_has_brought_meanwhile_is_not_fetched_again(server: str) -> None:
    path = module.cached_path(f"{server}/net.pkl")
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    module.download(f"{server}/net.pkl", path, before=0)
    assert Handler.asked == []


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.pkl", RequestError, r"missing\.pkl: the server answers 404 \(Not Found\); check the address"),
        ("page.pkl", RequestError, "a web page, not a file"),
        ("login.pkl", WorkError, "an HTML page in its place"),
        ("empty.pkl", WorkError, "an empty file"),
        ("error.safetensors", WorkError, "a text in its place .*no such file"),
        ("error.pth", WorkError, "a text in its place .*AccessDenied"),
        ("error.npz", WorkError, "a text in its place .*Not found"),
        ("short.npz", WorkError, "cut short, no end of archive"),
        ("short.pkl", WorkError, "cut short, no end of pickle"),
        ("none.pkl", RequestError, "the server answers 204 .*, no file"),
        ("part.pkl", RequestError, "the server answers 206 .*, no file"),
        ("packed.pkl", WorkError, "in the encoding gzip, unasked"),
        ("length.pkl", WorkError, "says a length of 'many'"),
        ("garbage.pkl", WorkError, r"the server's answer is not HTTP \(220 \\x1b\[31m ready\)"),
        ("moved.pkl", RequestError, "not a valid address"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    server: str, tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        local_file(f"{server}/{name}")
    assert len(str(caught.value).splitlines()) == 1
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", [b"", b"<!DOCTYPE html>"])
def test_a_damaged_file_in_the_cache_is_fetched_again(server: str, capsys, damage: bytes) -> None:
    path = cached_path(f"{server}/net.pkl")
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    assert local_file(f"{server}/net.pkl").read_bytes() == CONTENT
    assert "(there: an" in capsys.readouterr().err


def test_a_file_of_unknown_length_ends_with_the_connection(server: str) -> None:
    assert local_file(f"{server}/endless.pkl").read_bytes() == CONTENT


@pytest.mark.parametrize(("name", "reason"), [("silent.pkl", "timed out"), ("trickle.pkl", r"\d+ bytes in \d+ s")])
def test_a_server_that_stalls_is_given_up(server: str, monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(WorkError, match=rf"broken off after \d+ of \d+ bytes \({reason}\); run again to go on"):
        local_file(f"{server}/{name}")


def test_a_server_that_never_answers_is_given_up(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(WorkError, match=r"no connection \(timed out\)"):
        local_file(f"{server}/mute.pkl")


def test_a_server_that_sends_less_than_it_was_asked_for_is_asked_for_the_rest(server: str) -> None:
    url = f"{server}/sip.pkl"
    broken_off(url)
    with pytest.raises(WorkError, match=rf"broken off after {HALF + 1000} of {len(CONTENT)} bytes"):
        local_file(url)
    with pytest.raises(WorkError, match=rf"broken off after {HALF + 2000} of {len(CONTENT)} bytes"):
        local_file(url)


def test_a_server_that_is_busy_is_asked_again(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_PAUSES", (0.01, 0.01))
    Handler.failures = 2
    assert local_file(f"{server}/net.pkl").read_bytes() == CONTENT
    Handler.failures = 3
    with pytest.raises(WorkError, match="the server answers 503; try again later"):
        local_file(f"{server}/other.pkl")


@pytest.mark.parametrize(
    "url",
    [
        "http://[bad/net.pkl",
        "http://host:port/net.pkl",
        "http:///net.pkl",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/ü",
    ],
)
def test_a_bad_address_is_told_in_one_line(server: str, url: str) -> None:
    with pytest.raises((RequestError, WorkError), match=r"not a valid address|no host given") as caught:
        local_file(url)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written_is_named(server: str, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    monkeypatch.setenv("NEON_CACHE", cache)
    with pytest.raises(RequestError, match=f"{cache}/.*/net.pkl: cannot write here"):
        local_file(f"{server}/net.pkl")


def test_a_disk_too_small_is_told_before_anything_comes(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free = module.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(WorkError, match=rf"the disk is full \({len(CONTENT)} bytes to come, 1000 free\)"):
        local_file(f"{server}/net.pkl")


def test_no_server_is_told_with_the_place_to_put_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    url = "http://127.0.0.1:9/net.pkl"
    with pytest.raises(WorkError, match="no connection") as caught:
        local_file(url)
    assert str(cached_path(url)) in str(caught.value)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_one_process_of_each_node_downloads(server: str, monkeypatch: pytest.MonkeyPatch, local_rank: int) -> None:
    class OfAnotherNode(Processes):
        """One whose main process is elsewhere, on another disk."""

        def on_main(self, function):  # type: ignore[no-untyped-def, override]
            return None

    downloads: list[str] = []
    monkeypatch.setattr(module, "download", lambda url, path, before: downloads.append(url))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert shared_file(f"{server}/file", OfAnotherNode(rank=4)) == cached_path(f"{server}/file")
    assert len(downloads) == (1 if local_rank == 0 else 0)
