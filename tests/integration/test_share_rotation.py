"""Verification, rotation of shares and recovery in a new pool, on real processes (G1, G4, G8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hsm_pool.errors import AlreadyActivated, CeremonyState, InvalidField, ShareRefused
from mhsm.keys.v1 import keys_pb2
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import container
from tests.running_pool import RunningPool, TestOfficer, changes, make_officers, until
from tests.store_access import StoreAccess

pytestmark = [pytest.mark.pool, pytest.mark.slow]

EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
DIGEST = bytes(32)
Ceremony = security_domain_pb2.Ceremony


def submit(client: Any, pool: RunningPool, begun: Ceremony, officers: list[TestOfficer]) -> Ceremony:
    """Submit these officers' shares; return the ceremony after the last one."""
    after = begun
    for officer in officers:
        after = client.submit_share(begun.partition_index, begun.attempt_id, pool.submission(officer, begun))
    return after


def lock(pool: RunningPool) -> None:
    """Kill everything and wait until the pool is locked."""
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)


def test_a_quorum_is_proved_and_nothing_changes(pool: RunningPool) -> None:
    """G4: a proof needs a quorum, leaves no child behind and changes neither header nor keys."""
    with pool.client("administrator") as client:
        sequence = changes(client.partition_status(0))
        begun = client.verify_security_domain(1)
        assert begun.security_domain_file == pool.file
        assert pool.ceremony_child(1) is not None
        seen = client.get_ceremony(1)
        assert (seen.purpose, seen.accepted) == (security_domain_pb2.CEREMONY_PURPOSE_VERIFICATION, 0)
        with pytest.raises(CeremonyState):
            client.rotate_shares([officer.certificate_der for officer in pool.officers], 2, 1)
        first = submit(client, pool, begun, pool.officers[:1])
        assert not first.complete
        assert list(client.get_ceremony(1).accepted_officers) == list(first.accepted_officers)
        with pytest.raises(ShareRefused):
            submit(client, pool, begun, pool.officers[:1])
        assert submit(client, pool, begun, pool.officers[2:]).complete
        assert client.get_ceremony(1) is None
        assert pool.ceremony_child(1) is None
        assert changes(client.partition_status(0)) == sequence
    assert pool.states() == ["SERVING"] * 3


