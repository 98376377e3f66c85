"""Default-deny: every identity on every method of every listener equals the table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from hsm_pool.net.authorization import PERMISSIONS, Role
from mhsm.crypto.v1 import crypto_pb2
from mhsm.enclave.v1 import enclave_pb2
from mhsm.keys.v1 import keys_pb2
from mhsm.node.v1 import node_pb2
from mhsm.peer.v1 import peer_pb2
from mhsm.pool.v1 import pool_pb2
from mhsm.security_domain.v1 import security_domain_pb2
from tests.running_pool import RunningPool

pytestmark = pytest.mark.pool

PLANES = {
    "client": (
        "mhsm.keys.v1.KeyService",
        "mhsm.crypto.v1.CryptoService",
        "mhsm.security_domain.v1.SecurityDomainService",
        "mhsm.pool.v1.PoolService",
        "grpc.health.v1.Health",
    ),
    "peer": ("mhsm.peer.v1.PeerService",),
    "enclave": ("mhsm.enclave.v1.EnclaveService",),
    "node": ("mhsm.node.v1.NodeService",),
}
FILES = (
    crypto_pb2,
    enclave_pb2,
    health_pb2,
    keys_pb2,
    node_pb2,
    peer_pb2,
    pool_pb2,
    security_domain_pb2,
)
REFUSED = {"UNAUTHENTICATED", "PERMISSION_DENIED"}


def methods(service: str) -> list[tuple[str, bool]]:
    """Return (full method, streaming) of a service."""
    (descriptor,) = [
        found
        for file in FILES
        for found in file.DESCRIPTOR.services_by_name.values()
        if found.full_name == service
    ]
    return [
        (f"/{service}/{method.name}", method.server_streaming or method.client_streaming)
        for method in descriptor.methods
    ]


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and what the table knows of it."""

    name: str
    certificate: bytes | None
    key: bytes | None
    role: Role | None


