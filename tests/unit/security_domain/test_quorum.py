"""G4: any quorum opens the security domain, fewer learn nothing, a bad share is named."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwe
from joserfc.jwk import RSAKey

from hsm_pool.provisioning.pki import Authority
from security_domain import container, domain, shares
from security_domain.encoding import canonical, decode, encode
from security_domain.errors import (
    InvalidFile,
    InvalidOfficers,
    InvalidShare,
    QuorumMissing,
    SecurityDomainError,
    ShareRefused,
    SubmissionRefused,
)
from security_domain.officers import parse_officer
from security_domain.recovery import SUBMISSIONS_MAX, Recovery, seal_pool_keys
from security_domain.secret import Secret
from security_domain.submission import (
    Context,
    make_submission,
    open_own_share,
    seal_submission,
)
from security_domain.wrapping import unwrap_by_officer
from tests.running_pool import TestOfficer

POOL = "0123456789abcdef" * 2
ATTEMPT = b"attempt-id-16-by"
MESSAGE = b"the pool's keys"


def self_signed(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Return a self-signed certificate, DER, of any key."""
    from datetime import UTC, datetime, timedelta

    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.DER)


@pytest.fixture(scope="module")
def ten() -> list[TestOfficer]:
    """Ten officers with keys of 2048 bits, made for this run."""
    made = []
    for index in range(10):
        key = rsa.generate_private_key(65537, 2048)
        made.append(TestOfficer(self_signed(key, f"officer-{index}"), key))
    return made


def create(officers: list[TestOfficer], required: int, generation: int = 1) -> domain.NewDomain:
    return domain.create(POOL, generation, [o.certificate_der for o in officers], required)


def submit_all(file: bytes, officers: list[TestOfficer]) -> Recovery:
    recovery = Recovery(file, ATTEMPT)
    for officer in officers:
        recovery.submit(make_submission(file, officer.key, ATTEMPT, recovery.exchange_public_key))
    return recovery


@pytest.mark.parametrize(("required", "total"), [(t, n) for n in range(3, 6) for t in range(2, n + 1)])
def test_every_quorum_opens_and_no_smaller_set_does(
    ten: list[TestOfficer], required: int, total: int
) -> None:
    """G4, exhaustively for small (t, n)."""
    officers = ten[:total]
    new = create(officers, required)
    sealed = seal_pool_keys(new.recovery_public_key, POOL, 1, 1, MESSAGE)
    for chosen in itertools.combinations(officers, required):
        assert submit_all(new.file, list(chosen)).unseal_pool_keys(sealed, 1) == MESSAGE
    for chosen in itertools.combinations(officers, required - 1):
        with pytest.raises(QuorumMissing):
            submit_all(new.file, list(chosen)).unseal_pool_keys(sealed, 1)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_quorum_of_any_size_opens(ten: list[TestOfficer], data: st.DataObject) -> None:
    """G4, by property for all 2 <= t <= n, 3 <= n <= 10."""
    total = data.draw(st.integers(3, 10))
    required = data.draw(st.integers(2, total))
    chosen = data.draw(st.permutations(range(total)))
    officers = ten[:total]
    new = create(officers, required)
    sealed = seal_pool_keys(new.recovery_public_key, POOL, 1, 1, MESSAGE)
    recovery = submit_all(new.file, [officers[i] for i in chosen[:required]])
    assert recovery.unseal_pool_keys(sealed, 1) == MESSAGE
    fewer = submit_all(new.file, [officers[i] for i in chosen[: required - 1]])
    with pytest.raises(QuorumMissing):
        fewer.unseal_pool_keys(sealed, 1)


def test_fewer_shares_than_the_quorum_do_not_combine_in_any_way(ten: list[TestOfficer]) -> None:
    """G4: not through the front door only: the words themselves do not give the key."""
    new = create(ten[:3], 3)
    parsed = container.parse(new.file)
    words = [open_own_share(parsed, officer.key)[1] for officer in ten[:3]]
    with pytest.raises(InvalidShare):
        shares.combine(words[:2], 2)
    with pytest.raises(InvalidShare):
        shares.combine([*words[:2], words[0]], 3)
    assert len(shares.combine(words, 3)) == 32


Forgery = Callable[[bytes, list[TestOfficer], Recovery], bytes]


