"""One sharp test a guarantee, on a real pool. The broken builds of tests/mutants must fail here."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from shamir_mnemonic.wordlist import WORDLIST

from hsm_pool.client import calls
from hsm_pool.client.errors import CallIndefinite
from hsm_pool.core.model import key_name
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import AvailabilityError, CommitUnknown, KeyNotUsable, MHSMError, ShareRefused
from hsm_pool.net.interceptors import typed
from hsm_pool.store.sealing import PoolKeys, Tampered, open_record, seal_record
from mhsm.keys.v1 import keys_pb2
from security_domain import container, shares
from security_domain.secret import Secret
from security_domain.submission import Context, seal_submission
from tests.running_pool import RunningPool, TestOfficer, until
from tests.store_access import StoreAccess

pytestmark = pytest.mark.pool

DIGEST = hashlib.sha256(b"to be signed").digest()
EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
DISABLED = calls.attributes(enabled=False)


def attempt(operation: Callable[[], object]) -> str:
    """Return "ok", or the reason of a typed error."""
    try:
        operation()
    except MHSMError as error:
        return type(error).__name__
    return "ok"


def test_nothing_is_acknowledged_without_a_majority_of_the_store(pool: RunningPool) -> None:
    """G1: while two of three store members are stopped, no write is acknowledged."""
    with pool.client(partition=0, timeout_seconds=2.0) as client:
        with pool.paused(1, "store_member"), pool.paused(2, "store_member"):
            outcome = attempt(lambda: client.create_key("without-majority", **EC))
        assert outcome in {CallIndefinite.__name__, CommitUnknown.__name__, "StoreUnavailable"}
    pool.await_states(["SERVING"] * 3)


def test_writers_on_all_partitions_lose_nothing_to_each_other(pool: RunningPool) -> None:
    """G1: concurrent writers compare the same head; whoever loses tries again, nobody is lost."""
    created: list[str] = []
    lock = threading.Lock()

    def write(index: int) -> None:
        with pool.client(partition=index, timeout_seconds=20) as client:
            for number in range(15):
                name = f"contended-{index}-{number}"
                client.create_key(name, **EC)
                with lock:
                    created.append(name)

    writers = [threading.Thread(target=write, args=(index,)) for index in range(3) for _ in range(1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(created) == 45
    for index in range(3):
        with pool.client(partition=index) as client:
            listed = {key.name.split("/")[1] for key in client.list_keys()}
        assert set(created) <= listed


@pytest.mark.parametrize(
    "parts", [("partition",), ("store_member",), ("partition", "store_member")], ids="+".join
)
def test_a_paused_partition_never_uses_a_key_under_its_old_state(
    pool: RunningPool, parts: tuple[str, ...]
) -> None:
    """G2: after a disable was acknowledged, no partition signs, not even one that was stopped meanwhile."""
    late = sum(_late_signatures(pool, paused, parts) for paused in range(3))
    assert late == 0


def _late_signatures(pool: RunningPool, paused: int, parts: tuple[str, ...]) -> int:
    """Disable a key while a partition is stopped; count its signatures invoked after the acknowledgement."""
    name = f"pause-{'-'.join(parts)}-{paused}".replace("_", "-")
    with pool.client() as client:
        client.create_key(name, **EC)
    results: list[tuple[float, str]] = []
    stop = threading.Event()
    with pool.client(partition=paused, timeout_seconds=15) as victim:

        def sign_once() -> str:
            return attempt(lambda: victim.sign(f"keys/{name}", "ES256", DIGEST))

        def sign() -> None:
            while not stop.is_set():
                invoked = time.monotonic()
                results.append((invoked, sign_once()))

        until(lambda: sign_once() == "ok", 10, "a signature")
        signers = [threading.Thread(target=sign) for _ in range(7)]
        with pool.paused(paused, *parts):
            signers[0].start()
            with pool.client(partition=(paused + 1) % 3, timeout_seconds=20) as other:
                other.update_key(f"keys/{name}", key_attributes=DISABLED)
            acknowledged = time.monotonic()
            # These are invoked after the acknowledgement and lie in the stopped partition's sockets.
            for signer in signers[1:]:
                signer.start()
            until(lambda: all(signer.is_alive() for signer in signers), 5, "calls under way")
        until(lambda: any(result == KeyNotUsable.__name__ for _, result in results), 30, "a refusal")
        stop.set()
        for signer in signers:
            signer.join()
    pool.await_states(["SERVING"] * 3)
    return sum(1 for invoked, result in results if invoked > acknowledged and result == "ok")


def test_the_security_domain_file_holds_no_share(pool: RunningPool) -> None:
    """G3, G4: the file may lie anywhere; no run of share words stands in it."""
    text = pool.file.decode()
    words = set(WORDLIST)
    for entry in container.parse(pool.file).officers:
        assert entry.share_jwe.count(".") == 4, "a share is not a compact JWE"
    runs = sum(1 for word in text.replace('"', " ").split() if word in words)
    assert runs < 5


def test_a_forged_share_is_named(make_pool: Callable[..., RunningPool], officers: list[TestOfficer]) -> None:
    """G4: a share with a valid checksum that is not the officer's own is refused, with his name."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    domain = container.parse(pool.file)
    forged = shares.split(Secret(os.urandom(32)), 2, 3)[0]
    with pool.client("administrator") as client:
        begun = client.init_recovery(0)
        context = Context(
            begun.attempt_id, begun.exchange_public_key, pool_id=domain.pool_id, generation=domain.generation
        )
        liar = domain.officers[1].thumbprint
        with pytest.raises(ShareRefused) as refused:
            client.submit_share(0, begun.attempt_id, seal_submission(context, liar, officers[1].key, forged))
        assert refused.value.metadata["officer"] == liar
        for officer in (officers[0], officers[1]):
            progress = client.submit_share(0, begun.attempt_id, pool.submission(officer, begun))
        assert progress.complete
    pool.await_states(["SERVING"] * 3)
    pool.down()