def signed_by_client_ca(pool: RunningPool, uris: list[str], *, expired: bool = False) -> tuple[bytes, bytes]:
    """Return a certificate of the pool's own client authority with any names."""
    directory = pool.directory / "pki"
    issuer = x509.load_pem_x509_certificate((directory / "client-ca.crt").read_bytes())
    issuer_key = serialization.load_pem_private_key((directory / "client-ca.key").read_bytes(), None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    end = now - timedelta(days=1) if expired else now + timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "client/administrator")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(end)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris]), critical=False
        )
        .sign(issuer_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.fixture(scope="module")
def identities(pool: RunningPool) -> list[Identity]:
    """Everybody: the pool's own identities, and some that its client authority should not have made."""
    prefix = f"spiffe://{pool.connection.pool_id}"

    def file(name: str, path: str, role: Role) -> Identity:
        base = pool.directory / path
        return Identity(
            name,
            base.with_name(base.name + ".crt").read_bytes(),
            base.with_name(base.name + ".key").read_bytes(),
            role,
        )

    def made(name: str, uris: list[str], role: Role | None, *, expired: bool = False) -> Identity:
        return Identity(name, *signed_by_client_ca(pool, uris, expired=expired), role)

    return [
        file("administrator", "clients/administrator", Role.ADMINISTRATOR),
        file("application", "clients/application", Role.APPLICATION),
        file("partition", "nodes/1/pki/peer", Role.PARTITION),
        file("fabric controller", "fabric/controller", Role.FABRIC),
        file("node agent", "nodes/1/pki/agent", Role.NODE_AGENT),
        file("store client", "nodes/1/pki/store-client", Role.PARTITION),
        made("another application", [f"{prefix}/client/reports"], Role.APPLICATION),
        made("two names", [f"{prefix}/client/application", f"{prefix}/client/administrator"], None),
        made("unknown kind", [f"{prefix}/officer/x"], None),
        made("another pool", ["spiffe://" + "0" * 32 + "/client/application"], None),
        made("empty client name", [f"{prefix}/client/"], None),
        made("expired", [f"{prefix}/client/application"], None, expired=True),
        made("fabric name by the client authority", [f"{prefix}/fabric"], Role.FABRIC),
        made("partition name by the client authority", [f"{prefix}/partition/1"], Role.PARTITION),
        Identity("no certificate", None, None, None),
    ]


OWN_PLANE = {
    "administrator": "client",
    "application": "client",
    "another application": "client",
    "partition": "peer",
    "fabric controller": "enclave",
    "node agent": "node",
}
"""Where an identity's certificate leads to the authority that the listener trusts."""


@pytest.fixture(scope="module")
def authorities(pool: RunningPool) -> dict[str, bytes]:
    """The server side's authority of each plane."""
    pki = pool.directory / "nodes" / "0" / "pki"
    names = {"client": "client", "peer": "peer", "enclave": "fabric", "node": "node"}
    return {plane: (pki / f"{name}-trusted.crt").read_bytes() for plane, name in names.items()}


def call(channel: grpc.Channel, method: str, *, streaming: bool) -> str:
    """Call a method with an empty request; return the code's name, or a service's own reason."""
    try:
        if streaming:
            list(channel.stream_stream(method)(iter([b""]), timeout=5))
        else:
            channel.unary_unary(method)(b"", timeout=5)
    except grpc.RpcError as error:
        status = rpc_status.from_call(error)
        return "EVIDENCE_REFUSED" if "EVIDENCE_REFUSED" in str(status) else error.code().name
    return "OK"


def endpoints(pool: RunningPool) -> Iterator[tuple[str, str]]:
    """Yield (plane, endpoint) of the last partition: a drain in this test hits nobody else."""
    entry = pool.connection.partitions[0]
    yield from (
        ("client", entry.endpoint),
        ("peer", entry.peer_endpoint),
        ("enclave", entry.enclave_endpoint),
        ("node", entry.node_endpoint),
    )


def test_the_table_names_every_method_and_no_other() -> None:
    every = {method for services in PLANES.values() for service in services for method, _ in methods(service)}
    assert set(PERMISSIONS) == every - {"/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List"}


def test_every_identity_on_every_method_equals_the_table(
    pool: RunningPool, identities: list[Identity], authorities: dict[str, bytes]
) -> None:
    """Exhaustive: identity x listener x method of all services, also those of other planes."""
    checked = wrong = 0
    details: list[str] = []
    every = [
        (service, *method)
        for services in PLANES.values()
        for service in services
        for method in methods(service)
    ]
    for identity, (plane, endpoint) in itertools.product(identities, endpoints(pool)):
        chosen = grpc.ssl_channel_credentials(authorities[plane], identity.key, identity.certificate)
        in_plane = OWN_PLANE.get(identity.name) == plane or (
            plane == "client" and "client authority" in identity.name
        )
        handshake = in_plane or (
            plane == "client"
            and identity.name in {"two names", "unknown kind", "another pool", "empty client name"}
        )
        with grpc.secure_channel(endpoint, chosen) as channel:
            for service, method, streaming in every:
                code = call(channel, method, streaming=streaming)
                checked += 1
                if not handshake:
                    right = code == "UNAVAILABLE"
                elif service not in PLANES[plane]:
                    right = code == "UNIMPLEMENTED"
                elif identity.role in PERMISSIONS.get(method, frozenset()):
                    right = code not in REFUSED | {"UNAVAILABLE"}
                else:
                    right = code in REFUSED | {"UNIMPLEMENTED"}
                if not right:
                    wrong += 1
                    details.append(f"{identity.name} at {plane}: {method}: {code}")
    assert checked == len(identities) * 4 * len(every)
    assert not wrong, "\n".join(details[:20])
    pool.await_states(["SERVING"] * 3)


def test_reflection_is_not_served(pool: RunningPool, authorities: dict[str, bytes]) -> None:
    directory = pool.directory / "clients"
    chosen = grpc.ssl_channel_credentials(
        authorities["client"],
        (directory / "administrator.key").read_bytes(),
        (directory / "administrator.crt").read_bytes(),
    )
    with grpc.secure_channel(pool.connection.partitions[0].endpoint, chosen) as channel:
        method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        assert call(channel, method, streaming=True) == "UNIMPLEMENTED"


def test_an_authority_key_is_kept_for_the_customers_plane_only(pool: RunningPool) -> None:
    """The keys of the other planes' authorities are gone: nobody can make a partition's identity."""
    kept = []
    for path in Path(pool.directory).rglob("*.key"):
        if path.name == "sealing.key":
            continue
        certificate = path.with_suffix(".crt")
        parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
        if parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            kept.append(path.name)
    assert kept == ["client-ca.key"]
