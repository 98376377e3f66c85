"""Rotation of the key-encryption key, and new generations of the security domain (G1, G3, G4)."""

from __future__ import annotations

import contextlib
import signal
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from hsm_pool.audit.record import Operation
from hsm_pool.client import backup_calls, backups
from hsm_pool.client.locations import open_location
from hsm_pool.core import roles
from hsm_pool.core.model import PrincipalRecord, Record, RecordName, RoleAssignment, principal_name
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import (
    BackupRefused,
    CeremonyState,
    InvalidField,
    KeyExists,
    MHSMError,
    PermissionDenied,
    ShareRefused,
)
from hsm_pool.net import authorization
from hsm_pool.store import chain
from hsm_pool.store.sealing import PoolKeys, Tampered
from mhsm.keys.v1 import keys_pb2
from mhsm.record.v1 import record_pb2
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import container
from security_domain.errors import InvalidFile
from security_domain.recovery import Recovery
from security_domain.submission import make_submission
from tests.identities import Clients
from tests.running_pool import RunningPool, TestOfficer, make_officers, until
from tests.store_access import StoreAccess

pytestmark = [pytest.mark.pool, pytest.mark.slow]

EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
DIGEST = bytes(32)


def quiet(*_: object) -> None:
    """Report no progress."""


def epochs_of_records(pool: RunningPool) -> set[int]:
    """Return the epochs under which the records in the store are sealed."""
    with StoreAccess(pool.connection) as store:
        return {record_pb2.Envelope.FromString(value).epoch for value in store.records().values()}


def use(pool: RunningPool, *key_ids: str) -> None:
    """Sign with each key on each partition."""
    for index in range(3):
        with pool.client(partition=index, timeout_seconds=20) as user:
            for key_id in key_ids:
                user.sign(f"keys/{key_id}", "ES256", DIGEST)


def replace_domain(pool: RunningPool, new: list[TestOfficer]) -> security_domain_pb2.Ceremony:
    """Make a new generation with these officers."""
    with pool.client("administrator") as client:
        begun = client.new_generation([officer.certificate_der for officer in new], 2, 0)
        for officer in new:
            after = client.submit_share(0, begun.attempt_id, pool.submission(officer, begun))
    assert after.complete
    return after


