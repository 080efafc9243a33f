"""Files behind a URL: fetched once, whole or not at all."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from neon.errors import RequestError, WorkError
from neon.runtime.download import cached_path, local_file

CONTENT = bytes(range(256)) * 5000


class Handler(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - shared by all requests of a test, on purpose

    def do_GET(self) -> None:
        Handler.asked.append(self.path)
        if self.path == "/missing.pkl":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if "page" in self.path else "application/zip")
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if "short" in self.path else CONTENT)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NEON_CACHE", str(tmp_path / "cache"))
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


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


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.pkl", RequestError, r"missing\.pkl: the server answers 404"),
        ("page.pkl", RequestError, "a web page, not a file"),
        ("short.pkl", WorkError, "after 640000 of 1280000 bytes; run again"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    server: str, tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        local_file(f"{server}/{name}")
    assert leftovers(tmp_path / "cache") == []


def test_no_server_is_told_with_the_place_to_put_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEON_CACHE", str(tmp_path))
    url = "http://127.0.0.1:9/net.pkl"
    with pytest.raises(WorkError, match="download failed") as caught:
        local_file(url)
    assert str(cached_path(url)) in str(caught.value)
