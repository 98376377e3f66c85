"""mhsm status on terminals of every width: a line for each partition, never a wrapped one."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from hsm_pool.cli.output import failure_of
from hsm_pool.cli.status_command import COLUMNS, say_downloaded, table
from hsm_pool.errors import DOWNLOADED_OVER_REST, NotActivated
from mhsm.security_domain.v1 import security_domain_pb2


def rows() -> list[dict[str, Any]]:
    """Three partitions with values as long as they become."""
    serving = {
        "state": "SERVING",
        "lease_remaining_ms": 3000,
        "applied_sequence": 123_456,
        "head": "0123456789abcdef",
        "incarnation": 12,
        "recovery_path": "activation",
        "sealing": "platform",
        "secret_memory": "memfd_secret",
        "store_version": "3.5.16",
        "process_ids": {"node_agent": 1_234_567, "partition": 1_234_568, "store_member": 1_234_569},
    }
    unreachable = {"state": "UNREACHABLE", "process_ids": {"node_agent": 1_234_567}}
    return [
        {"index": 0, **serving},
        {"index": 1, **serving, "state": "QUARANTINED"},
        {"index": 2, **unreachable},
    ]


def shown(width: int) -> list[str]:
    """Return the lines on a terminal of so many columns."""
    output = io.StringIO()
    console = Console(file=output, width=width)
    console.print(table(rows(), console))
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_a_wide_terminal_shows_everything() -> None:
    lines = shown(200)
    assert len(lines) == 4
    assert all(title in lines[0] for title, _ in COLUMNS)
    assert "1234567 1234568 1234569" in lines[1]


@pytest.mark.parametrize("width", [24, 40, 60, 79, 80, 100, 120, 160])
def test_a_narrow_terminal_shows_whole_columns_and_says_how_many_are_missing(width: int) -> None:
    lines = shown(width)
    assert max(len(line) for line in lines) <= width
    titles = [title for title, _ in COLUMNS if title in lines[0]]
    assert titles == [title for title, _ in COLUMNS[: len(titles)]], "the first ones, in their order"
    assert "  ".join(titles).split() == lines[0].split(), "no title is cut"
    for line, state in zip(lines[1:4], ("serving", "quarantined", "unreachable"), strict=True):
        assert line.split()[1] == state
    if len(titles) < len(COLUMNS):
        assert lines[4].startswith(f"{len(COLUMNS) - len(titles)} columns")
        assert len(lines) == 5


def test_an_activation_under_way_is_told_from_a_pool_without_a_download() -> None:
    """Partitions that do not hold the ceremony know nothing of it; whoever reads the status does."""
    begun = security_domain_pb2.Ceremony(
        purpose=security_domain_pb2.CEREMONY_PURPOSE_ACTIVATION, required=3, accepted=2
    )
    shown = [{"state": state, "reason": "as it was"} for state in ("PROVISIONED", "PROVISIONED", "HEALING")]
    say_downloaded(shown, [begun, "partition 2 did not answer"])
    waits = "the security domain is downloaded; waits for 1 more share"
    assert [row["reason"] for row in shown] == [waits, waits, "as it was"]
    begun.purpose = security_domain_pb2.CEREMONY_PURPOSE_RECOVERY
    say_downloaded(shown[2:], [begun])
    assert shown[2]["reason"] == "as it was"


@pytest.mark.parametrize(
    ("why", "following"),
    [("download its security domain first", "mhsm security-domain status"), (DOWNLOADED_OVER_REST, "poll")],
)
def test_a_download_over_rest_is_polled_and_not_repeated(why: str, following: str) -> None:
    failure = failure_of(NotActivated(f"the pool is not active: {why}"))
    assert failure.following.startswith(following)
    assert failure.exit_code == 3
