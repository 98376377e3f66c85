"""The reference model says what the life cycle of a key is (G2); each line here is a line of its table."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.chaos.model import ABSENT, REASONS, KeyState, Version, step

ACTIVE = KeyState("active", (Version("v1", enabled=True),))
DISABLED = KeyState("active", (Version("v1", enabled=False),))
DELETED = KeyState("deleted", (Version("v1", enabled=True),))
ROTATED = KeyState("active", (Version("v1", enabled=True), Version("v2", enabled=True)))
NAMELESS = KeyState("active", (Version(None, enabled=True),))

STEPS: list[tuple[KeyState, tuple[Any, ...], tuple[Any, ...], KeyState]] = [
    (ABSENT, ("create", True), ("ok", "v1"), ACTIVE),
    (ABSENT, ("create", False), ("ok", "v1"), ACTIVE),
    (ACTIVE, ("create", True), ("error", "KEY_EXISTS"), ACTIVE),
    (ACTIVE, ("create", False), ("ok", "v2"), ROTATED),
    (DELETED, ("create", True), ("error", "KEY_EXISTS"), DELETED),
    (DELETED, ("create", False), ("error", "KEY_EXISTS"), DELETED),
    (ACTIVE, ("update", False), ("ok", "v1"), DISABLED),
    (DISABLED, ("update", True), ("ok", "v1"), ACTIVE),
    (ABSENT, ("update", True), ("error", "KEY_NOT_FOUND"), ABSENT),
    (DELETED, ("update", True), ("error", "KEY_SOFT_DELETED"), DELETED),
    (ACTIVE, ("sign",), ("ok", "v1"), ACTIVE),
    (ROTATED, ("sign",), ("ok", "v2"), ROTATED),
    (DISABLED, ("sign",), ("error", "KEY_NOT_USABLE"), DISABLED),
    (ABSENT, ("sign",), ("error", "KEY_NOT_FOUND"), ABSENT),
    (DELETED, ("sign",), ("error", "KEY_SOFT_DELETED"), DELETED),
    (ACTIVE, ("get",), ("ok", "v1", True), ACTIVE),
    (DISABLED, ("get",), ("ok", "v1", False), DISABLED),
    (ABSENT, ("get",), ("error", "KEY_NOT_FOUND"), ABSENT),
    (DELETED, ("get",), ("error", "KEY_SOFT_DELETED"), DELETED),
    (ACTIVE, ("delete",), ("ok",), DELETED),
    (ABSENT, ("delete",), ("error", "KEY_NOT_FOUND"), ABSENT),
    (DELETED, ("delete",), ("error", "KEY_SOFT_DELETED"), DELETED),
    (DELETED, ("recover",), ("ok",), ACTIVE),
    (ABSENT, ("recover",), ("error", "DELETED_KEY_NOT_FOUND"), ABSENT),
    (ACTIVE, ("recover",), ("error", "DELETED_KEY_NOT_FOUND"), ACTIVE),
    (DELETED, ("purge",), ("ok",), ABSENT),
    (ABSENT, ("purge",), ("error", "DELETED_KEY_NOT_FOUND"), ABSENT),
    (ACTIVE, ("purge",), ("error", "DELETED_KEY_NOT_FOUND"), ACTIVE),
]


@pytest.mark.parametrize(("state", "operation", "result", "after"), STEPS)
def test_g2_step(
    state: KeyState, operation: tuple[Any, ...], result: tuple[Any, ...], after: KeyState
) -> None:
    assert step(state, operation, result) == [after]
    for other in [("error", reason) for reason in REASONS] + [("ok", "x", True)]:
        # A create may give any name that is new; delete, recover and purge show none.
        free = operation[0] in {"create", "delete", "recover", "purge"} and result[0] == other[0] == "ok"
        if other != result and not free:
            assert step(state, operation, other) == []
    (unknown,) = step(state, operation, None)
    assert unknown.phase == after.phase
    assert [version.enabled for version in unknown.versions] == [
        version.enabled for version in after.versions
    ]


def test_the_table_covers_every_operation_in_every_phase() -> None:
    covered = {(state.phase, operation[0]) for state, operation, _, _ in STEPS}
    assert len(covered) == 3 * 7


def test_the_name_of_a_lost_create_is_settled_once() -> None:
    assert step(ABSENT, ("create", True), None) == [NAMELESS]
    (settled,) = step(NAMELESS, ("sign",), ("ok", "v1"))
    assert settled == ACTIVE
    assert step(settled, ("sign",), ("ok", "v2")) == []
    behind = KeyState("active", (Version("v1", enabled=True), Version(None, enabled=True)))
    assert step(behind, ("sign",), ("ok", "v1")) == []
    assert step(behind, ("sign",), ("ok", "v2")) == [ROTATED]
    assert step(ACTIVE, ("create", False), ("ok", "v1")) == []


@pytest.mark.parametrize(
    ("operation", "result"),
    [(("wrap",), None), (("sign",), ("error", "NOT_FRESH")), (("sign",), ("error", "COMMIT_UNKNOWN"))],
)
def test_what_is_not_the_models_is_refused(operation: tuple[Any, ...], result: Any) -> None:
    with pytest.raises(ValueError, match="of the model"):
        step(ACTIVE, operation, result)


def test_a_state_without_versions_is_absent_and_only_that() -> None:
    random_ = random.Random(1)
    operations = [(verb,) for verb in ("get", "sign", "delete", "recover", "purge")] + [
        (verb, flag) for verb in ("create", "update") for flag in (True, False)
    ]
    state = ABSENT
    for _ in range(2000):
        (state,) = step(state, random_.choice(operations), None)
        assert (state.phase == "absent") == (state.versions == ())
