"""Local RBAC on real processes: every method, pool state and role; revocation at once (G2, G8).

The expected tables are those of tests/role_tables.py, which are not made from hsm_pool.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hsm_pool.client import backup_calls, backups, channels
from hsm_pool.client.aio import AsyncPool
from hsm_pool.client.locations import open_location
from hsm_pool.errors import (
    AvailabilityError,
    InvalidField,
    LimitExceeded,
    MHSMError,
    PermissionDenied,
    RoleAssignmentExists,
    RoleAssignmentNotFound,
    RoleDefinitionNotFound,
)
from mhsm.backup.v1 import backup_pb2
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2
from mhsm.roles.v1 import roles_pb2
from tests.chaos.faults import await_whole
from tests.fabric_access import Fabric
from tests.identities import Clients
from tests.integration.test_authorization import described_methods
from tests.rest_client import DOWNLOAD, RestClient, download_body
from tests.role_tables import ALLOWED, GUIDS, METHODS, STREAM
from tests.running_pool import RunningPool, TestOfficer, mhsm, until
from tests.store_access import StoreAccess

pytestmark = pytest.mark.pool

EC: dict[str, Any] = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
DIGEST = hashlib.sha256(b"to be signed").digest()
STATUS = "/mhsm.pool.v1.PoolService/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
FREE = {f"{STATUS}GetPartitionStatus", f"{STATUS}GetEvidence", "/grpc.health.v1.Health/Check", REFLECTION}
CEREMONIES = "/mhsm.security_domain.v1.SecurityDomainService/"
AUDIT = "/mhsm.audit.v1.AuditService/"
OTHER_PLANES = {"mhsm.enclave.v1.EnclaveService", "mhsm.node.v1.NodeService", "mhsm.peer.v1.PeerService"}
"""Not served to clients: test_authorization.py tries every identity on them."""
METHODS_OF_CLIENTS = [*METHODS, STREAM, *sorted(FREE)]
ROLES = list(GUIDS)
SIGN_MESSAGE = crypto_pb2.StreamOperationsRequest(
    sign=crypto_pb2.SignRequest(name="keys/none", algorithm="ES256", digests=[DIGEST])
).SerializeToString()
SCOPED_KEY = "mine"
UNCONFIRMED = "UNCONFIRMED"
"""The security domain was downloaded over REST, and its download not polled yet."""
OF_AN_ACTIVE_POOL = {"VerifySecurityDomain", "RotateKeyEncryptionKey", "NewGeneration"}
"""Ceremonies that whoever may hold them is refused while the pool is not active, or locked."""
REFUSALS = {"PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_ACTIVATED", "POOL_LOCKED", "RESTORE_STATE"}
REFUSALS |= {"PARTITION_DRAINED", "PARTITION_QUARANTINED", "PARTITION_STARTING", "NOT_FRESH", "INTERNAL"}


def slug(role: str) -> str:
    """Return the client that has a role in these tests."""
    return "of-" + role.lower().replace(" ", "-")


def answer(channel: grpc.Channel, method: str, request: bytes = b"") -> str:
    """Call; return the reason of a refusal that has to do with the caller or the pool, else "permitted"."""
    try:
        if method == STREAM:
            stream = channel.stream_stream(method)
            (octets,) = stream(iter([request]), timeout=20)
            response = crypto_pb2.StreamOperationsResponse.FromString(octets)
            reason = reason_of(response.error)
        elif method == REFLECTION:
            list(channel.stream_stream(method)(iter([request]), timeout=20))
            return "permitted"
        else:
            channel.unary_unary(method)(request, timeout=20)
            return "permitted"
    except grpc.RpcError as error:
        reason = reason_of(rpc_status.from_call(error))
    return reason if reason in REFUSALS else "permitted"


def reason_of(status: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    if status is None:
        return "INTERNAL"
    return info.reason if status.details and status.details[0].Unpack(info) else ""


def of_role(role: str | None, method: str) -> str:
    """Return what the table says of a role for the whole pool, None for no role."""
    if method in FREE:
        return "permitted"
    allowed = ALLOWED.get(role or "", frozenset())
    # The stream is sent a message that signs; each of its messages needs its own data action.
    wanted = "keys/sign/action" if method == STREAM else METHODS[method][0]
    return "permitted" if wanted in allowed else "PERMISSION_DENIED"


def expected(state: str, who: str, method: str) -> str:
    """Return the table: what a caller is told in a state of the pool."""
    role = {"administrator": "Administrator", "nobody": None}.get(who, who)
    if method in FREE:
        return "permitted"
    if state == UNCONFIRMED:
        # The first roles are there, and nobody has another one; the pool is not active all the same.
        named = of_role(role if who == "administrator" else None, method)
        served = method.startswith((CEREMONIES, AUDIT))
        active = method.removeprefix(CEREMONIES) in OF_AN_ACTIVE_POOL
        return "NOT_ACTIVATED" if named == "permitted" and (active or not served) else named
    if state in {"NOT_ACTIVATED", "POOL_LOCKED", "PARTITION_QUARANTINED"}:
        if not method.startswith(CEREMONIES):
            return state
        # Nobody's roles can be read: those named when the pool was made hold its ceremonies.
        if who != "administrator":
            return "PERMISSION_DENIED"
        return state if method.removeprefix(CEREMONIES).strip("/") in OF_AN_ACTIVE_POOL else "permitted"
    if state == "PARTITION_DRAINED":
        return state
    if state == "RESTORE_STATE" and method != STREAM:
        if not METHODS[method][0].startswith(("restore/", "securitydomain/")):
            return state
    elif state == "RESTORE_STATE":
        return state
    return of_role(role, method)


WHO = ["administrator", "nobody", *ROLES]


class Matrix:
    """Walks a pool through its states and calls every method as everybody in each of them."""

    def __init__(self, pool: RunningPool, officers: list[TestOfficer], scratch: Path) -> None:
        self.pool, self.clients = pool, Clients(pool)
        self.seen: dict[tuple[str, str], dict[str, str]] = {}
        self.call_everything("NOT_ACTIVATED")
        self._cancel_ceremony()
        self._unconfirmed(officers)
        with pool.client("administrator") as administrator:
            for role in ROLES:
                administrator.create_role_assignment(f"client/{slug(role)}", GUIDS[role])
                scope = f"/keys/{SCOPED_KEY}"
                administrator.create_role_assignment(f"client/key-{slug(role)}", GUIDS[role], scope)
        self.call_everything("SERVING")
        self._cancel_ceremony()
        self.at_keys = {role: self.call_at_keys(role) for role in ROLES}
        self._drained()
        self._restoring(scratch)
        self._quarantined()
        pool.kill_everything()
        pool.await_states(["LOCKED"] * 3)
        self.call_everything("POOL_LOCKED")
        pool.unlock(officers[:2], partition=1)

    def channel(self, who: str, index: int = 0) -> grpc.Channel:
        entry = self.pool.connection.partitions[index]
        known = self.pool.connection.clients
        files = known[who] if who in known else self.clients.files(slug(who) if who in ROLES else who)
        credentials = grpc.ssl_channel_credentials(
            Path(self.pool.connection.client_ca_file).read_bytes(),
            Path(files.key_file).read_bytes(),
            Path(files.certificate_file).read_bytes(),
        )
        return grpc.secure_channel(entry.endpoint, credentials, options=channels.OPTIONS)

    def call_everything(
        self, state: str, index: int = 0, requests: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        requests = {STREAM: SIGN_MESSAGE, **requests}
        for who in WHO:
            with self.channel(who, index) as channel:
                self.seen[state, who] = {
                    method: answer(channel, method, requests.get(method, b""))
                    for method in METHODS_OF_CLIENTS
                }

    def call_at_keys(self, role: str) -> dict[tuple[str, str, str], str]:
        """Call everything whose request names a scope: with a role of the pool, and with one of a key."""
        found = {}
        for who, key in itertools.product((slug(role), f"key-{slug(role)}"), (SCOPED_KEY, "other")):
            with self.channel(who) as channel:
                for method, request in requests_for(key).items():
                    found[who, key, method] = answer(channel, method, request.SerializeToString())
                for operation, request in stream_requests_for(key).items():
                    found[who, key, operation] = answer(channel, STREAM, request.SerializeToString())
        return found

    def _cancel_ceremony(self) -> None:
        with self.pool.client("administrator", partition=0) as administrator:
            under_way = administrator.get_ceremony(0)
            if under_way:
                administrator.cancel_ceremony(0, under_way.attempt_id)

    def _unconfirmed(self, officers: list[TestOfficer]) -> None:
        """Download the security domain as Azure's clients do; the pool is active with the first poll."""
        client = RestClient(self.pool)
        made = client.call("POST", DOWNLOAD, download_body(officers, 2))
        assert made.status == 202
        until(lambda: all(self._holds_keys(index) for index in range(3)), 30, "the keys at every partition")
        # An empty request is refused before a service looks at the state: here all would take effect.
        self.call_everything(UNCONFIRMED, requests=well_formed(SCOPED_KEY))
        self._cancel_ceremony()
        assert self.pool.states() == ["PROVISIONED"] * 3
        client.follow(made)
        self.pool.officers = officers
        self.pool.await_states(["SERVING"] * 3)

    def _holds_keys(self, index: int) -> bool:
        with self.channel("nobody", index) as channel:
            return answer(channel, f"{AUDIT}QueryRecords") == "PERMISSION_DENIED"

    def _quarantined(self) -> None:
        """Have the store tampered with, and put it back for the next start."""
        with StoreAccess(self.pool.connection) as store:
            renewal = store.dump()["fresh/2"]
            store.write({"fresh/2": b"\xff" * 64})
            self.pool.await_states(["QUARANTINED"] * 3)
            self.call_everything("PARTITION_QUARANTINED")
            store.write({"fresh/2": renewal})

    def _drained(self) -> None:
        fabric = Fabric(self.pool)
        try:
            assert fabric.drain(2) == "drained"
            self.call_everything("PARTITION_DRAINED", 2)
            fabric.resume(2)
        finally:
            fabric.close()
        self.pool.await_states(["SERVING"] * 3)

    def _restoring(self, scratch: Path) -> None:
        place = open_location(str(scratch / "backup"))
        with self.pool.client("administrator") as administrator:
            backups.take(administrator, place, lambda *_: None)
            manifest = backups.manifest_of(place)
            begun = administrator.call(backup_calls.start_restore(manifest))
            self.call_everything("RESTORE_STATE")
            self._cancel_ceremony()
            administrator.call(backup_calls.cancel_restore(begun.restore_id))
            backups.cancel(administrator, lambda *_: None)


