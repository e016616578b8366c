"""A stand-in for the parts of the hub's HTTP API that an upload uses: repositories, LFS objects, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What the server holds."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool | None] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, str]] = []
        self.tokens: set[str | None] = set()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and JSON for a request."""
        path = path.partition("?")[0]
        if (method, path) == ("POST", "/api/repos/create"):
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
            self.repositories[name], self.private[name] = (
                {},
                asked.get("private") or asked.get("visibility") == "private",
            )
            return 200, {"url": f"{self.endpoint}/{name}", "id": name, "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if method == "PUT" and path.startswith("/upload/"):
            oid = path.removeprefix("/upload/")
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "other bytes than announced"}
            self.objects[oid] = body
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = [
                {**item, "actions": {"upload": {"href": f"{self.endpoint}/upload/{item['oid']}", "header": {}}}}
                for item in wanted
            ]
            return 200, {"transfer": "basic", "objects": actions}
        repo, action, revision = self._model_call(path)
        if repo is None or repo not in self.repositories:
            return 404, {"error": "Repository not found"}
        if action == "preupload":
            return 200, {"files": [self._mode(file) for file in json.loads(body)["files"]]}
        if action == "branch":
            return 200, {}
        if action == "commit":
            return 200, self._commit(repo, revision, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": path}

    def _model_call(self, path: str) -> tuple[str | None, str, str]:
        parts = path.removeprefix("/api/models/").split("/")
        if not path.startswith("/api/models/") or len(parts) < 4:
            return None, "", ""
        return "/".join(parts[:2]), parts[2], "/".join(parts[3:])

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith((".safetensors", ".ckpt")) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _commit(self, repo: str, revision: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        files = self.repositories[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append((repo, revision, value["summary"]))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.endpoint}/{repo}/commit/{'0' * 40}"}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at ``endpoint`` inside the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
            if "/upload/" not in self.path:
                hub.tokens.add(self.headers.get("Authorization"))
            status, content = hub.answer(self.command, self.path, body)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = _do

        def _chunked(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline().strip(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    hub.endpoint = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