def test_a_sealed_record_opens_under_its_own_id_only() -> None:
    """G6: the id is part of the key and of the additional data."""
    keys = PoolKeys.generate("0" * 32, 1, SecretBytes(bytes(32)))
    first, second = keys.opaque_id(key_name("a")), keys.opaque_id(key_name("b"))
    sealed = seal_record(keys, 1, 1, first, 7, b"p" * 32, b"body")
    assert open_record(keys, first, sealed) == (1, 7, b"body")
    with pytest.raises(Tampered):
        open_record(keys, second, sealed)


def _sleeping_pool_with_history(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> tuple[RunningPool, dict[str, bytes]]:
    """Return an unattended pool and a snapshot of its store before a key was disabled."""
    pool = make_pool(attended=False)
    pool.activate(officers, 2)
    with pool.client() as client:
        client.create_key("signer", **EC)
        with StoreAccess(pool.connection) as store:
            snapshot = store.dump()
        client.update_key("keys/signer", key_attributes=DISABLED)
        client.create_key("later", **EC)
    return pool, snapshot


def _tamper_while_partitions_sleep(pool: RunningPool, tamper: Callable[[StoreAccess], None]) -> None:
    """Change the store while the partitions are stopped, then let them start anew."""
    for index in range(3):
        pool.signal(index, "partition", signal.SIGSTOP)
    with StoreAccess(pool.connection) as store:
        tamper(store)
    for index in range(3):
        pool.signal(index, "partition", signal.SIGKILL)


def _await_quarantine(pool: RunningPool, word: str) -> None:
    pool.await_states(["QUARANTINED"] * 3)
    for index in range(3):
        status = pool.status(index)
        assert word in status.state_reason
        with pool.client(partition=index) as client, pytest.raises(AvailabilityError) as refused:
            client.sign("keys/signer", "ES256", DIGEST)
        assert refused.value.reason == "PARTITION_QUARANTINED"
    pool.down()


def test_a_record_put_back_while_the_pool_sleeps_is_noticed(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G6: an old record is authentic by itself; only the chain knows that it is not the newest."""
    pool, snapshot = _sleeping_pool_with_history(make_pool, officers)

    def put_back(store: StoreAccess) -> None:
        now = store.records()
        old = {key: value for key, value in snapshot.items() if key in now and now[key] != value}
        assert old, "the disabled version is a changed record"
        store.write(old)

    _tamper_while_partitions_sleep(pool, put_back)
    _await_quarantine(pool, "replayed")


def test_a_store_rolled_back_while_the_pool_sleeps_is_noticed(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G6: head, log and records of an earlier time fit each other; the partitions' own disks do not."""
    pool, snapshot = _sleeping_pool_with_history(make_pool, officers)
    _tamper_while_partitions_sleep(pool, lambda store: store.restore(snapshot))
    _await_quarantine(pool, "rolled back")


def test_an_unhandled_exception_shows_a_correlation_id_only() -> None:
    """G3, G8: the text of an exception may quote a value; it stays inside."""
    shown = typed(ValueError("secret value 4711"), "/any/Method")
    assert "4711" not in shown.message
    assert "correlation id" in shown.message
