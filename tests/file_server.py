"""A server of files that cuts, redirects, refuses and changes what it serves."""

import hashlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

BYTES = bytes(range(256)) * 4096  # 1 MiB


SHA256 = hashlib.sha256(BYTES).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files` with ETag and ranges, and does what `plan` says for a path: statuses to answer first, bytes after which to cut."""

    daemon_threads = True

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.statuses: dict[str, list[int]] = {}
        self.cuts: dict[str, list[int]] = {}
        self.redirects: dict[str, tuple[int, str, dict[str, str]]] = {}
        self.headers: dict[str, dict[str, str | None]] = {}
        self.slow: set[str] = set()
        self.silent: set[str] = set()
        self.ranges = True
        self.gets: list[tuple[str, dict[str, str]]] = []
        self.heads: list[tuple[str, dict[str, str]]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def asked(self, path: str) -> list[dict[str, str]]:
        return [headers for seen, headers in self.gets if seen == path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def do_HEAD(self):
        self.do_GET(with_bytes=False)

    def do_GET(self, with_bytes=True):
        server, path = self.server, self.path
        (server.gets if with_bytes else server.heads).append((path, dict(self.headers)))
        if server.statuses.get(path):
            return self.answer(server.statuses[path].pop(0), {"Content-Length": "0"})
        if path in server.redirects:
            status, to, extra = server.redirects[path]
            return self.answer(status, {"Location": to, "Content-Length": "0", **extra})
        if path not in server.files:
            return self.answer(404, {"Content-Length": "0"})
        data = server.files[path]
        mark = f'"{hashlib.md5(data).hexdigest()}"'
        start, asked_range = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers = {"ETag": mark, "X-Repo-Commit": "0" * 40}
        if asked_range and server.ranges:
            start = int(asked_range[1])
            if start >= len(data):
                return self.answer(416, {"Content-Length": "0", "Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - start)
        headers = {k: v for k, v in (headers | server.headers.get(path, {})).items() if v is not None}
        self.answer(206 if start else 200, headers)
        if not with_bytes:
            return None
        cut = server.cuts[path].pop(0) if server.cuts.get(path) else len(data)
        if path in server.slow:
            for at in range(start, cut, 1 << 14):
                self.wfile.write(data[at : min(at + (1 << 14), cut)])
                time.sleep(0.02)
        else:
            self.wfile.write(data[start:cut])
        if path in server.silent:
            time.sleep(0.3)
        self.close_connection = "Content-Length" not in headers or cut < len(data)


@pytest.fixture
def server(monkeypatch):
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: None), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what comes between two of its borders is lost by a cut
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    serving = Server()
    serving.files["/file"] = BYTES
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    yield serving
    serving.shutdown()
    serving.server_close()


def names(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []
