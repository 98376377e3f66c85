"""One officer's submission: his share under HPKE to the exchange key, signed (per-officer recovery)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from security_domain import container, shares
from security_domain.container import OfficerEntry, SecurityDomainFile
from security_domain.encoding import bind, canonical, decode, encode, parse_object
from security_domain.errors import (
    NO_OFFICER,
    OTHER_SHARE,
    InvalidFile,
    InvalidShare,
    SecurityDomainError,
    ShareRefused,
    SubmissionRefused,
)
from security_domain.wrapping import SUITE, unwrap_by_officer

FORMAT = "mhsm-share-submission/1"
SUBMISSION_BYTES_MAX = 16 * 1024
ATTEMPT_ID_BYTES = 16
EXCHANGE_KEY_BYTES = 32
_FIELDS: dict[str, type] = {
    "format": str,
    "pool_id": str,
    "generation": int,
    "attempt_id": str,
    "exchange_key_digest": str,
    "purpose": str,
    "detail": str,
    "officer": str,
    "sealed_share": str,
    "signature": str,
}
ACTIVATION, RECOVERY, VERIFICATION = "activation", "recovery", "verification"
SHARE_ROTATION, NEW_GENERATION = "share_rotation", "new_generation"
PURPOSES = frozenset({ACTIVATION, RECOVERY, VERIFICATION, SHARE_ROTATION, NEW_GENERATION})
WITH_OFFICERS = frozenset({SHARE_ROTATION})
"""Purposes whose detail says who the new officers are."""
_SHARE_FIELDS: dict[str, type] = {
    "pool_id": str,
    "generation": int,
    "index": int,
    "required": int,
    "total": int,
    "mnemonic": str,
}
_PADDING = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """What a submission of either format is bound to: the attempt, and what the officer agrees to."""

    attempt_id: bytes
    exchange_public_key: bytes
    purpose: str = RECOVERY
    """What the officer agrees to: one of :data:`PURPOSES`."""
    detail: bytes = b""
    """Digest of the new officers, for a purpose that has any; else b""."""

    def __post_init__(self) -> None:
        """Check the form.

        Raises:
            SubmissionRefused: A length is wrong, or the purpose is not known or lacks what belongs to it.
        """
        if len(self.attempt_id) != ATTEMPT_ID_BYTES or len(self.exchange_public_key) != EXCHANGE_KEY_BYTES:
            raise SubmissionRefused("the attempt id or the exchange key has a wrong length")
        if self.purpose not in PURPOSES or len(self.detail) != (32 if self.purpose in WITH_OFFICERS else 0):
            raise SubmissionRefused("the purpose is not known, or comes without what belongs to it")

    @property
    def exchange_key_digest(self) -> bytes:
        """SHA-256 of the exchange key."""
        return hashlib.sha256(self.exchange_public_key).digest()

    def bound(self, label: str, *domain: str | int | bytes, officer: str) -> bytes:
        """Return the HPKE info for an officer's share of a domain, which is named in its format's way."""
        agreed = (self.attempt_id, self.exchange_key_digest, self.purpose, self.detail)
        return bind(label, *domain, *agreed, officer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(AttemptContext):
    """What a submission of the pool's own format is bound to."""

    pool_id: str
    generation: int

    def info(self, officer: str) -> bytes:
        """Return the HPKE info for an officer's share."""
        return self.bound("mhsm-sd/submission/v1", self.pool_id, self.generation, officer=officer)


def own_entry(file: SecurityDomainFile, private_key: rsa.RSAPrivateKey) -> OfficerEntry:
    """Find an officer's entry by his key.

    Raises:
        InvalidShare: No share is for this key.
    """
    own = private_key.public_key().public_numbers()
    for entry in file.officers:
        if entry.public_key.public_numbers() == own:
            return entry
    raise InvalidShare("no share of this security domain is for this key")


def open_own_share(file: SecurityDomainFile, private_key: rsa.RSAPrivateKey) -> tuple[OfficerEntry, str]:
    """Find an officer's entry by his key and open his share.

    Raises:
        InvalidShare: No share is for this key, or it does not open, or is not the committed one.
    """
    entry = own_entry(file, private_key)
    opened = unwrap_by_officer(private_key, entry.thumbprint, entry.share_jwe)
    try:
        share = parse_object(opened, SUBMISSION_BYTES_MAX, _SHARE_FIELDS)
    except InvalidFile:
        raise InvalidShare("the share is malformed") from None
    mnemonic: str = share["mnemonic"]
    stated = (share["pool_id"], share["generation"], share["index"], share["required"], share["total"])
    if stated != (file.pool_id, file.generation, entry.index, file.required, len(file.officers)):
        raise InvalidShare("the share is of another security domain or officer")
    if shares.commitment(file.pool_id, file.generation, entry.index, mnemonic) != entry.share_commitment:
        raise InvalidShare(OTHER_SHARE)
    return entry, mnemonic


def officers_digest(thumbprints: Sequence[str], required: int) -> bytes:
    """Return the detail of a purpose that has new officers: who they are, and how many open the domain."""
    return hashlib.sha256(bind("mhsm-sd/new-officers/v1", required, *thumbprints)).digest()


