"""Answers `/metrics` of a worker over HTTP, on threads of its own: an engine that is busy does not hold a scrape up."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from ...errors import ConfigError, KvsluiceError, Unauthenticated
from ..security import METRICS, Guard
from ..tls import TlsFiles

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

TIMEOUT_S = 10.0  # of a connection that says nothing

StartResponse = Callable[[str, list[tuple[str, str]]], Any]
App = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a scrape is no event."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # the library's own asks the resolver for this host's name
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: whoever went away, or speaks no TLS, gets no answer."""


def guarded(app: App, guard: Guard) -> App:
    """The same application for callers who may read metrics, at `/metrics` alone."""

    def answer(environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/metrics":
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"allowed: /metrics\n"]
        try:
            guard.authorize(METRICS, environ.get("HTTP_AUTHORIZATION"))
        except KvsluiceError as exc:
            unknown = isinstance(exc, Unauthenticated)
            headers = [("Content-Type", "text/plain; charset=utf-8")]
            headers += [("WWW-Authenticate", "Bearer")] if unknown else []
            start("401 Unauthorized" if unknown else "403 Forbidden", headers)
            return [f"{exc.message}\n".encode()]
        return app(environ, start)

    return answer


def serve_metrics(registry: CollectorRegistry, host: str, port: int, guard: Guard, tls: TlsFiles | None) -> int:
    """Listen on exactly `host`, as long as the process lives. Returns the port.

    Raises:
        ConfigError: it cannot listen there, or the files of `tls` cannot be used.
    """
    from prometheus_client import make_wsgi_app

    class Server(_Server):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    try:
        server = Server((host, port), _Handler)
    except OSError as exc:
        raise ConfigError(f"worker_metrics_port: cannot listen on {host} port {port}: {exc.strerror}") from exc
    if tls is not None and tls.cert is not None:
        tls.check()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.cert, tls.key)
        # the handshake is the connection's own thread's, so that nobody's holds others up
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.set_app(guarded(make_wsgi_app(registry), guard))
    Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port
