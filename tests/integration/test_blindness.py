"""G3, G5: the controller of a real pool has no secret in its memory, its files and what it receives.

``./scripts/prove-blind`` runs the whole proof; here are its short run, and the scripted proof itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.blindness.proof import Proof
from tests.running_pool import ROOT

pytestmark = [pytest.mark.pool, pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_controller_sees_no_secret_in_a_short_run(tmp_path: Path) -> None:
    """G3, G5: drains, a failover, a restart and kills; broken builds are caught by this test."""
    result = Proof(tmp_path / "proof", print).short()
    findings = [*result.problems, *result.described_hits()]
    # As a text: pytest shortens lists, and the proof reads here what a broken build was caught by.
    assert not findings, "\n".join(["", *findings])


@pytest.mark.full
def test_the_proof_as_it_is_run_by_hand() -> None:
    """G3, G5: with its positive control and its five broken builds."""
    completed = subprocess.run(
        [sys.executable, "-m", "tests.blindness", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    summary = json.loads(completed.stdout.splitlines()[-1])
    assert (summary["ok"], summary["hits"]) == (True, 0)
    assert (summary["mutants_caught"], summary["mutants"]) == (5, 5)
    assert summary["positive_control_hits"] > 1000
    assert summary["not_seen"], "what leaks through an allowed number is not seen: the page says so"
    assert sum(kind["secrets"] for kind in summary["by_kind"].values()) == summary["secrets"]
    assert summary["tested"]["distribution_measurement"]
