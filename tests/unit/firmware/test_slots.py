"""Which image a node starts, and when it gives one up (G5)."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware.image import SECURITY_VERSION, Manifest, build
from hsm_pool.firmware.measurement import PACKAGES, measure
from hsm_pool.firmware.slots import INSTALLED, STARTS_MAX, Slots


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    roots = {package: tmp_path / "sources" / package for package in PACKAGES}
    for root in roots.values():
        root.mkdir(parents=True)
        (root / "__init__.py").write_text("")
    return roots


@pytest.fixture
def slots(tmp_path: Path, sources: dict[str, Path]) -> Slots:
    """A node with versions 1 and 2 staged."""
    made = Slots(tmp_path / "firmware")
    for version in (1, 2):
        stage(made, sources, version)
    return made


def stage(slots: Slots, sources: dict[str, Path], version: int) -> None:
    manifest = Manifest(version, 1)
    slots.stage(build(sources, manifest), manifest, measure(sources, manifest.serialise()))


def test_a_new_node_runs_the_installed_distribution(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "firmware")
    assert slots.starting() is None
    assert slots.active().version == INSTALLED
    with pytest.raises(FirmwareRefused, match="not staged"):
        slots.activate(1, b"before")


def test_what_was_activated_is_started_and_stays_when_it_is_confirmed(slots: Slots) -> None:
    slots.activate(1, b"before")
    assert slots.starting() == slots.path(1)
    slots.confirm(1)
    for _ in range(3 * STARTS_MAX):
        assert slots.starting() == slots.path(1)
    slots.activate(2, b"before")
    slots.activate(2, b"before")
    assert (slots.active().version, slots.active().previous) == (2, 1)
    assert slots.active().previous_measurement == b"before".hex()


def test_an_image_that_does_not_start_is_given_up_for_the_one_before(slots: Slots) -> None:
    slots.activate(1, b"before")
    slots.starting()
    slots.confirm(1)
    slots.activate(2, b"before")
    for _ in range(STARTS_MAX):
        assert slots.starting() == slots.path(2)
    assert slots.starting() == slots.path(1)
    assert (slots.active().version, slots.active().failed, slots.active().confirmed) == (1, 2, True)
    assert slots.starting() == slots.path(1)
    slots.activate(2, b"before")
    assert slots.starting() == slots.path(2), "it may be tried again on command"
    assert slots.active().failed == INSTALLED


def test_an_image_that_never_served_is_nothing_to_go_back_to(slots: Slots, sources: dict[str, Path]) -> None:
    """G5: activated twice without a start between; the fallback is what served last."""
    stage(slots, sources, 3)
    slots.activate(1, b"before")
    slots.starting()
    slots.confirm(1)
    slots.activate(2, b"of 1")
    slots.activate(3, b"of 1")
    assert (slots.active().version, slots.active().previous, slots.active().confirmed) == (3, 1, False)
    assert slots.active().previous_measurement == b"of 1".hex()
    for _ in range(STARTS_MAX):
        assert slots.starting() == slots.path(3)
    assert slots.starting() == slots.path(1)
    slots.activate(2, b"of 1")
    slots.starting()
    slots.activate(1, b"of 2")
    assert (slots.active().version, slots.active().confirmed) == (1, True), "1 has served"


def test_only_what_served_is_confirmed(slots: Slots) -> None:
    """G5: the old image, which still runs, says nothing of the one that was activated meanwhile."""
    slots.activate(1, b"before")
    slots.activate(2, b"before")
    slots.confirm(1)
    assert not slots.active().confirmed
    slots.confirm(2)
    assert slots.active().confirmed


def test_the_one_before_is_not_started_below_the_security_version(
    slots: Slots, sources: dict[str, Path]
) -> None:
    """G5: it would refuse to start, and the node would have nothing to run."""
    manifest = Manifest(3, 2)
    slots.stage(build(sources, manifest), manifest, measure(sources, manifest.serialise()))
    slots.activate(1, b"before")
    slots.confirm(1)
    slots.activate(3, b"before")
    slots.raise_floor(2)
    images = slots.path(3).parent  # type: ignore[union-attr]
    images.rename(images.with_name("hidden"))  # the agent does not read them
    for _ in range(2 * STARTS_MAX):
        assert slots.starting() == slots.path(3)
    assert not slots.active().confirmed


def test_what_is_installed_is_not_started_below_the_security_version(
    slots: Slots, sources: dict[str, Path]
) -> None:
    """G5: the agent is of the installed distribution and knows its security version."""
    for floor, started in ((SECURITY_VERSION, None), (SECURITY_VERSION + 1, slots.path(1))):
        slots.activate(1, b"before")
        slots.raise_floor(floor)
        for _ in range(STARTS_MAX):
            slots.starting()
        assert slots.starting() == started


def test_a_new_partition_proves_its_image_again(slots: Slots) -> None:
    """What runs at a node may be why the old partition died."""
    slots.doubt()
    assert slots.active().confirmed, "there is nothing but what is installed"
    slots.activate(1, b"before")
    slots.confirm(1)
    slots.doubt()
    for _ in range(STARTS_MAX):
        assert slots.starting() == slots.path(1)
    assert slots.starting() is None
    slots.doubt()
    assert slots.active().confirmed


def test_a_start_that_neither_serves_nor_waits_hangs(slots: Slots) -> None:
    assert not slots.hangs()
    slots.activate(1, b"before")
    slots.starting()
    assert slots.hangs()
    slots.note_waiting()
    slots.note_waiting()
    assert not slots.hangs()
    slots.starting()
    assert slots.hangs(), "each start says it anew"
    slots.confirm(1)
    assert not slots.hangs()


def test_staging_is_repeatable_and_checks_what_was_unpacked(slots: Slots, sources: dict[str, Path]) -> None:
    """G5: an image is what its metadata says, also the second time."""
    stage(slots, sources, 1)
    manifest = Manifest(3, 1)
    content = build(sources, manifest)
    for wrong in ((Manifest(3, 2), measure(sources, manifest.serialise())), (manifest, bytes(48))):
        with pytest.raises(FirmwareRefused, match="not what its metadata says"):
            slots.stage(content, *wrong)
        assert not slots.staged(3)
    path = slots.path(1)
    assert path is not None
    (path / "hsm_pool" / "__init__.py").write_text("changed = True\n")
    with pytest.raises(FirmwareRefused):
        stage(slots, sources, 1)
    assert not slots.staged(1)


def test_a_file_that_is_not_readable_is_said_so(slots: Slots, tmp_path: Path) -> None:
    (tmp_path / "firmware" / "active.json").write_bytes(b"{")
    with pytest.raises(FirmwareRefused):
        slots.starting()
