"""A proxy on 127.0.0.1 that takes every request, whatever host it is for, to one server."""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "content-length", "host"}


class LoopbackProxy:
    """Use it as a context manager.

    Attributes:
        hosts: that requests were for.
    """

    def __init__(self, target: str) -> None:
        self.hosts: set[str] = set()
        self._server = _server(self, urlsplit(target).netloc)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _server(proxy: LoopbackProxy, target: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _forward(self) -> None:
            url = urlsplit(self.path)
            proxy.hosts.add(url.netloc)
            kept = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = http.client.HTTPConnection(target)
            connection.request(self.command, f"{url.path}?{url.query}", body or None, kept)
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            length = answer.headers.get("Content-Length", "0")
            for name, value in answer.getheaders():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        do_GET = do_HEAD = do_POST = do_PUT = _forward

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)