def requests_for(key: str) -> dict[str, Message]:
    """Return a request of each method that names a scope, about a key."""
    name, request_id = f"keys/{key}", "00000000-0000-4000-8000-000000000000"
    scope = {"scope": f"/keys/{key}"}
    absent = {"name": request_id, **scope}
    keys = "/mhsm.keys.v1.KeyService/"
    crypto = "/mhsm.crypto.v1.CryptoService/"
    service = "/mhsm.roles.v1.RoleService/"
    return {
        f"{keys}CreateKey": keys_pb2.CreateKeyRequest(key_id=key, request_id=request_id, **EC),
        f"{keys}ImportKey": keys_pb2.ImportKeyRequest(
            key_id=f"{key}", request_id=request_id, material=keys_pb2.KeyMaterialSecret(octets=b"\x01" * 32)
        ),
        f"{keys}GetKey": keys_pb2.GetKeyRequest(name=name),
        f"{keys}ListKeyVersions": keys_pb2.ListKeyVersionsRequest(name=name),
        f"{keys}UpdateKey": keys_pb2.UpdateKeyRequest(name=name, request_id=request_id),
        f"{keys}ReleaseKey": keys_pb2.ReleaseKeyRequest(name=name, target_attestation_token="x"),
        f"{keys}GetKeyAttestation": keys_pb2.GetKeyAttestationRequest(name=name),
        f"{keys}BackupKey": keys_pb2.BackupKeyRequest(name=name),
        f"{keys}GetDeletedKey": keys_pb2.GetDeletedKeyRequest(name=name),
        f"{keys}RecoverDeletedKey": keys_pb2.RecoverDeletedKeyRequest(name=name, request_id=request_id),
        f"{keys}PurgeDeletedKey": keys_pb2.PurgeDeletedKeyRequest(name=name, request_id=request_id),
        f"{keys}RotateKey": keys_pb2.RotateKeyRequest(name=name, request_id=request_id),
        f"{keys}GetKeyRotationPolicy": keys_pb2.GetKeyRotationPolicyRequest(name=name),
        f"{keys}UpdateKeyRotationPolicy": keys_pb2.UpdateKeyRotationPolicyRequest(
            name=name, request_id=request_id
        ),
        f"{keys}DeleteKey": keys_pb2.DeleteKeyRequest(name=name, request_id=request_id),
        **{f"{crypto}{method}": request for method, request in crypto_requests(name).items()},
        f"{crypto}SecureWrapKey": crypto_pb2.SecureWrapKeyRequest(name=name, algorithm="A256KW"),
        f"{crypto}SecureUnwrapKey": crypto_pb2.SecureUnwrapKeyRequest(
            name=name, algorithm="A256KW", wrapped_key=b"k" * 40, target_attestation_token="x"
        ),
        f"{service}CreateRoleAssignment": roles_pb2.CreateRoleAssignmentRequest(
            **scope, role_definition_id=request_id, principal_id="client/x", request_id=request_id
        ),
        f"{service}GetRoleAssignment": roles_pb2.GetRoleAssignmentRequest(**absent),
        f"{service}ListRoleAssignments": roles_pb2.ListRoleAssignmentsRequest(**scope),
        f"{service}DeleteRoleAssignment": roles_pb2.DeleteRoleAssignmentRequest(
            **absent, request_id=request_id
        ),
    }


