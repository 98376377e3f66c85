"""Logs of an honest pool, made once for all tests of this directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.unit.audit.logs import Honest, ThreeLogs


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    logs = ThreeLogs(tmp_path_factory.mktemp("honest") / "pool")
    for _ in range(4):
        for index in range(3):
            logs.read(index, 5)
        logs.mutate(count=2)
        logs.checkpoint()
    logs.restart(1)
    logs.read(1, 3)
    logs.mutate()
    logs.checkpoint()
    checkpoints = tuple(logs.trails[0].newest_checkpoints())
    logs.close()
    return Honest(logs.directory, logs.pool_id, checkpoints)


@pytest.fixture
def copied(honest: Honest, tmp_path: Path) -> Path:
    shutil.copytree(honest.directory, tmp_path / "pool")
    return tmp_path / "pool"
