"""G4 on a real pool: any quorum unlocks it, nobody else does, and whoever cheats is named."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator

import pytest

from hsm_pool.errors import (
    AlreadyActivated,
    CeremonyState,
    InvalidField,
    MHSMError,
    NotActivated,
    PoolLocked,
    ShareRefused,
)
from hsm_pool.partition.ceremony_attempts import ATTEMPT_ID_BYTES
from mhsm.keys.v1 import keys_pb2
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import container, shares
from security_domain.secret import Secret
from security_domain.submission import Context, seal_submission
from tests.refused_officers import refused_officers
from tests.running_pool import RunningPool, TestOfficer, make_officers, until
from tests.store_access import StoreAccess

pytestmark = [pytest.mark.pool, pytest.mark.slow]

DIGEST = b"d" * 32
EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
Attempt = security_domain_pb2.Ceremony


@pytest.fixture
def locked(pool: RunningPool) -> RunningPool:
    """The module's pool, locked: all partitions were killed at once."""
    lock(pool)
    return pool


def lock(pool: RunningPool) -> None:
    if pool.states() != ["LOCKED"] * 3:
        pool.kill_everything()
        pool.await_states(["LOCKED"] * 3)


def context(pool: RunningPool, begun: Attempt) -> Context:
    domain = container.parse(pool.file)
    return Context(
        begun.attempt_id, begun.exchange_public_key, pool_id=domain.pool_id, generation=domain.generation
    )


# -- who unlocks --------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", list(itertools.combinations(range(3), 2)), ids=str)
def test_any_two_of_three_officers_unlock_and_one_does_not(
    locked: RunningPool, chosen: tuple[int, int]
) -> None:
    """G4: the first officer alone changes nothing; with the second one all keys are back."""
    first, second = (locked.officers[number] for number in chosen)
    partition = chosen[0]
    with locked.client("administrator") as client:
        begun = client.init_recovery(partition)
        progress = client.submit_share(partition, begun.attempt_id, locked.submission(first, begun))
        assert (progress.accepted, progress.required, progress.complete) == (1, 2, False)
        assert locked.states() == ["LOCKED"] * 3
        assert locked.status(partition).accepted_shares == 1
        for index in range(3):
            with locked.client(partition=index) as application, pytest.raises(PoolLocked):
                application.create_key("locked", **EC)
        progress = client.submit_share(partition, begun.attempt_id, locked.submission(second, begun))
        assert (progress.accepted, progress.required, progress.complete) == (2, 2, True)
    locked.await_states(["SERVING"] * 3)
    paths = [locked.status(index).recovery_path for index in range(3)]
    assert sorted(paths) == ["peer", "peer", "quorum"]
    until(lambda: locked.ceremony_child(partition) is None, 5, "the end of the ceremony child")
    with locked.client() as application:
        if chosen == (0, 1):
            application.create_key("kept", **EC)
        signature = application.sign("keys/kept", "ES256", DIGEST)
        application.verify("keys/kept", "ES256", DIGEST, signature)


def test_three_of_five_officers_unlock_and_two_do_not(make_pool: Callable[..., RunningPool]) -> None:
    """G4: the same with another quorum, in another order, at another partition."""
    officers = make_officers(5)
    pool = make_pool(attended=True)
    pool.activate(officers, 3)
    for chosen in ((0, 1, 2), (4, 1, 3)):
        lock(pool)
        with pool.client("administrator") as client:
            begun = client.init_recovery(2)
            for number in chosen[:2]:
                submission = pool.submission(officers[number], begun)
                assert not client.submit_share(2, begun.attempt_id, submission).complete
            # Two officers cannot make up for the third, however often they try.
            for number in chosen[:2]:
                with pytest.raises(ShareRefused):
                    client.submit_share(2, begun.attempt_id, pool.submission(officers[number], begun))
            assert pool.states() == ["LOCKED"] * 3
            submission = pool.submission(officers[chosen[2]], begun)
            assert client.submit_share(2, begun.attempt_id, submission).complete
        pool.await_states(["SERVING"] * 3)
    pool.down()


# -- who cheats ---------------------------------------------------------------------------