def well_formed(key: str) -> dict[str, bytes]:
    """Return a request of each method that makes or changes something, about a key where it names one."""
    request_id, identifier = "00000000-0000-4000-8000-000000000000", "0" * 32
    service, backup = "/mhsm.roles.v1.RoleService/", "/mhsm.backup.v1.BackupService/"
    definition = {"role_definition_id": request_id}
    requests: dict[str, Message] = {
        **requests_for(key),
        f"{service}CreateRoleDefinition": roles_pb2.CreateRoleDefinitionRequest(
            **definition, role_name="early", data_actions=["keys/read/action"], request_id=request_id
        ),
        f"{service}GetRoleDefinition": roles_pb2.GetRoleDefinitionRequest(**definition),
        f"{service}DeleteRoleDefinition": roles_pb2.DeleteRoleDefinitionRequest(
            **definition, request_id=request_id
        ),
        f"{backup}StartBackup": backup_pb2.StartBackupRequest(backup_id=identifier),
        f"{backup}ReadBackupPart": backup_pb2.ReadBackupPartRequest(backup_id=identifier),
        f"{backup}FinishBackup": backup_pb2.FinishBackupRequest(backup_id=identifier),
        f"{backup}CheckRestore": backup_pb2.CheckRestoreRequest(manifest=b"x"),
        f"{backup}StartRestore": backup_pb2.StartRestoreRequest(manifest=b"x", request_id=request_id),
        f"{backup}StageRestorePart": backup_pb2.StageRestorePartRequest(restore_id=identifier, content=b"x"),
        f"{backup}CommitRestore": backup_pb2.CommitRestoreRequest(restore_id=identifier),
        f"{backup}CancelRestore": backup_pb2.CancelRestoreRequest(restore_id=identifier),
        f"{backup}RestoreKeyFromPart": backup_pb2.RestoreKeyFromPartRequest(
            manifest=b"x", content=b"x", name=f"keys/{key}", request_id=request_id
        ),
    }
    return {method: request.SerializeToString() for method, request in requests.items()}


