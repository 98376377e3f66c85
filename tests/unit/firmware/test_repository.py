"""A partition takes an image only as far as the publisher's keys vouch for it (G5)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata

from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware import repository as repository_module
from hsm_pool.firmware.bounded_reads import BoundedReads
from hsm_pool.firmware.image import Manifest
from hsm_pool.firmware.repository import Published, Repository, load_key, make_keys
from hsm_pool.firmware.update import FirmwareSource


class Publisher:
    """A repository, its keys, and one partition's view of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "repository"
        self.keys = directory / "keys"
        self.keys.mkdir()
        make_keys(self.keys)
        self.repository = Repository.create(self.directory, self.keys)
        self.root = self.repository.root()
        self.state = directory / "state"

    def publish(
        self, version: int, content: bytes, security_version: int = 1, measurement: bytes = b""
    ) -> Published:
        measurement = measurement or bytes([version]) * 48
        published = Published(Manifest(version, security_version), measurement, len(content))
        self.repository.publish(
            content,
            published,
            [self.keys / "offline-1.key", self.keys / "offline-3.key"],
            self.keys / "snapshot.key",
            self.keys / "timestamp.key",
        )
        return published

    @property
    def source(self) -> FirmwareSource:
        return FirmwareSource(self.directory, self.state, self.root)

    def target(self, version: int) -> Path:
        (found,) = (self.directory / "targets").glob(f"*firmware-{version}.zip")
        return found


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


def test_a_published_image_is_fetched(publisher: Publisher) -> None:
    """And known afterwards, also without the repository; later ones are found."""
    assert publisher.source.known() == {}
    first = publisher.publish(1, b"first image")
    assert publisher.source.fetch(1) == (first, b"first image")
    second = publisher.publish(2, b"second image", 4)
    assert publisher.source.fetch(2) == (second, b"second image")
    assert publisher.source.fetch(1) == (first, b"first image")
    shutil.rmtree(publisher.directory)
    assert publisher.source.known() == {1: first, 2: second}
    with pytest.raises(FirmwareRefused):
        publisher.source.fetch(1)


def test_a_version_that_is_not_published_is_refused(publisher: Publisher) -> None:
    publisher.publish(2, b"image")
    for version in (1, 3):
        with pytest.raises(FirmwareRefused, match="no version"):
            publisher.source.fetch(version)


def longer(publisher: Publisher) -> None:
    publisher.target(2).write_bytes(publisher.target(2).read_bytes() + b"x")


def shorter(publisher: Publisher) -> None:
    publisher.target(2).write_bytes(publisher.target(2).read_bytes()[:-1])


def swapped(publisher: Publisher) -> None:
    publisher.target(2).write_bytes(b"X" + publisher.target(2).read_bytes()[1:])


def missing(publisher: Publisher) -> None:
    publisher.target(2).unlink()


def metadata(publisher: Publisher, name: str) -> Path:
    return publisher.directory / "metadata" / name


def with_one_signature(publisher: Publisher) -> None:
    """The threshold is two."""
    path = metadata(publisher, "3.targets.json")
    content = json.loads(path.read_bytes())
    content["signatures"] = content["signatures"][:1]
    path.write_text(json.dumps(content))


def signed_twice_by_one_key(publisher: Publisher) -> None:
    path = metadata(publisher, "3.targets.json")
    signed = Metadata.from_file(str(path))
    signed.signatures.clear()
    signed.sign(load_key(publisher.keys / "offline-1.key"))
    content = json.loads(signed.to_bytes())
    content["signatures"] *= 2
    path.write_text(json.dumps(content))


def changed_metadata(publisher: Publisher) -> None:
    path = metadata(publisher, "3.targets.json")
    path.write_bytes(path.read_bytes().replace(b'"security_version":1', b'"security_version":9'))


def signed_by_strangers(publisher: Publisher) -> None:
    other = publisher.keys.parent / "other"
    other.mkdir()
    make_keys(other)
    path = metadata(publisher, "3.targets.json")
    signed = Metadata.from_file(str(path))
    signed.signatures.clear()
    for name in ("offline-1.key", "offline-2.key"):
        signed.sign(load_key(other / name), append=True)
    path.write_bytes(signed.to_bytes())


