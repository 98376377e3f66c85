"""What a key version may be used for, and when (Azure Key Vault, key attributes)."""

from __future__ import annotations

from datetime import UTC, datetime

from hsm_pool.core.model import KeyOperation, KeyVersionRecord
from hsm_pool.errors import KeyNotUsable, OperationNotPermitted

_EXEMPT_FROM_TIME = frozenset(
    {KeyOperation.DECRYPT, KeyOperation.UNWRAP_KEY, KeyOperation.VERIFY, KeyOperation.SECURE_UNWRAP_KEY}
)
"""Operations that a version outside of its times still does, as the real service (Azure key attributes).

Azure's page does not name secureUnwrapKey: it is taken for an unwrap. It names no exception for a
disabled version, and the service refuses to decrypt, sign and unwrap with one (KeyDisabled;
Azure/azure-sdk-for-python issue 45342): to disable a key is how its owner stops it at once.
"""


def _utc(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def check_enabled(version: KeyVersionRecord) -> None:
    """Check that a version may be used at all.

    Raises:
        KeyNotUsable: It is disabled.
    """
    if not version.enabled:
        raise KeyNotUsable(f"key {version.key_id} is disabled", cause="disabled")


def check_use(version: KeyVersionRecord, operation: KeyOperation, time_ms: int) -> None:
    """Check that a version may be used for an operation at a time.

    Raises:
        OperationNotPermitted: The operation is not among its key operations.
        KeyNotUsable: It is disabled, not yet valid or expired.
    """
    if operation not in version.key_operations:
        raise OperationNotPermitted(
            f"key {version.key_id} does not permit {operation.azure_name}, only "
            + ", ".join(permitted.azure_name for permitted in version.key_operations),
            operation=operation.name,
        )
    check_enabled(version)
    if operation in _EXEMPT_FROM_TIME:
        return
    if version.not_before_ms and time_ms < version.not_before_ms:
        raise KeyNotUsable(
            f"key {version.key_id} is not valid before {_utc(version.not_before_ms)}", cause="not_before"
        )
    if version.expires_ms and time_ms >= version.expires_ms:
        raise KeyNotUsable(f"key {version.key_id} has expired at {_utc(version.expires_ms)}", cause="expires")