def crypto_requests(name: str) -> dict[str, Any]:
    pair = crypto_pb2.DigestSignature(digest=DIGEST, signature=b"s" * 64)
    ciphertext = crypto_pb2.Ciphertext(ciphertext=b"c" * 16)
    return {
        "Sign": crypto_pb2.SignRequest(name=name, algorithm="ES256", digests=[DIGEST]),
        "Verify": crypto_pb2.VerifyRequest(name=name, algorithm="ES256", items=[pair]),
        "Encrypt": crypto_pb2.EncryptRequest(
            name=name, algorithm="A256GCM", items=[crypto_pb2.Plaintext(plaintext=b"p")]
        ),
        "Decrypt": crypto_pb2.DecryptRequest(name=name, algorithm="A256GCM", items=[ciphertext]),
        "WrapKey": crypto_pb2.WrapKeyRequest(name=name, algorithm="A256KW", keys=[b"k" * 16]),
        "UnwrapKey": crypto_pb2.UnwrapKeyRequest(name=name, algorithm="A256KW", wrapped_keys=[b"k" * 24]),
    }


def stream_requests_for(key: str) -> dict[str, crypto_pb2.StreamOperationsRequest]:
    fields = {"Sign": "sign", "Verify": "verify", "Encrypt": "encrypt", "Decrypt": "decrypt"}
    fields |= {"WrapKey": "wrap_key", "UnwrapKey": "unwrap_key"}
    return {
        method: crypto_pb2.StreamOperationsRequest(**{fields[method]: request})
        for method, request in crypto_requests(f"keys/{key}").items()
    }


