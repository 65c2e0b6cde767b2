"""A local model hub with the endpoints that huggingface_hub uses to create, commit to and read a
repository."""

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, Response, request
from werkzeug.serving import make_server

TOKEN = "hf_of_the_tests"
COMMIT = "c" * 40


@dataclass
class Repository:
    """A repository: whether it is private, and its files."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """Contents of the hub: repositories by OWNER/NAME, and large files by their sha256."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)


def _app(hub: Hub) -> Flask:
    app = Flask(__name__)

    @app.before_request
    def check_token() -> Any:
        is_open = request.method != "POST" or request.path == "/api/validate-yaml"
        if not is_open and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return {"error": "Invalid username or password."}, 401
        return None

    @app.post("/api/validate-yaml")
    def validate() -> Any:
        return {"errors": [], "warnings": []}

    @app.post("/api/repos/create")
    def create() -> Any:
        asked = request.get_json(force=True)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        made = {"url": f"{hub.endpoint}/{name}", "name": name, "id": name}
        if name in hub.repositories:
            return {"error": "You already created this model repo", **made}, 409
        # The key of huggingface_hub 1.x, and that of 2.x.
        hub.repositories[name] = Repository(
            bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        return made

    @app.post("/api/models/<owner>/<name>/preupload/main")
    def preupload(owner: str, name: str) -> Any:
        paths = [each["path"] for each in request.get_json(force=True)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        return {
            "files": [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in modes.items()
            ]
        }

    @app.post("/<owner>/<name>.git/info/lfs/objects/batch")
    def batch(owner: str, name: str) -> Any:
        """Return the upload addresses of large files."""
        objects = [
            {**each, "actions": {"upload": {"href": f"{hub.endpoint}/objects/{each['oid']}"}}}
            for each in request.get_json(force=True)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    @app.put("/objects/<digest>")
    def upload(digest: str) -> Any:
        body = request.get_data()
        if hashlib.sha256(body).hexdigest() != digest:
            return {"error": "not what was promised"}, 400
        hub.objects[digest] = body
        return ""

    @app.post("/api/models/<owner>/<name>/commit/main")
    def commit(owner: str, name: str) -> Any:
        files = hub.repositories[f"{owner}/{name}"].files
        for line in map(json.loads, request.get_data().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return {
            "success": True,
            "commitUrl": f"{hub.endpoint}/{owner}/{name}/commit/{COMMIT}",
            "commitOid": COMMIT,
        }

    @app.get("/api/models/<owner>/<name>")
    @app.get("/api/models/<owner>/<name>/<part>/<path:revision>")
    def describe(owner: str, name: str, part: str = "", revision: str = "") -> Any:
        repository = hub.repositories.get(f"{owner}/{name}")
        if repository is None:
            return missing("RepoNotFound")
        if part == "tree":
            return [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for path, content in repository.files.items()
            ]
        siblings = [{"rfilename": path} for path in repository.files]
        known = {"id": f"{owner}/{name}", "private": repository.private, "sha": COMMIT}
        return known | {"tags": [], "siblings": siblings}

    @app.get("/<owner>/<name>/resolve/<revision>/<path:path>")
    def resolve(owner: str, name: str, revision: str, path: str) -> Any:
        repository = hub.repositories.get(f"{owner}/{name}")
        content = repository.files.get(path) if repository else None
        if content is None:
            return missing("EntryNotFound")
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        return Response(content, headers={"ETag": tag, "X-Repo-Commit": COMMIT})

    def missing(what: str) -> Response:
        return Response(status=404, headers={"X-Error-Code": what, "X-Repo-Commit": COMMIT})

    return app


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub server until the context ends."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    hub = Hub(endpoint="")
    server = make_server("127.0.0.1", 0, _app(hub), threaded=True)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
