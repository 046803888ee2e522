"""A model hub on a local port: as much of the hub's protocol as a download needs, and faults."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
PIECE = 50_000
LARGE_SUFFIXES = (".safetensors", "tokenizer.json")


@dataclass
class Hub:
    """Repos by name, each with its files, and what goes wrong with them."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    cuts: list[int] = field(default_factory=list)
    """After how many bytes of a body each next download of a large file is cut off."""
    corrupt: int = 0
    """How many of the next downloads of a large file arrive damaged."""
    ignore_ranges: bool = False
    claimed_size: int | None = None
    """What it says every large file's size is."""
    hold_at: int | None = None
    """After how many bytes of the next downloads of large files they wait for `release`."""
    pace: float = 0.0
    """Seconds between the pieces of a large file."""
    sent: list[int] = field(default_factory=list)
    """Bytes sent in each download of a large file."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range header of what was asked."""
    endpoint: str = ""
    _released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let held downloads go on, and hold none from now on."""
        self.hold_at = None
        self._released.set()

    def mend(self) -> None:
        """Let everything go well from now on, and forget what was asked."""
        self.release()
        self._released.clear()
        self.gated.clear()
        self.cuts.clear()
        self.corrupt = 0
        self.ignore_ranges = False
        self.claimed_size = None
        self.pace = 0.0
        self.sent.clear()
        self.requests.clear()

    def wait_for_release(self) -> None:
        """Hold a download."""
        self._released.wait()

    def downloads(self, file: str) -> list[str | None]:
        """The Range headers of the downloads of `file` so far."""
        return [
            wanted
            for method, path, wanted in self.requests
            if method == "GET" and path.endswith(f"/resolve/{COMMIT}/{file}")
        ]


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` for as long as the block lasts."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.release()
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(name: str) -> bool:
    """Whether the hub keeps the file outside git, with a checksum."""
    return name.endswith(LARGE_SUFFIXES)


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keep test output clean."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path, self.headers.get("Range")))
        match path.strip("/").split("/"):
            case ["api", "models", org, name, "revision", revision]:
                self._with_repo(f"{org}/{name}", revision, self._info)
            case ["api", "models", org, name, "tree", revision]:
                self._with_repo(f"{org}/{name}", revision, self._tree)
            case [org, name, "resolve", revision, *parts]:
                repo = f"{org}/{name}"
                self._with_repo(repo, revision, lambda _: self._file(repo, "/".join(parts)))
            case _:
                self._fail(HTTPStatus.NOT_FOUND, None)

    def _with_repo(self, repo: str, revision: str, answer: Any) -> None:
        if repo in self.state.gated:
            self._fail(HTTPStatus.FORBIDDEN, "GatedRepo")
        elif repo not in self.state.repos:
            self._fail(HTTPStatus.NOT_FOUND, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self._fail(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        else:
            answer(repo)

    def _info(self, repo: str) -> None:
        siblings = []
        for name, content in self.state.repos[repo].items():
            sibling = {"rfilename": name, "size": len(content), "blobId": _git_id(content)}
            if is_large(name):
                size = self.state.claimed_size or len(content)
                sibling["size"] = size
                sibling["lfs"] = {"sha256": _sha256(content), "size": size, "pointerSize": 134}
            siblings.append(sibling)
        self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

    def _tree(self, repo: str) -> None:
        entries = []
        for name, content in self.state.repos[repo].items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": _git_id(content)}
            if is_large(name):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _file(self, repo: str, name: str) -> None:
        content = self.state.repos[repo].get(name)
        if content is None:
            self._fail(HTTPStatus.NOT_FOUND, "EntryNotFound")
            return
        start = self._start()
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        self.send_header("ETag", f'"{_sha256(content) if is_large(name) else _git_id(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self._body(content[start:], is_large(name))

    def _start(self) -> int:
        wanted = self.headers.get("Range")
        if wanted is None or self.state.ignore_ranges:
            return 0
        return int(wanted.removeprefix("bytes=").partition("-")[0])

    def _body(self, content: bytes, large: bool) -> None:
        if large and self.state.corrupt:
            self.state.corrupt -= 1
            content = bytes(len(content))
        if large and self.state.cuts:
            content = content[: self.state.cuts.pop(0)]
            self.close_connection = True
        if not large:
            self.wfile.write(content)
            return
        number = len(self.state.sent)
        self.state.sent.append(0)
        with suppress(ConnectionError):  # the client has gone
            for part in self._pieces(content):
                self.wfile.write(part)
                self.state.sent[number] += len(part)

    def _pieces(self, content: bytes) -> Iterator[bytes]:
        """The content, with a wait in it where one was asked for."""
        at = self.state.hold_at
        if at is not None and at < len(content):
            yield content[:at]
            self.wfile.flush()
            self.state.wait_for_release()
            content = content[at:]
        size = PIECE if self.state.pace else max(1, len(content))
        for start in range(0, len(content), size):
            yield content[start : start + size]
            time.sleep(self.state.pace)

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _fail(self, status: HTTPStatus, code: str | None) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
