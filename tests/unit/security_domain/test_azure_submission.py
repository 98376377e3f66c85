"""Shares of Azure's format, submitted officer by officer (G4): as strict as those of our own."""

from __future__ import annotations

import itertools
import json
import uuid
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from security_domain.azure import document, domain, tokens
from security_domain.azure.items import Item
from security_domain.azure.recovery import AzureRecovery
from security_domain.azure.submission import Context, make_submission, seal_submission
from security_domain.encoding import canonical
from security_domain.errors import (
    InvalidFile,
    InvalidOfficers,
    InvalidShare,
    QuorumMissing,
    ShareRefused,
    SubmissionRefused,
)
from security_domain.officers import parse_officer
from security_domain.recovery import SUBMISSIONS_MAX
from security_domain.secret import Secret
from security_domain.submission import (
    RECOVERY,
    SHARE_ROTATION,
    VERIFICATION,
    officers_digest,
    public_exchange_key,
)
from tests.running_pool import TestOfficer
from tests.unit.security_domain.rehearsal import ATTEMPT, create, everything_said


def azure_file(officers: list[TestOfficer], required: int) -> tuple[bytes, bytes]:
    """Make a domain; return (our own file, document of Azure's format)."""
    new = create(officers, required)
    certificates = [officer.certificate_der for officer in officers]
    return new.file, domain.make(new.core, new.file, certificates, required)


@pytest.fixture(scope="module")
def files(ten: list[TestOfficer]) -> tuple[bytes, bytes]:
    """A domain of three officers with a quorum of two."""
    return azure_file(ten[:3], 2)


def attempt(file: bytes, **options: Any) -> AzureRecovery:
    return AzureRecovery(file, ATTEMPT, X25519PrivateKey.generate(), **options)


def share_for(recovery: AzureRecovery, file: bytes, officer: TestOfficer, *agreed: Any) -> bytes:
    """Return an honest officer's submission."""
    return make_submission(
        document.parse(file),
        officer.key,
        officer.certificate_der,
        ATTEMPT,
        recovery.exchange_public_key,
        *agreed,
    )


@pytest.mark.parametrize(("required", "total"), [(2, 3), (3, 3), (3, 4), (2, 10), (10, 10)])
def test_every_quorum_opens_and_one_fewer_does_not(ten: list[TestOfficer], required: int, total: int) -> None:
    """G4: the domain's core and our own file come out."""
    own, file = azure_file(ten[:total], required)
    for quorum in itertools.combinations(ten[:total], required):
        recovery = attempt(file)
        for number, officer in enumerate(quorum, start=1):
            with pytest.raises(QuorumMissing):
                recovery.opened()
            progress = recovery.submit(share_for(recovery, file, officer))
            assert (progress.accepted, progress.complete) == (number, number == required)
        core, brought = recovery.opened()
        assert brought == own
        assert core.generation == 1
        with pytest.raises(SubmissionRefused, match="complete"):
            recovery.submit(share_for(recovery, file, quorum[0]))


def test_a_wrong_share_is_named_even_at_exactly_the_quorum(
    ten: list[TestOfficer], files: tuple[bytes, bytes]
) -> None:
    """G4: forged, another officer's, another domain's and cut shares; the right ones still open it."""
    _, file = files
    parsed, other = document.parse(file), document.parse(azure_file(ten[:3], 2)[1])
    recovery = attempt(file)
    recovery.submit(share_for(recovery, file, ten[0]))
    own = [document.open_share(parsed, o.key, thumbprint(o)).reveal() for o in ten[:3]]
    foreign = document.open_share(other, ten[1].key, thumbprint(ten[1])).reveal()
    changed = bytes([own[1][0] ^ 1]) + own[1][1:]
    context = Context(ATTEMPT, recovery.exchange_public_key, document_digest=parsed.digest)
    for forged in (own[0], own[2], foreign, changed, own[1][:-2], own[1] + own[1][:2], b"", bytes(64)):
        submission = seal_submission(context, ten[1].certificate_der, ten[1].key, Secret(forged))
        with pytest.raises(ShareRefused) as refused:
            recovery.submit(submission)
        assert refused.value.officer == thumbprint(ten[1])
        assert forged.hex()[:16] not in everything_said(refused.value) or not forged
    assert recovery.accepted_officers == [thumbprint(ten[0])]
    assert recovery.submit(share_for(recovery, file, ten[1])).complete


