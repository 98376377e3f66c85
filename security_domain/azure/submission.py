"""One officer's submission of a share of Azure's format: as of our own, bound to a document.

Azure knows no such thing: its clients bring a quorum of private keys together on one
workstation. Here each officer opens his own share on his own machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from security_domain.azure import document as azure_document
from security_domain.azure.document import Document
from security_domain.encoding import decode, encode, parse_object
from security_domain.errors import (
    NO_OFFICER,
    InvalidFile,
    InvalidOfficers,
    InvalidShare,
    SecurityDomainError,
    ShareRefused,
    SubmissionRefused,
)
from security_domain.officers import parse_officer
from security_domain.secret import Secret
from security_domain.submission import (
    RECOVERY,
    SUBMISSION_BYTES_MAX,
    AttemptContext,
    check_signature,
    open_with_exchange_key,
    seal_to_exchange_key,
    sign,
)

FORMAT = "mhsm-azure-share-submission/1"
_FIELDS: dict[str, type] = {
    "format": str,
    "document_digest": str,
    "attempt_id": str,
    "exchange_key_digest": str,
    "purpose": str,
    "detail": str,
    "certificate": str,
    "sealed_share": str,
    "signature": str,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(AttemptContext):
    """What a submission of Azure's format is bound to."""

    document_digest: bytes

    def info(self, officer: str) -> bytes:
        """Return the HPKE info for an officer's share."""
        return self.bound("mhsm-sd/azure-submission/v1", self.document_digest, officer=officer)


def make_submission(
    document: Document,
    officer_private_key: rsa.RSAPrivateKey,
    officer_certificate_der: bytes,
    attempt_id: bytes,
    exchange_public_key: bytes,
    purpose: str = RECOVERY,
    detail: bytes = b"",
) -> bytes:
    """Open the officer's share of a document, encrypt it to the exchange key and sign it.

    Args:
        document: The security-domain document.
        officer_private_key: The officer's own key.
        officer_certificate_der: His certificate: the document names certificates by digest only.
        attempt_id: Names the attempt (16 bytes).
        exchange_public_key: X25519, 32 bytes.
        purpose: What the officer agrees to.
        detail: From security_domain.submission.officers_digest, for a purpose that has new officers.

    Raises:
        InvalidOfficers: The certificate is none of an officer, or of no officer of this document.
        InvalidFile: The share does not open with this key.
        InvalidShare: What opened is not this officer's share.
        SubmissionRefused: The attempt id or the exchange key is not one.
    """
    context = Context(attempt_id, exchange_public_key, purpose, detail, document_digest=document.digest)
    officer = parse_officer(officer_certificate_der)
    if officer.public_key.public_numbers() != officer_private_key.public_key().public_numbers():
        raise InvalidOfficers("the certificate is of another key")
    share = azure_document.open_share(document, officer_private_key, officer.thumbprint)
    try:
        return seal_submission(context, officer_certificate_der, officer_private_key, share)
    finally:
        share.wipe()


def seal_submission(
    context: Context, certificate_der: bytes, private_key: rsa.RSAPrivateKey, share: Secret
) -> bytes:
    """Encrypt a share to the exchange key and sign; :func:`make_submission` checks it before."""
    officer = parse_officer(certificate_der).thumbprint
    sealed = seal_to_exchange_key(share.reveal(), context.exchange_public_key, context.info(officer))
    fields = {
        "format": FORMAT,
        "document_digest": encode(context.document_digest),
        "attempt_id": encode(context.attempt_id),
        "exchange_key_digest": encode(context.exchange_key_digest),
        "purpose": context.purpose,
        "detail": encode(context.detail),
        "certificate": encode(certificate_der),
        "sealed_share": encode(sealed),
    }
    return sign(fields, private_key)


def is_submission(submission: bytes) -> bool:
    """Whether a submission says that it is of this format; nothing is checked."""
    try:
        return bool(parse_object(submission, SUBMISSION_BYTES_MAX, _FIELDS)["format"] == FORMAT)
    except InvalidFile:
        return False


def open_submission(
    submission: bytes, document: Document, context: Context, exchange_key: X25519PrivateKey
) -> tuple[str, Secret]:
    """Check a submission and open its share.

    Returns:
        (officer's thumbprint, share).

    Raises:
        SubmissionRefused: It is malformed, of another attempt, or not signed by an officer.
        ShareRefused: Its share is not the one that this officer was given.
    """
    try:
        fields = parse_object(submission, SUBMISSION_BYTES_MAX, _FIELDS)
        bound = tuple(
            decode(fields[name])
            for name in ("document_digest", "attempt_id", "exchange_key_digest", "detail")
        )
        sealed, certificate = decode(fields["sealed_share"]), decode(fields["certificate"])
        officer = parse_officer(certificate)
        wrapped = document.share_of(officer.thumbprint)
    except InvalidOfficers:
        raise SubmissionRefused(NO_OFFICER) from None
    except SecurityDomainError as error:
        raise SubmissionRefused(f"the submission is malformed: {error}") from None
    named = officer.thumbprint
    check_signature(fields, officer.public_key, named)
    if fields["format"] != FORMAT or bound[0] != context.document_digest:
        raise SubmissionRefused("the submission is for another security-domain document", named)
    if bound[1:3] != (context.attempt_id, context.exchange_key_digest):
        raise SubmissionRefused("the submission is for another attempt", named)
    if (fields["purpose"], bound[3]) != (context.purpose, context.detail):
        raise SubmissionRefused("the officer has agreed to something else than this ceremony", named)
    share = Secret(open_with_exchange_key(sealed, exchange_key, context.info(named), named))
    try:
        wrapped.check(share)
    except InvalidShare as error:
        raise ShareRefused(str(error), named) from None
    return named, share
