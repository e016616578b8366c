"""A small page on this machine: files of the package and one JSON document, for nobody else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from lagless.checkpoints import CheckpointError

_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"
_HOLD = 5.0  # seconds that a request waits for news, so that an open page costs little
_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class Page:
    """Serves the page on 127.0.0.1 from a thread; a context manager.

    Args:
        data: what the page shows, as plain JSON, and its version.
        port: 0 for any that is free.

    Attributes:
        url: where it is.

    Raises:
        CheckpointError: if the port is taken.
    """

    def __init__(self, data: Callable[[], dict[str, Any]], version: Callable[[], str], port: int = 0) -> None:
        self._changed, self._closed = threading.Condition(), False

        def newer(seen: str) -> bool:
            """Wait until there is something else than ``seen`` to show; False after a while."""
            with self._changed:
                return self._changed.wait_for(lambda: self._closed or version() != seen, _HOLD)

        members = {"data": staticmethod(data), "newer": staticmethod(newer)}
        handler = type("Handler", (_Handler,), members)
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError as error:
            raise CheckpointError(
                f"--serve {port}: the port cannot be used ({error.strerror}). Choose another one, or 0 for any."
            ) from error
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.5,), name="lagless-page", daemon=True
        )

    def changed(self, row: dict[str, Any]) -> None:
        """Let pages that wait look again; a sink of a watch."""
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Page:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    data: Callable[[], dict[str, Any]]
    newer: Callable[[str], bool]

    def do_GET(self) -> None:
        # Another site's page could reach this machine under a name of its own that leads here.
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in _HOSTS:
            self._send(403, "text/plain", b"only for this machine")
            return
        path, _, query = self.path.partition("?")
        if path == "/data.json":
            if query.startswith("version=") and not self.newer(query.removeprefix("version=")):
                self._send(204, "application/json", b"")
            else:
                self._send(200, "application/json", json.dumps(self.data(), allow_nan=False).encode())
            return
        name = "index.html" if path == "/" else path[1:]
        if name not in ("index.html", "page.js", "page.css"):
            self._send(404, "text/plain", b"not found")
            return
        content = (files("lagless.watch") / "page" / name).read_bytes()
        self._send(200, _TYPES[name.rpartition(".")[2]], content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal has the table."""

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if status != 204:
            self.wfile.write(content)
