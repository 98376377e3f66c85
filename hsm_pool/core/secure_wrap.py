"""Keys that wrap new keys for attested environments: secureWrapKey and secureUnwrapKey.

Source: Azure Key Vault REST API (secure wrap, secure unwrap) and its clients' samples: such a key is
made for nothing else, is not exportable and has a release policy. Whoever could also unwrap or decrypt
with it would get what it wraps without any attestation (G3).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from hsm_pool.core.model import KeyOperation, KeyReleasePolicy, KeyVersionRecord
from hsm_pool.errors import InvalidField, OperationNotPermitted

WRAPPED_KEY_BYTES: Final = 32
"""What is wrapped: an AES key of 256 bits (Azure)."""

OPERATIONS: Final = frozenset({KeyOperation.SECURE_WRAP_KEY, KeyOperation.SECURE_UNWRAP_KEY})


def wraps_securely(operations: Collection[KeyOperation]) -> bool:
    """Return whether a version of these operations is one of those keys."""
    return not OPERATIONS.isdisjoint(operations)


def check_new(operations: Collection[KeyOperation], *, exportable: bool) -> None:
    """Check that a new version that wraps securely does nothing else, and stays in the pool.

    Raises:
        InvalidField: It has another operation, or is exportable.
    """
    if not wraps_securely(operations):
        return
    if not OPERATIONS.issuperset(operations):
        raise InvalidField("a key that wraps securely has no other operation", field="key_operations")
    if exportable:
        raise InvalidField("a key that wraps securely cannot be exportable", field="attributes.exportable")


def check_changed(old: Collection[KeyOperation], new: Collection[KeyOperation]) -> None:
    """Check new operations of a version.

    Raises:
        InvalidField: A key that wraps securely would become another key, or another key become one.
    """
    if wraps_securely(old) != wraps_securely(new):
        raise InvalidField("whether a key wraps securely is fixed when it is made", field="key_operations")
    check_new(new, exportable=False)


def policy_of(version: KeyVersionRecord) -> KeyReleasePolicy:
    """Return who gets what a version wraps.

    Raises:
        OperationNotPermitted: It wraps nothing securely.
    """
    if version.release_policy is None:
        raise OperationNotPermitted(
            f"key {version.key_id} does not wrap securely", operation=KeyOperation.SECURE_UNWRAP_KEY.name
        )
    return version.release_policy
