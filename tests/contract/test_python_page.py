"""docs/python.md says of errors, times and bounds what the code says."""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict

from hsm_pool import errors, limits
from hsm_pool.client.calls import ATTEMPT_SECONDS, CALL_SECONDS
from hsm_pool.client.errors import ClientError
from tests.running_pool import ROOT

PAGE = (ROOT / "docs/python.md").read_text()
FAMILIES = (errors.RequestError, errors.StateError, errors.AvailabilityError, errors.AccessError)
KINDS = {
    "read": "a read",
    "crypto": "cryptography, a release",
    "mutation": "what changes keys or roles",
    "ceremony": "a ceremony, a part of a backup",
}


def table(name: str) -> list[str]:
    """Return the rows between two marks of the page, without the head."""
    found = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGE, re.DOTALL)
    assert found
    return found[1].splitlines()[2:]


def metadata() -> dict[str, set[str]]:
    """Return the names of metadata that the product gives to each class of errors."""
    classes = {kind.__name__ for kind in errors.BY_REASON.values()}
    given: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "hsm_pool").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in classes:
                    given[name] |= {keyword.arg or "" for keyword in node.keywords}
    return given


def test_the_table_of_errors_is_that_of_the_code() -> None:
    """Reason, class, family, code, whether it is definite, metadata, and the class's own sentence."""
    given = metadata()
    assert given["InvalidField"] == {"field"}
    rows = []
    for reason, kind in errors.BY_REASON.items():
        family = next((family.__name__ for family in FAMILIES if issubclass(kind, family)), "")
        names = ", ".join(sorted(given[kind.__name__]))
        meaning = (inspect.getdoc(kind) or "").splitlines()[0]
        definite = "yes" if kind.definite else "no"
        columns = (f"`{reason}`", kind.__name__, family, f"`{kind.code}`", definite, names, meaning)
        rows.append(f"| {' | '.join(columns)} |")
    assert table("errors") == rows, "the page should say:\n" + "\n".join(rows)


def test_the_errors_of_the_client_are_all_there() -> None:
    shown = {
        (name, definite) for name, definite in re.findall(r"^\| `(\w+)` \| (yes|no) \|", PAGE, re.MULTILINE)
    }
    assert shown == {
        (kind.__name__, "yes" if kind.definite else "no") for kind in ClientError.__subclasses__()
    }


def test_the_times_are_those_of_the_code() -> None:
    rows = [
        f"| {KINDS[kind]} | {ATTEMPT_SECONDS[kind]:.0f} s | {CALL_SECONDS[kind]:.0f} s |"
        for kind in ATTEMPT_SECONDS
    ]
    assert table("timeouts") == rows, "the page should say:\n" + "\n".join(rows)


def test_the_bounds_of_a_batch_are_those_of_the_code() -> None:
    bounds = f"at most {limits.BATCH_ITEMS_MAX} items, with an RSA key {limits.BATCH_ITEMS_RSA_MAX}, and "
    bounds += f"{limits.MESSAGE_BYTES_MAX >> 20} MiB; one plaintext has "
    bounds += f"at most {limits.PAYLOAD_BYTES_MAX >> 10} KiB"
    assert bounds in PAGE
