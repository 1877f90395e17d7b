"""A Hugging Face hub for tests: the real ``huggingface_hub`` client pushes to it and downloads.

It listens on the loopback interface only, keeps repositories of models in memory and answers what
the client asks in a push (repository, branches, upload modes, LFS, commit) and in a download. Large
files take the LFS route, so the client's other one, Xet, has to be off.
"""

import base64
import hashlib
import json
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import close_session
from typing_extensions import override

TOKEN = "hf_" + "x" * 34
_MAX_REQUEST_BYTES = 64 * 2**20
_LFS_SUFFIXES = (".safetensors", ".gguf", "tokenizer.json")
_WAIT_S = 10.0


@dataclass
class Commit:
    """One commit: its files by path, and whether each went by LFS."""

    files: dict[str, bytes]
    message: str
    lfs: frozenset[str] = frozenset()

    @property
    def oid(self) -> str:
        """Digest of all that it holds."""
        parts = [self.message, *sorted(f"{n} {_sha1(c)}" for n, c in self.files.items())]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()


@dataclass
class Repository:
    """The branches of one repository, each with its commits, the newest last."""

    is_private: bool
    branches: dict[str, list[Commit]] = field(
        default_factory=lambda: {"main": [Commit({".gitattributes": b"* lfs\n"}, "initial commit")]}
    )
    tags: dict[str, str] = field(default_factory=dict)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch, without the one that the hub makes itself."""
        newest = self.branches[revision][-1].files
        return {name: content for name, content in newest.items() if name != ".gitattributes"}


class HubServer:
    """The repositories of the stand-in, and how it fails.

    Attributes:
        url: Address for ``HF_ENDPOINT``.
        repositories: Every repository by its name.
        uploaded: Contents that came by LFS, by digest.
        requests: Method and path of every request, in order.
        answer_instead: Gives a status for a method and path that is to fail, or None.
    """

    def __init__(self) -> None:
        self._http = _HttpServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[str] = []
        self.answer_instead: Callable[[str, str], HTTPStatus | None] = lambda method, path: None

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        """Serves within the block; raises at its end what went wrong in the server.

        Raises:
            RuntimeError: A request made the server fail.
        """
        thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            close_session()  # the client keeps its connections
            self._http.shutdown()
            thread.join(_WAIT_S)
            self._http.server_close()
        if self.failures:
            raise RuntimeError("the hub failed:\n" + "\n".join(self.failures))


def reach(server: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Has the client of this process reach the stand-in, which `HF_HUB_OFFLINE` forbids else.

    The client reads the environment once, when it is imported: its constants are set, as they would
    be with ``HF_ENDPOINT`` and ``HF_HUB_DISABLE_XET=1`` and without ``HF_HUB_OFFLINE``.
    """
    constants = huggingface_hub.constants
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = False
    hub: HubServer

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        self.hub.failures.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    """The routes of the hub that a push and a download take."""

    protocol_version = "HTTP/1.1"
    timeout: ClassVar[float] = _WAIT_S
    server: _HttpServer

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Stays silent: a test's output is about the test."""

    def do_POST(self) -> None:
        body = self._read_body()
        if not self._fails():
            self._post(self._path(), body)

    def do_PUT(self) -> None:
        body = self._read_body()
        if self._fails():
            return
        oid = self._path().removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == oid, "an upload is not what was announced"
        self.server.hub.uploaded[oid] = body
        self._json({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._fails():
            return
        path = self._path()
        if path.startswith("/api/models/"):
            self._get_api(*_named(path.removeprefix("/api/models/")))
        else:
            self._download(path)

    def _post(self, path: str, body: bytes) -> None:
        hub = self.server.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                self._json({"url": f"{hub.url}/{name}"}, HTTPStatus.CONFLICT)
                return
            is_private = asked.get("visibility") == "private" or asked.get("private") is True
            hub.repositories[name] = Repository(is_private)
            self._json({"url": f"{hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._validate_card(json.loads(body)["content"])
        elif path == "/lfs-verify":
            asked = json.loads(body)
            assert len(hub.uploaded[asked["oid"]]) == asked["size"]
            self._json({})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        else:
            name, rest = _named(path.removeprefix("/api/models/"))
            self._post_api(name, rest, body)

    def _post_api(self, name: str, rest: str, body: bytes) -> None:
        repository = self.server.hub.repositories[name]
        kind, _, revision = rest.partition("/")
        if kind == "branch":
            if revision in repository.branches:
                self._json({"error": "it exists"}, HTTPStatus.CONFLICT)
                return
            repository.branches[revision] = list(repository.branches["main"])
            self._json({})
        elif kind == "preupload":
            there = repository.branches[revision][-1].files
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": _blob_id(there[file["path"]]) if file["path"] in there else None,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        else:
            assert kind == "commit", rest
            self._commit(name, revision, [json.loads(x) for x in body.splitlines()])

    def _validate_card(self, card: str) -> None:
        """Takes metadata that are YAML; the hub knows the fields too."""
        try:
            yaml.safe_load(card.split("---\n")[1] if card.startswith("---\n") else "")
        except yaml.YAMLError:
            errors = [{"message": "it is not YAML"}]
            self._json({"errors": errors, "warnings": []}, HTTPStatus.BAD_REQUEST)
        else:
            self._json({"errors": [], "warnings": []})

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        hub, objects = self.server.hub, []
        for one in asked["objects"]:
            actions = {
                "upload": {"href": f"{hub.url}/lfs/{one['oid']}"},
                "verify": {"href": f"{hub.url}/lfs-verify"},
            }
            is_there = one["oid"] in hub.uploaded
            objects.append(one | ({} if is_there else {"actions": actions}))
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> None:
        hub = self.server.hub
        branch = hub.repositories[name].branches[revision]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, branch[-1].oid):
            self._json({"error": "A commit has happened since."}, HTTPStatus.PRECONDITION_FAILED)
            return
        files, lfs = dict(branch[-1].files), set(branch[-1].lfs)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.uploaded[value["oid"]]
                lfs.add(value["path"])
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        branch.append(Commit(files, header["summary"], frozenset(lfs)))
        oid = branch[-1].oid
        self._json({"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _get_api(self, name: str, rest: str) -> None:
        repository = self.server.hub.repositories.get(name)
        if repository is None:
            self._json({"error": "Repository not found"}, HTTPStatus.NOT_FOUND, "RepoNotFound")
            return
        kind, _, revision = rest.partition("/")
        if kind == "refs":
            self._json(
                {
                    "branches": [
                        {"name": n, "ref": f"refs/heads/{n}", "targetCommit": commits[-1].oid}
                        for n, commits in repository.branches.items()
                    ],
                    "tags": [
                        {"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid}
                        for n, oid in repository.tags.items()
                    ],
                    "converts": [],
                }
            )
            return
        if kind == "commits":
            self._json(
                [
                    {
                        "id": commit.oid, "title": commit.message, "message": "", "authors": [],
                        "date": "2026-01-01T00:00:00.000Z",
                    }
                    for commit in reversed(repository.branches[revision])
                ]
            )  # fmt: skip
            return
        commit = _commit_at(repository, revision or "main")
        if kind == "tree":
            self._json([_tree_entry(commit, path) for path in sorted(commit.files)])
            return
        assert kind in ("", "revision"), rest
        self._json(
            {
                "id": name, "sha": commit.oid, "private": repository.is_private, "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )  # fmt: skip

    def _download(self, path: str) -> None:
        name, rest = _named(path.removeprefix("/"))
        _, revision, file = rest.split("/", 2)
        commit = _commit_at(self.server.hub.repositories[name], revision)
        if file not in commit.files:
            self._json({}, HTTPStatus.NOT_FOUND, "EntryNotFound")
            return
        content = commit.files[file]
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_sha1(content)}"')
        self.send_header("X-Repo-Commit", commit.oid)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fails(self) -> bool:
        """Answers with an error where the client has no right, or the test wants one."""
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self._path()}")
        status = hub.answer_instead(self.command, self._path())
        is_storage = self._path().startswith("/lfs/")  # its addresses are signed, on the real hub
        if not is_storage and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = HTTPStatus.UNAUTHORIZED
        if status is None:
            return False
        self._json({"error": "no"}, status)
        return True

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                assert len(body) + size <= _MAX_REQUEST_BYTES
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        size = int(self.headers.get("Content-Length") or 0)
        assert size <= _MAX_REQUEST_BYTES
        return self.rfile.read(size)

    def _json(
        self, answer: Any, status: HTTPStatus = HTTPStatus.OK, error_code: str | None = None
    ) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        if error_code is not None:
            self.send_header("X-Error-Code", error_code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _named(path: str) -> tuple[str, str]:
    """Name of the repository, and the rest of the path."""
    owner, name, *rest = path.split("/", 2)
    return f"{owner}/{name}", rest[0] if rest else ""


def _commit_at(repository: Repository, revision: str) -> Commit:
    if revision in repository.branches:
        return repository.branches[revision][-1]
    commits = [commit for branch in repository.branches.values() for commit in branch]
    return next(commit for commit in commits if commit.oid == revision)


def _tree_entry(commit: Commit, path: str) -> dict[str, Any]:
    content = commit.files[path]
    entry = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if path in commit.lfs:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry


def _blob_id(content: bytes) -> str:
    return _sha1(b"blob %d\0" % len(content) + content)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
