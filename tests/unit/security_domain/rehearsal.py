"""What the tests of the security domain share: certificates of any key, domains, submissions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from security_domain import container, domain
from security_domain.recovery import Recovery
from security_domain.submission import Context, make_submission, open_own_share
from tests.running_pool import TestOfficer

POOL = "0123456789abcdef" * 2
ATTEMPT = b"attempt-id-16-by"
MESSAGE = b"the pool's keys"


def self_signed(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, name: str, padding_bytes: int = 0
) -> bytes:
    """Return a self-signed certificate, DER, of any key, made larger by an extension on demand."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    if padding_bytes:
        oid = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, bytes(padding_bytes)), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def create(
    officers: list[TestOfficer], required: int, generation: int = 1, pool_id: str = POOL
) -> domain.NewDomain:
    """Make a security domain for these officers."""
    return domain.create(pool_id, generation, [o.certificate_der for o in officers], required)


def submit_all(file: bytes, officers: Iterable[TestOfficer]) -> Recovery:
    """Start an attempt and let these officers submit."""
    recovery = Recovery(file, ATTEMPT)
    for officer in officers:
        recovery.submit(make_submission(file, officer.key, ATTEMPT, recovery.exchange_public_key))
    return recovery


def own_words(file: bytes, officer: TestOfficer) -> str:
    """Return the words of an officer's share."""
    return open_own_share(container.parse(file), officer.key)[1]


def context_of(recovery: Recovery) -> Context:
    """Return what honest submissions to an attempt of generation 1 are bound to."""
    return Context(ATTEMPT, recovery.exchange_public_key, pool_id=POOL, generation=1)


def everything_said(error: BaseException) -> str:
    """Return all text that an exception carries, also in its causes, contexts and attributes."""
    said = []
    link: BaseException | None = error
    while link is not None:
        said += [str(link), repr(link.args), repr(vars(link))]
        said += [str(getattr(link, name, "")) for name in ("doc", "object", "__notes__")]
        link = link.__cause__ or link.__context__
    return "\n".join(said)


def quotes(text: str, words: str) -> bool:
    """Whether two consecutive words of a share stand in a text."""
    split = words.split()
    return any(f"{first} {second}" in text for first, second in itertools.pairwise(split))
