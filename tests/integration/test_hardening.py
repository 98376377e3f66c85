"""G3, G5: what the processes of a real pool are hardened with, as status says and as it is from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.running_pool import RunningPool, mhsm

pytestmark = pytest.mark.pool

FROM_THE_START = ["no_core_files", "not_dumpable", "no_new_privileges"]


def status(pool: RunningPool) -> dict:
    return json.loads(mhsm("status", "--data-dir", str(pool.directory), "--json").stdout)


def threads(process_id: int) -> list[dict[str, str]]:
    """Return the kernel's status of each thread of a process."""
    found = []
    for file in Path(f"/proc/{process_id}/task").glob("*/status"):
        pairs = (line.split(":", 1) for line in file.read_text().splitlines())
        found.append({name: value.strip() for name, value in pairs})
    return found


def test_status_says_what_partitions_are_hardened_with(pool: RunningPool) -> None:
    for row in status(pool)["partitions"]:
        assert row["hardening"][:3] == FROM_THE_START
        assert row["ceremony_child_hardening"] == []
        process_id = pool.process_id(row["index"], "partition")
        assert process_id
        assert {thread["NoNewPrivs"] for thread in threads(process_id)} == {"1"}
    text = mhsm("status", "--data-dir", str(pool.directory)).stdout
    assert "partition 0, 1, 2: hardened with no core files, not dumpable, no new privileges" in text


def test_a_ceremony_child_is_hardened_too(pool: RunningPool) -> None:
    with pool.client("administrator") as client:
        begun = client.verify_security_domain(1)
        try:
            rows = status(pool)["partitions"]
            assert rows[1]["ceremony_child_hardening"][:3] == FROM_THE_START
        finally:
            client.cancel_ceremony(1, begun.attempt_id)
        assert status(pool)["partitions"][1]["ceremony_child_hardening"] == []
