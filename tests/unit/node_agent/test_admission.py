"""G6: an admission is carried out once, whole, also when the agent is killed at any step of it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hsm_pool.firmware.slots import Slots
from hsm_pool.node_agent import admission, store_member
from hsm_pool.node_agent.admission import Admission
from hsm_pool.settings import FirmwareSettings, Identity, NodeSettings, StoreMemberSettings

IDENTITY = Identity("c", "k", "ca")
NEW = Admission(1, 4, done=False)


class Killed(BaseException):
    """Stands for kill -9."""


def node(directory: Path, incarnation: int) -> NodeSettings:
    """Return the settings of a node whose partition and member have left something behind."""
    for name in ("partition", "store"):
        (directory / name).mkdir(mode=0o700)
        (directory / name / "left-behind").write_text(name)
    (directory / "partition" / "incarnation").write_text(str(incarnation))
    return NodeSettings(
        pool_id="p",
        index=0,
        data_directory=str(directory),
        partition_settings_file="x",
        partition_lock_file=str(directory / "partition" / "lock"),
        incarnation_file=str(directory / "partition" / "incarnation"),
        log_directory=str(directory / "logs"),
        identity=IDENTITY,
        peer_node_endpoints=(),
        store_member=StoreMemberSettings(
            "etcd", "m", str(directory / "store"), "c", "p", "i", "t", IDENTITY, IDENTITY, 2**30
        ),
        firmware=None,
    )


def check(directory: Path, incarnation: int) -> None:
    """The old is put aside, the new is empty but for the incarnation."""
    assert [path.name for path in (directory / "partition").iterdir()] == ["incarnation"]
    assert (directory / "partition" / "incarnation").read_text() == str(incarnation)
    assert list((directory / "store").iterdir()) == []
    for name in ("partition", "store"):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o700
        assert (directory / f"{name}.replaced-1" / "left-behind").read_text() == name


@pytest.mark.parametrize(("last", "next_"), [(2, 3), (17, 17)])
def test_the_old_is_put_aside_and_the_incarnation_goes_on(tmp_path: Path, last: int, next_: int) -> None:
    """Above the highest that this node knows, and above the highest that the others have seen."""
    settings = node(tmp_path, last)
    assert admission.read(settings) == Admission(0, 0, done=True)
    admission.carry_out(settings, NEW)
    check(tmp_path, next_)
    assert admission.read(settings) == Admission(1, 4, done=True)


def test_directories_without_end_keep_no_node_from_starting(tmp_path: Path) -> None:
    """G8: a partition laid them, which was bad: that is why it was replaced. They stay, and that is all."""
    settings = node(tmp_path, 1)
    inner = os.open(tmp_path / "partition", os.O_RDONLY)
    for _ in range(2 * sys.getrecursionlimit()):
        os.mkdir("d", dir_fd=inner)
        above, inner = inner, os.open("d", os.O_RDONLY, dir_fd=inner)
        os.close(above)
    os.close(inner)
    try:
        for number in range(1, 4):
            admission.carry_out(settings, Admission(number, 4, done=False))
        assert admission.read(settings).done
        assert (tmp_path / "partition" / "incarnation").exists()
        assert (tmp_path / "partition.replaced-1").exists()
    finally:  # pytest could not remove it
        subprocess.run(["rm", "-rf", tmp_path / "partition.replaced-1"], check=True)


def test_of_what_replaced_partitions_left_behind_the_newest_two_are_kept(tmp_path: Path) -> None:
    """G5: else a controller that replaces a partition again and again fills the disk of three members."""
    settings = node(tmp_path, 1)
    (tmp_path / "store.replaced-notes").mkdir()  # not the agent's
    for number in range(1, 13):  # beyond 9: they are numbers, not texts
        for name in ("partition", "store"):
            (tmp_path / name / "member" / "wal").mkdir(parents=True)
            (tmp_path / name / "member" / "wal" / "0.wal").touch(mode=0o400)
        admission.carry_out(settings, Admission(number, 4, done=False))
        kept = {f"{name}.replaced-{n}" for name in ("partition", "store") for n in (number - 1, number) if n}
        found = {path.name for path in tmp_path.glob("*.replaced-*")}
        assert found == kept | {"store.replaced-notes"}
        assert all((tmp_path / name / "member" / "wal" / "0.wal").exists() for name in kept)


@pytest.mark.parametrize("step", range(8))
def test_killed_at_any_step_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    settings = node(tmp_path, 17)
    steps = 0

    def counted(original: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            nonlocal steps
            if steps == step:
                raise Killed
            steps += 1
            return original(*arguments, **options)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", counted(Path.rename))
        patched.setattr(Path, "mkdir", counted(Path.mkdir))
        patched.setattr(admission, "write_atomically", counted(admission.write_atomically))
        try:
            admission.carry_out(settings, NEW)
        except Killed:
            pass
        else:
            assert step == 7, "there are seven steps"
    found = admission.read(settings)
    if found.number == 0:
        assert step == 0
        check_untouched(tmp_path)
        found = NEW
    if not found.done:
        # What the agent does before it starts anything.
        admission.carry_out(settings, found)
    check(tmp_path, 17)


def test_a_new_partition_proves_its_image_again(tmp_path: Path) -> None:
    """What a dead partition ran may be why it died: else its node could never be replaced."""
    settings = replace(
        node(tmp_path, 17), firmware=FirmwareSettings("repository", "root", str(tmp_path / "firmware"))
    )
    slots = Slots(tmp_path / "firmware")
    (tmp_path / "firmware" / "images" / "1").mkdir(parents=True)
    slots.activate(1, b"before")
    slots.confirm(1)
    admission.carry_out(settings, NEW)
    assert (slots.active().version, slots.active().confirmed) == (1, False)
    (tmp_path / "firmware" / "active.json").write_text("{")
    admission.carry_out(settings, replace(NEW, number=2))
    assert admission.read(settings).done, "an agent that ends would bring nothing back"


def check_untouched(directory: Path) -> None:
    """Nothing was moved before it was written down what is to be done."""
    assert sorted(path.name for path in directory.iterdir()) == ["partition", "store"]


def test_a_member_joins_only_in_place_of_a_dead_one(tmp_path: Path) -> None:
    settings = node(tmp_path, 1).store_member
    assert settings is not None
    assert "--initial-cluster-state=new" in store_member.command(settings, joining=False)
    assert "--initial-cluster-state=existing" in store_member.command(settings, joining=True)


def test_a_member_has_joined_when_it_has_written_down_its_id(tmp_path: Path) -> None:
    """The new partition starts only then: seen earlier, it could be replaced again meanwhile."""
    settings = node(tmp_path, 1)
    assert not store_member.has_joined(settings)
    (tmp_path / "store" / "member" / "wal.tmp").mkdir(parents=True)
    (tmp_path / "store" / "member" / "wal.tmp" / "0.wal").touch()
    assert not store_member.has_joined(settings), "the log is not whole yet"
    (tmp_path / "store" / "member" / "wal.tmp").rename(tmp_path / "store" / "member" / "wal")
    assert store_member.has_joined(settings)
    assert store_member.has_joined(replace(settings, store_member=None)), "with an external store"