def test_stale_foreign_and_repeated_submissions_are_refused(
    ten: list[TestOfficer], files: tuple[bytes, bytes]
) -> None:
    """G4: of another attempt, exchange key, document, officer or key; nothing changes."""
    _, file = files
    recovery, earlier = attempt(file), attempt(file)
    strange_file = azure_file(ten[:3], 2)[1]
    strange = attempt(strange_file)
    parsed = document.parse(file)
    good = share_for(recovery, file, ten[0])
    refused = [
        share_for(earlier, file, ten[0]),
        share_for(strange, strange_file, ten[0]),
        make_submission(
            document.parse(strange_file),
            ten[0].key,
            ten[0].certificate_der,
            ATTEMPT,
            recovery.exchange_public_key,
        ),
        make_submission(
            parsed, ten[0].key, ten[0].certificate_der, b"another-attempt!", recovery.exchange_public_key
        ),
        seal_submission(
            Context(ATTEMPT, recovery.exchange_public_key, document_digest=parsed.digest),
            ten[5].certificate_der,
            ten[5].key,
            Secret(bytes(64)),
        ),
        seal_submission(
            Context(ATTEMPT, recovery.exchange_public_key, document_digest=parsed.digest),
            ten[1].certificate_der,
            ten[0].key,
            document.open_share(parsed, ten[1].key, thumbprint(ten[1])),
        ),
    ]
    for submission in refused:
        with pytest.raises(SubmissionRefused):
            recovery.submit(submission)
    assert recovery.submit(good).accepted == 1
    with pytest.raises(SubmissionRefused, match="before"):
        recovery.submit(share_for(recovery, file, ten[0]))
    assert recovery.submit(share_for(recovery, file, ten[2])).complete


def test_a_share_is_taken_for_what_it_was_given_for(
    ten: list[TestOfficer], files: tuple[bytes, bytes]
) -> None:
    """G4: nobody is led to hand out the domain by being asked for a proof."""
    _, file = files
    to = officers_digest([thumbprint(officer) for officer in ten[3:6]], 2)
    others = officers_digest([thumbprint(officer) for officer in ten[4:7]], 2)
    agreements = [(RECOVERY,), (VERIFICATION,), (SHARE_ROTATION, to), (SHARE_ROTATION, others)]
    for wanted in agreements:
        options = dict(zip(("purpose", "detail"), wanted, strict=False))
        recovery = attempt(file, **options)
        for given_for in agreements:
            if given_for != wanted:
                with pytest.raises(SubmissionRefused, match="something else"):
                    recovery.submit(share_for(recovery, file, ten[0], *given_for))
        assert recovery.submit(share_for(recovery, file, ten[0], *wanted)).accepted == 1


def test_attempts_are_bounded(ten: list[TestOfficer], files: tuple[bytes, bytes]) -> None:
    """G8: refused submissions count, too."""
    recovery = attempt(files[1])
    for _ in range(SUBMISSIONS_MAX):
        with pytest.raises(SubmissionRefused):
            recovery.submit(b"{}")
    with pytest.raises(SubmissionRefused, match=f"more than {SUBMISSIONS_MAX}"):
        recovery.submit(share_for(recovery, files[1], ten[0]))
    assert recovery.accepted_officers == []


