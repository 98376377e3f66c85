"""G4: any quorum opens the security domain, fewer learn nothing, a bad share is named."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shamir_mnemonic.share import Share

from security_domain import container, shares
from security_domain.errors import (
    InvalidFile,
    InvalidShare,
    QuorumMissing,
    ShareRefused,
    SubmissionRefused,
)
from security_domain.recovery import SUBMISSIONS_MAX, Recovery, seal_pool_keys
from security_domain.secret import Secret
from security_domain.submission import make_submission, seal_submission
from security_domain.wrapping import open_payload
from tests.running_pool import TestOfficer
from tests.unit.security_domain.rehearsal import (
    ATTEMPT,
    MESSAGE,
    POOL,
    context_of,
    create,
    everything_said,
    own_words,
    quotes,
    submit_all,
)


@pytest.mark.parametrize(("required", "total"), [(t, n) for n in range(3, 6) for t in range(2, n + 1)])
def test_every_quorum_opens_and_no_smaller_set_does(
    ten: list[TestOfficer], required: int, total: int
) -> None:
    """G4, exhaustively for small (t, n)."""
    officers = ten[:total]
    new = create(officers, required)
    sealed = seal_pool_keys(new.recovery_public_key, POOL, 1, 1, MESSAGE)
    for chosen in itertools.combinations(officers, required):
        assert submit_all(new.file, chosen).unseal_pool_keys(sealed, 1) == MESSAGE
    for chosen in itertools.combinations(officers, required - 1):
        with pytest.raises(QuorumMissing):
            submit_all(new.file, chosen).unseal_pool_keys(sealed, 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_quorum_of_any_size_opens(ten: list[TestOfficer], data: st.DataObject) -> None:
    """G4, by property for all 2 <= t <= n, 3 <= n <= 10, in any order of submission."""
    total = data.draw(st.integers(3, 10))
    required = data.draw(st.integers(2, total))
    chosen = data.draw(st.permutations(range(total)))
    new = create(ten[:total], required)
    sealed = seal_pool_keys(new.recovery_public_key, POOL, 1, 1, MESSAGE)
    recovery = submit_all(new.file, [ten[i] for i in chosen[:required]])
    assert recovery.unseal_pool_keys(sealed, 1) == MESSAGE
    fewer = submit_all(new.file, [ten[i] for i in chosen[: required - 1]])
    with pytest.raises(QuorumMissing):
        fewer.unseal_pool_keys(sealed, 1)


def test_fewer_shares_than_the_quorum_do_not_combine_in_any_way(ten: list[TestOfficer]) -> None:
    """G4: not through the front door only: the words themselves do not give the key."""
    new = create(ten[:3], 3)
    words = [own_words(new.file, officer) for officer in ten[:3]]
    with pytest.raises(InvalidShare):
        shares.combine(words[:2], 2)
    with pytest.raises(InvalidShare):
        shares.combine([*words[:2], words[0]], 3)
    with pytest.raises(InvalidShare):
        shares.combine([*words[:2], words[0].upper()], 3)
    assert len(shares.combine(words, 3)) == 32


@pytest.mark.parametrize(("required", "total"), [(t, n) for n in range(3, 6) for t in range(2, n + 1)])
def test_shares_that_claim_a_lower_threshold_give_nothing(
    ten: list[TestOfficer], required: int, total: int
) -> None:
    """G4: t-1 officers rewrite the threshold in their words, checksum included."""
    new = create(ten[:total], required)
    domain = container.parse(new.file)
    parsed = [shares.parse(own_words(new.file, officer), required) for officer in ten[:total]]
    lowered = [dataclasses.replace(share, member_threshold=required - 1).mnemonic() for share in parsed]
    for chosen in itertools.combinations(lowered, required - 1):
        with pytest.raises((InvalidShare, InvalidFile)):  # a wrong digest; no digest exists at 1
            open_payload(shares.combine(chosen, required - 1), domain.payload, domain.header())


def test_the_shares_of_one_key_look_random() -> None:
    """G4, a smoke test: no bit of one share of a constant key is fixed or biased (six sigma)."""
    splits = 400
    for member in (0, 2):
        values = []
        for _ in range(splits):
            words = shares.split(Secret(bytes(32)), 2, 3)[member]
            values.append(int.from_bytes(shares.parse(words, 2).value, "big"))
        assert len(set(values)) == splits
        for bit in range(256):
            ones = sum(value >> bit & 1 for value in values)
            assert abs(ones - splits / 2) < 6 * (splits / 4) ** 0.5, bit


Forgery = Callable[[bytes, list[TestOfficer], Recovery], bytes]


def second_officer_seals(words: str, file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """Officer 2 submits these words in good order."""
    thumbprint = container.parse(file).officers[1].thumbprint
    return seal_submission(context_of(recovery), thumbprint, officers[1].key, words)


def forged_words(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """A share with a valid checksum, of another split."""
    other = shares.split(Secret(os.urandom(32)), 2, 3)[1]
    return second_officer_seals(other, file, officers, recovery)


def altered_value(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """The officer's own share with another value: identifier, index and checksum all fit."""
    own: Share = shares.parse(own_words(file, officers[1]), 2)
    altered = dataclasses.replace(own, value=os.urandom(32)).mnemonic()
    return second_officer_seals(altered, file, officers, recovery)


