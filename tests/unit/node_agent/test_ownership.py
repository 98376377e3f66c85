"""G3: what a child of the agent's has laid in its directory makes the agent give away nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hsm_pool.node_agent import ownership
from hsm_pool.node_agent.ownership import NodeUsers
from hsm_pool.provisioning import users as users_module
from hsm_pool.provisioning.users import Users

ME = os.geteuid()
AGENT = NodeUsers(ME, ME, ME)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory that nobody may be given."""
    made = tmp_path / "elsewhere"
    made.mkdir(mode=0o755)
    (made / "inner").mkdir(mode=0o755)
    return made


def untouched(directory: Path) -> bool:
    return {stat.S_IMODE(path.stat().st_mode) for path in (directory, directory / "inner")} == {0o755}


@pytest.mark.parametrize(
    ("give", "place"),
    [
        (ownership.give_store_directory, "node/member"),
        (ownership.give_store_directory, "node"),
        (ownership.give_partition_directory, "node"),
        (ownership.take, "node"),
        (ownership.take_whole, "node"),
    ],
)
def test_a_link_is_refused_and_what_it_leads_to_keeps_its_owner(
    give: Callable[[Path, NodeUsers], None], place: str, tmp_path: Path, elsewhere: Path
) -> None:
    if place != "node":
        (tmp_path / "node").mkdir()
    (tmp_path / place).symlink_to(elsewhere)
    with pytest.raises(OSError):
        give(tmp_path / "node", AGENT)
    assert untouched(elsewhere)


def test_links_within_what_is_removed_are_not_followed(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "old" / "deep").mkdir(parents=True)
    (tmp_path / "old" / "deep" / "link").symlink_to(elsewhere)
    ownership.take_whole(tmp_path / "old", AGENT)
    assert untouched(elsewhere)
    assert stat.S_IMODE((tmp_path / "old" / "deep").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["firmware", "partition", "pki", "store", "audit", "anything"])
def test_links_in_a_nodes_directory_are_not_followed_at_the_start(
    name: str, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root gives the node's directories to their users at each start; the agent may have laid links there."""
    node = tmp_path / "node"
    for other in {"firmware", "partition", "pki", "store", "audit"} - {name}:
        (node / other).mkdir(parents=True)
    (node / "partition.json").touch()
    (node / name).symlink_to(elsewhere)
    everybody = Users(*[ME] * len(Users.__slots__))
    changed: list[str] = []
    chown = os.chown

    def noted(path: object, *owner: int, **options: object) -> None:
        followed = options.get("follow_symlinks", True)
        changed.append(os.path.realpath(str(path)) if followed else str(path))
        chown(path, *owner, **options)  # type: ignore[arg-type,call-overload]

    monkeypatch.setattr(os, "chown", noted)
    try:
        users_module._assign_node(node, everybody)
    except OSError:
        assert name in {"firmware", "partition"}, "these are given once more, and a link is refused"
    assert untouched(elsewhere)
    assert not [path for path in changed if path.startswith(str(elsewhere))]
