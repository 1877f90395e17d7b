"""A W&B server for tests: real ``wandb`` clients, agents and ``wandb sync`` work against it.

It listens on the loopback interface only, keeps everything in memory and refuses a request above
``MAX_REQUEST_MIB``. Runs, history, summaries, files, artifacts, and grid and random sweeps are
kept; drawing charts is not.
"""

import json
import os
import re
import socket
import sys
import threading
import traceback
import zlib
from enum import StrEnum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from typing_extensions import override

from tests.support.wandb_graphql import GraphQL
from tests.support.wandb_records import Artifact, Records, Run, Sweep

MAX_REQUEST_MIB = 64
_MAX_REQUEST_BYTES = MAX_REQUEST_MIB * 2**20
_FILE_STREAM = re.compile(r"/files/(?P<entity>[^/]+)/(?P<project>[^/]+)/(?P<run>[^/]+)/file_stream")


class Fault(StrEnum):
    """Faulty ways in which a server answers."""

    ERROR = "status 500"
    REFUSED = "status 401"
    HTML = "a page of a portal"
    GARBAGE = "bytes that are not JSON"
    SILENT = "no answer"


class WandbServer:
    """A server that lives as long as its ``with`` block.

    Leaving the block closes every connection, joins every thread and raises what went wrong inside
    the server, so that no defect of it is mistaken for one of the client.

    Args:
        entity: User and team that every run belongs to.

    Raises:
        RuntimeError: A request made the server fail; raised at the end of the block.
    """

    def __init__(self, entity: str = "test") -> None:
        self._records = Records(entity)
        self._http = _HttpServer(self._records)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.close_connections()
        self._http.server_close()
        if self._http.failures and error is None:
            raise RuntimeError("the W&B server failed:\n" + "\n".join(self._http.failures))

    @property
    def url(self) -> str:
        """The address for ``WANDB_BASE_URL``."""
        return self._http.url

    def fail(self, fault: Fault | None, after_uploads: int = 0) -> None:
        """Makes the server answer faultily from now on.

        Args:
            fault: Kind of fault; None answers correctly again.
            after_uploads: Number of pieces of runs' logs that are accepted before.
        """
        self._http.fault, self._http.uploads_left = fault, after_uploads

    @property
    def runs(self) -> dict[str, Run]:
        """Every run by its id."""
        return self._records.runs

    @property
    def sweeps(self) -> dict[str, Sweep]:
        """Every sweep by its id."""
        return self._records.sweeps

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """Every artifact version by its id."""
        return self._records.artifacts

    @property
    def files(self) -> dict[str, bytes]:
        """Every uploaded file by its path: ``/upload/PROJECT/RUN/NAME`` for a run's."""
        return self._records.files

    def environment(self, folder: Path) -> dict[str, str]:
        """Makes the environment of a client process that reaches this server and no other.

        Args:
            folder: Folder for the client's home, run folders and caches.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        places = dict.fromkeys(
            ("HOME", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"),
            str(folder),
        )
        return {
            **kept,
            **places,
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "WANDB_API_KEY": "x" * 40,
            "WANDB_BASE_URL": self.url,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "false",
        }


class _HttpServer(ThreadingHTTPServer):
    """Serves one ``Records``, knows its open connections and keeps what went wrong."""

    daemon_threads = False

    def __init__(self, records: Records) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.records = records
        self.graphql = GraphQL(records, self.url)
        self.failures: list[str] = []
        self.fault: Fault | None = None
        self.uploads_left = 0
        self.ended = threading.Event()
        self._connections: set[Any] = set()

    def close_connections(self) -> None:
        """Ends the wait of every handler for a next request on its connection."""
        self.ended.set()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # Its client was faster.

    @override
    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    @override
    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        # The client drops its idle connections when it exits.
        if not isinstance(sys.exception(), ConnectionError):
            self.failures.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    """Speaks HTTP: GraphQL and file streams by POST, uploads by PUT, downloads by GET."""

    protocol_version = "HTTP/1.1"
    server: _HttpServer

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Stays silent: a test's output is about the test."""

    def do_POST(self) -> None:
        body = self._read_body()
        if body is None or self._answer_badly():
            return
        path = urlsplit(self.path).path
        message = json.loads(body or b"{}")
        if path == "/graphql":
            variables = message.get("variables") or {}
            self._send_json(self.server.graphql.answer(message["query"], variables))
        elif stream := _FILE_STREAM.fullmatch(path):
            self.server.records.append_stream(unquote(stream["project"]), stream["run"], message)
            self._send_json({"exitcode": None, "limits": {}})
        else:
            self._send_json({}, HTTPStatus.NOT_FOUND)

    def do_PUT(self) -> None:
        body = self._read_body()
        if body is not None and not self._answer_badly():
            self.server.records.files[unquote(urlsplit(self.path).path)] = body
            self._send_json({})

    def do_GET(self) -> None:
        if self._answer_badly():
            return
        content = self.server.records.files.get(unquote(urlsplit(self.path).path))
        if content is None:
            self._send_json({}, HTTPStatus.NOT_FOUND)
        else:
            self._send(content, "application/octet-stream", HTTPStatus.OK)

    def _answer_badly(self) -> bool:
        """Answers according to the fault of the server, if one is active."""
        if self.server.fault is None:
            return False
        if self.server.uploads_left:
            self.server.uploads_left -= self.path.endswith("/file_stream")
            return False
        match self.server.fault:
            case Fault.ERROR:
                self._send(b"oops", "text/plain", HTTPStatus.INTERNAL_SERVER_ERROR)
            case Fault.REFUSED:
                self._send_json({"errors": [{"message": "who are you"}]}, HTTPStatus.UNAUTHORIZED)
            case Fault.HTML:
                self._send(b"<html>please log in</html>", "text/html", HTTPStatus.OK)
            case Fault.GARBAGE:
                self._send(bytes(range(256)), "application/json", HTTPStatus.OK)
            case Fault.SILENT:
                self.server.ended.wait()
                self.close_connection = True
        return True

    def _read_body(self) -> bytes | None:
        """Returns the decoded body; one that is too large is refused, and None returned."""
        is_chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        size_bytes = int(self.headers.get("Content-Length") or 0)
        body: bytes | None
        if size_bytes > _MAX_REQUEST_BYTES:
            body = None
        else:
            body = self._read_chunks() if is_chunked else self.rfile.read(size_bytes)
        if body is not None and self.headers.get("Content-Encoding") == "gzip":
            body = _gunzip(body)
        if body is None:
            self.close_connection = True
            self._send_json({}, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return body

    def _read_chunks(self) -> bytes | None:
        body = b""
        while size_bytes := int(self.rfile.readline().split(b";")[0], 16):
            if len(body) + size_bytes > _MAX_REQUEST_BYTES:
                return None
            body += self.rfile.read(size_bytes)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send_json(self, answer: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(answer).encode(), "application/json", status)

    def _send(self, content: bytes, content_type: str, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _gunzip(body: bytes) -> bytes | None:
    """Unpacks a gzip body; None where it grows above the limit of a request."""
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    content = unpacker.decompress(body, _MAX_REQUEST_BYTES)
    return None if unpacker.unconsumed_tail else content
