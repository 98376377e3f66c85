"""The token issuer of the development profile: ``python -m hsm_pool.tokens.issuer --settings FILE``.

It stands for Microsoft Entra ID on one machine: it listens on loopback only and publishes its
key set. A token for any name is given to whoever shows the administrator's client
certificate. Azure's clients take theirs by the client-credentials flow (RFC 6749, 4.4) with such
a token as client assertion (RFC 7523), and get one that ends with it. The signing key is made at
each start and never written: a restart is a rotation.
The attestation authority of the same profile is a part of it.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import ssl
import sys
import threading
import time
import urllib.parse
import uuid
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from hsm_pool import limits
from hsm_pool import settings as settings_module
from hsm_pool.settings import TokenIssuerSettings
from hsm_pool.tokens import attestation_authority
from hsm_pool.tokens.attestation_authority import AttestationAuthority

KEYS_PATH = "/keys"
TOKEN_PATH = "/token"  # noqa: S105 - a path
_OPENID_CONFIGURATION = re.compile(r"/([A-Za-z0-9.-]{1,64})/v2\.0/\.well-known/openid-configuration")
_ASSERTION_PATH = re.compile(r"/[A-Za-z0-9.-]{1,64}/oauth2/v2\.0/token")
_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_REQUEST_BYTES_MAX = 32 * 1024
_CONNECTION_SECONDS = 5.0
_THREADS = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")


def object_id(pool_id: str, name: str) -> str:
    """Return the GUID that stands for a person, an application or a group of this issuer."""
    return str(uuid.uuid5(uuid.UUID(pool_id), name))


class Issuer:
    """Signs tokens with a key of this process."""

    def __init__(self, settings: TokenIssuerSettings) -> None:
        self.settings = settings
        self.attestation = AttestationAuthority(settings.issuer + attestation_authority.ISSUER_PATH)
        self._key = ECKey.generate_key("P-256", {"kid": uuid.uuid4().hex, "use": "sig", "alg": "ES256"})

    def key_set(self) -> dict[str, Any]:
        """Return the public key set."""
        return {"keys": [self._key.as_dict(private=False)]}

    def token(self, name: str, groups: list[str]) -> dict[str, Any]:
        """Return a token for a name, and under which ids its bearer can have roles."""
        now = int(time.time())
        pool_id = self.settings.pool_id
        claims = {
            "iss": self.settings.issuer,
            "aud": self.settings.audience,
            "iat": now,
            "nbf": now,
            "exp": now + limits.DEVELOPMENT_TOKEN_SECONDS,
            "oid": object_id(pool_id, name),
            "groups": [object_id(pool_id, f"group/{group}") for group in groups],
        }
        found = {name: claims[name] for name in ("oid", "groups", "exp")}
        return {"access_token": self._signed(claims), "token_type": "Bearer", **found}

    def token_for(self, assertion: str, client_id: str) -> dict[str, Any]:
        """Return the answer of Entra ID's token endpoint to whoever shows a token of this issuer.

        Raises:
            ValueError: It is none, has expired, or is another one's than the client's.
        """
        now = int(time.time())
        try:
            claims = jwt.decode(assertion, self._key, algorithms=["ES256"]).claims
        except JoseError:
            raise ValueError("the assertion is no token of this issuer") from None
        if claims["oid"] != client_id or claims["exp"] <= now:
            raise ValueError("the assertion has expired, or is another client's")
        token = self._signed({**claims, "iat": now, "nbf": now})
        remaining = claims["exp"] - now
        return {
            "access_token": token,
            "token_type": "Bearer",
            "expires_in": remaining,
            "ext_expires_in": remaining,
        }

    def _signed(self, claims: dict[str, Any]) -> str:
        header = {"alg": "ES256", "kid": self._key.kid, "typ": "JWT"}
        return jwt.encode(header, claims, self._key, algorithms=["ES256"])


class _Server(HTTPServer):
    """HTTPS with a bounded number of threads; the handshake is the thread's, not the listener's."""

    def __init__(self, issuer: Issuer) -> None:
        host, _, port = issuer.settings.endpoint.rpartition(":")
        self.issuer = issuer
        self._threads = ThreadPoolExecutor(_THREADS)
        super().__init__((host, int(port)), _Handler)
        identity = issuer.settings.identity
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=identity.ca_file)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_cert_chain(identity.certificate_file, identity.key_file)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand a connection to a thread."""
        request.settimeout(_CONNECTION_SECONDS)
        self._threads.submit(self._serve, request, client_address)

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            request.do_handshake()
            self.finish_request(request, client_address)
        except OSError:
            pass  # the caller's side of the connection
        finally:
            self.shutdown_request(request)

    def server_close(self) -> None:
        """Stop listening and end the threads."""
        super().server_close()
        self._threads.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        issuer = self.server.issuer
        match self.path:
            case "/.well-known/openid-configuration":
                base = issuer.settings.issuer
                self._answer(200, {"issuer": base, "jwks_uri": base + KEYS_PATH})
            case path if path == KEYS_PATH:
                self._answer(200, issuer.key_set())
            case path if found := _OPENID_CONFIGURATION.fullmatch(path.partition("?")[0]):
                base = f"{issuer.settings.issuer}/{found[1]}"
                self._answer(
                    200,
                    {
                        "issuer": f"{base}/v2.0",
                        "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                        "token_endpoint": f"{base}/oauth2/v2.0/token",
                    },
                )
            case path if path.partition("?")[0] == "/subscriptions":
                # az asks at each login; there is no resource manager here.
                self._answer(200, {"value": []})
            case path if path == attestation_authority.KEYS_PATH:
                self._answer(200, issuer.attestation.key_set())
            case _:
                self._answer(404, {"error": "not_found"})

    def do_POST(self) -> None:
        if _ASSERTION_PATH.fullmatch(self.path.partition("?")[0]):
            self._exchange()
            return
        if self.path not in {TOKEN_PATH, attestation_authority.TOKEN_PATH}:
            self._answer(404, {"error": "not_found"})
            return
        if not self._is_administrator():
            self._answer(403, {"error": "access_denied"})
            return
        try:
            request = json.loads(self._body())
            if self.path == attestation_authority.TOKEN_PATH:
                self._answer(200, self.server.issuer.attestation.token(request))
                return
            name, groups = request["name"], request.get("groups", [])
            if not isinstance(groups, list) or len(groups) > limits.TOKEN_GROUPS_MAX:
                raise ValueError
            if not all(isinstance(text, str) and _NAME.fullmatch(text) for text in [name, *groups]):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._answer(400, {"error": "invalid_request"})
            return
        self._answer(200, self.server.issuer.token(name, groups))

    def _exchange(self) -> None:
        """Answer the client-credentials flow."""
        try:
            form = urllib.parse.parse_qs(self._body().decode("ascii"), strict_parsing=True)
            if form["grant_type"] != ["client_credentials"]:
                raise ValueError
            if form["client_assertion_type"] != [_ASSERTION_TYPE]:
                raise ValueError
            (assertion,), (client_id,) = form["client_assertion"], form["client_id"]
            answer = self.server.issuer.token_for(assertion, client_id)
        except (ValueError, KeyError, TypeError, RecursionError):
            self._answer(401, {"error": "invalid_client"})
            return
        self._answer(200, answer)

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length", ""))
        if not 0 < length <= _REQUEST_BYTES_MAX:
            raise ValueError
        return self.rfile.read(length)

    def _is_administrator(self) -> bool:
        certificate: Any = self.connection.getpeercert() or {}
        wanted = ("URI", f"spiffe://{self.server.issuer.settings.pool_id}/client/administrator")
        return bool(certificate.get("subjectAltName") == (wanted,))

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        """Write no log: a request line is the caller's text."""


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, required=True)
    arguments = parser.parse_args()
    # Blocked before any thread exists, so that only sigwait below sees them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    server = _Server(Issuer(settings_module.load(TokenIssuerSettings, arguments.settings)))
    thread = threading.Thread(target=server.serve_forever, name="token-issuer")
    thread.start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    server.shutdown()
    thread.join()
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
