"""What the ceremony child gives to a partition, and what it refuses, as its own process (G3, G4, G6)."""

from __future__ import annotations

import os

import pytest

from hsm_pool.ceremony.parent import CeremonyChild
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import CeremonyState, ShareRefused
from hsm_pool.partition import epochs
from hsm_pool.store.sealing import PoolKeys
from mhsm.ceremony.v1 import ceremony_pb2
from security_domain import container, domain
from security_domain.azure import document, transfer_key
from security_domain.azure import domain as azure_domain
from security_domain.azure import submission as azure_submission
from security_domain.azure.restore_blob import make_restore_blob
from security_domain.submission import RECOVERY, VERIFICATION, make_submission
from tests.running_pool import TestOfficer, make_officers

POOL, ATTEMPT = "p" * 32, bytes(16)


def made(officers: list[TestOfficer], pool_id: str = POOL) -> domain.NewDomain:
    return domain.create(pool_id, 1, [officer.certificate_der for officer in officers], 2)


def opened(
    officers: list[TestOfficer], new: domain.NewDomain, keys: PoolKeys, *, give_keys: bool
) -> ceremony_pb2.SubmitResult:
    """Have a quorum open the keys that stand in a store."""
    sealed = epochs.sealed(container.parse(new.file), keys, 1)
    command = ceremony_pb2.OpenCommand(
        security_domain_file=new.file,
        attempt_id=ATTEMPT,
        give_keys=give_keys,
        sealed_pool_keys=sealed.sealed_pool_keys,
        epoch=1,
    )
    with CeremonyChild() as child:
        begun = child.ask(ceremony_pb2.CeremonyRequest(open=command)).begin
        purpose = RECOVERY if give_keys else VERIFICATION
        for officer in officers[:2]:
            submission = make_submission(
                new.file, officer.key, ATTEMPT, begun.exchange_public_key, purpose, b""
            )
            submit = ceremony_pb2.SubmitCommand(submission=submission)
            answer = child.ask(ceremony_pb2.CeremonyRequest(submit=submit)).submit
    return answer


@pytest.mark.parametrize("give_keys", [True, False], ids=["recovery", "verification"])
def test_keys_that_no_partition_has_sealed_are_not_the_pool_s(give_keys: bool) -> None:
    """G3, G6: whoever holds the store can seal keys that he knows to the public recovery key.

    Given to a partition they would be the pool's: he would read every key that is made afterwards.
    """
    officers = make_officers(3)
    new = made(officers)
    own = PoolKeys.generate(POOL, 1, SecretBytes(new.backup_private_key.reveal()))
    result = opened(officers, new, own, give_keys=give_keys)
    assert result.complete
    assert bool(result.pool_keys_secret) is give_keys
    other = made(make_officers(3))
    for backup_key in (os.urandom(32), other.backup_private_key.reveal()):
        forged = PoolKeys.generate(POOL, 1, SecretBytes(backup_key))
        with pytest.raises(CeremonyState, match="not sealed by a partition"):
            opened(officers, new, forged, give_keys=give_keys)
    without = PoolKeys.generate(POOL, 2, SecretBytes(new.backup_private_key.reveal()))
    with pytest.raises(CeremonyState, match="not sealed by a partition"):
        opened(officers, new, without, give_keys=give_keys)


def test_a_restore_blob_is_not_taken_in_the_place_of_an_announced_file() -> None:
    """G4: officers of one domain have agreed; the blob of another one does not finish what they began."""
    officers, others = make_officers(3), make_officers(3)
    documents = []
    for people, pool_id in ((officers, POOL), (others, "q" * 32)):
        new = made(people, pool_id)
        certificates = [officer.certificate_der for officer in people]
        documents.append(azure_domain.make(new.core, new.file, certificates, 2))
    announced, other = documents
    command = ceremony_pb2.OpenCommand(
        azure_security_domain_file=announced,
        attempt_id=ATTEMPT,
        give_keys=True,
        transfer_key_name="mhsm-new",
    )
    with CeremonyChild() as child:
        begun = child.ask(ceremony_pb2.CeremonyRequest(open=command)).begin
        submission = azure_submission.make_submission(
            document.parse(announced),
            officers[0].key,
            officers[0].certificate_der,
            ATTEMPT,
            begun.exchange_public_key,
            RECOVERY,
            b"",
        )
        submit = ceremony_pb2.SubmitCommand(submission=submission)
        assert child.ask(ceremony_pb2.CeremonyRequest(submit=submit)).submit.accepted == 1
        keys = [(officer.key, officer.certificate_der) for officer in others[:2]]
        certificate = transfer_key.parse_transfer_key(begun.transfer_key)
        blob = make_restore_blob(document.parse(other), keys, certificate)
        with pytest.raises(ShareRefused, match="takes no restore blob"):
            child.ask(ceremony_pb2.CeremonyRequest(upload=ceremony_pb2.UploadCommand(restore_blob=blob)))
