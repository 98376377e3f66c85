"""The plans that come along, from the first to the last step, on a real pool (G4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hsm_pool.ceremony_runner.plan import read_plan
from hsm_pool.cli.ceremony_commands import PLANS
from tests.running_pool import RunningPool, mhsm
from tests.unit.ceremony_runner.rehearsal import ceremony

pytestmark = [pytest.mark.pool, pytest.mark.slow]


def test_a_pool_s_life_by_its_plans(make_pool: Callable[..., RunningPool], tmp_path: Path) -> None:
    pool = make_pool(attended=True)
    at = ("--data-dir", str(pool.directory))
    for directory in ("officers", "new"):
        mhsm("officers", "make", "--output-dir", str(tmp_path / directory))

    def hold(name: str) -> None:
        """Hold a ceremony with the plan's own defaults."""
        steps = len(read_plan(PLANS / f"{name}.yaml").steps)
        (tmp_path / "answers.json").write_text(json.dumps({"confirm": ["continue"] * steps}))
        output = ("--output", f"{name}-transcript.json")
        held = ceremony("run", name, *output, *at, "--answers", "answers.json", cwd=tmp_path)
        assert held.returncode == 0, held.stderr
        ca = str(pool.directory / "pki" / "client-ca.crt")
        verified = ceremony("verify", f"{name}-transcript.json", "--ca-file", ca, "--json", cwd=tmp_path)
        assert json.loads(verified.stdout)["steps_done"] == steps

    hold("activation")
    # Broken off when it has begun: the pool's own ceremony is named, and the command that ends it is right.
    (tmp_path / "answers.json").write_text(json.dumps({"confirm": ["continue"] * 4 + ["abort"]}))
    broken = ("ceremony", "run", "officer-change", "--answers", "answers.json", "--output", "t.json", *at)
    aborted = mhsm(*broken, check=False, cwd=tmp_path)
    assert aborted.returncode == 130, aborted.stderr
    assert "the pool's own ceremony is still open, at partition 0" in aborted.stdout
    assert f"next: mhsm security-domain cancel --partition 0 {' '.join(at)}" in aborted.stderr
    # One that was under way before is somebody else's.
    (tmp_path / "answers.json").write_text(json.dumps({"confirm": ["abort"]}))
    other = mhsm(*broken[:-4], "--output", "u.json", *at, "--json", check=False, cwd=tmp_path)
    assert json.loads(other.stdout)["left_open"] == []
    mhsm("security-domain", "cancel", "--partition", "0", *at)
    (tmp_path / "officer-change-attempt.json").unlink()
    hold("yearly-proof")
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    hold("recovery")
    hold("officer-change")
