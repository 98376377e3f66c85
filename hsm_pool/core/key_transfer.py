"""Key transfer blobs: how a key comes into a pool without being seen on the way (BYOK).

Source: Azure Key Vault, "Bring your own key specification"::

    {"schema_version": "1.0.0", "header": {"kid": "<key exchange key>", "alg": "dir",
     "enc": "CKM_RSA_AES_KEY_WRAP"}, "ciphertext": "<base64url>", "generator": "..."}

The key exchange key is an RSA key of the pool whose only operation is import.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hsm_pool import limits
from hsm_pool.core.model import KeyOperation
from hsm_pool.errors import InvalidField

_SCHEMA_VERSIONS = frozenset({"1.0", "1.0.0"})
_ALGORITHM = "dir"
_ENCRYPTION = "CKM_RSA_AES_KEY_WRAP"
_KEY_NAME = re.compile(
    rf"(?:https://[^/]{{1,255}}/)?keys/([0-9a-zA-Z-]{{1,{limits.KEY_ID_LENGTH_MAX}}})/(?:versions/)?([0-9a-f]{{32}})"
)
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class KeyTransferBlob:
    """A parsed blob; the ciphertext is not opened yet."""

    key_id: str
    version_id: str
    """Key exchange key."""
    ciphertext: bytes


def parse(document: bytes) -> KeyTransferBlob:
    """Parse a blob, which has at most IMPORT_BYTES_MAX bytes.

    ``kid`` is keys/{key}/versions/{version}, or Azure's URL of a version.

    Raises:
        InvalidField: It is none; the text says what is missing.
    """
    try:
        value = json.loads(document.decode())
    except (ValueError, RecursionError):
        raise _invalid("it is not JSON") from None
    if not isinstance(value, dict) or not isinstance(value.get("header"), dict):
        raise _invalid("an object with schema_version, header and ciphertext is needed")
    header: dict[str, Any] = value["header"]
    if value.get("schema_version") not in _SCHEMA_VERSIONS:
        raise _invalid("schema_version is 1.0.0")
    if header.get("alg") != _ALGORITHM or header.get("enc") != _ENCRYPTION:
        raise _invalid(f"alg is {_ALGORITHM}, and enc is {_ENCRYPTION}")
    named = _KEY_NAME.fullmatch(header["kid"]) if isinstance(header.get("kid"), str) else None
    if named is None:
        raise _invalid("kid is not the name of a key version")
    text = value.get("ciphertext")
    if not isinstance(text, str) or not _BASE64URL.fullmatch(text) or len(text) % 4 == 1:
        raise _invalid("ciphertext is not base64url without padding")
    ciphertext = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    return KeyTransferBlob(named[1], named[2], ciphertext)


def check_new(operations: Collection[KeyOperation], *, exportable: bool) -> None:
    """Check that a new version that is a key exchange key stays in the pool.

    Raises:
        InvalidField: It is exportable.
    """
    if KeyOperation.IMPORT in operations and exportable:
        raise InvalidField("a key that imports cannot be exportable", field="attributes.exportable")


def check_changed(old: Collection[KeyOperation], new: Collection[KeyOperation]) -> None:
    """Check new operations of a version.

    Whoever turned a key exchange key into one that decrypts could read every blob made for it (G3).

    Raises:
        InvalidField: A key exchange key would become another key, or another key become one.
    """
    if (KeyOperation.IMPORT in old) != (KeyOperation.IMPORT in new):
        raise InvalidField("whether a key imports is fixed when it is made", field="key_operations")


def _invalid(text: str) -> InvalidField:
    return InvalidField(f"key transfer blob: {text}", field="material.key_transfer_blob")
