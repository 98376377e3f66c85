"""The disaster-recovery rehearsal, as ./scripts/rehearse-recovery runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hsm_pool.rehearsal import keys, roles

pytestmark = [pytest.mark.pool, pytest.mark.slow, pytest.mark.timeout(900)]


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hsm_pool.rehearsal", *arguments],
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )


def test_a_lost_pool_is_recovered_whole(full: bool, seed: int) -> None:
    """G1, G4: every key, version and attribute; signatures and ciphertext of both pools fit."""
    count = 2000 if full else 200
    completed = rehearse("--keys", str(count), "--seed", str(seed))
    assert completed.returncode == 0, completed.stdout + completed.stderr
    *progress, last = completed.stdout.splitlines()
    summary = json.loads(last)
    assert (summary["ok"], summary["keys"], summary["mismatches"]) == (True, count, 0)
    assert summary["roles"] >= 9 + 2 + 3 + 15  # built-in, custom, of the pool itself, given
    assert {"fill", "roles", "unlock", "backup", "recover_domain", "restore", "compare"} <= set(
        summary["seconds"]
    )
    assert f"{count} keys compared, 0 mismatches" in progress[-1]


def test_bad_arguments_are_usage_errors() -> None:
    for arguments in (("--keys", "0"), ("--keys", "5001"), ("--keys", "x")):
        assert rehearse(*arguments).returncode == 2


def test_the_comparison_can_fail() -> None:
    """A comparison that finds nothing whatever happens would prove nothing."""

    class Empty:
        def list_keys(self) -> list[object]:
            return []

        def list_deleted_keys(self) -> list[object]:
            return []

        def list_role_definitions(self) -> list[object]:
            return []

        def list_role_assignments(self, scope: str) -> list[object]:  # noqa: ARG002
            return []

    before = keys.Record([keys.Recorded("lost", False, [b"version"], [b""])])
    assert keys.mismatches(before, Empty(), lambda _: None) == ["lost is in one of the pools only"]  # type: ignore[arg-type]
    assert len(roles.mismatches({b"lost"}, Empty())) == 1  # type: ignore[arg-type]