def colleagues_words(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """An officer submits the share of another one."""
    return second_officer_seals(own_words(file, officers[2]), file, officers, recovery)


def missing_word(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """A share that lacks its last word."""
    cut = own_words(file, officers[1]).rsplit(" ", 1)[0]
    return second_officer_seals(cut, file, officers, recovery)


def other_generations_words(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """The officer's right share of a later generation, in a submission to this one."""
    later = own_words(create(officers, 2, generation=2).file, officers[1])
    return second_officer_seals(later, file, officers, recovery)


def another_signer(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """Somebody else signs in the officer's name."""
    thumbprint = container.parse(file).officers[1].thumbprint
    words = own_words(file, officers[1])
    return seal_submission(context_of(recovery), thumbprint, officers[2].key, words)


def stale_attempt(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """A submission of an earlier attempt."""
    return make_submission(file, officers[1].key, b"another-attempt!", recovery.exchange_public_key)


def another_exchange_key(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """A submission to an exchange key that is not this attempt's."""
    del recovery
    return make_submission(file, officers[1].key, ATTEMPT, Recovery(file, ATTEMPT).exchange_public_key)


def another_generation(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """A share of a later security domain of the same officers."""
    del file
    later = create(officers, 2, generation=2).file
    return make_submission(later, officers[1].key, ATTEMPT, recovery.exchange_public_key)


def another_pool(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """A share of another pool with the same officers."""
    del file
    foreign = create(officers, 2, pool_id="f" * 32).file
    return make_submission(foreign, officers[1].key, ATTEMPT, recovery.exchange_public_key)


def truncated(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """A submission cut short."""
    return make_submission(file, officers[1].key, ATTEMPT, recovery.exchange_public_key)[:-20]


SHARE_IS_WRONG = [forged_words, altered_value, colleagues_words, missing_word, other_generations_words]
SUBMISSION_IS_WRONG = [another_signer, stale_attempt, another_exchange_key, another_generation, another_pool]


@pytest.mark.parametrize("forge", [*SHARE_IS_WRONG, *SUBMISSION_IS_WRONG, truncated])
def test_a_bad_submission_is_refused_and_changes_nothing(ten: list[TestOfficer], forge: Forgery) -> None:
    """G4: forged, foreign, stale, truncated: refused, the officer named, accepted shares stay."""
    officers = ten[:3]
    new = create(officers, 2)
    sealed = seal_pool_keys(new.recovery_public_key, POOL, 1, 1, MESSAGE)
    recovery = Recovery(new.file, ATTEMPT)
    first = make_submission(new.file, officers[0].key, ATTEMPT, recovery.exchange_public_key)
    assert recovery.submit(first).accepted == 1
    with pytest.raises(SubmissionRefused) as refused:
        recovery.submit(forge(new.file, officers, recovery))
    assert isinstance(refused.value, ShareRefused) == (forge in SHARE_IS_WRONG)
    second_officer = container.parse(new.file).officers[1].thumbprint
    # What is cut short cannot be attributed: its signature is gone.
    assert refused.value.officer == ("" if forge is truncated else second_officer)
    assert refused.value.officer in str(refused.value)
    for officer in officers:
        assert not quotes(everything_said(refused.value), own_words(new.file, officer))
    with pytest.raises(QuorumMissing):
        recovery.unseal_pool_keys(sealed, 1)
    with pytest.raises(SubmissionRefused, match="before") as again:
        recovery.submit(first)
    assert again.value.officer == container.parse(new.file).officers[0].thumbprint
    good = make_submission(new.file, officers[1].key, ATTEMPT, recovery.exchange_public_key)
    assert recovery.submit(good).complete
    assert recovery.unseal_pool_keys(sealed, 1) == MESSAGE


def test_one_officer_cannot_count_twice(ten: list[TestOfficer]) -> None:
    """G4: not with the same submission, and not with a fresh one of the same share."""
    new = create(ten[:3], 2)
    recovery = submit_all(new.file, ten[:1])
    fresh = make_submission(new.file, ten[0].key, ATTEMPT, recovery.exchange_public_key)
    with pytest.raises(SubmissionRefused, match="before"):
        recovery.submit(fresh)
    with pytest.raises(QuorumMissing):
        recovery.unseal_pool_keys(b"", 1)


def test_a_foreign_officer_has_no_share(ten: list[TestOfficer]) -> None:
    new = create(ten[:3], 2)
    recovery = Recovery(new.file, ATTEMPT)
    with pytest.raises(InvalidShare):
        make_submission(new.file, ten[5].key, ATTEMPT, recovery.exchange_public_key)
    foreign = create(ten[3:6], 2)
    with pytest.raises(SubmissionRefused, match="no officer"):
        recovery.submit(make_submission(foreign.file, ten[3].key, ATTEMPT, recovery.exchange_public_key))


def test_an_attempt_takes_a_bounded_number_of_submissions(ten: list[TestOfficer]) -> None:
    new = create(ten[:3], 2)
    recovery = Recovery(new.file, ATTEMPT)
    for _ in range(SUBMISSIONS_MAX):
        with pytest.raises(SubmissionRefused, match="malformed"):
            recovery.submit(b"{}")
    good = make_submission(new.file, ten[0].key, ATTEMPT, recovery.exchange_public_key)
    with pytest.raises(SubmissionRefused, match="more than"):
        recovery.submit(good)


def test_a_complete_attempt_takes_no_more(ten: list[TestOfficer]) -> None:
    new = create(ten[:3], 2)
    recovery = submit_all(new.file, ten[:2])
    third = make_submission(new.file, ten[2].key, ATTEMPT, recovery.exchange_public_key)
    with pytest.raises(SubmissionRefused, match="complete"):
        recovery.submit(third)


def test_each_sharing_of_a_domain_has_its_own_number(ten: list[TestOfficer]) -> None:
    """G4: the same domain for other officers; by its number people tell the file in force from an old one."""
    first = create(ten[:3], 2)
    recovery, required = submit_all(first.file, ten[:2]), 3
    seen = [container.parse(first.file)]
    for officers in (ten[3:6], ten[6:10]):
        certificates = [officer.certificate_der for officer in officers]
        file, following = recovery.next_phase(certificates, required)
        seen.append(container.parse(file))
        key = following.exchange_public_key
        assert key == recovery.exchange_public_key
        for officer in officers[:required]:
            following.submit(make_submission(file, officer.key, ATTEMPT, key))
        assert following.opened().root.reveal() == recovery.opened().root.reveal()
        recovery = following
    assert [(one.sharing, len(one.officers)) for one in seen] == [(1, 3), (2, 3), (3, 4)]
    assert {one.generation for one in seen} == {1}
    assert len({one.recovery_public_key for one in seen}) == 1


def test_sealed_pool_keys_open_under_their_own_names_only(ten: list[TestOfficer]) -> None:
    """G6: keys of another pool, generation, epoch or security domain are refused, and any changed octet."""
    new = create(ten[:3], 2)
    recovery = submit_all(new.file, ten[:2])
    sealed = seal_pool_keys(new.recovery_public_key, POOL, 1, 7, MESSAGE)
    assert recovery.unseal_pool_keys(sealed, 7) == MESSAGE
    stranger = create(ten[:3], 2).recovery_public_key
    refused = [
        seal_pool_keys(new.recovery_public_key, "f" * 32, 1, 7, MESSAGE),
        seal_pool_keys(new.recovery_public_key, POOL, 2, 7, MESSAGE),
        seal_pool_keys(new.recovery_public_key, POOL, 1, 8, MESSAGE),
        seal_pool_keys(stranger, POOL, 1, 7, MESSAGE),
        sealed[:-1],
        b"",
        *(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :] for at in range(len(sealed))),
    ]
    for wrong in refused:
        with pytest.raises(InvalidFile):
            recovery.unseal_pool_keys(wrong, 7)


@pytest.mark.parametrize("key", [b"", b"short", bytes(32), bytes(33)])
def test_an_unusable_recovery_key_is_refused(key: bytes) -> None:
    """G8: also the points of small order, whose shared secret everybody knows."""
    with pytest.raises(InvalidFile):
        seal_pool_keys(key, POOL, 1, 1, MESSAGE)
