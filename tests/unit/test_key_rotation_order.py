"""A rotation of the key-encryption key and a ceremony do not cross (G4)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hsm_pool.core.roles import Access, DataAction
from hsm_pool.errors import CeremonyState, MHSMError, NotActivated, PoolLocked
from hsm_pool.partition import epochs
from hsm_pool.partition.ceremonies import Ceremonies
from hsm_pool.partition.partition import PartitionState
from mhsm.evidence.v1 import evidence_pb2
from mhsm.record.v1 import record_pb2
from security_domain import domain
from tests.running_pool import make_officers

ACCESS = Access(("client/administrator",), DataAction.SECURITY_DOMAIN_UPLOAD)


def test_no_key_is_rotated_while_a_ceremony_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceremony would be refused at its last share; a real child, only the partition is the test's."""
    rotated: list[object] = []
    monkeypatch.setattr(epochs, "rotate", lambda *_: rotated.append(_) or 2)
    certificates = [officer.certificate_der for officer in make_officers(3)]
    file = domain.create("p" * 32, 1, certificates, 2).file
    partition: Any = SimpleNamespace(
        state=PartitionState.SERVING,
        settings=SimpleNamespace(pool_id="p" * 32, index=0),
        attester=SimpleNamespace(attest=lambda *_: evidence_pb2.Evidence()),
        header=record_pb2.PoolHeader(security_domain_file=file),
        holding_keys=object,
    )
    held = Ceremonies(partition)
    try:
        begun = held.new_generation(certificates, 2)
        with pytest.raises(CeremonyState, match="under way at this partition"):
            held.rotate_key_encryption_key(ACCESS)
        assert not rotated
        assert held.current() is not None, "the ceremony goes on"
        held.cancel(begun.attempt_id)
        assert held.rotate_key_encryption_key(ACCESS) == 2
    finally:
        held.close()


@pytest.mark.parametrize("why", [NotActivated("not active"), PoolLocked("locked")])
def test_what_needs_an_active_pool_says_why_it_is_none(why: MHSMError) -> None:
    """The commands end with 3, as every other one does there."""
    partition: Any = SimpleNamespace(header=None, holding_keys=lambda: None, refusal=lambda: why)
    held = Ceremonies(partition)
    for begin in (held.verify, lambda: held.rotate_key_encryption_key(ACCESS)):
        with pytest.raises(type(why)):
            begin()
