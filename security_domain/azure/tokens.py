"""The two kinds of compact JWE (RFC 7516) in Azure's format, and no other.

Keys: RSA-OAEP-256 with A256CBC-HS512; items: dir with A256CBC-HS512 (RFC 7518). Whatever
does not open raises one error with one text, so that no cause can be told from another.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from joserfc import jwe
from joserfc.jwk import OctKey, RSAKey

from security_domain.encoding import decode
from security_domain.errors import InvalidFile
from security_domain.secret import Secret

ITEM_BYTES_MAX = 32 * 1024
ITEM_CHARACTERS_MAX = 44 * 1024
"""Of an item of 32 KiB: base64url makes it a third longer."""
KEY_CHARACTERS_MAX = 4096
REFUSED = "something encrypted does not open: wrong keys or shares, or the file was changed"

_ENCRYPTION = "A256CBC-HS512"
_HEADER_CHARACTERS_MAX = 512
_IV_BYTES = 16
_TAG_BYTES = 32


class _Registry(jwe.JWERegistry):
    max_encrypted_key_length = 1366
    """Characters of a key encrypted to RSA-8192."""


_WRAPPING = _Registry(algorithms=["RSA-OAEP-256", _ENCRYPTION])
_DIRECT = _Registry(algorithms=["dir", _ENCRYPTION])


def wrap(public_key: rsa.RSAPublicKey, plaintext: Secret, key_id: str) -> str:
    """Encrypt a share or a key to an RSA key."""
    header = {"alg": "RSA-OAEP-256", "enc": _ENCRYPTION, "kid": key_id}
    return jwe.encrypt_compact(header, plaintext.reveal(), RSAKey.import_key(public_key), registry=_WRAPPING)


def unwrap(private_key: rsa.RSAPrivateKey, token: str) -> Secret:
    """Open a share or a key; its ``kid`` is any text.

    Raises:
        InvalidFile: It does not open, for whatever reason.
    """
    with contextlib.suppress(Exception):  # parsers and ciphers raise many kinds; all are one here
        check_form(token, "RSA-OAEP-256", KEY_CHARACTERS_MAX)
        opened = jwe.decrypt_compact(token, RSAKey.import_key(private_key), registry=_WRAPPING)
        if opened.plaintext is not None:
            return Secret(opened.plaintext)
    raise InvalidFile(REFUSED)


def seal(key: Secret, plaintext: Secret, tag: str) -> str:
    """Encrypt an item under its 64-byte key.

    Raises:
        InvalidFile: It is too large.
    """
    if len(plaintext) > ITEM_BYTES_MAX:
        raise InvalidFile(f"an item has more than {ITEM_BYTES_MAX} bytes")
    header = {"alg": "dir", "enc": _ENCRYPTION, "kid": tag}
    return jwe.encrypt_compact(header, plaintext.reveal(), OctKey.import_key(key.reveal()), registry=_DIRECT)


def unseal(key: Secret, token: str, tag: str) -> Secret:
    """Open an item; its ``kid`` is its tag.

    Raises:
        InvalidFile: It does not open, for whatever reason.
    """
    with contextlib.suppress(Exception):  # as above
        if check_form(token, "dir", ITEM_CHARACTERS_MAX)["kid"] == tag:
            opened = jwe.decrypt_compact(token, OctKey.import_key(key.reveal()), registry=_DIRECT)
            if opened.plaintext is not None:
                return Secret(opened.plaintext)
    raise InvalidFile(REFUSED)


def check_form(token: str, algorithm: str, characters_max: int) -> dict[str, Any]:
    """Check everything about a token that needs no key: sizes, header, lengths of IV and tag.

    Returns:
        The header.

    Raises:
        InvalidFile: It is not a token of this kind.
    """
    if len(token) > characters_max:
        raise InvalidFile(f"a JWE has more than {characters_max} characters")
    parts = token.split(".")
    if len(parts) != 5 or len(parts[0]) > _HEADER_CHARACTERS_MAX:
        raise InvalidFile("a JWE has not five parts, or its header is too large")
    encoded, _, initialization_vector, _, tag = parts
    header: Any = None
    # Suppressed, not chained: the parser's error would carry the text.
    with contextlib.suppress(ValueError, RecursionError):
        header = json.loads(decode(encoded).decode("ascii"))
    if not isinstance(header, dict) or set(header) != {"alg", "enc", "kid"}:
        raise InvalidFile("a JWE's header is not alg, enc and kid")
    if header["alg"] != algorithm or header["enc"] != _ENCRYPTION or not isinstance(header["kid"], str):
        raise InvalidFile("a JWE uses an algorithm that is not accepted")
    decode(initialization_vector, _IV_BYTES)
    decode(tag, _TAG_BYTES)
    return header
