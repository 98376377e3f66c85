"""Default-deny: every identity on every method of every listener equals the tables.

What each role allows on each method is shown in test_roles.py; here it is who has any role at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from hsm_pool.core import roles
from hsm_pool.net.authorization import DATA_ACTIONS, FREE_OF_DATA, PERMISSIONS, Kind
from hsm_pool.provisioning.pki import Authority
from mhsm.audit.v1 import audit_pb2
from mhsm.backup.v1 import backup_pb2
from mhsm.crypto.v1 import crypto_pb2
from mhsm.enclave.v1 import enclave_pb2
from mhsm.etcd.v3 import rpc_pb2, rpc_pb2_grpc
from mhsm.keys.v1 import keys_pb2
from mhsm.node.v1 import node_pb2
from mhsm.peer.v1 import peer_pb2
from mhsm.pool.v1 import pool_pb2
from mhsm.roles.v1 import roles_pb2
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain.officers import make_officer
from tests.identities import issue
from tests.running_pool import ROOT, RunningPool

pytestmark = pytest.mark.pool

SERVICES: dict[str, tuple[set[str], set[Kind]]] = {
    "mhsm.keys.v1.KeyService": ({"client"}, {Kind.CLIENT}),
    "mhsm.crypto.v1.CryptoService": ({"client"}, {Kind.CLIENT}),
    "mhsm.roles.v1.RoleService": ({"client"}, {Kind.CLIENT}),
    "mhsm.backup.v1.BackupService": ({"client"}, {Kind.CLIENT}),
    "mhsm.security_domain.v1.SecurityDomainService": ({"client"}, {Kind.CLIENT}),
    "mhsm.audit.v1.AuditService": ({"client"}, {Kind.CLIENT}),
    "mhsm.pool.v1.PoolService": ({"client"}, {Kind.CLIENT}),
    "grpc.reflection.v1alpha.ServerReflection": ({"client"}, {Kind.CLIENT}),
    "grpc.health.v1.Health": ({"client", "enclave"}, {Kind.CLIENT, Kind.FABRIC}),
    "mhsm.peer.v1.PeerService": ({"peer"}, {Kind.PARTITION}),
    "mhsm.enclave.v1.EnclaveService": ({"enclave"}, {Kind.FABRIC}),
    "mhsm.node.v1.NodeService": ({"node"}, {Kind.NODE_AGENT}),
}
"""Where each service is served and which kinds of identity may call it, written down a second time."""

ROLES_OF = {
    "administrator": [roles.ADMINISTRATOR],
    "application": [roles.CRYPTO_USER, roles.CRYPTO_OFFICER],
}
"""The roles that a pool begins with; every other name that the customer puts into a certificate has none."""

PLANES = ("client", "peer", "enclave", "node")
FILES = (
    audit_pb2,
    backup_pb2,
    crypto_pb2,
    enclave_pb2,
    health_pb2,
    keys_pb2,
    node_pb2,
    peer_pb2,
    pool_pb2,
    reflection_pb2,
    roles_pb2,
    security_domain_pb2,
)
NOT_OFFERED = {"/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List"}
"""Methods of the health interface that nobody may call."""

FOREIGN_METHODS = (
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.channelz.v1.Channelz/GetServers",
    "/mhsm.keys.v1.KeyService/ExportKey",
    "/mhsm.keys.v1.KeyService/getkey",
)
NOBODY = "unauthenticated"
LISTENER = 0
"""The partition that is called; a drain by the fabric's identity is followed by its resume."""


