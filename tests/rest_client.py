"""Plain HTTPS against the REST front of a real pool, and what Azure's clients send."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hsm_pool.client import tokens
from security_domain.azure import document, transfer_key
from security_domain.azure.restore_blob import make_restore_blob
from tests.running_pool import RunningPool, TestOfficer

DOWNLOAD = "/securitydomain/download"
UPLOAD = "/securitydomain/upload"
IN_PROGRESS = "InProgress"
SUCCESS = "Success"
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; ``value`` is its JSON."""

    status: int
    headers: dict[str, str]
    value: Any

    @property
    def code(self) -> str:
        """Code of the error, "" when it is none."""
        return str(self.value.get("error", {}).get("code", ""))


def send(
    port: int,
    ca_file: str,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Send one request to localhost; header names of the answer are in lower case."""
    context = ssl.create_default_context(cafile=ca_file)
    connection = http.client.HTTPSConnection("localhost", port, timeout=_SECONDS, context=context)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        names = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, names, json.loads(content))
    finally:
        connection.close()


class RestClient:
    """One caller of the development issuer at one partition."""

    def __init__(self, pool: RunningPool, partition: int = 0, name: str = "administrator") -> None:
        self._pool = pool
        self._token = tokens.development_token(pool.connection, name)["access_token"]
        self.partition = partition

    @property
    def port(self) -> int:
        """Port of the partition's REST endpoint."""
        endpoint = self._pool.connection.partitions[self.partition].rest_endpoint
        assert endpoint
        return int(endpoint.rpartition(":")[2])

    @property
    def authorization(self) -> dict[str, str]:
        """The header that says who calls."""
        return {"Authorization": f"Bearer {self._token}"}

    def at(self, partition: int) -> RestClient:
        """Return the same caller at another partition."""
        other = RestClient.__new__(RestClient)
        other._pool, other._token, other.partition = self._pool, self._token, partition
        return other

    def call(
        self, method: str, path: str, body: Any = None, *, version: str = "7.5", **headers: str
    ) -> Reply:
        """Send one request with the token; a body that is not bytes is sent as JSON."""
        octets = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        query = f"{'&' if '?' in path else '?'}api-version={version}" if version else ""
        given = {**self.authorization, **headers}
        return send(self.port, self._pool.connection.client_ca_file, method, path + query, octets, given)

    def follow(self, reply: Reply) -> Reply:
        """Poll what a reply names in azure-asyncoperation, at this partition."""
        url = reply.headers["azure-asyncoperation"]
        path = "/" + url.split("/", 3)[3]
        return self.call("GET", path, version="")


def download_body(officers: Sequence[TestOfficer], required: int) -> dict[str, Any]:
    """Return the body of a download, as az makes it (the members that matter here)."""
    entries = []
    for officer in officers:
        der = officer.certificate_der
        thumbprint = base64.urlsafe_b64encode(hashlib.sha256(der).digest()).rstrip(b"=").decode()
        entries.append(
            {
                "kty": "RSA",
                "x5c": [base64.b64encode(der).decode()],
                "x5t#S256": thumbprint,
                "alg": "RSA-OAEP-256",
            }
        )
    return {"certificates": entries, "required": required}


def upload_body(key: Reply, azure_file: str, officers: Sequence[TestOfficer]) -> dict[str, str]:
    """Return the body of an upload for the transfer key of a reply."""
    pairs = [(officer.key, officer.certificate_der) for officer in officers]
    certificate = transfer_key.parse_transfer_key(key.value["transfer_key"])
    return {"value": make_restore_blob(document.parse(azure_file.encode()), pairs, certificate).decode()}
