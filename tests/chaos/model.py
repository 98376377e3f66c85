"""Reference model of one key's life cycle: what a pool that behaves like one machine may answer (G2).

Every operation addresses the key by name, so use and update mean its newest version. ``KeyState`` is
the state: ``absent``, ``active`` or ``deleted`` (soft-deleted), with the versions of the key, oldest
first. An operation and its result are tuples of plain values:

=============================  =======================  ==================================================
operation                      result of success        refused with ("error", reason)
=============================  =======================  ==================================================
("create", must_not_exist)     ("ok", version)          deleted, or active and must_not_exist: KEY_EXISTS
("update", enabled)            ("ok", version)          as use: absent KEY_NOT_FOUND,
("get",)                       ("ok", version, enabled) deleted KEY_SOFT_DELETED
("sign",)                      ("ok", version)          as use; disabled: KEY_NOT_USABLE
("delete",)                    ("ok",)                  as use
("recover",), ("purge",)       ("ok",)                  absent or active: DELETED_KEY_NOT_FOUND
=============================  =======================  ==================================================

A create of an active key adds a version, enabled. Deleting and recovering keep the versions and
whether each is enabled; purging leaves nothing.

Versions are names that the pool chooses. A create whose reply was lost adds a version whose name is
not known (None); the first operation that shows a new name settles it.

Which outcome goes into a history: a result above as it is; any other refusal that is sure to have
changed nothing (NOT_FRESH, PARTITION_DRAINED, OVERLOADED, ...) is discarded; everything else
(COMMIT_UNKNOWN, INTERNAL, deadline, lost connection) is an unknown outcome. A repeat with the same
request_id belongs to the first call: one operation from the first invocation to the last return.
Retention and the limit on versions are outside the model: histories stay below both.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

from tests.chaos.linearizability import Model

REASONS = frozenset(
    {"KEY_NOT_FOUND", "KEY_SOFT_DELETED", "KEY_NOT_USABLE", "KEY_EXISTS", "DELETED_KEY_NOT_FOUND"}
)
"""Refusals that tell something about the key; no other may stand in a history."""

VERBS = frozenset({"create", "update", "get", "sign", "delete", "recover", "purge"})


class Version(NamedTuple):
    """A version of the key; the name is None while no reply has shown it."""

    name: str | None
    enabled: bool


class KeyState(NamedTuple):
    """State of one key; versions oldest first, none exactly when the key is absent."""

    phase: Literal["absent", "active", "deleted"]
    versions: tuple[Version, ...] = ()


ABSENT = KeyState("absent")


def refusal(state: KeyState, operation: tuple[Any, ...]) -> str | None:
    """Return the reason for which the operation is refused in this state, or None."""
    verb = operation[0]
    reason = None
    if verb == "create":
        if state.phase == "deleted" or (state.phase == "active" and operation[1]):
            reason = "KEY_EXISTS"
    elif verb in {"recover", "purge"}:
        if state.phase != "deleted":
            reason = "DELETED_KEY_NOT_FOUND"
    elif state.phase == "absent":
        reason = "KEY_NOT_FOUND"
    elif state.phase == "deleted":
        reason = "KEY_SOFT_DELETED"
    elif verb == "sign" and not state.versions[-1].enabled:
        reason = "KEY_NOT_USABLE"
    return reason


def step(state: KeyState, operation: tuple[Any, ...], result: tuple[Hashable, ...] | None) -> list[KeyState]:
    """Return the states that may follow when the operation gives the result (None: any result).

    Raises:
        ValueError: The operation or the reason of the result is none of the model's.
    """
    if operation[0] not in VERBS:
        raise ValueError(f"not an operation of the model: {operation}")
    if result is not None and result[0] == "error" and result[1] not in REASONS:
        raise ValueError(f"not a result of the model: {result}")
    reason = refusal(state, operation)
    if reason is not None:
        return [state] if result is None or result == ("error", reason) else []
    if result is not None and result[0] != "ok":
        return []
    return _effect(state, operation, result)


def _effect(state: KeyState, operation: tuple[Any, ...], result: tuple[Any, ...] | None) -> list[KeyState]:
    verb = operation[0]
    if verb == "purge":
        return [ABSENT]
    if verb == "delete":
        return [state._replace(phase="deleted")]
    if verb == "recover":
        return [state._replace(phase="active")]
    name = None if result is None else result[1]
    known = {version.name for version in state.versions if version.name is not None}
    if verb == "create":
        if name in known:
            return []
        return [KeyState("active", (*state.versions, Version(name, enabled=True)))]
    newest = state.versions[-1]
    if name is not None and name != newest.name:
        # Another version's name refutes the result; a new name may be the one a lost reply held back.
        if newest.name is not None or name in known:
            return []
        newest = newest._replace(name=name)
    if verb == "get" and result is not None and result[2] != newest.enabled:
        return []
    if verb == "update":
        newest = newest._replace(enabled=operation[1])
    return [KeyState("active", (*state.versions[:-1], newest))]


KEY_LIFE_CYCLE = Model(ABSENT, step)
"""The model of one key that did not exist when the history began."""