def test_records_written_later_are_sealed_under_the_new_epoch(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G1: without officers and without a gap; a quorum opens every epoch afterwards."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    with pool.client() as user:
        user.create_key("before", **EC)
        assert epochs_of_records(pool) == {1}
        refused: list[MHSMError] = []
        stop = threading.Event()

        def sign() -> None:
            while not stop.is_set():
                try:
                    user.sign("keys/before", "ES256", DIGEST)
                except MHSMError as error:
                    refused.append(error)

        load = threading.Thread(target=sign)
        load.start()
        with pool.client("administrator") as client:
            assert [client.rotate_key_encryption_key(index) for index in (0, 2, 1)] == [2, 3, 4]
        stop.set()
        load.join()
        assert refused == []
        user.create_key("after", **EC)
    assert 4 in epochs_of_records(pool)
    use(pool, "before", "after")
    pool.signal(1, "partition", signal.SIGKILL)
    pool.await_states(["SERVING"] * 3)
    use(pool, "before", "after")
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    pool.unlock(officers[1:])
    use(pool, "before", "after")
    with pool.client("administrator") as client:
        assert client.rotate_key_encryption_key(0) == 5, "the count goes on after an unlock"
    pool.down()


def test_a_partition_that_slept_through_a_rotation_heals(
    make_pool: Callable[..., RunningPool],
) -> None:
    """G1: an unattended partition's platform seal is too old then; it gets the keys from a peer."""
    pool = make_pool(attended=False)
    pool.activate(make_officers(3), 2)
    with pool.client() as user:
        user.create_key("before", **EC)
    with pool.paused(2, "node_agent"):  # so that nobody starts it again
        pool.signal(2, "partition", signal.SIGKILL)
        until(lambda: pool.status(2) is None, 10, "the partition is gone")
        with pool.client("administrator", timeout_seconds=30) as client:
            until(lambda: _rotated(client, 0), 40, "a rotation by two partitions")
        with pool.client() as user:
            user.create_key("after", **EC)
    pool.await_states(["SERVING"] * 3)
    assert pool.status(2).recovery_path == "peer"
    use(pool, "before", "after")
    pool.kill_everything()
    pool.await_states(["SERVING"] * 3)
    use(pool, "before", "after")
    pool.down()


def _rotated(client: object, partition: int) -> bool:
    """Rotate; False while the dead partition's lease still counts."""
    try:
        client.rotate_key_encryption_key(partition)  # type: ignore[attr-defined]
    except CeremonyState:
        return False
    return True


def test_a_rotation_waits_for_every_serving_partition(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G1, G2: a paused partition that still holds a lease is waited for, or the rotation gives up."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    with pool.client() as user:
        user.create_key("kept", **EC)
    with (
        pool.client("administrator", timeout_seconds=60) as client,
        pool.paused(1, "partition"),
    ):
        client.rotate_key_encryption_key(0)  # its lease runs out, then two are enough
    pool.await_states(["SERVING"] * 3)
    use(pool, "kept")
    pool.down()


@pytest.mark.parametrize("victim", [0, 1])
def test_kills_while_the_key_rotates(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], victim: int
) -> None:
    """G1: kill -9 of the partition that rotates, or of one that must take the key, again and again."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    with pool.client() as user:
        user.create_key("kept", **EC)
    for delay in (0.0, 0.02, 0.1, 0.3):
        killer = threading.Timer(delay, lambda: pool.signal(victim, "partition", signal.SIGKILL))
        with pool.client("administrator", timeout_seconds=30) as client:
            killer.start()
            with contextlib.suppress(MHSMError):  # which error, and whether it took effect, is open
                client.rotate_key_encryption_key(0)
            killer.join()
        pool.await_states(["SERVING"] * 3)
        use(pool, "kept")
    with pool.client("administrator", timeout_seconds=30) as client, pool.client() as user:
        client.rotate_key_encryption_key(1)
        user.create_key("last", **EC)
    use(pool, "kept", "last")
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    pool.unlock(officers[:2])
    use(pool, "kept", "last")
    pool.down()


def test_a_new_generation_revokes(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], tmp_path: Path
) -> None:
    """G4: old officers with the old file unlock nothing; what they can open opens no new records."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    with pool.client() as user:
        user.create_key("before", **EC)
    old_file, new = pool.file, make_officers(3)
    with StoreAccess(pool.connection) as store:
        old_header = record_pb2.PoolHeader.FromString(store.dump()["header"])
    old_place, new_place = (open_location(str(tmp_path / name)) for name in ("old", "new"))
    with pool.client("administrator") as client:
        backups.take(client, old_place, quiet)
        begun = client.new_generation([officer.certificate_der for officer in new], 2, 0)
        first = client.submit_share(0, begun.attempt_id, pool.submission(new[0], begun))
        assert not first.complete
        client.cancel_ceremony(0, begun.attempt_id)
        assert client.verify_security_domain(1).security_domain_file == old_file, "the old one is in force"
    with pool.client("administrator") as client:
        client.cancel_ceremony(1, client.get_ceremony(1).attempt_id)
    after = replace_domain(pool, new)
    assert container.parse(after.security_domain_file).generation == 2
    with pool.client() as user:
        user.create_key("after", **EC)
    # What an old quorum gets out of old copies: epoch 1 only, and new records are sealed under 2.
    recovery = Recovery(old_file, b"a" * 16)
    for officer in officers[:2]:
        recovery.submit(make_submission(old_file, officer.key, b"a" * 16, recovery.exchange_public_key))
    sealed = old_header.sealed_epoch
    old_keys = record_pb2.PoolKeysSecret.FromString(recovery.unseal_pool_keys(sealed.sealed_pool_keys, 1))
    assert set(old_keys.key_encryption_keys) == {1}
    with StoreAccess(pool.connection) as store:
        header = record_pb2.PoolHeader.FromString(store.dump()["header"])
    with pytest.raises(InvalidFile):
        recovery.unseal_pool_keys(header.sealed_epoch.sealed_pool_keys, header.sealed_epoch.epoch)
    assert 2 in epochs_of_records(pool)
    with pool.client("administrator") as client:
        backups.take(client, new_place, quiet)
        # The living pool still restores what it backed up before; whoever has the old domain only does not.
        assert client.call(backup_calls.check_restore(backups.manifest_of(old_place))).keys == 1
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    with pool.client("administrator") as client:
        begun = client.init_recovery(0)
        stale = security_domain_pb2.Ceremony()
        stale.CopyFrom(begun)
        stale.security_domain_file = old_file
        with pytest.raises(ShareRefused):
            client.submit_share(0, begun.attempt_id, pool.submission(officers[0], stale))
        for officer in new[1:]:
            client.submit_share(0, begun.attempt_id, pool.submission(officer, begun))
    pool.await_states(["SERVING"] * 3)
    use(pool, "before", "after")
    pool.down()

    found = make_pool(attended=True)
    with found.client("administrator") as client:
        begun = client.init_recovery(0, old_file)
        for officer in officers[:2]:
            client.submit_share(0, begun.attempt_id, found.submission(officer, begun))
        found.await_states(["SERVING"] * 3)
        with pytest.raises(BackupRefused):
            client.call(backup_calls.check_restore(backups.manifest_of(new_place)))
        assert client.call(backup_calls.check_restore(backups.manifest_of(old_place))).keys == 1
        for bad in ([], [b"x"] * 3, [officers[0].certificate_der] * 3):
            with pytest.raises(InvalidField):
                client.new_generation(bad, 2, 0)
    found.down()


def test_an_old_quorum_with_the_store_forges_nothing(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G4, G6: revoked officers, the old header and write access to the store give nobody a role."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    pool_id = pool.connection.pool_id
    with StoreAccess(pool.connection) as store:
        sealed = record_pb2.PoolHeader.FromString(store.dump()["header"]).sealed_epoch
    old_file = pool.file
    replace_domain(pool, make_officers(3))
    with pool.client() as user:
        user.create_key("after", **EC)
    recovery = Recovery(old_file, b"a" * 16)
    for officer in officers[:2]:
        recovery.submit(make_submission(old_file, officer.key, b"a" * 16, recovery.exchange_public_key))
    secret = SecretBytes(recovery.unseal_pool_keys(sealed.sealed_pool_keys, sealed.epoch))
    old_keys = PoolKeys(pool_id, secret)
    who = authorization.identify([f"spiffe://{pool_id}/client/mallory"], pool_id).principals[0]
    assignments = tuple(
        RoleAssignment(str(uuid.uuid4()), who, role.role_definition_id, roles.WHOLE_POOL)
        for role in (roles.ADMINISTRATOR, roles.CRYPTO_USER)
    )
    with Clients(pool).connect("mallory") as mallory, StoreAccess(pool.connection) as store:
        with pytest.raises(PermissionDenied):
            mallory.sign("keys/after", "ES256", DIGEST)
        dump = store.dump()
        table = chain.TableDigest()
        records = {key: value for key, value in dump.items() if key.startswith(chain.RECORD_PREFIX)}
        table.update((bytes.fromhex(k.split("/")[1]), chain.value_digest(v)) for k, v in records.items())
        # He cannot check the head, which is of epoch 2, but reads it.
        with pytest.raises(Tampered):
            chain.read_head(old_keys, dump[chain.HEAD_KEY])
        message = record_pb2.Head.FromString(dump[chain.HEAD_KEY])
        head = chain.Head(message.sequence, message.digest, dump[chain.HEAD_KEY])
        audit = [Operation("RoleAssignmentsPut", who).record(head.sequence + 1, 1)]
        changes: dict[RecordName, Record | None] = {
            principal_name(who): PrincipalRecord(who, assignments),
        }
        forged = chain.build_transaction(old_keys, 0, head, table, changes, audit)
        store.write(forged.puts)
        pool.await_states(["QUARANTINED"] * 3)
        assert all("epoch 2 has replaced" in pool.status(index).state_reason for index in range(3))
        with pytest.raises(MHSMError):
            mallory.sign("keys/after", "ES256", DIGEST)
        with pytest.raises(MHSMError):
            mallory.new_generation([officer.certificate_der for officer in officers], 2, 0)
    pool.down()


def test_a_key_backup_of_an_earlier_generation_is_restored_in_the_living_pool(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    with pool.client() as user:
        user.create_key("kept", **EC)
        single = user.backup_key("keys/kept")
        replace_domain(pool, make_officers(3))
        with pytest.raises(KeyExists):
            user.restore_key(single)
        user.delete_key("keys/kept")
        user.purge_deleted_key("keys/kept")
        user.restore_key(single)
    use(pool, "kept")
    pool.down()