@pytest.fixture(scope="module")
def matrix(
    make_pool: Callable[..., RunningPool],
    officers: list[TestOfficer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Matrix]:
    """A pool that has been through all its states, and everything that was answered."""
    pool = make_pool(attended=True)
    yield Matrix(pool, officers, tmp_path_factory.mktemp("matrix"))
    pool.down()


# -- the matrix ----------------------------------------------------------------------------

STATES = (
    "NOT_ACTIVATED",
    UNCONFIRMED,
    "SERVING",
    "PARTITION_DRAINED",
    "RESTORE_STATE",
    "PARTITION_QUARANTINED",
    "POOL_LOCKED",
)
"""The state, or what is told in it. Without the two that pass by themselves, STARTING and HEALING."""


def test_the_expected_table_names_every_method_of_clients() -> None:
    """A method or a service that is added must be added to the table by hand."""
    described = {method for method in described_methods() if method.split("/")[1] not in OTHER_PLANES}
    health = {"/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List"}
    assert set(METHODS_OF_CLIENTS) == described - health


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("state", STATES)
def test_every_method_in_every_state_as_everybody(matrix: Matrix, state: str, who: str) -> None:
    """No operation without its data action: all methods, refusals of the pool's state included."""
    wanted = {method: expected(state, who, method) for method in METHODS_OF_CLIENTS}
    assert matrix.seen[state, who] == wanted


@pytest.mark.parametrize("role", ROLES)
def test_a_role_at_a_key_holds_for_that_key_only(matrix: Matrix, role: str) -> None:
    """Whatever names a key or a scope, with a role of the whole pool and with one of a key."""
    wrong = {}
    for (who, key, method), seen in matrix.at_keys[role].items():
        action = METHODS.get(method, METHODS.get(f"/mhsm.crypto.v1.CryptoService/{method}", ("", "")))[0]
        of_key = who.startswith("key-")
        holds = action in ALLOWED[role] and (not of_key or key == SCOPED_KEY)
        if seen != ("permitted" if holds else "PERMISSION_DENIED"):
            wrong[who, key, method] = seen
    assert not wrong
    assert len(matrix.at_keys[role]) == 4 * (len(requests_for("x")) + 6)


def test_the_unlocked_pool_has_its_roles_again(matrix: Matrix) -> None:
    """G1: roles are in the pool's state; the lock and the unlock changed none."""
    with matrix.pool.client("administrator") as administrator:
        found = {
            (entry.principal_id, entry.role_definition_id) for entry in administrator.list_role_assignments()
        }
        of_key = list(administrator.list_role_assignments(f"/keys/{SCOPED_KEY}"))
    assert {(f"client/{slug(role)}", GUIDS[role]) for role in ROLES} <= found
    assert len(of_key) == len(ROLES)


# -- revocation ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clients(pool: RunningPool) -> Clients:
    return Clients(pool)


def attempt(operation: Callable[[], object]) -> str:
    try:
        operation()
    except MHSMError as error:
        return type(error).__name__
    return "ok"


class Signers:
    """Clients that sign without a pause, one or more at each partition; each result with its invocation."""

    def __init__(self, clients: Clients, who: str, key: str, at: list[int]) -> None:
        self.results: list[tuple[float, int, str]] = []
        self._stop = threading.Event()
        self._key = key
        self._pools = [(index, clients.connect(who, partition=index, timeout_seconds=15)) for index in at]
        self._threads = [threading.Thread(target=self._run, args=entry) for entry in self._pools]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for _, pool in self._pools:
            pool.close()

    def _run(self, index: int, pool: Any) -> None:
        while not self._stop.is_set():
            invoked = time.monotonic()
            result = attempt(lambda: pool.sign(f"keys/{self._key}", "ES256", DIGEST))
            self.results.append((invoked, index, result))

    def denied_at(self, index: int) -> bool:
        return any(
            at == index and result == PermissionDenied.__name__ for _, at, result in list(self.results)
        )

    def late(self, acknowledged: float) -> int:
        return sum(invoked > acknowledged and result == "ok" for invoked, _, result in self.results)


@pytest.mark.parametrize("paused", range(3))
def test_a_removed_role_is_used_by_no_partition(pool: RunningPool, clients: Clients, paused: int) -> None:
    """G2: once the removal is acknowledged nobody signs with it, not even where the partition was stopped."""
    who, key = f"revoked-{paused}", f"revoked-{paused}"
    with pool.client() as user, pool.client("administrator", timeout_seconds=30) as administrator:
        user.create_key(key, **EC)
        given = administrator.create_role_assignment(f"client/{who}", GUIDS["Crypto User"], f"/keys/{key}")
        for index in range(3):
            with clients.connect(who, partition=index) as client:
                client.sign(f"keys/{key}", "ES256", DIGEST)  # acknowledged means: everywhere, at once
        early, late = Signers(clients, who, key, [0, 1, 2]), Signers(clients, who, key, [paused] * 4)
        with pool.paused(paused, "partition"):
            early.start()
            administrator.delete_role_assignment(given.name, given.scope)
            acknowledged = time.monotonic()
            late.start()  # these lie in the stopped partition's sockets
        try:
            until(
                lambda: all(early.denied_at(index) for index in range(3)), 30, "a refusal at each partition"
            )
            until(lambda: late.denied_at(paused), 30, "a refusal where it was stopped")
        finally:
            early.stop()
            late.stop()
    assert early.late(acknowledged) + late.late(acknowledged) == 0
    pool.await_states(["SERVING"] * 3)


@pytest.mark.chaos
def test_revocation_under_chaos(pool: RunningPool, clients: Clients, seed: int, full: bool) -> None:
    """G2: partitions and store members are stopped and killed while roles come and go."""
    chosen = random.Random(seed)
    rounds = 40 if full else 6
    with pool.client() as user:
        user.create_key("chaos", **EC)
    for number in range(rounds):
        who = f"chaos-{number}"
        with pool.client("administrator", timeout_seconds=60) as administrator:
            scope = chosen.choice(["/", "/keys", "/keys/chaos"])
            given = administrator.create_role_assignment(f"client/{who}", GUIDS["Crypto User"], scope)
            signers = Signers(clients, who, "chaos", [0, 1, 2])
            signers.start()
            victim, part = chosen.randrange(3), chosen.choice(["partition", "store_member", "node_agent"])
            number_of_signal = chosen.choice([signal.SIGSTOP, signal.SIGKILL])
            stopped = pool.signal(victim, part, number_of_signal)
            try:
                administrator.delete_role_assignment(given.name, given.scope)
                acknowledged = time.monotonic()
            finally:
                if number_of_signal == signal.SIGSTOP and stopped is not None:
                    pool.signal(victim, part, signal.SIGCONT)
            try:
                until(lambda: all(signers.denied_at(index) for index in range(3)), 90, "three refusals")  # noqa: B023
            finally:
                signers.stop()
            assert signers.late(acknowledged) == 0, (number, victim, part, number_of_signal, seed)
        await_whole(pool)


# -- rules of roles ------------------------------------------------------------------------


def test_the_role_service_from_end_to_end(pool: RunningPool, clients: Clients) -> None:
    """Definitions and assignments: made, read, listed, repeated, refused, removed (G8)."""
    with pool.client("administrator") as administrator, clients.connect("reader") as reader:
        assert [role.role_name for role in administrator.list_role_definitions(page_size=4)] == [
            role.role_name for role in administrator.list_role_definitions()
        ]
        request = {"request_id": "11111111-1111-4111-8111-111111111111"}
        made = administrator.create_role_definition("readers", ["keys/read/action"], **request)
        assert administrator.create_role_definition("readers", ["keys/read/action"], **request) == made
        assert administrator.get_role_definition(made.role_definition_id) == made
        assert made.role_type == roles_pb2.ROLE_TYPE_CUSTOM
        assert list(made.data_actions) == ["Microsoft.KeyVault/managedHsm/keys/read/action"]
        with pytest.raises(PermissionDenied):
            list(reader.list_keys())
        given = administrator.create_role_assignment("client/reader", made.role_definition_id)
        assert administrator.get_role_assignment(given.name) == given
        assert list(administrator.list_role_assignments(principal_id="client/reader")) == [given]
        assert given in list(administrator.list_role_assignments("/keys"))
        list(reader.list_keys())
        with pytest.raises(PermissionDenied) as refused:
            reader.create_key("forbidden", **EC)
        assert refused.value.metadata["action"] == "Microsoft.KeyVault/managedHsm/keys/create"
        with pytest.raises(RoleAssignmentExists):
            administrator.create_role_assignment("client/reader", made.role_definition_id)
        for page in (1, 2, 25):
            listed = list(administrator.list_role_assignments(page_size=page))
            assert listed == list(administrator.list_role_assignments())
        administrator.delete_role_definition(made.role_definition_id)
        with pytest.raises(PermissionDenied):
            list(reader.list_keys())
        with pytest.raises(RoleDefinitionNotFound):
            administrator.get_role_definition(made.role_definition_id)
        assert administrator.delete_role_assignment(given.name) == given
        with pytest.raises(RoleAssignmentNotFound):
            administrator.get_role_assignment(given.name)
        with pytest.raises(RoleAssignmentNotFound):
            administrator.delete_role_assignment(given.name)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"scope": "keys/a"}, "scope"),
        ({"scope": ""}, "scope"),
        ({"name": "x"}, "name"),
        ({"principal_id": "administrator"}, "principal_id"),
        ({"principal_id": "client/"}, "principal_id"),
        ({"principal_id": "client/a b"}, "principal_id"),
        ({"principal_id": "partition/0"}, "principal_id"),
        ({"principal_id": "client/" + "x" * 250}, "principal_id"),
        ({"role_definition_id": "Administrator"}, "role_definition_id"),
    ],
)
def test_a_bad_assignment_is_refused(pool: RunningPool, change: dict[str, Any], field: str) -> None:
    """G8: each field is named, and nothing is assigned."""
    fields = {"principal_id": "client/x", "role_definition_id": GUIDS["Backup User"], "scope": "/"}
    with pool.client("administrator") as administrator:
        before = list(administrator.list_role_assignments())
        with pytest.raises(InvalidField) as refused:
            administrator.create_role_assignment(**{**fields, **change})
        assert refused.value.metadata["field"] == field
        assert list(administrator.list_role_assignments()) == before


