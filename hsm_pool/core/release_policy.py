"""The grammar of Azure's release policies: who may vouch, and what the claims must say.

Source: Azure Key Vault and Managed HSM, "secure key release policy grammar", version 1.0.0::

    {"version": "1.0.0", "anyOf": [{"authority": "https://...", "allOf": [
        {"claim": "a.b", "equals": "value"},
        {"anyOf": [{"claim": "c", "equals": 1}, {"claim": "d", "equals": true}]}]}]}

Dots in a claim's name descend into objects. A claim that is missing, or that an array holds,
does not meet its condition. Azure's service takes ``equals`` only, although its grammar lists
more; the pool's own admission policy also uses ``greaterOrEquals``, for security versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from hsm_pool import limits
from hsm_pool.errors import InvalidField

VERSION: Final = "1.0.0"
EQUALS: Final = "equals"
GREATER_OR_EQUALS: Final = "greaterOrEquals"
AZURE_OPERATORS: Final = frozenset({EQUALS})
ADMISSION_OPERATORS: Final = frozenset({EQUALS, GREATER_OR_EQUALS})


class PolicyNotMet(Exception):
    """The claims do not meet the policy; the text names the first condition that failed."""


@dataclass(frozen=True, slots=True)
class ClaimCondition:
    """One claim compared with one value; values of different JSON types are never equal."""

    claim: str
    operator: str
    value: str | int | float | bool


@dataclass(frozen=True, slots=True)
class AllOf:
    """Met when every condition is; there is at least one."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Met when one condition is; there is at least one."""

    conditions: tuple[Condition, ...]


Condition = ClaimCondition | AllOf | AnyOf


@dataclass(frozen=True, slots=True)
class Authority:
    """Who vouches for the claims, and what they must say then."""

    authority: str
    condition: AllOf | AnyOf


@dataclass(frozen=True, slots=True)
class ReleasePolicy:
    """A parsed policy: met when the condition of one authority is."""

    authorities: tuple[Authority, ...]


