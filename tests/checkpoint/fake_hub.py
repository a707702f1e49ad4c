"""A stand-in for the Hugging Face hub: its HTTP interface, as far as huggingface_hub uses it for
reading a model and for a commit, on 127.0.0.1.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from atd.checkpoint import hub

TOKEN = "hf_of_the_tests"


@dataclass
class Repo:
    """A model: its branches, each a commit with files."""

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    private: bool = False
    gated: bool = False

    def commit(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(sha, files) of a branch or a commit."""
        for branch, files in self.branches.items():
            listed = sorted((name, _oid(data)) for name, data in files.items())
            sha = hashlib.sha1(json.dumps(listed).encode()).hexdigest()
            if revision in (branch, sha):
                return sha, files
        return None


@dataclass
class FakeHub:
    """The repositories, and what was asked for."""

    endpoint: str
    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # "GET /user/repo/resolve/...", in order

    def fetched(self) -> set[str]:
        """Files whose content was sent."""
        found = [re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", line) for line in self.asked]
        return {match[1] for match in found if match}


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Prints nothing."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.command == "POST" and not known:
            return self._error(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        match = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit|branch)/(.+))?"
            r"|/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)",
            path,
        )
        repo = self.hub.repos.get((match[1] or match[4]) if match else "")
        if match is None or repo is None or (repo.private and not known):
            return self._error(404 if known else 401, "RepoNotFound")
        if repo.gated and not known:
            return self._error(401, "GatedRepo")
        kind, revision = match[2] or match[5] or "revision", match[3] or match[6] or "main"
        if kind == "branch":
            repo.branches[revision] = dict(repo.branches["main"])
            return self._json({})
        found = repo.commit(revision)
        if found is None:
            return self._error(404, "RevisionNotFound")
        sha, files = found
        match kind:
            case "revision":
                names = [{"rfilename": name} for name in files]
                return self._json({"id": match[1], "sha": sha, "siblings": names, "tags": []})
            case "tree":
                return self._json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                        for name, data in files.items()
                    ]
                )
            case "preupload":
                asked = json.loads(body)["files"]
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                return self._json({"files": [{"path": f["path"], **modes} for f in asked]})
            case "commit":
                return self._commit(match[1], repo, revision, body)
            case _:
                return self._file(sha, files, match[7])

    def _create(self, asked: dict) -> None:
        organization = asked.get("organization") or "user"
        name = f"{organization}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repos:
            return self._json(url, 409)
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        return self._json(url)

    def _commit(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        files = dict(repo.branches[revision])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repo.branches[revision] = files
        found = repo.commit(revision)
        assert found is not None
        url = f"{self.hub.endpoint}/{name}/commit/{found[0]}"
        return self._json({"success": True, "commitOid": found[0], "commitUrl": url})

    def _file(self, sha: str, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self._error(404, "EntryNotFound", commit=sha)
        headers = {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": sha}
        return self._send(200, files[name], headers)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._send(status, b"{}", {name: value for name, value in headers.items() if value})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub without models that answers until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def used(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[FakeHub]:
    """A hub without models that huggingface_hub takes for its own, with a cache in this folder."""
    from huggingface_hub import constants

    with serving() as fake:
        url = fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", fake.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        patch.delenv("HF_TOKEN", raising=False)
        patch.chdir(folder)
        hub._fetched.cache_clear()
        yield fake