def test_ten_assignments_at_a_key(pool: RunningPool) -> None:
    with pool.client("administrator") as administrator:
        for number in range(10):
            administrator.create_role_assignment(f"client/{number}", GUIDS["Crypto User"], "/keys/full")
        with pytest.raises(LimitExceeded):
            administrator.create_role_assignment("client/10", GUIDS["Crypto User"], "/keys/full")


def test_who_may_assign_at_a_key_may_not_assign_at_the_pool(pool: RunningPool, clients: Clients) -> None:
    """A Policy Administrator of one key gives roles of that key and no others."""
    with pool.client("administrator") as administrator, clients.connect("policy") as policy:
        role = GUIDS["Policy Administrator"]
        administrator.create_role_assignment("client/policy", role, "/keys/theirs")
        policy.create_role_assignment("client/friend", GUIDS["Crypto User"], "/keys/theirs")
        for scope in ("/", "/keys", "/keys/others"):
            with pytest.raises(PermissionDenied):
                policy.create_role_assignment("client/friend", GUIDS["Crypto User"], scope)
        with pytest.raises(PermissionDenied):
            policy.create_role_definition("mine", ["keys/sign/action"])


def test_the_asyncio_client_manages_roles(pool: RunningPool) -> None:
    async def story() -> None:
        async with AsyncPool.connect(pool.directory, "administrator") as administrator:
            made = await administrator.create_role_definition("of-aio", ["keys/read/action"])
            assert made in [role async for role in administrator.list_role_definitions()]
            assert await administrator.get_role_definition(made.role_definition_id) == made
            given = await administrator.create_role_assignment("client/aio", made.role_definition_id)
            assert await administrator.get_role_assignment(given.name) == given
            assert [a async for a in administrator.list_role_assignments("/", "client/aio")] == [given]
            assert await administrator.delete_role_assignment(given.name) == given
            assert await administrator.delete_role_definition(made.role_definition_id) == made

    asyncio.run(story())


