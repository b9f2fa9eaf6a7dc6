"""A hub on this machine: repositories served to the real client over HTTP, with a count of what it downloads."""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"


@contextmanager
def served(folder: Path, seconds: float = 0) -> Iterator[tuple[str, Counter[str]]]:
    """`(address, downloads by OWNER/NAME/FILE)` of a folder of OWNER/NAME; a download takes `seconds`."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    downloads: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).removeprefix("/")
            file = path.replace(f"/resolve/{COMMIT}/", "/")
            if file != path and file in files:
                if self.command == "GET":
                    downloads[file] += 1
                    time.sleep(seconds)
                etag = hashlib.sha256(files[file]).hexdigest()
                self.answer(files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            elif path.startswith("api/models/"):
                owner, name, *rest = path.removeprefix("api/models/").split("/")
                inside = {f.split("/", 2)[2]: data for f, data in files.items() if f.startswith(f"{owner}/{name}/")}
                siblings = [{"rfilename": file} for file in inside]
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in inside.items()
                ]
                info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
                self.answer(json.dumps(tree if rest[:1] == ["tree"] else info).encode())
            else:
                self.answer(b"{}", {"X-Error-Code": "EntryNotFound"}, status=404)

        do_HEAD = do_GET

        def answer(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloads
    finally:
        server.shutdown()
        server.server_close()