def test_an_officer_notices_what_is_wrong_before_he_submits(
    ten: list[TestOfficer], files: tuple[bytes, bytes]
) -> None:
    """G8: another key's certificate, no officer, an exchange key that is none."""
    _, file = files
    parsed = document.parse(file)
    exchange_key = public_exchange_key(X25519PrivateKey.generate())
    with pytest.raises(InvalidOfficers, match="another key"):
        make_submission(parsed, ten[0].key, ten[1].certificate_der, ATTEMPT, exchange_key)
    with pytest.raises(InvalidOfficers, match="no share"):
        make_submission(parsed, ten[7].key, ten[7].certificate_der, ATTEMPT, exchange_key)
    with pytest.raises(SubmissionRefused):
        make_submission(parsed, ten[0].key, ten[0].certificate_der, ATTEMPT, bytes(32))


def test_a_document_whose_share_was_replaced_is_noticed_by_its_officer(
    ten: list[TestOfficer], files: tuple[bytes, bytes]
) -> None:
    """G4: the commitment is in the key id, which Azure's clients do not look at."""
    _, file = files
    parsed = document.parse(file)
    share = document.open_share(parsed, ten[1].key, thumbprint(ten[1]))
    fields = json.loads(file)
    entry = fields["SharedKeys"]["enc_shares"][0]
    entry["enc_key"] = tokens.wrap(ten[0].key.public_key(), share, parsed.shares[0].commitment)
    with pytest.raises(InvalidShare, match="not the one"):
        document.open_share(document.parse(canonical(fields)), ten[0].key, thumbprint(ten[0]))
    assert {uuid.UUID(wrapped.commitment).version for wrapped in parsed.shares} == {8}
    entry["enc_key"] = tokens.wrap(ten[0].key.public_key(), share, str(uuid.uuid4()))
    unnamed = document.parse(canonical(fields))
    assert unnamed.shares[0].commitment == "", "a document of a service that does not commit itself"
    assert document.open_share(unnamed, ten[0].key, thumbprint(ten[0])).reveal() == share.reveal()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_changed_octet_is_accepted(
    ten: list[TestOfficer], files: tuple[bytes, bytes], data: st.DataObject
) -> None:
    """G4, by property; the state is as before."""
    _, file = files
    recovery = attempt(file)
    good = share_for(recovery, file, ten[0])
    changed = bytearray(good)
    changed[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SubmissionRefused):
        recovery.submit(bytes(changed))
    assert recovery.submit(good).accepted == 1


@given(st.binary(max_size=300))
def test_any_octets_are_refused(files: tuple[bytes, bytes], octets: bytes) -> None:
    """G8: a typed refusal, never an accident."""
    with pytest.raises(SubmissionRefused):
        attempt(files[1]).submit(octets)


def thumbprint(officer: TestOfficer) -> str:
    """Return the thumbprint of an officer's certificate."""
    return parse_officer(officer.certificate_der).thumbprint


def test_only_the_items_of_a_domain_of_ours_open(ten: list[TestOfficer], files: tuple[bytes, bytes]) -> None:
    """G8: more or fewer, under other tags, or of two domains: a quorum made them, and it may be at fault."""
    own = files[0]

    def opened(octets: bytes) -> list[Item]:
        parsed = document.parse(octets)
        shares = [document.open_share(parsed, officer.key, thumbprint(officer)) for officer in ten[:2]]
        return document.open_items(parsed, shares)

    items = opened(files[1])
    assert [item.tag for item in items] == [domain.CORE_TAG, f"{domain.FILE_TAG}_0"]
    assert domain.open_core(items)[1] == own
    core, file = items
    (_, others_file) = opened(azure_file(ten[:3], 2)[1])
    for wrong in (
        [*items, Item("another", Secret(b"x"))],
        [*items, Item(f"{domain.FILE_TAG}_2", Secret(b""))],
        [core, Item(f"{domain.FILE_TAG}_1", file.plaintext)],
        [core],
        [file],
        [],
        [core, others_file],
        [Item(domain.CORE_TAG, Secret(b"{}")), file],
    ):
        with pytest.raises(InvalidFile):
            domain.open_core(wrong)