def described_methods() -> dict[str, bool]:
    """Return every method of the descriptors, and whether it streams."""
    return {
        f"/{service.full_name}/{method.name}": method.server_streaming or method.client_streaming
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


# -- who calls ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate, the plane whose authority issued it, and what it stands for there."""

    certificate: bytes | None
    key: bytes | None
    plane: str | None
    """None: no listener's authority issued it (or it is out of date)."""
    kind: Kind | str
    name: str


FILES_OF_POOL: dict[str, tuple[str, str | None, Kind]] = {
    "administrator": ("clients/administrator", "client", Kind.CLIENT),
    "application": ("clients/application", "client", Kind.CLIENT),
    "partition at the client plane": ("nodes/1/pki/client", "client", Kind.PARTITION),
    "partition at the peer plane": ("nodes/1/pki/peer", "peer", Kind.PARTITION),
    "partition at the fabric plane": ("nodes/1/pki/fabric", "enclave", Kind.PARTITION),
    "partition at the node plane": ("nodes/1/pki/node", "node", Kind.PARTITION),
    "fabric controller": ("fabric/controller", "enclave", Kind.FABRIC),
    "node agent": ("nodes/1/pki/agent", "node", Kind.NODE_AGENT),
    "store client": ("nodes/1/pki/store-client", None, Kind.PARTITION),
    "store member": ("nodes/1/pki/store-peer", None, Kind.PARTITION),
}
"""The identities that provisioning made: file, plane of their authority, kind."""

MADE: dict[str, tuple[list[str], Kind | str]] = {
    "another application": (["client/reports"], Kind.CLIENT),
    "administrator in capitals": (["client/Administrator"], Kind.CLIENT),
    "partition by the client authority": (["partition/0"], Kind.PARTITION),
    "node by the client authority": (["node/0"], Kind.NODE_AGENT),
    "fabric by the client authority": (["fabric"], Kind.FABRIC),
    "two names": (["client/application", "client/administrator"], NOBODY),
    "the same name twice": (["client/application", "client/application"], NOBODY),
    "no name": ([], NOBODY),
    "officer by the client authority": (["officer/" + "0" * 64], NOBODY),
    "unknown kind": (["auditor/x"], NOBODY),
    "empty client": (["client/"], NOBODY),
    "client without a name": (["client"], NOBODY),
    "fabric with a name": (["fabric/x"], NOBODY),
    "partition without a number": (["partition/x"], NOBODY),
}
"""Names that the customer could put into a certificate of his own authority."""


@pytest.fixture(scope="module")
def identities(pool: RunningPool) -> dict[str, Identity]:
    pool_id = pool.connection.pool_id
    prefix = f"spiffe://{pool_id}/"
    application = f"{prefix}client/application"
    found: dict[str, Identity] = {}
    for name, (path, plane, kind) in FILES_OF_POOL.items():
        base = pool.directory / path
        certificate, key = (base.with_suffix(suffix).read_bytes() for suffix in (".crt", ".key"))
        found[name] = Identity(certificate, key, plane, kind, name)
    for name, (paths, kind_or_none) in MADE.items():
        uris = [prefix + path for path in paths]
        found[name] = Identity(*issue(pool.directory, uris), "client", kind_or_none, name)
    for name, uri in {
        "another pool": f"spiffe://{'0' * 32}/client/application",
        "pool id as a prefix": f"spiffe://{pool_id}0/client/application",
        "another scheme": f"https://{pool_id}/client/application",
    }.items():
        found[name] = Identity(*issue(pool.directory, [uri]), "client", NOBODY, name)
    found["expired"] = Identity(*issue(pool.directory, [application], expired=True), None, NOBODY, "expired")
    found["foreign authority"] = Identity(
        *Authority("foreign").issue(application), None, NOBODY, "foreign authority"
    )
    certificate, key = make_officer("officer-1")
    own_key = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    found["officer"] = Identity(certificate, own_key, None, NOBODY, "officer")
    found["no certificate"] = Identity(None, None, None, NOBODY, "no certificate")
    return found


OTHERS = ("another pool", "pool id as a prefix", "another scheme")
NAMES = [*FILES_OF_POOL, *MADE, *OTHERS, "expired", "foreign authority", "officer", "no certificate"]


@pytest.fixture(scope="module")
def authorities(pool: RunningPool) -> dict[str, bytes]:
    """The server side's authority of each plane."""
    pki = pool.directory / f"nodes/{LISTENER}/pki"
    files = {"client": "client", "peer": "peer", "enclave": "fabric", "node": "node"}
    return {plane: (pki / f"{name}-trusted.crt").read_bytes() for plane, name in files.items()}


def endpoint(pool: RunningPool, plane: str) -> str:
    entry = pool.connection.partitions[LISTENER]
    found: str = entry.endpoint if plane == "client" else getattr(entry, f"{plane}_endpoint")
    return found


# -- what is answered --------------------------------------------------------------------


def outcome(channel: grpc.Channel, method: str, *, streaming: bool) -> str:
    """Call with an empty request; return what stopped it, or "permitted" when a service answered."""
    try:
        if streaming:
            list(channel.stream_stream(method)(iter([b""]), timeout=10))
        else:
            channel.unary_unary(method)(b"", timeout=10)
    except grpc.RpcError as error:
        code: str = error.code().name
        info = error_details_pb2.ErrorInfo()
        status = rpc_status.from_call(error)
        reason = info.reason if status and status.details[0].Unpack(info) else ""
        if code == "UNAVAILABLE" and not reason:
            return "no connection"
        if code in {"UNAUTHENTICATED", "PERMISSION_DENIED"} and reason in {"", code}:
            return code
        if code in {"UNIMPLEMENTED", "UNKNOWN", "INTERNAL", "DEADLINE_EXCEEDED"}:
            return code
    return "permitted"


def expected(identity: Identity, plane: str, method: str) -> str:
    """Return what the table says."""
    if identity.plane != plane:
        return "no connection"
    service = method.split("/")[1]
    if method in FOREIGN_METHODS or plane not in SERVICES[service][0]:
        return "UNIMPLEMENTED"
    if identity.kind == NOBODY:
        return "UNAUTHENTICATED"
    if identity.kind not in PERMISSIONS.get(method, frozenset()):
        return "PERMISSION_DENIED"
    if identity.kind is not Kind.CLIENT or method in FREE_OF_DATA:
        return "permitted"
    allowed = {action for role in ROLES_OF.get(identity.name, []) for action in role.data_actions}
    return "permitted" if allowed & set(DATA_ACTIONS[method].actions) else "PERMISSION_DENIED"


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("name", NAMES)
def test_an_identity_on_every_method_of_a_listener(
    pool: RunningPool,
    identities: dict[str, Identity],
    authorities: dict[str, bytes],
    name: str,
    plane: str,
) -> None:
    """Design, section 3: all services, also those of other planes, answer as the table says."""
    identity = identities[name]
    credentials = grpc.ssl_channel_credentials(authorities[plane], identity.key, identity.certificate)
    methods = {**described_methods(), **{method: "Reflection" in method for method in FOREIGN_METHODS}}
    with grpc.secure_channel(endpoint(pool, plane), credentials) as channel:
        seen = {method: outcome(channel, method, streaming=streams) for method, streams in methods.items()}
    wanted = {method: expected(identity, plane, method) for method in methods}
    assert seen == wanted


@pytest.mark.parametrize("name", NAMES)
def test_the_store_answers_partitions_only(
    pool: RunningPool, identities: dict[str, Identity], name: str
) -> None:
    """G3, G5: etcd asks for a certificate of an authority that signs for nothing else."""
    identity = identities[name]
    ca = Path(pool.connection.store["ca_file"]).read_bytes()
    credentials = grpc.ssl_channel_credentials(ca, identity.key, identity.certificate)
    with grpc.secure_channel(pool.connection.partitions[LISTENER].store_endpoint, credentials) as channel:
        try:
            rpc_pb2_grpc.KVStub(channel).Range(rpc_pb2.RangeRequest(key=b"x"), timeout=10)
            answered = True
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            answered = False
    assert answered == (name == "store client")


def test_the_attempts_left_the_pool_as_it_was(pool: RunningPool) -> None:
    """After all of the above: no key was made, everybody serves."""
    pool.await_states(["SERVING"] * 3)
    with pool.client() as client:
        assert list(client.list_keys()) == []


# -- the table itself --------------------------------------------------------------------


def test_every_service_of_ours_is_tried() -> None:
    """A service that a new file of the contract brings is not forgotten here; etcd's are not ours."""
    declared = {
        f"mhsm.{path.parent.parent.name}.{path.parent.name}.{name}"
        for path in (ROOT / "proto" / "mhsm").rglob("*.proto")
        for name in re.findall(r"^service (\w+)", path.read_text(), re.MULTILINE)
    }
    assert {name for name in declared if not name.startswith("mhsm.etcd.")} == {
        name for name in SERVICES if name.startswith("mhsm.")
    }
    assert set(SERVICES) == {method.split("/")[1] for method in described_methods()}


def test_the_table_names_every_method_and_no_other() -> None:
    assert set(PERMISSIONS) == set(described_methods()) - NOT_OFFERED


def test_the_table_says_what_each_service_is_for() -> None:
    """The table against its second copy: a row that is changed alone shows."""
    for method, kinds in PERMISSIONS.items():
        assert kinds == SERVICES[method.split("/")[1]][1], method


def test_every_method_of_the_client_plane_has_its_data_action_or_none() -> None:
    """A method that is missing in both tables of data actions could be called by nobody."""
    of_clients = {method for method in PERMISSIONS if "client" in SERVICES[method.split("/")[1]][0]}
    assert set(DATA_ACTIONS) | FREE_OF_DATA == of_clients
    assert not set(DATA_ACTIONS) & FREE_OF_DATA


def test_no_identity_is_left_out(identities: dict[str, Identity]) -> None:
    assert sorted(identities) == sorted(NAMES)
    assert {identity.kind for identity in identities.values()} >= set(Kind)


def authority_keys(directory: Path) -> Iterator[str]:
    """Yield the name of every private key in a directory whose certificate is an authority's."""
    for path in directory.rglob("*.key"):
        if path.name == "sealing.key":
            continue
        certificate = x509.load_pem_x509_certificate(path.with_suffix(".crt").read_bytes())
        if certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            yield path.name


def test_an_authority_key_is_kept_for_the_customers_plane_only(pool: RunningPool) -> None:
    """The keys of the other planes' authorities are gone: nobody can make a partition's identity."""
    assert list(authority_keys(pool.directory)) == ["client-ca.key"]
