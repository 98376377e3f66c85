"""The main job, as ./scripts/demo runs it, and what the README says that it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.running_pool import ROOT

pytestmark = [pytest.mark.pool, pytest.mark.timeout(300)]


def test_the_main_job_and_what_the_readme_shows_of_it() -> None:
    """G1, G3, G4: nothing acknowledged is lost over a kill under load, a lock and an unlock."""
    completed = subprocess.run(
        [sys.executable, "-m", "hsm_pool.demo", "--seed", "7", "--seconds", "4"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    *progress, last = completed.stdout.strip().splitlines()
    summary = json.loads(last)
    assert summary["ok"] is True
    assert summary["acknowledged_writes_lost"] == 0
    assert summary["operations_acknowledged"] > 100
    shown = re.search(r"<!-- demo -->\n```\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown
    *readme_progress, readme_last = shown[1].splitlines()
    assert set(json.loads(readme_last)) == set(summary)

    def story(lines: list[str]) -> list[str]:
        """The lines without their numbers and the counts that differ from run to run."""
        return [re.sub(r"[0-9. ]+|\{.*\}", "#", line).split(":")[0].strip() for line in lines]

    assert story(readme_progress) == story(progress)
