"""A model hub on loopback: the addresses that huggingface_hub asks to make a repository, commit to it and read it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"
COMMIT = "c" * 40


@dataclass
class Repository:
    """Whether others see it, and its files."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """What the server holds: repositories by OWNER/NAME, large files by their sha256."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        told = {"url": f"{self.endpoint}/{name}", "name": name, "id": name}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **told}
        # The word of huggingface_hub 1.x, and that of 2.x.
        is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.repositories[name] = Repository(is_private)
        return 200, told

    def batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Where large files go."""
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.endpoint}/objects/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def commit(self, name: str, lines: bytes) -> dict[str, Any]:
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name].files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[name].files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.repositories[name].files[value["path"]]
        return {"success": True, "commitUrl": f"{self.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Nobody reads it."""

        def _say(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _tell(self, data: Any, status: int = 200) -> None:
            self._say(status, json.dumps(data).encode(), Content_Type="application/json")

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            body, path = self._body(), self.path.partition("?")[0]
            if path == "/api/validate-yaml":
                return self._tell({"errors": [], "warnings": []})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._tell({"error": "Invalid username or password."}, 401)
            if path == "/api/repos/create":
                status, told = hub.create(json.loads(body))
                return self._tell(told, status)
            if re.fullmatch(r"/api/models/(.+)/preupload/main", path):
                modes = {True: "lfs", False: "regular"}
                paths = [each["path"] for each in json.loads(body)["files"]]
                told = [{"path": path, "uploadMode": modes[path.endswith(".safetensors")]} for path in paths]
                return self._tell({"files": [{**each, "shouldIgnore": False} for each in told]})
            if path.endswith(".git/info/lfs/objects/batch"):
                return self._tell(hub.batch(json.loads(body)))
            if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
                return self._tell(hub.commit(found[1], body))
            return self._tell({"error": f"no {path}"}, 404)

        def do_PUT(self) -> None:
            body, digest = self._body(), self.path.removeprefix("/objects/")
            if hashlib.sha256(body).hexdigest() != digest:
                return self._tell({"error": "not what was promised"}, 400)
            hub.objects[digest] = body
            return self._say(200)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+|/tree/.+)?", path)
            if asked and (repository := hub.repositories.get(asked[1])):
                if (asked[2] or "").startswith("/tree"):
                    sizes = {name: (len(content), hashlib.sha1(content)) for name, content in repository.files.items()}
                    return self._tell(
                        [
                            {"type": "file", "path": name, "size": size, "oid": digest.hexdigest()}
                            for name, (size, digest) in sizes.items()
                        ]
                    )
                told = {"id": asked[1], "private": repository.private, "sha": COMMIT, "tags": []}
                return self._tell({**told, "siblings": [{"rfilename": name} for name in repository.files]})
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
            content = found and found[1] in hub.repositories and hub.repositories[found[1]].files.get(found[2])
            if not isinstance(content, bytes):
                missing = "EntryNotFound" if found else "RepoNotFound"
                return self._say(404, X_Error_Code=missing, X_Repo_Commit=COMMIT)
            return self._say(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET  # noqa: N815  the base class names it so

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    hub = Hub(endpoint="")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
