"""A stand-in for the Hugging Face Hub: what it is asked to download a model, and to upload small files."""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c" * 40
OLD_COMMIT = "0" * 40


class HubServer:
    """Repositories in memory, by name and then by name of the file; requests are noted."""

    def __init__(self) -> None:
        self.address = ""
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.revisions = {"main": COMMIT, COMMIT: COMMIT, "v1": OLD_COMMIT}
        self.refused: dict[str, tuple[int, str]] = {}
        """status and error code by repository"""
        self.asked: list[tuple[str, str]] = []
        """method and path"""
        self.created: list[dict[str, Any]] = []
        self.tokens = set[str]()


@contextmanager
def serving() -> Iterator[HubServer]:
    """A server on a port of this machine."""
    hub = HubServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        hub.address = f"http://127.0.0.1:{http.server_port}"
        try:
            yield hub
        finally:
            http.shutdown()
            thread.join()


def only_this(hub: HubServer, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask nothing but this server, and find nothing but what is below `home`."""
    from huggingface_hub import constants

    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING_FACE")):
            patch.delenv(name)
    environment = {
        "HF_HOME": str(home), "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"
    }  # fmt: skip
    for name, value in environment.items():  # for subprocesses; this one has read its own already
        patch.setenv(name, value)
    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._note()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path):
            repository, kind, revision = match[1], match[2], match[3] or "main"
            if (files := self._files(repository, revision)) is None:
                return
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            siblings = [{"rfilename": name} for name in files]
            commit = self.hub.revisions.get(revision, revision)
            self._json(tree if kind == "tree" else {"id": repository, "sha": commit, "siblings": siblings})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (files := self._files(match[1], match[2])) is None:
                return
            if match[3] not in files:
                return self._refuse(404, "EntryNotFound")
            self._send(200, files[match[3]], match[2])
        else:
            self._refuse(404, "")

    def do_POST(self) -> None:
        path = self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            name = "{organization}/{name}".format(**json.loads(body))
            if refused := self.hub.refused.get(name):
                return self._refuse(*refused)
            self.hub.repositories.setdefault(name, {})
            self._json({"url": f"{self.hub.address}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.hub.repositories[match[1]][line["value"]["path"]] = content
            self._json({"commitUrl": f"{self.hub.address}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._refuse(404, "")

    def _note(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        return path

    def _files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """Those of a repository; None: it was refused."""
        if repository in self.hub.refused:
            self._refuse(*self.hub.refused[repository])
        elif repository not in self.hub.repositories:
            self._refuse(404, "RepoNotFound")
        elif revision not in (*self.hub.revisions, *self.hub.revisions.values()):
            self._refuse(404, "RevisionNotFound")
        else:
            return self.hub.repositories[repository]
        return None

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, data: bytes, revision: str = "main") -> None:
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.revisions.get(revision, revision))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass
