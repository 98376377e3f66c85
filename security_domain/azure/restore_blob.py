"""The restore blob: the items of a document, encrypted anew to a pool's exchange certificate.

Making it is the one-workstation way of Azure's clients: a quorum of private keys meets in
one process, which sees the items.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric import rsa

from security_domain.azure import sharing, tokens
from security_domain.azure.document import Document, open_items, open_share
from security_domain.azure.items import Item, open_all, parse_all, parse_json, seal_all
from security_domain.azure.transfer_key import public_key, thumbprint
from security_domain.encoding import canonical, check_object, decode
from security_domain.errors import InvalidFile, InvalidShare, QuorumMissing, ShareRefused
from security_domain.officers import parse_officer
from security_domain.secret import Secret

_KEY_ID = "not used"


def make_restore_blob(
    document: Document,
    officers: Sequence[tuple[rsa.RSAPrivateKey, bytes]],
    exchange_certificate_der: bytes,
) -> bytes:
    """Open a document and encrypt its items to an exchange certificate, under a new master key.

    Args:
        document: The document.
        officers: Private key and certificate (DER) of each; those beyond the quorum are not used.
        exchange_certificate_der: From the transfer key; whoever calls has checked whose it is.

    Returns:
        The restore blob.

    Raises:
        QuorumMissing: There are fewer officers than are required.
        InvalidOfficers: A certificate is none, or the document has no share for it.
        ShareRefused: A key is not the officer's, his share is not the one he was given, or he stands
            twice; names him.
        InvalidShare: Two shares have the same number: the document was changed.
        InvalidFile: The document was changed or holds too much, or the exchange certificate is not
            acceptable.
    """
    exchange_key = public_key(exchange_certificate_der)
    if len(officers) < document.required:
        raise QuorumMissing(f"{document.required} officers are needed")
    secrets: list[Secret] = []
    try:
        named: set[str] = set()
        for private_key, certificate_der in officers[: document.required]:
            officer = thumbprint(certificate_der)
            if officer in named:
                raise ShareRefused("this officer stands twice", officer)
            named.add(officer)
            secrets.append(_open_share(document, private_key, certificate_der))
        opened = open_items(document, secrets)
        secrets += [item.plaintext for item in opened]
        master = Secret(os.urandom(sharing.KEY_BYTES))
        secrets.append(master)
        wrapped = {
            "enc_key": tokens.wrap(exchange_key, master, _KEY_ID),
            "x5t_256": thumbprint(exchange_certificate_der),
        }
        return canonical({"EncData": seal_all(master, opened), "WrappedKey": wrapped})
    finally:
        for secret in secrets:
            secret.wipe()


def _open_share(document: Document, private_key: rsa.RSAPrivateKey, certificate_der: bytes) -> Secret:
    """Open an officer's share; what is wrong with it is said with his thumbprint.

    Raises:
        ShareRefused: The key is not that of the certificate, or the share is not the one he was given.
        InvalidOfficers: The document has no share for him.
    """
    officer = parse_officer(certificate_der)
    if officer.public_key.public_numbers() != private_key.public_key().public_numbers():
        raise ShareRefused("the key is not that of the certificate", officer.thumbprint)
    try:
        return open_share(document, private_key, officer.thumbprint)
    except (InvalidFile, InvalidShare) as error:
        raise ShareRefused(str(error), officer.thumbprint) from None


def open_restore_blob(
    blob: bytes, private_key: rsa.RSAPrivateKey, exchange_certificate_der: bytes
) -> list[Item]:
    """Open a restore blob, ours or one made by Azure's clients.

    Args:
        blob: JSON of any spelling.
        private_key: The exchange key.
        exchange_certificate_der: Its certificate; the blob must have been made for this one.

    Raises:
        InvalidFile: It is something else, for another certificate, or does not open.
    """
    fields = parse_json(blob, {"EncData": dict, "WrappedKey": dict})
    wrapped = check_object(fields["WrappedKey"], {"enc_key": str, "x5t_256": str})
    sealed = parse_all(fields["EncData"])
    decode(wrapped["x5t_256"], 32)
    if not hmac.compare_digest(wrapped["x5t_256"], thumbprint(exchange_certificate_der)):
        raise InvalidFile("the restore blob was made for another exchange certificate")
    master = tokens.unwrap(private_key, wrapped["enc_key"])
    try:
        if len(master) != sharing.KEY_BYTES:
            raise InvalidFile(tokens.REFUSED)
        return open_all(master, sealed)
    finally:
        master.wipe()
