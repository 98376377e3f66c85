"""G5, G8: the grammar of release policies: what is met, what is not, and what is no policy at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool import limits
from hsm_pool.core import release_policy
from hsm_pool.core.release_policy import ADMISSION_OPERATORS, PolicyNotMet
from hsm_pool.enclave import admission
from hsm_pool.errors import InvalidField

WHO = "https://attestation.example"
CLAIMS: dict[str, Any] = {
    "type": "tee",
    "debug": False,
    "svn": 3,
    "ratio": 1.5,
    "tee": {"vendor": {"name": "x"}, "keys": [{"name": "x"}]},
    "a.b": "dotted",
}


def policy(condition: dict[str, Any], authority: str = WHO) -> dict[str, Any]:
    return {"version": "1.0.0", "anyOf": [{"authority": authority, **condition}]}


def met(document: dict[str, Any], authority: str = WHO) -> bool:
    parsed = release_policy.parse(json.dumps(document), ADMISSION_OPERATORS)
    try:
        release_policy.require(parsed, authority, CLAIMS)
    except PolicyNotMet:
        return False
    return True


def equals(claim: str, value: object) -> dict[str, object]:
    return {"claim": claim, "equals": value}


def at_least(claim: str, value: object) -> dict[str, object]:
    return {"claim": claim, "greaterOrEquals": value}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (equals("type", "tee"), True),
        (equals("type", "TEE"), False),
        (equals("type", True), False),
        (equals("debug", False), True),
        (equals("debug", 0), False),
        (equals("debug", "false"), False),
        (equals("svn", 3), True),
        (equals("svn", 3.0), True),
        (equals("svn", "3"), False),
        (equals("svn", True), False),
        (equals("ratio", 1.5), True),
        (equals("tee.vendor.name", "x"), True),
        (equals("tee.vendor", "x"), False),
        (equals("tee.keys.name", "x"), False),
        (equals("tee.keys.0.name", "x"), False),
        (equals("tee.vendor.name.x", "x"), False),
        (equals("a.b", "dotted"), False),
        (equals("absent", ""), False),
        (equals("absent", False), False),
        (at_least("svn", 3), True),
        (at_least("svn", 2), True),
        (at_least("svn", 4), False),
        (at_least("type", 0), False),
        (at_least("debug", 0), False),
        (at_least("absent", 0), False),
    ],
    ids=str,
)
def test_a_condition(condition: dict[str, object], expected: bool) -> None:
    """Types are compared, dots descend, arrays and absent claims never meet a condition."""
    assert met(policy({"allOf": [condition]})) is expected
    assert met(policy({"anyOf": [condition]})) is expected


def test_groups_nest() -> None:
    """AllOf needs all, anyOf one, at every depth."""
    yes, no = equals("svn", 3), equals("svn", 4)
    assert met(policy({"allOf": [yes, {"anyOf": [no, {"allOf": [yes, yes]}]}]}))
    assert not met(policy({"allOf": [yes, {"anyOf": [no, {"allOf": [yes, no]}]}]}))
    assert met(policy({"anyOf": [no, {"allOf": [yes]}]}))
    assert not met(policy({"anyOf": [no, {"allOf": [no]}]}))


def test_only_a_named_authority_counts() -> None:
    """Conditions of one authority say nothing about another; a policy is met by any entry of its own."""
    yes, no = {"allOf": [equals("svn", 3)]}, {"allOf": [equals("svn", 4)]}
    assert not met(policy(yes), WHO + "/")
    two = {"version": "1.0.0", "anyOf": [{"authority": WHO, **no}, {"authority": WHO, **yes}]}
    assert met(two)
    assert not met({"version": "1.0.0", "anyOf": [{"authority": WHO, **no}, {"authority": "other", **yes}]})


def _nested(depth: int) -> dict[str, Any]:
    condition: dict[str, Any] = {"allOf": [equals("svn", 3)]}
    for _ in range(depth - 1):
        condition = {"allOf": [condition]}
    return policy(condition)


def test_bounds() -> None:
    """G8: depth, number, length and size are bounded, and what is within them is a policy."""
    most = limits.RELEASE_POLICY_CONDITIONS_MAX - 1
    assert met(_nested(limits.RELEASE_POLICY_DEPTH_MAX))
    assert met(policy({"allOf": [equals("svn", 3)] * most}))
    name = "n" * limits.RELEASE_POLICY_NAME_LENGTH_MAX
    assert not met(policy({"allOf": [equals(name, 3)]}))
    for document in (
        _nested(limits.RELEASE_POLICY_DEPTH_MAX + 1),
        policy({"allOf": [equals("svn", 3)] * (most + 1)}),
        policy({"allOf": [equals(name + "n", 3)]}),
        policy({"allOf": [equals("svn", 3)]}, name + "n"),
        policy({"allOf": [equals("svn", "x" * limits.RELEASE_POLICY_BYTES_MAX)]}),
    ):
        with pytest.raises(InvalidField):
            release_policy.parse(json.dumps(document))


@pytest.mark.parametrize(
    "document",
    [
        "",
        "[]",
        "{}",
        "[" * 10_000,
        b"\xff",
        '{"version":"1.0.0","anyOf":[]}',
        '{"version":"1.0.0","anyOf":{}}',
        '{"version":"1.1.0","anyOf":[{"authority":"a","allOf":[{"claim":"c","equals":1}]}]}',
        '{"version":"1.0.0","allOf":[{"authority":"a","allOf":[{"claim":"c","equals":1}]}]}',
        '{"version":"1.0.0","version":"1.0.0","anyOf":[{"authority":"a","allOf":[{"claim":"c","equals":1}]}]}',
        '{"version":"1.0.0","anyOf":[{"authority":"a","allOf":[{"claim":"c","equals":NaN}]}]}',
        '{"version":"1.0.0","anyOf":[{"authority":"a","allOf":[{"claim":"c","equals":1}],"x":1}]}',
        *(
            json.dumps(policy(condition))
            for condition in (
                {},
                {"allOf": []},
                {"allOf": {}},
                {"allOf": [1]},
                {"allOf": [{}]},
                {"allOf": [{"claim": "c"}]},
                {"allOf": [{"equals": 1}]},
                {"allOf": [{"claim": "", "equals": 1}]},
                {"allOf": [{"claim": 1, "equals": 1}]},
                {"allOf": [{"claim": "c", "equals": None}]},
                {"allOf": [{"claim": "c", "equals": [1]}]},
                {"allOf": [{"claim": "c", "equals": {}}]},
                {"allOf": [{"claim": "c", "equals": 1, "also": 2}]},
                {"allOf": [{"claim": "c", "notEquals": 1}]},
                {"allOf": [{"claim": "c", "greaterOrEquals": 1}]},
                {"allOf": [{"allOf": [], "anyOf": []}]},
                {"allOf": [equals("c", 1)], "anyOf": [equals("c", 1)]},
            )
        ),
    ],
    ids=lambda document: str(document)[-60:],
)
def test_what_is_no_policy_is_refused(document: str | bytes) -> None:
    """G8: one typed error; nothing that could be read in two ways is read at all."""
    with pytest.raises(InvalidField) as refused:
        release_policy.parse(document)
    assert refused.value.metadata == {"field": "release_policy"}


def test_a_bound_is_a_number() -> None:
    with pytest.raises(InvalidField):
        release_policy.parse(json.dumps(policy({"allOf": [at_least("svn", "3")]})), ADMISSION_OPERATORS)


_CONDITIONS = st.recursive(
    st.builds(
        equals,
        st.sampled_from(["type", "svn", "debug", "tee.vendor.name", "absent"]),
        st.sampled_from(["tee", 3, False, "x"]),
    ),
    lambda inner: st.builds(
        lambda name, members: {name: members},
        st.sampled_from(["allOf", "anyOf"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


def _reference(condition: dict[str, Any]) -> bool:
    if "allOf" in condition:
        return all(_reference(one) for one in condition["allOf"])
    if "anyOf" in condition:
        return any(_reference(one) for one in condition["anyOf"])
    flat = {"type": "tee", "svn": 3, "debug": False, "tee.vendor.name": "x"}
    found, wanted = flat.get(condition["claim"]), condition["equals"]
    return found == wanted and type(found) is type(wanted)


@given(condition=_CONDITIONS)
def test_any_tree_means_what_it_says(condition: dict[str, Any]) -> None:
    """Against a second evaluation, written apart."""
    assert met(policy({"allOf": [condition]})) is _reference(condition)


# -- the pool's admission policy -----------------------------------------------------------


def test_the_default_admission_policy_is_one_that_an_operator_could_write(tmp_path: Path) -> None:
    """G5: no file means the default; its own text in a file means the same."""
    file = tmp_path / "policy.json"
    assert admission.load(file) == admission.load(None)
    file.write_text(admission.default_document())
    assert admission.load(file) == admission.load(None)


def test_a_broken_policy_file_admits_nobody(tmp_path: Path) -> None:
    """G5: it is an error, never the default."""
    file = tmp_path / "policy.json"
    for content in (b"", b"{}", bytes(limits.RELEASE_POLICY_BYTES_MAX + 1)):
        file.write_bytes(content)
        with pytest.raises(InvalidField):
            admission.load(file)
