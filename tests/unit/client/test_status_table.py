"""mhsm status on terminals of every width: a line for each partition, never a wrapped one."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from rich.console import Console

from hsm_pool.cli.output import failure_of
from hsm_pool.cli.status_command import COLUMNS, rows_of, say_downloaded, table, unstable, way_out
from hsm_pool.client.errors import PoolUnreachable
from hsm_pool.errors import DISK_IS_EMPTY, DOWNLOADED_OVER_REST, NotActivated
from mhsm.enclave.v1 import enclave_pb2
from mhsm.pool.v1 import pool_pb2
from mhsm.security_domain.v1 import security_domain_pb2

if TYPE_CHECKING:
    from hsm_pool.client.connection import Connection
    from hsm_pool.client.pool import Pool


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
    unreachable = {
        **dict.fromkeys(serving),
        "state": "UNREACHABLE",
        "process_ids": {"node_agent": 1_234_567, "partition": None, "store_member": None},
    }
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
    assert lines[3].split() == ["2", "unreachable", *["-"] * 8, "1234567", "-", "-"], "no None"


def answers(**of_two: Any) -> list[dict[str, Any]]:
    """Return the rows of a pool of which 0 and 1 serve and 2 gives an answer, or none."""
    serving = {"state": enclave_pb2.PARTITION_STATE_SERVING, "fresh": True}
    said = [
        pool_pb2.GetPartitionStatusResponse(**serving, half_replaced=of_two.pop("half_replaced", ())),
        pool_pb2.GetPartitionStatusResponse(**serving),
        pool_pb2.GetPartitionStatusResponse(**of_two) if of_two else None,
    ]

    def partition_status(index: int) -> pool_pb2.GetPartitionStatusResponse:
        answer = said[index]
        if answer is None:
            raise PoolUnreachable("the partition could not be reached; nothing was sent")
        return answer

    entries = [
        SimpleNamespace(
            index=index, process_ids={}, node_agent_hardening=[], failures={}, store_disk_lost=False
        )
        for index in range(3)
    ]
    pool, connection = SimpleNamespace(partition_status=partition_status), SimpleNamespace(partitions=entries)
    return rows_of(cast("Pool", pool), cast("Connection", connection))


def test_a_partition_that_does_not_answer_has_the_same_fields_in_json() -> None:
    serving, _, silent = answers()
    assert set(silent) == set(serving)
    assert silent["applied_sequence"] is None
    assert (silent["state"], silent["reason"]) == ("UNREACHABLE", "it does not answer")


def test_a_process_that_does_not_stay_up_is_named_with_its_log() -> None:
    """One end may be a kill; from the second in a row on the reason is in the log."""
    (row, *_) = answers()
    row["failures"] = {"node_agent": 0, "partition": 1, "store_member": 4}
    (line,) = unstable(row)
    assert line.startswith(
        "its store member does not stay up: ended 4 times in a row; nodes/0/logs/store.log"
    )


LOCKED = enclave_pb2.PARTITION_STATE_LOCKED
DRAINED = enclave_pb2.PARTITION_STATE_DRAINED
QUARANTINED = enclave_pb2.PARTITION_STATE_QUARANTINED


@pytest.mark.parametrize(
    ("of_two", "helps"),
    [
        ({"state": LOCKED, "state_reason": DISK_IS_EMPTY}, True),
        ({"state": QUARANTINED}, True),
        ({"state": DRAINED, "half_replaced": [2]}, True),
        ({"half_replaced": [2]}, True),  # it is dead, the others know
        ({"state": LOCKED, "state_reason": "its evidence is refused: its code was changed"}, False),
        ({"state": DRAINED}, False),
        ({}, False),
    ],
)
def test_what_comes_next_is_a_replacement_where_nothing_else_helps(
    of_two: dict[str, Any], helps: bool
) -> None:
    """Two others serve: no officer is called in, and nobody resumes what cannot be resumed."""
    found = answers(**of_two)
    assert list(way_out(found)) == (["mhsm-fabric replace 2"] if helps else [])
    assert [row["half_replaced"] for row in found] == [False, False, "half_replaced" in of_two]
    found[0]["state"] = "HEALING"
    assert list(way_out(found)) == [], "it would be refused"


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
