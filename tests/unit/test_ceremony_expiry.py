"""An attempt that nobody finishes ends by itself, with its child (G3, G4)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hsm_pool import limits
from hsm_pool.core.roles import Access, DataAction
from hsm_pool.errors import CeremonyState
from hsm_pool.partition import ceremonies, ceremony_attempts
from hsm_pool.partition.partition import PartitionState
from mhsm.evidence.v1 import evidence_pb2
from security_domain.submission import ACTIVATION, make_submission
from tests.running_pool import make_officers, until

ACCESS = Access(("client/administrator",), DataAction.SECURITY_DOMAIN_UPLOAD)


def provisioned() -> Any:
    """What a ceremony needs to see of a partition that is not active yet."""
    return SimpleNamespace(
        state=PartitionState.PROVISIONED,
        settings=SimpleNamespace(pool_id="p" * 32, index=0),
        state_directory=SimpleNamespace(incarnation=1),
        attester=SimpleNamespace(attest=lambda *_: evidence_pb2.Evidence()),
        activated_by=lambda _: None,
        unconfirmed=False,
    )


def test_an_attempt_that_nobody_asks_for_ends_with_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """G3, G4: no call is needed; the status shows no shares of it any more."""
    monkeypatch.setattr(limits, "CEREMONY_SECONDS", 1)
    officers = make_officers(3)
    held = ceremonies.Ceremonies(provisioned())
    try:
        begun = held.download([officer.certificate_der for officer in officers], 2, "r" * 36)
        assert held._attempts.current is not None
        child = held._attempts.current.child
        assert child.alive
        until(lambda: not child.alive, 30, "the end of the ceremony child")
        assert held.accepted_shares == 0
        with pytest.raises(CeremonyState):
            held.cancel(begun.attempt_id)
    finally:
        held.close()


def test_an_expired_exchange_key_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child and real shares; only the partition around them, and the clock, are the test's."""
    now = [1000.0]
    monkeypatch.setattr(ceremony_attempts, "boot_time", lambda: now[0])
    officers = make_officers(3)
    partition = provisioned()
    held = ceremonies.Ceremonies(partition)
    try:
        begun = held.download([officer.certificate_der for officer in officers], 2, "r" * 36)
        submissions = [
            make_submission(begun.file, officer.key, begun.attempt_id, begun.exchange_public_key, ACTIVATION)
            for officer in officers
        ]
        assert held.submit_share(begun.attempt_id, submissions[0], ACCESS).accepted == 1
        now[0] += limits.CEREMONY_SECONDS - 1
        assert held.submit_share(begun.attempt_id, submissions[1], ACCESS).accepted == 2
        assert (current := held.current())
        assert current.accepted == 2
        now[0] += 2
        with pytest.raises(CeremonyState):
            held.submit_share(begun.attempt_id, submissions[2], ACCESS)
        assert held.current() is None
        again = held.download([officer.certificate_der for officer in officers], 2, "r" * 36)
        assert again.exchange_public_key != begun.exchange_public_key
        assert again.file != begun.file, "nothing of the first attempt is left"
        partition.state = PartitionState.SERVING  # another partition was activated meanwhile
        assert held.current() is None
    finally:
        held.close()


def test_a_timer_ends_no_attempt_but_its_own() -> None:
    """G4: it may have fired, and waited for the lock, while its attempt was cancelled and another begun."""
    officers = [officer.certificate_der for officer in make_officers(3)]
    held = ceremonies.Ceremonies(provisioned())
    try:
        begun = held.download(officers, 2, "r" * 36)
        first = held._attempts.current
        assert first is not None
        held.cancel(begun.attempt_id)
        held.download(officers, 2, "s" * 36)
        second = held._attempts.current
        assert second is not None
        held._attempts._expire(first)
        assert held._attempts.current is second
        assert second.child.alive
        held._attempts._expire(second)
        assert held._attempts.current is None
        assert not second.child.alive
    finally:
        held.close()