def forged_words(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """A share with a valid checksum, of another split."""
    other = shares.split(Secret(os.urandom(32)), 2, 3)[1]
    parsed = container.parse(file)
    context = Context(POOL, 1, ATTEMPT, recovery.exchange_public_key)
    return seal_submission(context, parsed.officers[1].thumbprint, officers[1].key, other)


def colleagues_words(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """An officer submits the share of another one."""
    parsed = container.parse(file)
    words = open_own_share(parsed, officers[2].key)[1]
    context = Context(POOL, 1, ATTEMPT, recovery.exchange_public_key)
    return seal_submission(context, parsed.officers[1].thumbprint, officers[1].key, words)


def another_signer(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """Somebody else signs in the officer's name."""
    parsed = container.parse(file)
    words = open_own_share(parsed, officers[1].key)[1]
    context = Context(POOL, 1, ATTEMPT, recovery.exchange_public_key)
    return seal_submission(context, parsed.officers[1].thumbprint, officers[2].key, words)


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


def truncated(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """A submission cut short."""
    return make_submission(file, officers[1].key, ATTEMPT, recovery.exchange_public_key)[:-20]


def missing_word(file: bytes, officers: list[TestOfficer], recovery: Recovery) -> bytes:
    """A share that lacks its last word."""
    parsed = container.parse(file)
    words = open_own_share(parsed, officers[1].key)[1].rsplit(" ", 1)[0]
    context = Context(POOL, 1, ATTEMPT, recovery.exchange_public_key)
    return seal_submission(context, parsed.officers[1].thumbprint, officers[1].key, words)


NAMED = [forged_words, colleagues_words, missing_word]
REFUSED = [another_signer, stale_attempt, another_exchange_key, another_generation]


@pytest.mark.parametrize("forge", [*NAMED, *REFUSED, truncated])
def test_a_bad_submission_is_refused_and_changes_nothing(ten: list[TestOfficer], forge: Forgery) -> None:
    """G4: forged, foreign, stale, truncated: refused, the officer named, accepted shares stay."""
    officers = ten[:3]
    new = create(officers, 2)
    sealed = seal_pool_keys(new.recovery_public_key, POOL, 1, 1, MESSAGE)
    recovery = Recovery(new.file, ATTEMPT)
    first = make_submission(new.file, officers[0].key, ATTEMPT, recovery.exchange_public_key)
    assert recovery.submit(first).accepted == 1
    bad = forge(new.file, officers, recovery)
    with pytest.raises(ShareRefused if forge in NAMED else SubmissionRefused) as refused:
        recovery.submit(bad)
    if forge is not truncated:
        assert refused.value.officer == container.parse(new.file).officers[1].thumbprint
    assert not any(
        word in str(refused.value)
        for word in open_own_share(container.parse(new.file), officers[1].key)[1].split()[4:8]
    )
    with pytest.raises(SubmissionRefused, match="before"):
        recovery.submit(first)
    good = make_submission(new.file, officers[1].key, ATTEMPT, recovery.exchange_public_key)
    assert recovery.submit(good).complete
    assert recovery.unseal_pool_keys(sealed, 1) == MESSAGE


def test_a_foreign_officer_has_no_share(ten: list[TestOfficer]) -> None:
    new = create(ten[:3], 2)
    recovery = Recovery(new.file, ATTEMPT)
    with pytest.raises(InvalidShare):
        make_submission(new.file, ten[5].key, ATTEMPT, recovery.exchange_public_key)
    foreign = create(ten[3:6], 2)
    with pytest.raises(SubmissionRefused):
        recovery.submit(make_submission(foreign.file, ten[3].key, ATTEMPT, recovery.exchange_public_key))


def test_an_attempt_takes_a_bounded_number_of_submissions(ten: list[TestOfficer]) -> None:
    recovery = Recovery(create(ten[:3], 2).file, ATTEMPT)
    for _ in range(SUBMISSIONS_MAX):
        with pytest.raises(SubmissionRefused):
            recovery.submit(b"{}")
    good = make_submission(create(ten[:3], 2).file, ten[0].key, ATTEMPT, recovery.exchange_public_key)
    with pytest.raises(SubmissionRefused, match="more than"):
        recovery.submit(good)


@pytest.mark.parametrize(
    ("pick", "required"),
    [
        (lambda ten: ten[:2], 2),
        (lambda ten: [*ten, ten[0]], 2),
        (lambda ten: ten[:3], 1),
        (lambda ten: ten[:3], 4),
        (lambda ten: [ten[0], ten[1], ten[0]], 2),
    ],
    ids=["two officers", "eleven officers", "quorum of one", "quorum above officers", "same officer twice"],
)
def test_officers_and_quorum_are_checked(
    ten: list[TestOfficer], pick: Callable[[list[TestOfficer]], list[TestOfficer]], required: int
) -> None:
    with pytest.raises(InvalidOfficers):
        create(pick(ten), required)


def test_weak_and_foreign_kinds_of_keys_are_refused(ten: list[TestOfficer]) -> None:
    short = self_signed(rsa.generate_private_key(65537, 1024), "short")
    curve = self_signed(ec.generate_private_key(ec.SECP256R1()), "curve")
    renewed = self_signed(ten[0].key, "the same key in another certificate")
    for bad in (short, curve, b"no certificate", renewed):
        with pytest.raises(InvalidOfficers):
            domain.create(POOL, 1, [ten[0].certificate_der, ten[1].certificate_der, bad], 2)
    assert Authority("unused").certificate_pem  # the other kind of EC certificate is refused too
    with pytest.raises(InvalidOfficers):
        parse_officer(
            x509.load_pem_x509_certificate(Authority("ec").certificate_pem).public_bytes(
                serialization.Encoding.DER
            )
        )


def test_every_changed_field_of_the_file_is_noticed(ten: list[TestOfficer]) -> None:
    """G4, G8: a changed file is refused at parsing, or names the officer, or does not open; never opens."""
    officers = ten[:3]
    new = create(officers, 2)
    fields = json.loads(new.file)
    other = json.loads(create(officers, 2).file)
    changed = {name: copy.deepcopy(fields) for name in fields}
    for name in (
        "payload",
        "recovery_public_key",
        "backup_public_key",
        "owner_public_key",
        "key_check_value",
    ):
        changed[name][name] = other[name]
    changed["pool_id"]["pool_id"] = "f" * 32
    changed["generation"]["generation"] = 2
    changed["required"]["required"] = 3
    changed["created"]["created"] = "2000-01-01T00:00:00Z"
    changed["format"]["format"] = "mhsm-security-domain/2"
    changed["officers"]["officers"][0]["share_commitment"] = other["officers"][0]["share_commitment"]
    for name, value in changed.items():
        with pytest.raises(SecurityDomainError):
            submit_all(canonical(value), officers[: value["required"]])
        assert value != fields, name


@pytest.mark.parametrize(
    "junk",
    [b"", b"[]", b"{}", b"\xff\xfe", b'{"format":1}', b"[" * 100_000, b" " * (container.FILE_BYTES_MAX + 1)],
)
def test_junk_is_refused_as_a_file(junk: bytes) -> None:
    with pytest.raises(InvalidFile):
        container.parse(junk)


@given(st.binary(max_size=300))
def test_any_octets_are_refused_as_a_file_and_as_a_submission(octets: bytes) -> None:
    """G8: a typed refusal, never an accident."""
    with pytest.raises(InvalidFile):
        container.parse(octets)


def test_only_the_allowed_jwe_algorithms_open(ten: list[TestOfficer]) -> None:
    """RSA1_5, RSA-OAEP with SHA-1, and short tags are refused."""
    officer = parse_officer(ten[0].certificate_der)
    pem = (
        ten[0]
        .key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    key = RSAKey.import_key(pem)
    for algorithm, encryption in (("RSA-OAEP", "A256GCM"), ("RSA-OAEP-256", "A128CBC-HS256")):
        header = {"alg": algorithm, "enc": encryption, "kid": officer.thumbprint}
        token = jwe.encrypt_compact(header, b"{}", key, algorithms=[algorithm, encryption])
        with pytest.raises(InvalidShare):
            unwrap_by_officer(ten[0].key, officer.thumbprint, token)
    header = {"alg": "RSA-OAEP-256", "enc": "A256GCM", "kid": officer.thumbprint}
    token = jwe.encrypt_compact(header, b"{}", key, algorithms=["RSA-OAEP-256", "A256GCM"])
    assert unwrap_by_officer(ten[0].key, officer.thumbprint, token) == b"{}"
    *parts, tag = token.split(".")
    with pytest.raises(InvalidShare):
        unwrap_by_officer(ten[0].key, officer.thumbprint, ".".join([*parts, encode(decode(tag)[:8])]))
    with pytest.raises(InvalidShare):
        unwrap_by_officer(ten[0].key, "another thumbprint", token)


def test_a_costly_exponent_is_refused_before_any_work() -> None:
    """A share with a high iteration exponent would run for minutes."""
    from shamir_mnemonic.shamir import EncryptedMasterSecret, split_ems

    secret = EncryptedMasterSecret(7, True, 15, os.urandom(32))
    ((first, *_),) = split_ems(1, [(2, 3)], secret)
    with pytest.raises(InvalidShare, match="another kind"):
        shares.parse(first.mnemonic(), 2)


def test_secrets_are_not_printed_or_pickled() -> None:
    """G3."""
    secret = Secret(b"hidden octets")
    assert "hidden" not in f"{secret} {secret!r}"
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    secret.wipe()
    assert secret.reveal() == bytes(13)
