"""An OpenAI-compatible service on 127.0.0.1, which answers as a test says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asked:
    """One request. number: how many POST requests came before it."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    number: int


@dataclass
class Reply:
    """hang_up: the connection is closed in place of a reply."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False


def says(text: str | None) -> Reply:
    return Reply(body=json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


def fails(status: int, message: str = "no", headers: dict[str, str] | None = None, **more: str) -> Reply:
    return Reply(status, json.dumps({"error": {"message": message, **more}}).encode(), headers or {})


@dataclass
class Service:
    url: str
    asked: list[Asked]

    @property
    def questions(self) -> list[Asked]:
        return [request for request in self.asked if request.method == "POST"]


@contextlib.contextmanager
def serve(answer: Callable[[Asked], Reply]) -> Iterator[Service]:
    """A service that runs in threads of this process; GET requests get 404, as where there is no list of models, unless
    `answer` takes them: it is asked for POST requests alone, unless it has the attribute `takes_get`."""
    asked: list[Asked] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply("GET", {})

        def do_POST(self) -> None:
            self._reply("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, method: str, body: dict[str, Any]) -> None:
            with lock:
                number = sum(request.method == "POST" for request in asked)
                asked.append(request := Asked(method, self.path, dict(self.headers), body, number))
            reply = answer(request) if method == "POST" or hasattr(answer, "takes_get") else Reply(404)
            if reply.hang_up:
                self.close_connection = True
                return
            with contextlib.suppress(OSError):  # a client that no longer waits
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield Service(f"http://127.0.0.1:{server.server_port}/v1", asked)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
