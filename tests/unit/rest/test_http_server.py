"""The HTTPS server's bounds, over real TLS; the application is the test's own (G8)."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsm_pool import limits
from hsm_pool.provisioning.pki import Authority
from hsm_pool.rest.http_server import HttpServer
from hsm_pool.settings import Identity
from tests.running_pool import until


def _read_all(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


def _read_nothing(_: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("401 Unauthorized", [("Content-Length", "2")])
    return [b"no"]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Any], ssl.SSLSocket]]:
    """Return a function that starts a server of an application, and connects to it."""
    authority = Authority("clients")
    certificate, key = authority.issue("spiffe://pool/partition/0", server=True)
    identity = Identity(*(str(tmp_path / name) for name in ("certificate", "key", "ca")))
    for name, octets in (("certificate", certificate), ("key", key), ("ca", authority.certificate_pem)):
        (tmp_path / name).write_bytes(octets)
    servers: list[HttpServer] = []
    sockets: list[ssl.SSLSocket] = []

    def start(application: Any) -> ssl.SSLSocket:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = HttpServer(f"127.0.0.1:{port}", identity, application)
        servers.append(server)
        server.start()
        context = ssl.create_default_context(cafile=identity.ca_file)
        raw = socket.create_connection(("127.0.0.1", port), timeout=60)
        sockets.append(context.wrap_socket(raw, server_hostname="localhost"))
        return sockets[-1]

    yield start
    for connected in sockets:
        connected.close()
    for server in servers:
        server.close()


def _closed(connection: ssl.SSLSocket) -> bool:
    """Send one more octet; return whether the server has given up."""
    try:
        connection.sendall(b"x")
        connection.settimeout(0.2)
        return connection.recv(65536) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_an_octet_now_and_then_does_not_keep_a_thread(
    serve: Callable[[Any], ssl.SSLSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is never silent, and never done, is cut off."""
    monkeypatch.setattr(limits, "REST_REQUEST_SECONDS", 1)
    connection = serve(_read_all)
    connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
    until(lambda: _closed(connection), 60, "the end of a slow request")


@pytest.mark.parametrize(
    "head", [b"Content-Length: 40", b"Transfer-Encoding: chunked"], ids=["length", "chunks"]
)
def test_what_was_not_read_is_no_next_request(serve: Callable[[Any], ssl.SSLSocket], head: bytes) -> None:
    """An answer that did not read the body ends its connection."""
    connection = serve(_read_nothing)
    inner = b"GET /inner HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n" + inner)
    answer = b""
    try:
        while octets := connection.recv(65536):
            answer += octets
    except (ConnectionError, ssl.SSLError):
        pass  # closed before all of it was read
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer.lower()