def test_rotated_shares_open_and_old_ones_do_not_unlock_the_pool(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G4: after a rotation the new quorum unlocks; a share of the old file is refused and named."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    with pool.client() as user:
        user.create_key("kept", **EC)
    old_file, new = pool.file, make_officers(4)
    with pool.client("administrator") as client:
        begun = client.rotate_shares([officer.certificate_der for officer in new], 3, 2)
        middle = submit(client, pool, begun, officers[1:])
        assert not middle.complete
        assert middle.security_domain_file != old_file
        assert client.partition_status(2).required == 2, "not in force before the new quorum was proved"
        with pytest.raises(ShareRefused):  # an old officer has no share of the new file
            client.submit_share(2, begun.attempt_id, pool.submission(officers[0], begun))
        assert submit(client, pool, middle, new[:3]).complete
        # Every partition knows the new header as soon as it has applied the transaction.
        until(lambda: all(client.partition_status(i).required == 3 for i in range(3)), 10, "new header")
    parsed, before = container.parse(middle.security_domain_file), container.parse(old_file)
    assert parsed.sharing == before.sharing + 1
    assert parsed.recovery_public_key == before.recovery_public_key
    lock(pool)
    with pool.client("administrator") as client:
        begun = client.init_recovery(0)
        assert begun.security_domain_file == middle.security_domain_file
        stale = Ceremony()
        stale.CopyFrom(begun)
        stale.security_domain_file = old_file
        with pytest.raises(ShareRefused):
            client.submit_share(0, begun.attempt_id, pool.submission(officers[0], stale))
        assert submit(client, pool, begun, new[1:]).complete
    pool.await_states(["SERVING"] * 3)
    with pool.client() as user:
        user.sign("keys/kept", "ES256", DIGEST)
    pool.down()


def test_a_header_put_back_is_noticed(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G6: the old header again, alone or with a head of its time, and the partitions refuse to serve."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    with StoreAccess(pool.connection) as store:
        old = store.dump()["header"]
    new = make_officers(3)
    with pool.client("administrator") as client:
        begun = client.rotate_shares([officer.certificate_der for officer in new], 2, 0)
        middle = submit(client, pool, begun, officers[:2])
        assert submit(client, pool, middle, new[:2]).complete
    with StoreAccess(pool.connection) as store:
        assert store.dump()["header"] != old
        store.write({"header": old})
    pool.await_states(["QUARANTINED"] * 3)
    assert "header" in pool.status(0).state_reason
    pool.down()


def test_a_share_given_for_a_proof_opens_no_rotation(pool: RunningPool, officers: list[TestOfficer]) -> None:
    """G4: an administrator who asks for a proof and begins a rotation to his own officers gets nothing."""
    own = make_officers(3)
    with pool.client("administrator") as client:
        begun = client.rotate_shares([officer.certificate_der for officer in own], 2, 0)
        told = security_domain_pb2.Ceremony()
        told.CopyFrom(begun)
        told.purpose = security_domain_pb2.CEREMONY_PURPOSE_VERIFICATION
        others = security_domain_pb2.Ceremony()
        others.CopyFrom(begun)
        others.new_officers[0] = begun.new_officers[1]
        fewer = security_domain_pb2.Ceremony()
        fewer.CopyFrom(begun)
        fewer.new_required = 3
        for officer in officers:
            for said in (told, others, fewer):
                with pytest.raises(ShareRefused, match="something else"):
                    client.submit_share(0, begun.attempt_id, pool.submission(officer, said))
        assert client.get_ceremony(0).accepted == 0
        client.cancel_ceremony(0, begun.attempt_id)
        proof = client.verify_security_domain(0)
        told.CopyFrom(proof)
        told.purpose = security_domain_pb2.CEREMONY_PURPOSE_RECOVERY
        with pytest.raises(ShareRefused, match="something else"):
            client.submit_share(0, proof.attempt_id, pool.submission(officers[0], told))
        client.cancel_ceremony(0, proof.attempt_id)


def test_of_two_rotations_at_two_partitions_one_wins(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G4: the second is refused by the chain, and the file in force is the first one's."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    sets = [make_officers(3), make_officers(3)]
    with pool.client("administrator") as client:
        middles = []
        for index, new in enumerate(sets):
            begun = client.rotate_shares([officer.certificate_der for officer in new], 2, index)
            middles.append(submit(client, pool, begun, officers[:2]))
        assert submit(client, pool, middles[0], sets[0][:2]).complete
        with pytest.raises(CeremonyState):
            submit(client, pool, middles[1], sets[1][:2])
        assert client.verify_security_domain(2).security_domain_file == middles[0].security_domain_file
    pool.down()


def test_a_lost_pools_domain_is_recovered_in_a_new_pool(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G4: a quorum brings the old security domain into a new pool, which is then active and empty."""
    lost, found = make_pool(attended=True), make_pool(attended=True)
    lost.activate(officers, 2)
    file = lost.file
    lost.down()
    with found.client("administrator") as client:
        with pytest.raises(InvalidField):
            client.init_recovery(0, file[:-1])
        begun = client.init_recovery(0, file)
        assert begun.pool_id == container.parse(file).pool_id != found.connection.pool_id
        assert not submit(client, found, begun, officers[:1]).complete
        assert found.states() == ["PROVISIONED"] * 3
        assert submit(client, found, begun, officers[2:]).complete
        found.await_states(["SERVING"] * 3)
        with pytest.raises(AlreadyActivated):
            client.download_security_domain([officer.certificate_der for officer in officers], 2)
    with found.client() as user:
        user.create_key("new", **EC)
    lock(found)
    with found.client("administrator") as client:
        begun = client.init_recovery(1)
        assert submit(client, found, begun, officers[:2]).complete, "the same officers unlock it later"
    found.await_states(["SERVING"] * 3)
    with found.client() as user:
        user.sign("keys/new", "ES256", DIGEST)
    found.down()
