"""A server that answers for one data set as Hugging Face's hub does, on this machine."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves the files of a folder as the data set `org/set`.

    `before(name)` is called before a file is sent, and may wait or raise. `sent` has the names of those that were.
    """

    daemon_threads = True

    def __init__(self, folder: Path, before: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.before, self.sent = folder, before, []
        self.files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entry(self, name: str) -> dict:
        size = (self.folder / name).stat().st_size if name in self.files else 0
        return {"type": "file" if name in self.files else "directory", "oid": "0" * 40, "size": size, "path": name}

    def tree(self, folder: str) -> list[dict]:
        start = f"{folder}/" if folder else ""
        inside = {start + name[len(start) :].partition("/")[0] for name in self.files if name.startswith(start)}
        return [self.entry(name) for name in sorted(inside)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/datasets/org/set/resolve/"):
            self._file(path.split("/", 6)[-1])
        elif path.startswith("/api/datasets/org/set/tree/"):
            self._json(self.server.tree("/".join(path.split("/")[7:])))
        elif path.startswith("/api/datasets/org/set"):
            files = [{"rfilename": name} for name in self.server.files]
            self._json({"id": "org/set", "sha": COMMIT, "private": False, "tags": [], "siblings": files})
        else:
            self._answer(404, b"not found", {"X-Error-Code": "EntryNotFound"})

    def _file(self, name: str) -> None:
        if name not in self.server.files:
            self._answer(404, b"not found", {"X-Error-Code": "EntryNotFound"})
            return
        content = (self.server.folder / name).read_bytes()
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.server.before(name)
            self.server.sent.append(name)
        if span := self.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self._answer(206, part, headers)
        else:
            self._answer(200, content, headers)

    def _json(self, values) -> None:
        self._answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # of a reader that was killed
                self.wfile.write(body)
