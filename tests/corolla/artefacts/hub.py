"""A model hub on loopback that takes what huggingface_hub sends, and keeps it."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """The repositories that were made, and the files that were committed to them."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.files: dict[str, bytes] = {}
        self.address = ""


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub, for as long as the block lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                hub.made.append(f"{asked['organization']}/{asked['name']}")
                self._say({"url": f"{hub.address}/{hub.made[-1]}"})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                self._say(
                    {
                        "files": [
                            {**f, "uploadMode": "regular", "shouldIgnore": False} for f in files
                        ]
                    }
                )
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                self._say({"commitUrl": f"{hub.address}/{hub.made[-1]}/commit/1", "commitOid": "1"})
            else:
                self._say({})

        def do_GET(self) -> None:
            self._say({"id": "ada/x", "siblings": [], "sha": "0"})

        def _say(self, told: Any) -> None:
            data = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *said: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