def another_repository(publisher: Publisher) -> None:
    other = publisher.directory.parent / "elsewhere"
    other.mkdir()
    strange = Publisher(other)
    strange.publish(1, b"first image")
    strange.publish(2, b"second image")
    shutil.rmtree(publisher.directory)
    strange.directory.rename(publisher.directory)


def junk(publisher: Publisher) -> None:
    metadata(publisher, "timestamp.json").write_bytes(b"{")


def huge(publisher: Publisher) -> None:
    metadata(publisher, "timestamp.json").write_bytes(b" " * 1024 * 1024)


def deep(publisher: Publisher) -> None:
    metadata(publisher, "timestamp.json").write_bytes(b'{"a":' * 100_000)


def a_directory(publisher: Publisher) -> None:
    metadata(publisher, "timestamp.json").unlink()
    metadata(publisher, "timestamp.json").mkdir()


def a_loop(publisher: Publisher) -> None:
    metadata(publisher, "timestamp.json").unlink()
    metadata(publisher, "timestamp.json").symlink_to("timestamp.json")


def a_way_out(publisher: Publisher) -> None:
    """A link to the very file, elsewhere on the machine."""
    path = metadata(publisher, "timestamp.json")
    path.rename(publisher.keys / "timestamp.json")
    path.symlink_to(publisher.keys / "timestamp.json")


def a_device(publisher: Publisher) -> None:
    metadata(publisher, "timestamp.json").unlink()
    metadata(publisher, "timestamp.json").symlink_to("/dev/zero")


ATTACKS: list[Callable[[Any], None]] = [
    longer,
    shorter,
    swapped,
    missing,
    with_one_signature,
    signed_twice_by_one_key,
    changed_metadata,
    signed_by_strangers,
    another_repository,
    junk,
    huge,
    deep,
    a_directory,
    a_loop,
    a_device,
    a_way_out,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_repository_that_was_attacked_is_refused(
    publisher: Publisher, attack: Callable[[Publisher], None]
) -> None:
    """G5: one typed refusal, and what was known before stays known."""
    publisher.publish(1, b"first image")
    publisher.source.fetch(1)
    publisher.publish(2, b"second image")
    before = publisher.source.known()
    attack(publisher)
    with pytest.raises(FirmwareRefused):
        publisher.source.fetch(2)
    assert publisher.source.known().keys() >= before.keys()


@pytest.mark.parametrize("name", ["metadata/timestamp.json", "targets"])
def test_a_pipe_in_the_place_of_a_file_is_refused(publisher: Publisher, name: str) -> None:
    """G5: whoever holds the repository cannot have a partition wait for ever, with its commands refused."""
    publisher.publish(1, b"first image")
    path = publisher.directory / name if name != "targets" else publisher.target(1)
    good = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FirmwareRefused, match="is refused: DownloadError"):
        BoundedReads().run(lambda: publisher.source.fetch(1), 20, 0)
    path.unlink()
    path.write_bytes(good)
    assert publisher.source.fetch(1)[1] == b"first image"


def test_a_repository_that_was_rolled_back_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    """G5: metadata that was seen once is never older again."""
    publisher.publish(1, b"first image")
    shutil.copytree(publisher.directory, tmp_path / "old")
    publisher.publish(2, b"second image")
    publisher.source.fetch(2)
    shutil.rmtree(publisher.directory)
    shutil.copytree(tmp_path / "old", publisher.directory)
    for version in (1, 2):
        with pytest.raises(FirmwareRefused):
            publisher.source.fetch(version)