def test_the_command_manages_roles(pool: RunningPool) -> None:
    """The command, by name and by GUID; a refusal ends with 1."""
    at = ("--data-dir", str(pool.directory))
    mhsm("client", "create", "cli", *at)
    assert mhsm("client", "create", "cli", *at, check=False).returncode == 1  # never overwritten
    assert mhsm("client", "create", "../x", *at, check=False).returncode == 1
    nobody = mhsm("role", "definition", "list", "--as", "nobody", *at, check=False)
    assert (nobody.returncode, "mhsm client create" in nobody.stderr) == (1, True)
    unassigned = mhsm("role", "definition", "list", "--as", "cli", *at, check=False)
    assert (unassigned.returncode, "not authorized" in unassigned.stderr) == (1, True)

    def run(*arguments: str) -> Any:
        return json.loads(mhsm("role", *arguments, *at, "--json").stdout)

    made = run("definition", "create", "cli signers", "--data-action", "keys/sign/action")["role_definition"]
    assert run("definition", "show", "CLI signers")["role_definition"] == made
    assert len(run("definition", "list")["role_definitions"]) >= 10
    given = run(
        "assignment", "create", "--role", "cli signers", "--assignee", "client/cli", "--scope", "/keys/cli"
    )["role_assignment"]  # fmt: skip
    assert given["roleName"] == "cli signers"
    assert run("assignment", "list", "--scope", "/keys/cli")["role_assignments"] == [given]
    everything = run("assignment", "list")["role_assignments"]
    assert {entry["scope"] for entry in everything} >= {"/", "/keys/cli"}
    assert run("assignment", "list", "--assignee", "client/cli")["role_assignments"] == [given]
    assert given not in run("assignment", "list", "--scope", "/")["role_assignments"]
    of_key = run(
        "assignment", "create", "--role", "Crypto Auditor", "--assignee", "client/cli", "--scope", "/keys/cli"
    )["role_assignment"]  # fmt: skip
    assert len(run("assignment", "list", "--scope", "/keys/cli", "--as", "cli")["role_assignments"]) == 2
    all_of_them = mhsm("role", "assignment", "list", "--as", "cli", *at, check=False)
    assert (all_of_them.returncode, "not authorized" in all_of_them.stderr) == (1, True)
    run("assignment", "delete", of_key["name"], "--scope", "/keys/cli")
    assert run("assignment", "show", given["name"], "--scope", "/keys/cli")["role_assignment"] == given
    again = mhsm("role", "assignment", "delete", given["name"], *at, check=False)
    assert again.returncode == 1  # not at the scope "/"
    reader = run("assignment", "create", "--role", "Crypto Auditor", "--assignee", "client/cli")
    assert len(run("definition", "list", "--as", "cli")["role_definitions"]) >= 10
    run("assignment", "delete", reader["role_assignment"]["name"])
    run("assignment", "delete", given["name"], "--scope", "/keys/cli")
    run("definition", "delete", made["roleDefinitionId"])
    built_in = mhsm("role", "definition", "delete", "Crypto User", *at, check=False)
    assert (built_in.returncode, "built-in" in built_in.stderr) == (1, True)


def test_a_lost_administrator_is_told_so(pool: RunningPool, clients: Clients) -> None:
    """A role that is missing is definite: the client tries no other partition."""
    with clients.connect("stranger") as stranger, pytest.raises(PermissionDenied) as refused:
        stranger.get_key("keys/none")
    assert refused.value.definite
    assert not isinstance(refused.value, AvailabilityError)
