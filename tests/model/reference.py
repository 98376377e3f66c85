"""A second opinion on the life of keys, in dictionaries.

Written from the rules of Azure Key Vault and Managed HSM as their documents state them (key
attributes, key operations, versions, soft delete), not from hsm_pool.core:

* a key is a list of versions; create adds one; the newest is meant when none is named;
* an operation that is not among a version's key operations is refused;
* a version that is disabled is refused; one not valid yet or expired does verify, decrypt and unwrap only;
* a deleted key can be listed, recovered and purged only, and its name cannot be used again meanwhile;
* recovering brings back every version as it was; purging leaves nothing, and the name is free again;
* a deleted key is purged by itself when its retention is over; with purge protection never before that;
* a key with a rotation policy is rotated on demand, and by itself when its newest version is old enough:
  the new version is like the newest, begins at once, and expires as the policy says;
* there are at most 100 versions a key and 5,000 keys a pool, deleted ones included;
* an exportable version is released to whoever meets its release policy, also when it has expired;
  its policy can be replaced until it is immutable; a version that is not exportable is never released;
* whatever somebody does needs a role assignment of his, at the whole pool or at that very key, whose role has
  the data action; a custom role has those that it names without those that it excludes; an assigned role
  that was deleted allows nothing. Who lacks it is told so, and nothing else.

Refusals are named by their reason on the wire. A refusal changes nothing (G8).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tests.role_tables import ALLOWED, GUIDS

STILL_ALLOWED = {"DECRYPT", "UNWRAP_KEY", "VERIFY"}


class Refused(Exception):
    """The pool must refuse this, for this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Version:
    """What is known of a version; times are Unix milliseconds, 0 for none."""

    version_id: str
    operations: frozenset[str]
    enabled: bool = True
    not_before_ms: int = 0
    expires_ms: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    release: ReleaseRule | None = None
    """Whom it may be released to; None: it is not exportable."""


@dataclass(frozen=True)
class ReleaseRule:
    """The attested level that an environment must have, and whether this may be changed."""

    level: int
    immutable: bool = False


@dataclass(frozen=True)
class Assignment:
    """A role of somebody; ``scope`` is "/", "/keys" or "/keys/{key}"."""

    principal: str
    role: str
    scope: str


@dataclass(frozen=True)
class Policy:
    """A rotation policy in milliseconds, 0 for none; at most one trigger."""

    after_ms: int = 0
    before_expiry_ms: int = 0
    life_ms: int = 0


