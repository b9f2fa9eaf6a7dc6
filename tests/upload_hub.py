"""A hub on this machine that takes uploads of the real client: repositories, storage of large files, commits."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

COMMIT = "89abcdef" * 5


@dataclass
class Hub:
    """Files, requests and commits of a hub."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """By OWNER/NAME/FILE."""
    requests: list[str] = field(default_factory=list)
    created: list[dict[str, object]] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)
    """Messages of commits."""
    large: dict[str, bytes] = field(default_factory=dict)
    """By sha256."""
    ignored: tuple[str, ...] = ()
    """Files that a .gitignore in the repository names."""
    refuses: int = 0
    """The status of every answer, if it is not 0."""

    def save(self, folder: Path) -> Path:
        for name, data in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, value: object, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def do_PUT(self) -> None:
            data = self.body()
            hub.large[hashlib.sha256(data).hexdigest()] = data
            self.answer({})

        def do_GET(self) -> None:
            self.body()
            owner, name, *rest = unquote(urlsplit(self.path).path).removeprefix("/api/models/").split("/")
            found = {
                key.split("/", 2)[2]: data for key, data in hub.files.items() if key.startswith(f"{owner}/{name}/")
            }
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in found.items()
            ]
            self.answer(tree if rest[:1] == ["tree"] else {"id": f"{owner}/{name}", "sha": COMMIT})

        def do_POST(self) -> None:
            data, path = self.body(), unquote(urlsplit(self.path).path)
            if hub.refuses:
                self.answer({"error": "no"}, hub.refuses)
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                hub.created.append(json.loads(data))
                self.answer({"url": f"{hub.address}/me/{hub.created[-1]['name']}"})
            elif path.endswith("/objects/batch"):
                self.answer({"transfer": "basic", "objects": [
                    {**row, "actions": {"upload": {"href": f"{hub.address}/large/{row['oid']}"}}}
                    for row in json.loads(data)["objects"]
                ]})  # fmt: skip
            elif "/preupload/" in path:
                self.answer({"files": [
                    {"path": row["path"], "uploadMode": "lfs" if row["path"].endswith(".safetensors") else "regular",
                     "shouldIgnore": row["path"] in hub.ignored}
                    for row in json.loads(data)["files"]
                ]})  # fmt: skip
            elif "/commit/" in path:
                self.commit(path.removeprefix("/api/models/").partition("/commit/")[0], data)
            else:
                self.answer({"error": path}, 404)

        def commit(self, repo: str, data: bytes) -> None:
            for line in data.splitlines():
                row = json.loads(line)
                value = row["value"]
                if row["key"] == "header":
                    hub.summaries.append(value["summary"])
                elif row["key"] == "file":
                    hub.files[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
                else:
                    assert row["key"] == "lfsFile"
                    hub.files[f"{repo}/{value['path']}"] = hub.large[value["oid"]]
            self.answer({"commitUrl": f"{hub.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler


@contextmanager
def started() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of this process talk to a hub, with a token and a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
