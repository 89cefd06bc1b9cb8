"""A real HTTP server that gives prepared answers, for what `transformers serve` never does.

Bodies are those that the documentation of vLLM, SGLang and OpenAI describes; statuses, delays and
broken connections are a network's.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What comes back to one request."""

    body: Any = None
    status: int = 200
    delay_s: float = 0.0
    cut_at: int | None = None
    """Close the connection after so many bytes of the body."""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    path: str
    body: Any
    headers: dict[str, str]


Script = Callable[[Request], Reply]


class ReplyServer(ThreadingHTTPServer):
    """Answers by a script, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.requests: list[Request] = []
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ReplyServer

    def do_GET(self) -> None:
        self._reply()

    def do_POST(self) -> None:
        self._reply()

    def _reply(self) -> None:
        length = int(self.headers.get("content-length", 0))
        text = self.rfile.read(length)
        request = Request(
            method=self.command,
            path=self.path,
            body=json.loads(text) if text else None,
            headers={name.lower(): value for name, value in self.headers.items()},
        )
        with self.server.lock:
            self.server.requests.append(request)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        reply = self.server.script(request)
        time.sleep(reply.delay_s)
        with self.server.lock:
            self.server.at_once -= 1
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        with contextlib.suppress(OSError):
            self.send_response(reply.status)
            for name, value in reply.headers:
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: reply.cut_at])
        if reply.cut_at is not None:
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def reply_server(script: Script) -> Iterator[ReplyServer]:
    server = ReplyServer(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
