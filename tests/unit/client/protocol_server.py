"""Three in-process gRPC servers with mutual TLS, for protocol tests of the client alone.

They are no pool and stand in for none: they answer by script, so that the client meets
answers (and silences) in an order that a real pool would not repeat. What the pool itself
does is tested on real pools under tests/integration and tests/chaos.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from hsm_pool.client.connection import ClientIdentity, Connection, PartitionConnection
from hsm_pool.errors import MHSMError
from hsm_pool.net.interceptors import error_status
from hsm_pool.provisioning.pki import Authority
from mhsm.crypto.v1 import crypto_pb2, crypto_pb2_grpc
from mhsm.keys.v1 import keys_pb2, keys_pb2_grpc
from mhsm.pool.v1 import pool_pb2, pool_pb2_grpc
from mhsm.security_domain.v1 import security_domain_pb2, security_domain_pb2_grpc

POOL_ID = "0" * 32
_RELEASE_SECONDS = 20.0
_OPTIONS = (
    # The keepalive of the client is welcome, as at a partition.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)

_PUBLIC_KEY_DER = (
    ec.generate_private_key(ec.SECP256R1())
    .public_key()
    .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
)

Script = Callable[[str, Any, grpc.ServicerContext], Any]
"""(method, request, context) -> a response, or None for the plain one; may refuse or block."""


def make(kind: type[MHSMError]) -> MHSMError:
    """Return an error of any kind, whatever its constructor takes."""
    error = kind.__new__(kind)
    MHSMError.__init__(error, "why")
    return error


def refuse(kind: type[MHSMError]) -> Script:
    """Answer every call but the health check with a typed error."""

    def script(method: str, _: Any, context: grpc.ServicerContext) -> None:
        if method != "Check":
            context.abort_with_status(rpc_status.to_status(error_status(make(kind))))

    return script


def fail_with(code: grpc.StatusCode) -> Script:
    """Answer every call but the health check with a bare code."""

    def script(method: str, _: Any, context: grpc.ServicerContext) -> None:
        if method != "Check":
            context.abort(code, "no details")

    return script


def answer(_method: str, _request: Any, _context: grpc.ServicerContext) -> None:
    """Give the plain answer."""


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "CreateKey": lambda r: keys_pb2.CreateKeyResponse(key=_a_key(r.key_id)),
    "ImportKey": lambda r: keys_pb2.ImportKeyResponse(key=_a_key(r.key_id)),
    "GetKey": lambda r: keys_pb2.GetKeyResponse(key=_a_key(r.name.removeprefix("keys/"))),
    "PurgeDeletedKey": lambda _: keys_pb2.PurgeDeletedKeyResponse(),
    "Sign": lambda r: crypto_pb2.SignResponse(signatures=[bytes(64) for _ in r.digests]),
    "Verify": lambda r: crypto_pb2.VerifyResponse(valid=[False for _ in r.items]),
    "Encrypt": lambda r: crypto_pb2.EncryptResponse(items=[crypto_pb2.Ciphertext() for _ in r.items]),
    "Decrypt": lambda r: crypto_pb2.DecryptResponse(plaintexts=[i.ciphertext for i in r.items]),
    "WrapKey": lambda r: crypto_pb2.WrapKeyResponse(wrapped_keys=list(r.keys)),
    "UnwrapKey": lambda r: crypto_pb2.UnwrapKeyResponse(keys=list(r.wrapped_keys)),
    "GetRandomBytes": lambda r: crypto_pb2.GetRandomBytesResponse(random_bytes=bytes(r.count)),
    "GetPartitionStatus": lambda _: pool_pb2.GetPartitionStatusResponse(),
    "DownloadSecurityDomain": lambda _: security_domain_pb2.DownloadSecurityDomainResponse(),
    "InitRecovery": lambda _: security_domain_pb2.InitRecoveryResponse(),
    "Check": lambda _: health_pb2.HealthCheckResponse(status=1),
}


def _a_key(key_id: str) -> keys_pb2.Key:
    return keys_pb2.Key(
        name=f"keys/{key_id}/versions/{'0' * 32}",
        key_type=keys_pb2.KEY_TYPE_EC,
        curve=keys_pb2.CURVE_P256,
        size_bits=256,
        public_key_der=_PUBLIC_KEY_DER,
    )


class Partition:
    """One server: its script and the calls that reached it, in order."""

    def __init__(self, credentials: grpc.ServerCredentials) -> None:
        self.script: Script = answer
        self.calls: list[tuple[str, Any]] = []
        self.release = threading.Event()
        self.entered = threading.Event()
        self.stream_ended = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8), options=_OPTIONS)
        for servicer, add in (
            (keys_pb2_grpc.KeyServiceServicer, keys_pb2_grpc.add_KeyServiceServicer_to_server),
            (crypto_pb2_grpc.CryptoServiceServicer, crypto_pb2_grpc.add_CryptoServiceServicer_to_server),
            (pool_pb2_grpc.PoolServiceServicer, pool_pb2_grpc.add_PoolServiceServicer_to_server),
            (
                security_domain_pb2_grpc.SecurityDomainServiceServicer,
                security_domain_pb2_grpc.add_SecurityDomainServiceServicer_to_server,
            ),
            (health_pb2_grpc.HealthServicer, health_pb2_grpc.add_HealthServicer_to_server),
        ):
            scripted = servicer()
            for method in [name for name in vars(servicer) if name in _PLAIN]:
                setattr(scripted, method, self._handler(method))
            if servicer is crypto_pb2_grpc.CryptoServiceServicer:
                scripted.StreamOperations = self._stream
            add(scripted, self._server)
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()

    def _handler(self, method: str) -> Callable[[Any, grpc.ServicerContext], Any]:
        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            self.calls.append((method, request))
            response = self.script(method, request, context)
            return _PLAIN[method](request) if response is None else response

        return handle

    def _stream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(self.stream_ended.set)
        self.calls.append(("StreamOperations", None))
        for request in requests:
            yield crypto_pb2.StreamOperationsResponse(correlation_id=request.correlation_id)

    def hang(self, method: str, _: Any, __: grpc.ServicerContext) -> None:
        """A script: keep every call but the health check until released."""
        if method != "Check":
            self.entered.set()
            self.release.wait(_RELEASE_SECONDS)

    def requests(self, method: str) -> list[Any]:
        """Return the requests of one method that reached this server."""
        return [request for name, request in list(self.calls) if name == method]

    def stop(self) -> None:
        """Break all connections at once."""
        self.release.set()
        self._server.stop(None).wait(_RELEASE_SECONDS)


class Servers:
    """Three servers and a connection file that leads to them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # As a supervisor does: status asks whether one runs.
        self._lock = os.open(directory / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.write(self._lock, str(os.getpid()).encode())
        authority, foreign = Authority("client plane"), Authority("somebody else")
        (directory / "ca.pem").write_bytes(authority.certificate_pem)
        identities: dict[str, ClientIdentity] = {}
        for name, issuer in (
            ("application", authority),
            ("administrator", authority),
            ("foreigner", foreign),
        ):
            certificate, key = issuer.issue(f"spiffe://{POOL_ID}/client/{name}")
            (directory / f"{name}.crt").write_bytes(certificate)
            (directory / f"{name}.key").write_bytes(key)
            identities[name] = ClientIdentity(str(directory / f"{name}.crt"), str(directory / f"{name}.key"))
        self.partitions: list[Partition] = []
        for index in range(3):
            certificate, key = authority.issue(f"spiffe://{POOL_ID}/partition/{index}", server=True)
            credentials = grpc.ssl_server_credentials(
                [(key, certificate)], authority.certificate_pem, require_client_auth=True
            )
            self.partitions.append(Partition(credentials))
        self.connection = Connection(
            pool_id=POOL_ID,
            data_directory=str(directory),
            attended=True,
            client_ca_file=str(directory / "ca.pem"),
            clients=identities,
            partitions=tuple(
                PartitionConnection(
                    index, f"127.0.0.1:{partition.port}", "", "", "", "", "", "", {"partition": None}
                )
                for index, partition in enumerate(self.partitions)
            ),
            store={},
            fabric_controller={"process_id": os.getpid()},
            supervisor_process_id=0,
        )

    def at(self, endpoints: dict[int, str]) -> Connection:
        """Return the connection with other endpoints for some partitions."""
        entries = tuple(
            dataclasses.replace(entry, endpoint=endpoints.get(entry.index, entry.endpoint))
            for entry in self.connection.partitions
        )
        return dataclasses.replace(self.connection, partitions=entries)

    def write_connection_file(self) -> None:
        """Write connection.json as ``mhsm up`` does."""
        content = dataclasses.asdict(self.connection)
        content["supervisor"] = {"process_id": content.pop("supervisor_process_id")}
        (self.directory / "connection.json").write_text(json.dumps({"format": 1, **content}))

    def script(self, script: Script) -> None:
        """Give all servers one script."""
        for partition in self.partitions:
            partition.script = script

    def count(self, method: str) -> list[int]:
        """Return how many calls of a method reached each server."""
        return [len(partition.requests(method)) for partition in self.partitions]

    def reset(self) -> None:
        """Forget all calls and scripts."""
        for partition in self.partitions:
            partition.script = answer
            partition.calls.clear()
            partition.release.clear()
            partition.entered.clear()
            partition.stream_ended.clear()

    def stop(self) -> None:
        """Stop all servers."""
        for partition in self.partitions:
            partition.stop()
        os.close(self._lock)