def test_a_frozen_repository_is_refused_until_it_is_renewed(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5: whoever shows old metadata for ever is found out when the timestamp expires."""
    image = publisher.publish(1, b"first image")
    frozen = Metadata.from_file(str(metadata(publisher, "timestamp.json")))
    frozen.signed.version += 1
    frozen.signed.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=1)
    frozen.signatures.clear()
    frozen.sign(load_key(publisher.keys / "timestamp.key"))
    metadata(publisher, "timestamp.json").write_bytes(frozen.to_bytes())
    with pytest.raises(FirmwareRefused, match="ExpiredMetadataError"):
        publisher.source.fetch(1)
    assert publisher.repository.renew(publisher.keys / "timestamp.key", None, []) == ["timestamp"]
    assert publisher.source.fetch(1)[0] == image


def test_a_repository_whose_metadata_has_ended_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5: a pool can be patched for longer than its root metadata holds; old and new nodes follow."""
    with monkeypatch.context() as a_year_ago:
        a_year_ago.setattr(repository_module, "OFFLINE_VALIDITY", timedelta(seconds=-1))
        publisher = Publisher(tmp_path)
        image = publisher.publish(1, b"image")
    keys, repository = publisher.keys, publisher.repository
    old = publisher.source
    offline = [keys / "offline-2.key", keys / "offline-3.key"]
    online = (keys / "timestamp.key", keys / "snapshot.key")
    with pytest.raises(FirmwareRefused, match="Expired"):
        old.fetch(1)
    assert repository.renew(*online, []) == ["timestamp", "snapshot"]
    with pytest.raises(FirmwareRefused, match="Expired"):
        old.fetch(1)
    repository.renew_root(offline)
    with pytest.raises(FirmwareRefused, match="Expired"):
        old.fetch(1)
    assert repository.renew(*online, offline) == ["timestamp", "snapshot", "targets"]
    for source in (old, FirmwareSource(publisher.directory, tmp_path / "new", publisher.root)):
        assert source.fetch(1) == (image, b"image")
    assert min(repository.expirations().values()) > datetime.now(UTC)
    assert repository.renew(*online, offline) == ["timestamp"], "nothing else ends soon"
    repository.renew_root(offline)
    publisher.publish(2, b"second image")
    assert old.fetch(2)[1] == b"second image"


def test_the_publisher_cannot_publish_wrongly(publisher: Publisher) -> None:
    """G8: versions rise, keys fit and are two; whatever is refused leaves the repository as it was."""
    publisher.publish(5, b"image")
    keys = publisher.keys
    online = (keys / "snapshot.key", keys / "timestamp.key")
    two = [keys / "offline-1.key", keys / "offline-2.key"]

    def published(version: int) -> Published:
        return Published(Manifest(version, 1), bytes(48), 5)

    stamp = metadata(publisher, "timestamp.json").read_bytes()
    for arguments in (
        (published(5), two, *online),
        (published(4), two, *online),
        (published(6), two[:1], *online),
        (published(6), [two[0], two[0]], *online),
        (published(6), [two[0], online[0]], *online),
    ):
        with pytest.raises(FirmwareRefused):
            publisher.repository.publish(b"other", *arguments)
    assert metadata(publisher, "timestamp.json").read_bytes() == stamp
    assert publisher.repository.images().keys() == {5}
    with pytest.raises(FirmwareRefused):
        publisher.repository.renew(keys / "snapshot.key", None, [])
    with pytest.raises(FirmwareRefused):
        publisher.repository.renew_root([keys / "offline-1.key", keys / "snapshot.key"])
    with pytest.raises(FirmwareRefused):
        publisher.repository.renew_root([keys / "offline-1.key"])
    publisher.publish(6, b"image 6", 2)
    with pytest.raises(FirmwareRefused, match="security version 2 is published"):
        publisher.publish(7, b"image 7", 1)
    assert publisher.repository.images().keys() == {5, 6}
    assert publisher.source.fetch(6)[1] == b"image 6"


def test_nothing_is_overwritten(publisher: Publisher) -> None:
    """G8."""
    with pytest.raises(FileExistsError):
        make_keys(publisher.keys)
    with pytest.raises(FileExistsError):
        Repository.create(publisher.directory, publisher.keys)


def test_an_interrupted_publication_can_be_repeated(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: until the timestamp is replaced nothing is visible, and the same command completes it."""
    publisher.publish(1, b"first image")
    written = repository_module.write_new_file
    left = 0

    def dying(path: Path, content: bytes, mode: int = 0o600) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        written(path, content, mode)

    for steps in range(4):
        left = steps
        monkeypatch.setattr(repository_module, "write_new_file", dying)
        version = 2 + steps
        with pytest.raises(KeyboardInterrupt):
            publisher.publish(version, f"image {version}".encode())
        monkeypatch.setattr(repository_module, "write_new_file", written)
        assert version not in seen(publisher)
        publisher.publish(version, f"image {version}".encode())
        assert publisher.source.fetch(version)[1] == f"image {version}".encode()


def seen(publisher: Publisher) -> set[int]:
    """Return the versions that a partition sees now."""
    found = set()
    for version in range(1, 7):
        try:
            publisher.source.fetch(version)
        except FirmwareRefused:
            continue
        found.add(version)
    return found
