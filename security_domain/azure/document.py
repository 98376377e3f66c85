"""Azure's security-domain document: items under a master key, shared among officers (G4)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import rsa

from security_domain.azure import sharing, tokens
from security_domain.azure.items import Item, SealedItem, open_all, parse_all, parse_json, seal_all
from security_domain.encoding import canonical, check_object, decode
from security_domain.errors import InvalidFile, InvalidOfficers
from security_domain.officers import OFFICERS_MAX, OFFICERS_MIN, QUORUM_MIN, check_officers
from security_domain.secret import Secret

VERSION = 2
KEY_ALGORITHM = "shamir_share"


@dataclass(frozen=True, slots=True)
class WrappedShare:
    """A share as it stands in a document."""

    thumbprint: str
    token: str


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed security-domain document."""

    required: int
    shares: tuple[WrappedShare, ...]
    items: tuple[SealedItem, ...]


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
                "enc_key": tokens.wrap(officer.public_key, share, str(uuid.uuid4())),
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
    return Document(shared["required"], shares, parse_all(fields["EncData"]))


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
        InvalidShare: What opened is not a share.
    """
    token = next((share.token for share in document.shares if share.thumbprint == thumbprint), None)
    if token is None:
        raise InvalidOfficers("the file has no share for this certificate")
    share = tokens.unwrap(private_key, token)
    sharing.parse_share(share)
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
    tokens.check_form(fields["enc_key"], "RSA-OAEP-256", tokens.KEY_CHARACTERS_MAX)
    return WrappedShare(fields["x5t_256"], fields["enc_key"])
