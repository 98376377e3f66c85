"""HTTPS with bounds: cheroot, with the handshake in the worker and refusals in Azure's shape.

A connection waits in a bounded queue, is served by one of a fixed number of threads, and is closed
when its client is silent for some seconds. What is not HTTP, or too large, never reaches a route.
"""

from __future__ import annotations

import json
import math
import ssl
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

import structlog
from cheroot.makefile import MakeFile
from cheroot.server import HTTPConnection, HTTPRequest
from cheroot.ssl import Adapter
from cheroot.wsgi import Server

from hsm_pool import limits
from hsm_pool.rest.errors import body
from hsm_pool.settings import Identity
from hsm_pool.store.replica import boot_time

_log = structlog.get_logger()
_CODES: Final = {
    "408": "RequestTimeout",
    "413": "RequestEntityTooLarge",
    "414": "RequestUriTooLong",
    "500": "InternalError",
}
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _BoundedSocket(ssl.SSLSocket):
    """Gives up when a request comes too slowly: a client that sends an octet now and then is not silent."""

    until = math.inf
    """On the boot clock."""

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        if boot_time() >= self.until:
            raise TimeoutError
        return super().recv_into(*arguments, **options)


class _Tls(Adapter):
    """Our certificate. The handshake is the worker's affair: the listener waits for nobody."""

    def __init__(self, identity: Identity) -> None:
        super().__init__(identity.certificate_file, identity.key_file)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.sslsocket_class = _BoundedSocket
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.load_cert_chain(identity.certificate_file, identity.key_file)

    def bind(self, sock: Any) -> Any:
        return sock

    def wrap(self, sock: Any) -> tuple[ssl.SSLSocket, dict[str, str]]:
        return self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), {}

    def get_environ(self) -> dict[str, str]:
        return {}

    def makefile(self, sock: Any, mode: str = "r", bufsize: int = -1) -> Any:
        return MakeFile(sock, mode, bufsize)


class _OneSlash:
    """Reads a request line; clients begin paths with two slashes, which would name another server."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readline(self) -> bytes:
        line: bytes = self._stream.readline()
        method, _, rest = line.partition(b" ")
        return method + b" /" + rest.lstrip(b"/") if rest.startswith(b"//") else line


class _Request(HTTPRequest):
    def read_request_line(self) -> bool:
        """Read the first line; return whether it is one of HTTP."""
        stream, self.rfile = self.rfile, _OneSlash(self.rfile)
        try:
            return bool(super().read_request_line())  # type: ignore[no-untyped-call]
        except ValueError:  # an address that is none
            self.simple_response("400 Bad Request")
            return False
        finally:
            self.rfile = stream

    def send_headers(self) -> None:
        """Begin the answer; what was not read of the request is not read as the next one."""
        unread: object = getattr(self.rfile, "remaining", None)
        if self.chunked_read or unread:
            self.close_connection = True
        super().send_headers()

    def simple_response(self, status: Any, msg: str = "") -> None:
        """Refuse what is no request, without a word of the text that cheroot has for it."""
        del msg
        number, _, reason = str(status).partition(" ")
        content = json.dumps(body(_CODES.get(number, "BadParameter"), reason or "refused")).encode()
        self.close_connection = True
        head = (
            f"{self.server.protocol} {status}\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        self.conn.wfile.write(head.encode("ascii") + content)


class _Connection(HTTPConnection):
    RequestHandlerClass = _Request
    _shaken = False

    def communicate(self) -> bool:
        """Serve one request; return whether the connection stays open."""
        try:
            self.socket.until = boot_time() + limits.REST_REQUEST_SECONDS
            if not self._shaken:
                self.socket.do_handshake()
                self._shaken = True
            return bool(super().communicate())  # type: ignore[no-untyped-call]
        except OSError:
            return False  # the client's side of the connection
        except Exception as error:  # noqa: BLE001 - one connection must not end the others
            _log.error("a connection failed", kind=type(error).__name__)
            return False


class _Server(Server):
    def error_log(self, msg: str = "", level: int = 20, traceback: bool = False) -> None:
        """Write no text that a client had a part in, and none of an exception (G3)."""
        del msg, level, traceback
        kind = sys.exc_info()[0]
        _log.warning("a connection was refused", kind=kind.__name__ if kind else "")


class HttpServer:
    """An HTTPS server of one application; :meth:`close` ends it and its threads.

    Args:
        endpoint: host:port.
        identity: Certificate and key of the server.
        application: WSGI (PEP 3333).

    Raises:
        OSError: The endpoint is in use.
    """

    def __init__(self, endpoint: str, identity: Identity, application: Application) -> None:
        host, _, port = endpoint.rpartition(":")
        self._server = _Server(
            (host, int(port)),
            application,
            numthreads=limits.REST_THREADS,
            max=limits.REST_THREADS,
            server_name="mhsm",
            request_queue_size=limits.REST_CONNECTIONS_MAX,
            timeout=limits.REST_SILENCE_SECONDS,
            shutdown_timeout=limits.REST_STOP_SECONDS,
            accepted_queue_size=limits.REST_CONNECTIONS_MAX,
            accepted_queue_timeout=1,
        )
        self._server.ConnectionClass = _Connection
        self._server.keep_alive_conn_limit = limits.REST_CONNECTIONS_MAX
        self._server.max_request_header_size = limits.REST_HEADER_BYTES_MAX
        self._server.max_request_body_size = limits.REST_BODY_BYTES_MAX
        self._server.ssl_adapter = _Tls(identity)
        self._server.prepare()
        self._thread = threading.Thread(target=self._server.serve, name="rest", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening and wait, bounded, for requests under way."""
        self._server.stop()
        if self._thread.is_alive():
            self._thread.join()
