"""G1: a store member that has had data never starts without it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hsm_pool.node_agent.store_disk import StoreDisk
from hsm_pool.settings import NodeSettings
from tests.unit.node_agent.test_admission import node


def settings_of(directory: Path) -> NodeSettings:
    return node(directory, 1)


def log_of(directory: Path) -> Path:
    """Return the directory of the member's log, as etcd makes it."""
    return directory / "store" / "member" / "wal"


@pytest.mark.parametrize("admission", [0, 3])
def test_a_member_starts_on_an_empty_disk_once(tmp_path: Path, admission: int) -> None:
    """Also the first one of all, which etcd refuses only while it reaches the others; also after kill -9."""
    settings = settings_of(tmp_path)
    disk = StoreDisk(settings, admission)
    disk.look()
    assert (disk.may_start(), disk.joining, disk.settled) == (True, admission > 0, False)
    log_of(tmp_path).mkdir(parents=True)
    disk.look()
    for again in (disk, StoreDisk(settings, admission)):
        assert (again.may_start(), again.joining, again.settled) == (True, False, True)
    shutil.rmtree(tmp_path / "store")
    for again in (disk, StoreDisk(settings, admission)):
        again.look()
        assert (again.may_start(), again.lost, again.joining) == (False, True, False)


def test_a_new_member_begins_on_an_empty_disk(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    log_of(tmp_path).mkdir(parents=True)
    disk = StoreDisk(settings, 0)
    disk.look()
    shutil.rmtree(tmp_path / "store")
    disk.admit(1)
    for again in (disk, StoreDisk(settings, 1)):
        again.look()
        assert (again.may_start(), again.lost, again.joining) == (True, False, True)
    log_of(tmp_path).mkdir(parents=True)
    disk.look()
    shutil.rmtree(tmp_path / "store")
    assert not disk.may_start()
    assert not StoreDisk(settings, 1).may_start()
