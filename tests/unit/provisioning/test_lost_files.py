"""What of a node's directory nobody makes anew is named when it is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

from hsm_pool.provisioning import layout


def test_identities_and_settings_that_are_gone_are_named(tmp_path: Path) -> None:
    for index in range(3):
        node = tmp_path / "nodes" / str(index)
        for name in ("pki", "platform", "owner", "partition", "store", "audit"):
            (node / name).mkdir(parents=True)
        for name in ("node.json", "partition.json"):
            (node / name).touch()
    found = [layout.lost_files(tmp_path, index) for index in range(3)]
    assert found == [[], [], []]
    for name in ("partition", "store", "audit"):  # these are healed
        shutil.rmtree(tmp_path / "nodes/0" / name)
    (tmp_path / "nodes/1/partition.json").unlink()
    shutil.rmtree(tmp_path / "nodes/2")
    names = ["node.json", "partition.json", "pki", "platform", "owner"]
    assert layout.lost_files(tmp_path, 0) == []
    assert layout.lost_files(tmp_path, 1) == ["nodes/1/partition.json"]
    assert layout.lost_files(tmp_path, 2) == [f"nodes/2/{name}" for name in names]
    (tmp_path / "nodes/0/firmware").mkdir()
    assert layout.lost_files(tmp_path, 0) == ["nodes/0/firmware/root.json"]
    (tmp_path / "nodes/0/firmware/root.json").touch()
    assert layout.lost_files(tmp_path, 0) == []
