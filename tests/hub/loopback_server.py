"""What carries the answers of the loopback Hub: an HTTP server on 127.0.0.1. The hub says what they are."""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .loopback_parts import DROP_CONNECTION, Answer, Fault

if TYPE_CHECKING:
    from .loopback import LoopbackHub


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is two writes; 40 ms would pass between them
    server: "Server"  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self._read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline() or self._read(1), 16):
            chunks.append(self._read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _read(self, size: int) -> bytes:
        """So many bytes; a client that is killed sends fewer, and what it wanted does not happen."""
        if len(found := self.rfile.read(size)) < size:
            raise ConnectionResetError
        return found

    def _serve(self) -> None:
        hub, body = self.server.hub, self._body()
        fault = hub.take_fault(self.command, self.path)
        if fault == DROP_CONNECTION:
            self.close_connection = True
            return
        answer = hub.answer(self.command, self.path, self.headers, body)
        if fault is not None:
            answer = fault.change(answer) if isinstance(fault, Fault) else Answer(status=fault)
        hub.requests.append((self.command, urlsplit(self.path).path, answer.status))
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.sent])
        if answer.sent is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve


class Server(ThreadingHTTPServer):
    """At a port that is free; connections that break are no errors."""

    def __init__(self, hub: "LoopbackHub") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
