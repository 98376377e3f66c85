"""Azure's security-domain document: items under a master key, shared among officers (G4)."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import rsa

from security_domain.azure import sharing, tokens
from security_domain.azure.items import (
    DOCUMENT_BYTES_MAX,
    Item,
    SealedItem,
    open_all,
    parse_all,
    parse_json,
    seal_all,
)
from security_domain.encoding import bind, canonical, check_object, decode
from security_domain.errors import OTHER_SHARE, InvalidFile, InvalidOfficers, InvalidShare
from security_domain.officers import OFFICERS_MAX, OFFICERS_MIN, QUORUM_MIN, check_officers
from security_domain.secret import Secret

VERSION = 2
KEY_ALGORITHM = "shamir_share"


@dataclass(frozen=True, slots=True)
class WrappedShare:
    """A share as it stands in a document."""

    thumbprint: str
    token: str
    commitment: str
    """What :func:`commitment` made; "" in a document of a service that does not commit itself."""

    def check(self, share: Secret) -> None:
        """Check that a share is well formed and the one that this officer was given.

        Raises:
            InvalidShare: It is not; where there is no commitment only its form is known.
        """
        sharing.parse_share(share)
        if self.commitment and not hmac.compare_digest(self.commitment, commitment(self.thumbprint, share)):
            raise InvalidShare(OTHER_SHARE)


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed security-domain document."""

    required: int
    shares: tuple[WrappedShare, ...]
    items: tuple[SealedItem, ...]
    digest: bytes
    """SHA-256 of the document, however it was spelled."""

    def share_of(self, thumbprint: str) -> WrappedShare:
        """Return the share of an officer's certificate.

        Raises:
            InvalidOfficers: The document has none for it.
        """
        for share in self.shares:
            if share.thumbprint == thumbprint:
                return share
        raise InvalidOfficers("the file has no share for this certificate")


def commitment(thumbprint: str, share: Secret) -> str:
    """Return a UUID of version 8 (RFC 9562) with 122 bits of SHA-256 over a share and its officer.

    It is the ``kid`` of the share's JWE, which Azure's clients do not look at, and lets a reader
    name the officer whose share is wrong. It says nothing about a share, whose values are random.
    """
    digest = hashlib.sha256(bind("mhsm-sd/azure-commitment/v1", thumbprint, share.reveal())).digest()
    number = int.from_bytes(digest[:16], "big")
    number = number & ~(0xF << 76) | (8 << 76)
    number = number & ~(0x3 << 62) | (0x2 << 62)
    return str(uuid.UUID(int=number))


def make(items: Sequence[Item], officer_certificates_der: Sequence[bytes], required: int) -> bytes:
    """Make a document under a new master key, which nobody holds afterwards.

    Args:
        items: 1 to 16, of up to 32 KiB each.
        officer_certificates_der: 3 to 10, with distinct RSA keys of 2048 to 8192 bits.
        required: How many of the officers open it.

    Returns:
        The document, spelled as Azure's service spells it.

    Raises:
        InvalidOfficers: The officers or the quorum are not acceptable.
        InvalidFile: The items are not acceptable, or too large together.
    """
    officers = check_officers(officer_certificates_der, required)
    master = Secret(os.urandom(sharing.KEY_BYTES))
    shares: list[Secret] = []
    try:
        encrypted = seal_all(master, items)
        shares = sharing.split(master, required, len(officers))
        wrapped = [
            {
                "enc_key": tokens.wrap(officer.public_key, share, commitment(officer.thumbprint, share)),
                "x5t_256": officer.thumbprint,
            }
            for officer, share in zip(officers, shares, strict=True)
        ]
    finally:
        for secret in (master, *shares):
            secret.wipe()
    shared = {"enc_shares": wrapped, "key_algorithm": KEY_ALGORITHM, "required": required}
    document = canonical({"EncData": encrypted, "SharedKeys": shared, "version": VERSION})
    parse(document)  # whoever is given it can read it
    return document


def is_document(octets: bytes) -> bool:
    """Whether a file says that it is of Azure's format and not of our own; nothing else is checked."""
    return len(octets) <= DOCUMENT_BYTES_MAX and b'"EncData"' in octets and b'"SharedKeys"' in octets


def parse(octets: bytes) -> Document:
    """Parse a document; nothing is decrypted.

    Raises:
        InvalidFile: It is something else, or out of bounds.
    """
    fields = parse_json(octets, {"EncData": dict, "SharedKeys": dict, "version": int})
    if fields["version"] != VERSION:
        raise InvalidFile("the version is not known")
    shared = check_object(fields["SharedKeys"], {"enc_shares": list, "key_algorithm": str, "required": int})
    if shared["key_algorithm"] != KEY_ALGORITHM:
        raise InvalidFile("the kind of shares is not known")
    if not OFFICERS_MIN <= len(shared["enc_shares"]) <= OFFICERS_MAX:
        raise InvalidFile("the number of officers is out of bounds")
    if not QUORUM_MIN <= shared["required"] <= len(shared["enc_shares"]):
        raise InvalidFile("the quorum is out of bounds")
    shares = tuple(_share(entry) for entry in shared["enc_shares"])
    if len({share.thumbprint for share in shares}) != len(shares):
        raise InvalidFile("two shares are for the same certificate")
    digest = hashlib.sha256(canonical(fields)).digest()
    return Document(shared["required"], shares, parse_all(fields["EncData"]), digest)


def open_share(document: Document, private_key: rsa.RSAPrivateKey, thumbprint: str) -> Secret:
    """Open an officer's share.

    Args:
        document: The document.
        private_key: The officer's.
        thumbprint: SHA-256 of the officer's certificate (DER), base64url.

    Returns:
        64 bytes.

    Raises:
        InvalidOfficers: The document has no share for this certificate.
        InvalidFile: The share does not open with this key.
        InvalidShare: What opened is not a share, or not the one this officer was given.
    """
    wrapped = document.share_of(thumbprint)
    share = tokens.unwrap(private_key, wrapped.token)
    wrapped.check(share)
    return share


def open_items(document: Document, shares: Sequence[Secret]) -> list[Item]:
    """Open all items with exactly the required number of shares.

    Raises:
        QuorumMissing: There are fewer.
        InvalidShare: There are more, one is malformed, or two are the same.
        InvalidFile: A share is not of this document, or the document was changed.
    """
    master = sharing.combine(shares, document.required)
    try:
        return open_all(master, document.items)
    finally:
        master.wipe()


def _share(value: object) -> WrappedShare:
    fields = check_object(value, {"enc_key": str, "x5t_256": str})
    decode(fields["x5t_256"], 32)
    header = tokens.check_form(fields["enc_key"], "RSA-OAEP-256", tokens.KEY_CHARACTERS_MAX)
    return WrappedShare(fields["x5t_256"], fields["enc_key"], _committed(header["kid"]))


def _committed(key_id: str) -> str:
    """Return the key id if it is a commitment: Azure's own are UUIDs of version 4."""
    with contextlib.suppress(ValueError):
        if uuid.UUID(key_id).version == 8 and str(uuid.UUID(key_id)) == key_id:
            return key_id
    return ""