def make_submission(
    file: bytes,
    officer_private_key: rsa.RSAPrivateKey,
    attempt_id: bytes,
    exchange_public_key: bytes,
    purpose: str = RECOVERY,
    detail: bytes = b"",
) -> bytes:
    """Open the officer's share, encrypt it to the exchange key and sign it.

    Args:
        file: The security-domain file.
        officer_private_key: The officer's own key.
        attempt_id: Names the attempt (16 bytes).
        exchange_public_key: X25519, 32 bytes.
        purpose: What the officer agrees to; the ceremony refuses a share that was given for another.
        detail: From :func:`officers_digest`, for a purpose that has new officers.

    Raises:
        InvalidFile: The file is not a security domain.
        InvalidShare: The key does not open a share of it.
        SubmissionRefused: The attempt id or the exchange key is not one.
    """
    domain = container.parse(file)
    entry, mnemonic = open_own_share(domain, officer_private_key)
    return seal_submission(
        Context(
            attempt_id,
            exchange_public_key,
            purpose,
            detail,
            pool_id=domain.pool_id,
            generation=domain.generation,
        ),
        entry.thumbprint,
        officer_private_key,
        mnemonic,
    )


def seal_submission(context: Context, officer: str, private_key: rsa.RSAPrivateKey, mnemonic: str) -> bytes:
    """Encrypt words to the exchange key and sign; :func:`make_submission` checks them before.

    Raises:
        SubmissionRefused: The exchange key is a point that no honest pool sends.
    """
    sealed = seal_to_exchange_key(mnemonic.encode(), context.exchange_public_key, context.info(officer))
    fields = {
        "format": FORMAT,
        "pool_id": context.pool_id,
        "generation": context.generation,
        "attempt_id": encode(context.attempt_id),
        "exchange_key_digest": encode(context.exchange_key_digest),
        "purpose": context.purpose,
        "detail": encode(context.detail),
        "officer": officer,
        "sealed_share": encode(sealed),
    }
    return sign(fields, private_key)


def seal_to_exchange_key(share: bytes, exchange_public_key: bytes, info: bytes) -> bytes:
    """Return a share under HPKE to the exchange key.

    Raises:
        SubmissionRefused: The exchange key is a point that no honest pool sends.
    """
    exchange_key = X25519PublicKey.from_public_bytes(exchange_public_key)
    try:
        return SUITE.encrypt(share, exchange_key, info)
    except ValueError:  # a point of small order, for which the shared secret is known to everybody
        raise SubmissionRefused("the exchange key is not acceptable") from None


def open_with_exchange_key(sealed: bytes, key: X25519PrivateKey, info: bytes, officer: str) -> bytes:
    """Return the share that :func:`seal_to_exchange_key` sealed.

    Raises:
        ShareRefused: It does not open; names the officer.
    """
    try:
        return SUITE.decrypt(sealed, key, info)
    except Exception:  # noqa: BLE001 - HPKE raises several kinds
        raise ShareRefused("the share does not open with this attempt's exchange key", officer) from None


def sign(fields: Mapping[str, Any], private_key: rsa.RSAPrivateKey) -> bytes:
    """Return a submission: its fields and the officer's signature over them."""
    signature = private_key.sign(canonical(fields), _PADDING, hashes.SHA256())
    return canonical({**fields, "signature": encode(signature)})


def check_signature(fields: Mapping[str, Any], public_key: rsa.RSAPublicKey, officer: str) -> None:
    """Check what :func:`sign` made.

    Raises:
        SubmissionRefused: It is not the signature of this officer over these fields.
    """
    signed = canonical({name: value for name, value in fields.items() if name != "signature"})
    try:
        public_key.verify(decode(fields["signature"]), signed, _PADDING, hashes.SHA256())
    except (InvalidSignature, InvalidFile):
        raise SubmissionRefused("the submission is not signed by this officer", officer) from None


def open_submission(
    submission: bytes, domain: SecurityDomainFile, context: Context, exchange_key: X25519PrivateKey
) -> tuple[OfficerEntry, str]:
    """Check a submission and open its share.

    Returns:
        (officer's entry, mnemonic).

    Raises:
        SubmissionRefused: It is malformed, of another attempt, or not signed by the officer it names.
        ShareRefused: Its share is not the one that this officer was given.
    """
    try:
        fields = parse_object(submission, SUBMISSION_BYTES_MAX, _FIELDS)
        attempt_id = decode(fields["attempt_id"])
        key_digest = decode(fields["exchange_key_digest"])
        detail = decode(fields["detail"])
        sealed = decode(fields["sealed_share"])
    except SecurityDomainError as error:
        raise SubmissionRefused(f"the submission is malformed: {error}") from None
    entry = domain.officer(fields["officer"])
    if fields["format"] != FORMAT or entry is None:
        raise SubmissionRefused(NO_OFFICER)
    officer = entry.thumbprint
    check_signature(fields, entry.public_key, officer)
    if (fields["pool_id"], fields["generation"]) != (context.pool_id, context.generation):
        raise SubmissionRefused("the submission is for another pool or generation", officer)
    if attempt_id != context.attempt_id or key_digest != context.exchange_key_digest:
        raise SubmissionRefused("the submission is for another attempt", officer)
    if (fields["purpose"], detail) != (context.purpose, context.detail):
        raise SubmissionRefused("the officer has agreed to something else than this ceremony", officer)
    mnemonic = open_with_exchange_key(sealed, exchange_key, context.info(officer), officer).decode(
        "ascii", "replace"
    )
    committed = shares.commitment(domain.pool_id, domain.generation, entry.index, mnemonic)
    if committed != entry.share_commitment:
        raise ShareRefused(OTHER_SHARE, officer)
    try:
        shares.parse(mnemonic, domain.required)
    except InvalidShare as error:
        raise ShareRefused(str(error), officer) from None
    return entry, mnemonic


def public_exchange_key(key: X25519PrivateKey) -> bytes:
    """Return the 32 bytes of an exchange key's public half."""
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