def test_what_is_refused_names_the_officer_and_the_ceremony_goes_on(locked: RunningPool) -> None:
    """G4: each bad submission is refused for its own reason; none is counted; the right ones unlock."""
    domain = container.parse(locked.file)
    honest, liar = locked.officers[0], locked.officers[1]
    names = [entry.thumbprint for entry in domain.officers]
    (stranger,) = make_officers(1)
    forged = shares.split(Secret(os.urandom(32)), domain.required, 3)
    with locked.client("administrator") as client:
        old = client.init_recovery(0)
        client.cancel_ceremony(0, old.attempt_id)
        begun = client.init_recovery(0)
        assert begun.attempt_id != old.attempt_id
        assert begun.exchange_public_key != old.exchange_public_key
        here = context(locked, begun)

        def refused(submission: bytes, officer: str, text: str) -> None:
            with pytest.raises(ShareRefused) as error:
                client.submit_share(0, begun.attempt_id, submission)
            assert error.value.metadata.get("officer", "") == officer
            assert text in error.value.message
            assert locked.status(0).accepted_shares == accepted

        accepted = 0
        own = locked.submission(liar, begun)
        refused(
            seal_submission(here, names[1], liar.key, forged[1]),
            names[1],
            "not the one this officer was given",
        )
        refused(seal_submission(here, names[1], liar.key, "no words at all"), names[1], "not the one")
        refused(seal_submission(here, names[0], liar.key, forged[0]), names[0], "not signed by this officer")
        refused(
            seal_submission(here, names[1], stranger.key, forged[1]), names[1], "not signed by this officer"
        )
        refused(seal_submission(here, "A" * 43, stranger.key, forged[1]), "", "no officer")
        refused(locked.submission(liar, old), names[1], "another attempt")
        for cut in (0, 1, len(own) // 2, len(own) - 1):
            refused(own[:cut], "", "malformed")
        refused(b"\xff" * 100, "", "malformed")
        with pytest.raises(InvalidField):
            client.submit_share(0, begun.attempt_id, own + b" " * 16 * 1024)

        progress = client.submit_share(0, begun.attempt_id, locked.submission(honest, begun))
        accepted = 1
        assert (progress.accepted, progress.complete) == (1, False)
        refused(locked.submission(honest, begun), names[0], "submitted before")
        refused(
            seal_submission(here, names[1], liar.key, forged[1]),
            names[1],
            "not the one this officer was given",
        )
        assert client.submit_share(0, begun.attempt_id, own).complete
    locked.await_states(["SERVING"] * 3)


def test_one_attempt_at_a_time_by_its_own_id(locked: RunningPool) -> None:
    """G4: a second attempt, another attempt's id, and a cancelled attempt are refused."""
    officer, other = locked.officers[0], locked.officers[2]
    with locked.client("administrator") as client:
        begun = client.init_recovery(1)
        with pytest.raises(CeremonyState):
            client.init_recovery(1)
        own = locked.submission(officer, begun)
        with pytest.raises(CeremonyState):
            client.submit_share(1, os.urandom(ATTEMPT_ID_BYTES), own)
        with pytest.raises(CeremonyState):
            client.submit_share(2, begun.attempt_id, own)  # another partition knows nothing of it
        for malformed in (b"", begun.attempt_id[:-1], begun.attempt_id + b"x"):
            with pytest.raises(InvalidField):
                client.submit_share(1, malformed, own)
        with pytest.raises(CeremonyState):
            client.cancel_ceremony(1, os.urandom(ATTEMPT_ID_BYTES))
        assert client.submit_share(1, begun.attempt_id, own).accepted == 1

        client.cancel_ceremony(1, begun.attempt_id)
        assert locked.ceremony_child(1) is None
        assert locked.status(1).accepted_shares == 0
        with pytest.raises(CeremonyState):
            client.submit_share(1, begun.attempt_id, locked.submission(other, begun))
        with pytest.raises(CeremonyState):
            client.cancel_ceremony(1, begun.attempt_id)

        # What the cancelled attempt had accepted is forgotten.
        again = client.init_recovery(1)
        assert client.submit_share(1, again.attempt_id, locked.submission(other, again)).accepted == 1
        client.cancel_ceremony(1, again.attempt_id)
    assert locked.states() == ["LOCKED"] * 3


def test_attempts_at_two_partitions_do_not_add_up(locked: RunningPool) -> None:
    """G4: two officers at two partitions are one officer each."""
    with locked.client("administrator") as client:
        begun = [client.init_recovery(index) for index in range(2)]
        for index in range(2):
            submission = locked.submission(locked.officers[index], begun[index])
            progress = client.submit_share(index, begun[index].attempt_id, submission)
            assert (progress.accepted, progress.complete) == (1, False)
        # A submission to one partition's exchange key is worth nothing at the other.
        with pytest.raises(ShareRefused, match="another attempt"):
            client.submit_share(0, begun[0].attempt_id, locked.submission(locked.officers[1], begun[1]))
        assert locked.states() == ["LOCKED"] * 3
        for index in range(2):
            client.cancel_ceremony(index, begun[index].attempt_id)


def test_no_ceremony_while_the_pool_serves(locked: RunningPool) -> None:
    """G4: a pool that is not locked is not recovered."""
    locked.unlock(locked.officers[:2])
    with locked.client("administrator") as client, pytest.raises(CeremonyState):
        client.init_recovery(0)


# -- what restarts ------------------------------------------------------------------------


def test_an_unattended_pool_restarts_by_itself(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G4: with the platform's seal nobody is needed, and the status says so."""
    pool = make_pool(attended=False)
    pool.activate(officers, 2)
    with pool.client() as client:
        client.create_key("kept", **EC)
    pool.kill_everything()
    until(lambda: all((s := pool.status(i)) and s.incarnation > 1 for i in range(3)), 30, "new incarnations")
    pool.await_states(["SERVING"] * 3)
    for index in range(3):
        status = pool.status(index)
        assert (status.sealing, status.recovery_path in {"seal", "peer"}) == ("platform", True)
    assert "seal" in {pool.status(index).recovery_path for index in range(3)}
    with pool.client() as client:
        client.verify("keys/kept", "ES256", DIGEST, client.sign("keys/kept", "ES256", DIGEST))
    pool.down()


# -- activation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def provisioned(make_pool: Callable[..., RunningPool]) -> Iterator[RunningPool]:
    """A pool that is not active yet."""
    pool = make_pool(attended=True)
    yield pool
    pool.down()


def test_activation_refuses_officers_and_quorums(
    provisioned: RunningPool, officers: list[TestOfficer]
) -> None:
    """G4, G8: each is refused as a field, and the pool stays as it is."""
    with provisioned.client("administrator", partition=0) as client:
        for name, case in refused_officers(officers).items():
            with pytest.raises(InvalidField) as refused:
                client.download_security_domain(case.certificates_der, case.required)
            assert case.said in refused.value.message, name
    assert provisioned.states() == ["PROVISIONED"] * 3
    with StoreAccess(provisioned.connection) as store:
        assert store.dump() == {}


def test_nothing_works_before_activation(provisioned: RunningPool) -> None:
    """G8: key calls are answered with NOT_ACTIVATED, an unlock with CEREMONY_STATE."""
    assert provisioned.states() == ["PROVISIONED"] * 3
    for index in range(3):
        with provisioned.client(partition=index) as client:
            calls: list[Callable[[], object]] = [
                lambda c=client: c.create_key("early", **EC),  # type: ignore[misc]
                lambda c=client: c.get_key("keys/early"),  # type: ignore[misc]
                lambda c=client: list(c.list_keys()),  # type: ignore[misc]
                lambda c=client: c.sign("keys/early", "ES256", DIGEST),  # type: ignore[misc]
            ]
            for call in calls:
                with pytest.raises(NotActivated):
                    call()
        with provisioned.client("administrator") as client:
            for call in (client.verify_security_domain, lambda p: client.rotate_shares([b"x"], 2, p)):
                with pytest.raises(NotActivated):
                    call(index)
            for file in (b"{}", b"x" * 1000):
                with pytest.raises(InvalidField):
                    client.init_recovery(index, file)
            assert client.get_ceremony(index) is None
            waiting = client.init_recovery(index)  # for a restore blob, which may bring the file
            client.cancel_ceremony(index, waiting.attempt_id)
            assert client.get_ceremony(index) is None
        with provisioned.client(partition=index) as client, pytest.raises(MHSMError):
            client.download_security_domain([], 2)  # an application is no administrator


def test_a_repeated_download_gives_the_same_file_and_another_one_is_refused(
    provisioned: RunningPool, officers: list[TestOfficer]
) -> None:
    """G4: one security domain a pool, whoever asks where, and a lost answer can be asked for again."""
    certificates = [officer.certificate_der for officer in officers]
    request_id = str(uuid.uuid4())
    with provisioned.client("administrator", partition=0) as client:
        begun = client.download_security_domain(certificates, 2, request_id)
        assert client.download_security_domain(certificates, 2, request_id) == begun
        with pytest.raises(CeremonyState):
            client.download_security_domain(certificates, 3, request_id)
        for number, officer in enumerate(officers, start=1):
            assert provisioned.states() == ["PROVISIONED"] * 3, "every officer must prove his share first"
            progress = client.submit_share(0, begun.attempt_id, provisioned.submission(officer, begun))
            assert (progress.accepted, progress.complete) == (number, number == len(officers))
    files = {begun.security_domain_file}
    for index in (0, 1, 2):
        with provisioned.client("administrator", partition=index) as client:
            repeated = client.download_security_domain(certificates, 2, request_id)
            assert repeated.complete
            files.add(repeated.security_domain_file)
    assert len(files) == 1
    for index in range(3):
        with provisioned.client("administrator", partition=index) as client:
            with pytest.raises(AlreadyActivated):
                client.download_security_domain(certificates, 2)
            with pytest.raises(AlreadyActivated):
                client.download_security_domain(certificates, 3, request_id)
    provisioned.await_states(["SERVING"] * 3)
