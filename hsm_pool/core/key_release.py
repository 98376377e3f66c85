"""Which key versions may be released, and to whom (Azure Key Vault, secure key release).

An exportable version has a release policy from the first moment on, and so has one that wraps
securely (:mod:`hsm_pool.core.secure_wrap`); no other version has one. Exportable never changes;
the policy does until it is immutable.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hsm_pool.core import key_use, release_policy, secure_wrap
from hsm_pool.core.model import KeyOperation, KeyReleasePolicy, KeyType, KeyVersionRecord
from hsm_pool.core.release_policy import PolicyNotMet
from hsm_pool.errors import InvalidField, KeyReleaseRefused, OperationNotPermitted, ReleasePolicyImmutable


def check_new(
    key_type: KeyType,
    operations: Collection[KeyOperation],
    exportable: bool,
    policy: KeyReleasePolicy | None,
) -> None:
    """Check what a new version says of its release.

    Raises:
        InvalidField: A key that is exportable or wraps securely has no release policy, another key has
            one, the policy is none, or the key is of a type that is not released (Azure has no form for
            AKP keys).
    """
    securely = secure_wrap.wraps_securely(operations)
    if policy is None:
        if exportable or securely:
            kind = "an exportable key" if exportable else "a key that wraps securely"
            raise InvalidField(f"{kind} must have a release policy", field="release_policy")
        return
    if not exportable and not securely:
        raise InvalidField("a key that is not exportable must not have a release policy", field="exportable")
    if exportable and key_type is KeyType.AKP:
        raise InvalidField("an AKP key cannot be exportable", field="exportable")
    release_policy.parse(policy.data)


def replaced(version: KeyVersionRecord, policy: KeyReleasePolicy | None) -> KeyReleasePolicy | None:
    """Return the release policy of a version after an update; None asks for no change.

    Raises:
        InvalidField: The version has none, or the policy is none.
        ReleasePolicyImmutable: The version's policy is another one and can never be replaced.
    """
    old = version.release_policy
    if policy is None or policy == old:
        return old
    check_new(version.key_type, version.key_operations, version.exportable, policy)
    if old is not None and old.immutable:
        raise ReleasePolicyImmutable(f"the release policy of key {version.key_id} is immutable")
    return policy


def check_exportable(version: KeyVersionRecord) -> KeyReleasePolicy:
    """Return the release policy of a version. One outside of its times is released, too (Azure).

    Raises:
        OperationNotPermitted: It is not exportable.
        KeyNotUsable: It is disabled.
    """
    if not version.exportable or version.release_policy is None:
        raise OperationNotPermitted(f"key {version.key_id} is not exportable", operation="RELEASE")
    key_use.check_enabled(version)
    return version.release_policy


def check_target(policy: KeyReleasePolicy, authority: str, claims: Mapping[str, Any]) -> None:
    """Check what an authority says of the environment that a key is to be released to.

    Raises:
        KeyReleaseRefused: The policy does not name the authority, or the claims do not meet it.
    """
    try:
        release_policy.require(release_policy.parse(policy.data), authority, claims)
    except PolicyNotMet:
        raise KeyReleaseRefused from None
