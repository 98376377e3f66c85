"""docs/algorithms.md, the command line and the contract say what the one table of algorithms says."""

from __future__ import annotations

import re

import click
import pytest

from hsm_pool.cli.crypto_commands import crypto
from hsm_pool.cli.key_commands import key
from hsm_pool.core.model import Curve, KeyOperation
from hsm_pool.crypto import algorithms
from hsm_pool.crypto.algorithms import ALGORITHMS, Algorithm
from tests.running_pool import ROOT


def row(algorithm: Algorithm) -> str:
    key = algorithm.key_type.name if algorithm.key_type.name != "OCT" else "oct"
    kind = {
        Curve.NONE: f" {algorithm.size_bits}" if algorithm.size_bits else "",
        Curve.P256K: " P-256K",
    }.get(algorithm.curve, f" P-{algorithm.curve.name[1:]}")
    operations = ", ".join(
        operation.name.lower() for operation in KeyOperation if operation in algorithm.operations
    )
    digest = algorithm.hash.name.upper() if algorithm.hash else ""
    scheme = algorithm.scheme.value + (" **preview**" if algorithm.preview else "")
    columns = (algorithm.name, key + kind, operations.replace("_key", "").replace("_", " "), digest, scheme)
    return f"| {' | '.join(columns)} |"


def test_the_page_has_the_table_of_the_code() -> None:
    page = (ROOT / "docs/algorithms.md").read_text()
    found = re.search("<!-- algorithms -->\n(.*?)<!-- /algorithms -->", page, re.DOTALL)
    assert found
    rows = [row(algorithm) for algorithm in ALGORITHMS]
    assert found[1].splitlines()[2:] == rows, "the page should say:\n" + "\n".join(rows)


@pytest.mark.parametrize(
    ("command", "operation"),
    [
        ("sign", KeyOperation.SIGN),
        ("verify", KeyOperation.VERIFY),
        ("encrypt", KeyOperation.ENCRYPT),
        ("wrap", KeyOperation.WRAP_KEY),
        ("unwrap", KeyOperation.UNWRAP_KEY),
        ("secure-wrap", KeyOperation.SECURE_WRAP_KEY),
        ("secure-unwrap", KeyOperation.SECURE_UNWRAP_KEY),
    ],
)
def test_the_command_line_offers_what_the_table_has(command: str, operation: KeyOperation) -> None:
    (option,) = [p for p in {**key.commands, **crypto.commands}[command].params if p.name == "algorithm"]
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == [a.name for a in ALGORITHMS if operation in a.operations]


def test_no_algorithm_is_listed_in_the_contract() -> None:
    """A second list would be forgotten."""
    contract = (ROOT / "proto/mhsm/crypto/v1/crypto.proto").read_text()
    assert [name for name in (a.name for a in ALGORITHMS) if re.search(rf"\b{name}\b", contract)] == [
        "RSNULL"
    ]
    assert len({a.name for a in ALGORITHMS}) == len(ALGORITHMS)
    for operation in set(KeyOperation) - {KeyOperation.IMPORT}:
        assert algorithms.names(operation)