def parse(document: bytes | str, operators: frozenset[str] = AZURE_OPERATORS) -> ReleasePolicy:
    """Parse a policy.

    Args:
        document: JSON in UTF-8, at most RELEASE_POLICY_BYTES_MAX bytes.
        operators: Which operators may occur.

    Raises:
        InvalidField: The document is not a policy, or exceeds a bound; the text says where.
    """
    octets = document if isinstance(document, bytes) else document.encode(errors="replace")
    if len(octets) > limits.RELEASE_POLICY_BYTES_MAX:
        raise _invalid(f"more than {limits.RELEASE_POLICY_BYTES_MAX} bytes", "")
    try:
        value = json.loads(octets.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _invalid("it is not JSON, or names a member twice", "") from None
    return _Parser(operators).policy(value)


def require(policy: ReleasePolicy, authority: str, claims: Mapping[str, Any]) -> None:
    """Check claims that an authority vouches for.

    Args:
        policy: From :func:`parse`.
        authority: Who was found to vouch for the claims; compared octet for octet.
        claims: Names and JSON values.

    Raises:
        PolicyNotMet: No entry of this authority is met.
    """
    entries = [entry for entry in policy.authorities if entry.authority == authority]
    if not entries:
        raise PolicyNotMet(f"the policy does not name the authority {authority}")
    failed = [_first_unmet(entry.condition, claims) for entry in entries]
    if all(failed):
        raise PolicyNotMet(failed[0])


def _first_unmet(condition: Condition, claims: Mapping[str, Any]) -> str:
    """Return what is not met, in words; "" when the condition is met."""
    match condition:
        case AllOf(conditions):
            return next((text for one in conditions if (text := _first_unmet(one, claims))), "")
        case AnyOf(conditions):
            texts = [_first_unmet(one, claims) for one in conditions]
            return texts[0] if all(texts) else ""
        case ClaimCondition(claim, operator, wanted):
            found = _find(claims, claim)
            met = _equal(found, wanted) if operator == EQUALS else _at_least(found, wanted)
            return "" if met else f"{claim}: {operator} {json.dumps(wanted)} is needed"


def _find(claims: Mapping[str, Any], name: str) -> Any:
    found: Any = claims
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(found: Any, wanted: str | float | bool) -> bool:
    same_type = type(found) is type(wanted) or (_is_number(found) and _is_number(wanted))
    return same_type and bool(found == wanted)


def _at_least(found: Any, wanted: Any) -> bool:
    return _is_number(found) and _is_number(wanted) and bool(found >= wanted)


class _Parser:
    """Parses one document; counts its conditions."""

    def __init__(self, operators: frozenset[str]) -> None:
        self._operators = operators
        self._count = 0

    def policy(self, value: Any) -> ReleasePolicy:
        if not isinstance(value, dict) or set(value) != {"version", "anyOf"}:
            raise _invalid("an object with version and anyOf is needed", "")
        if value["version"] != VERSION:
            raise _invalid(f'"{VERSION}" is needed', "version")
        entries = self._list(value["anyOf"], "anyOf")
        return ReleasePolicy(tuple(self._authority(entry, f"anyOf[{i}]") for i, entry in enumerate(entries)))

    def _authority(self, value: Any, where: str) -> Authority:
        if not isinstance(value, dict) or set(value) not in ({"authority", "allOf"}, {"authority", "anyOf"}):
            raise _invalid("an object with authority and one of allOf and anyOf is needed", where)
        name = self._text(value["authority"], f"{where}.authority")
        return Authority(name, self._group({k: v for k, v in value.items() if k != "authority"}, where, 1))

    def _group(self, value: dict[str, Any], where: str, depth: int) -> AllOf | AnyOf:
        if depth > limits.RELEASE_POLICY_DEPTH_MAX:
            raise _invalid(f"nested deeper than {limits.RELEASE_POLICY_DEPTH_MAX}", where)
        ((name, members),) = value.items()
        where = f"{where}.{name}"
        found = self._list(members, where)
        conditions = tuple(self._condition(one, f"{where}[{i}]", depth + 1) for i, one in enumerate(found))
        return AllOf(conditions) if name == "allOf" else AnyOf(conditions)

    def _condition(self, value: Any, where: str, depth: int) -> Condition:
        if not isinstance(value, dict):
            raise _invalid("an object is needed", where)
        if set(value) in ({"allOf"}, {"anyOf"}):
            return self._group(value, where, depth)
        operator = next(iter(set(value) - {"claim"}), "")
        if set(value) != {"claim", operator} or operator not in self._operators:
            raise _invalid(f"claim and one of {', '.join(sorted(self._operators))} are needed", where)
        wanted = value[operator]
        if not isinstance(wanted, str | int | float | bool):
            raise _invalid("a string, a number, true or false is needed", f"{where}.{operator}")
        if operator == GREATER_OR_EQUALS and not _is_number(wanted):
            raise _invalid("a number is needed", f"{where}.{operator}")
        return ClaimCondition(self._text(value["claim"], f"{where}.claim"), operator, wanted)

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise _invalid("a list with at least one member is needed", where)
        self._count += len(value)
        if self._count > limits.RELEASE_POLICY_CONDITIONS_MAX:
            raise _invalid(f"more than {limits.RELEASE_POLICY_CONDITIONS_MAX} conditions", where)
        return value

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= limits.RELEASE_POLICY_NAME_LENGTH_MAX:
            raise _invalid(f"1 to {limits.RELEASE_POLICY_NAME_LENGTH_MAX} characters are needed", where)
        return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member occurs twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _invalid(text: str, where: str) -> InvalidField:
    place = f"release policy, {where}" if where else "release policy"
    return InvalidField(f"{place}: {text}", field="release_policy")