class ReferencePool:
    """What a pool must answer, one operation after the other."""

    def __init__(
        self,
        keys_max: int = 5_000,
        versions_max: int = 100,
        partitions: int = 3,
        retention_ms: int = 0,
        *,
        protected: bool = False,
    ) -> None:
        self.active: dict[str, dict[str, Version]] = {}
        self.deleted: dict[str, dict[str, Version]] = {}
        self.deleted_at: dict[str, int] = {}
        self.policies: dict[str, Policy] = {}
        self.made_at: dict[str, int] = {}
        """When a version was made, by its id; noted by whoever can look at the clock."""
        self.retention_ms, self.protected = retention_ms, protected
        self.drained: set[int] = set()
        self.roles = {GUIDS[name]: actions for name, actions in ALLOWED.items()}
        """The data actions of each role, by its id."""
        self.assignments: dict[str, Assignment] = {}
        self._keys_max, self._versions_max, self._partitions = keys_max, versions_max, partitions

    def create(self, key: str, version: Version, *, must_not_exist: bool = False, now_ms: int = 0) -> Version:
        """Add a version, and with it the key if there is none."""
        policy = self.policies.get(key)
        if policy and policy.life_ms and not version.expires_ms:
            version = replace(version, expires_ms=now_ms + policy.life_ms)
        if key in self.deleted or (must_not_exist and key in self.active):
            raise Refused("KEY_EXISTS")
        if len(self.active.get(key, {})) == self._versions_max:
            raise Refused("LIMIT_EXCEEDED")
        if key not in self.active and len(self.active) + len(self.deleted) == self._keys_max:
            raise Refused("LIMIT_EXCEEDED")
        _check_window(version)
        self.active.setdefault(key, {})[version.version_id] = version
        self.made_at[version.version_id] = now_ms
        return version

    def find(self, key: str, version_id: str = "") -> Version:
        """Return a version of an active key, the newest when none is named."""
        versions = self.versions(key)
        if version_id and version_id not in versions:
            raise Refused("KEY_NOT_FOUND")
        return versions[version_id or list(versions)[-1]]

    def versions(self, key: str) -> dict[str, Version]:
        """Return the versions of an active key, oldest first."""
        if key in self.deleted:
            raise Refused("KEY_SOFT_DELETED")
        if key not in self.active:
            raise Refused("KEY_NOT_FOUND")
        return self.active[key]

    def update(self, key: str, version_id: str = "", **changes: Any) -> Version:
        """Change what is given of a version."""
        old = self.find(key, version_id)
        version = replace(old, **changes)
        if version.release != old.release:
            if old.release is None:
                raise Refused("INVALID_FIELD")
            if old.release.immutable:
                raise Refused("RELEASE_POLICY_IMMUTABLE")
        _check_window(version)
        self.active[key][version.version_id] = version
        return version

    def use(self, key: str, operation: str, now_ms: int, version_id: str = "") -> Version:
        """Return the version that does the operation now."""
        version = self.find(key, version_id)
        if operation not in version.operations:
            raise Refused("OPERATION_NOT_PERMITTED")
        begun = not version.not_before_ms or version.not_before_ms <= now_ms
        ended = version.expires_ms and version.expires_ms <= now_ms
        if not version.enabled or (operation not in STILL_ALLOWED and (not begun or ended)):
            raise Refused("KEY_NOT_USABLE")
        return version

    def release(self, key: str, level: int, version_id: str = "") -> Version:
        """Return the version that is released to an environment of that level, 0 for one without a token."""
        version = self.find(key, version_id)
        if version.release is None:
            raise Refused("OPERATION_NOT_PERMITTED")
        if not version.enabled:
            raise Refused("KEY_NOT_USABLE")
        if version.release.level != level:
            raise Refused("KEY_RELEASE_REFUSED")
        return version

    def set_policy(self, key: str, policy: Policy | None) -> None:
        """Give a key a rotation policy, or take it away."""
        self.versions(key)
        self.policies.pop(key, None)
        if policy:
            self.policies[key] = policy

    def rotate(self, key: str, version_id: str, now_ms: int) -> Version:
        """Add a version like the newest."""
        newest = self.find(key)
        if key not in self.policies:
            raise Refused("ROTATION_POLICY_MISSING")
        return self.create(
            key, replace(newest, version_id=version_id, not_before_ms=0, expires_ms=0), now_ms=now_ms
        )

    def due(self, now_ms: int) -> set[str]:
        """Return the keys that are to be purged or rotated by now."""
        found = {key for key in self.deleted if now_ms - self.deleted_at[key] >= self.retention_ms}
        for key, policy in self.policies.items():
            versions = self.active.get(key)
            if not versions or len(versions) == self._versions_max:
                continue
            newest = list(versions.values())[-1]
            if not newest.enabled or now_ms < newest.not_before_ms:
                continue
            old = policy.after_ms and now_ms - self.made_at[newest.version_id] >= policy.after_ms
            early = policy.before_expiry_ms and newest.expires_ms
            if old or (early and newest.expires_ms - now_ms <= policy.before_expiry_ms):
                found.add(key)
        return found

    def delete(self, key: str, now_ms: int = 0) -> None:
        """Soft-delete a key with all its versions."""
        self.versions(key)
        self.deleted[key] = self.active.pop(key)
        self.deleted_at[key] = now_ms

    def recover(self, key: str) -> Version:
        """Bring a deleted key back as it was."""
        self._check_deleted(key)
        self.active[key] = self.deleted.pop(key)
        return self.find(key)

    def purge(self, key: str, now_ms: int = 0) -> None:
        """Forget a deleted key for good."""
        self._check_deleted(key)
        if self.protected and now_ms - self.deleted_at[key] < self.retention_ms:
            raise Refused("PURGE_PROTECTED")
        del self.deleted[key]
        self.policies.pop(key, None)

    def drain(self, partition: int, serving: set[int]) -> None:
        """Take a partition out of service; two others must go on (G5)."""
        if len(serving - self.drained - {partition}) < self._partitions - 1:
            raise Refused("FLOOR_OF_TWO")
        self.drained.add(partition)

    # -- roles -------------------------------------------------------------------------------

    def permit(self, principal: str, action: str, scope: str) -> None:
        """Let somebody do something at "/" or at "/keys/{key}"."""
        for assignment in self.assignments.values():
            holds = assignment.principal == principal and assignment.scope in {"/", "/keys", scope}
            if holds and action in self.roles.get(assignment.role, frozenset()):
                return
        raise Refused("PERMISSION_DENIED")

    def define(self, role: str, allowed: frozenset[str], excluded: frozenset[str]) -> None:
        """Make a custom role, or another one of it; whoever has it has what it allows now."""
        if role in GUIDS.values():
            raise Refused("INVALID_FIELD")
        self.roles[role] = allowed - excluded

    def undefine(self, role: str) -> None:
        """Delete a custom role; it stays assigned and allows nothing."""
        if role in GUIDS.values():
            raise Refused("INVALID_FIELD")
        if role not in self.roles:
            raise Refused("ROLE_DEFINITION_NOT_FOUND")
        del self.roles[role]

    def assign(self, name: str, assignment: Assignment) -> None:
        """Give a role to somebody."""
        if assignment.role not in self.roles:
            raise Refused("ROLE_DEFINITION_NOT_FOUND")
        if assignment in self.assignments.values():
            raise Refused("ROLE_ASSIGNMENT_EXISTS")
        at_scope = sum(other.scope == assignment.scope for other in self.assignments.values())
        if assignment.scope.startswith("/keys/") and at_scope == 10:
            raise Refused("LIMIT_EXCEEDED")
        self.assignments[name] = assignment

    def revoke(self, name: str, scope: str) -> None:
        """Take a role from somebody."""
        if name not in self.assignments or self.assignments[name].scope != scope:
            raise Refused("ROLE_ASSIGNMENT_NOT_FOUND")
        del self.assignments[name]

    def _check_deleted(self, key: str) -> None:
        if key not in self.deleted:
            raise Refused("DELETED_KEY_NOT_FOUND")


def _check_window(version: Version) -> None:
    if version.not_before_ms and version.expires_ms and version.not_before_ms >= version.expires_ms:
        raise Refused("INVALID_FIELD")
