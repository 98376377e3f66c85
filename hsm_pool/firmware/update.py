"""The partition's side: it fetches images and verifies them itself (G5).

Nothing that the fabric controller says is believed but a version number. What the
repository holds is believed as far as its TUF metadata leads to the root that the partition
was given when it was made: unsigned, swapped, older, frozen or wrongly long is refused.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware.image import IMAGE_BYTES_MAX
from hsm_pool.firmware.repository import Published, images_of, target_path
from hsm_pool.regular_files import open_regular_file

_METADATA_BYTES_MAX = 512 * 1024
_CHUNK_BYTES = 64 * 1024


class _Files(FetcherInterface):
    """Reads file URLs below one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = Path(unquote(urlsplit(url).path)).resolve()
        if urlsplit(url).scheme != "file" or not path.is_relative_to(self._directory):
            raise DownloadError("outside the repository")
        try:
            # Whoever holds the repository may put a pipe or a device there, which would never end.
            descriptor = open_regular_file(path, os.O_RDONLY)
        except FileNotFoundError:
            raise DownloadHTTPError("no such file", 404) from None
        return self._chunks(FileIO(descriptor))

    @staticmethod
    def _chunks(stream: FileIO) -> Iterator[bytes]:
        with stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk


@contextmanager
def _verified() -> Iterator[None]:
    """Make one refusal of whatever is wrong with a repository."""
    try:
        yield
    except (RepositoryError, DownloadError, OSError, ValueError, RuntimeError) as error:
        # A loop of symbolic links is a RuntimeError.
        raise FirmwareRefused(f"the firmware repository is refused: {type(error).__name__}") from None


class FirmwareSource:
    """A repository as one partition sees it.

    Args:
        repository: Directory of the repository.
        state: Directory in which verified metadata is kept: what was seen once is never older again.
        root: The root metadata that the partition was given.
    """

    def __init__(self, repository: Path, state: Path, root: bytes) -> None:
        self._repository = repository
        self._state = state
        self._root = root

    def refresh(self) -> None:
        """Take the newest metadata, for :meth:`known`.

        Raises:
            FirmwareRefused: It does not verify, or is not fresh.
        """
        with _verified():
            self._updater().get_targetinfo(target_path(1))  # reads the targets, whatever is in them

    def fetch(self, version: int) -> tuple[Published, bytes]:
        """Return an image of the repository, verified against fresh metadata.

        Raises:
            FirmwareRefused: There is none of this version, or something about it does not verify.
        """
        name = target_path(version)
        with _verified():
            updater = self._updater()
            target = updater.get_targetinfo(name)
            if target is None:
                raise FirmwareRefused(f"the repository has no version {version}")
            published = images_of(Targets(targets={name: target}))[version]
            if target.length > IMAGE_BYTES_MAX:
                raise FirmwareRefused(f"an image has at most {IMAGE_BYTES_MAX} bytes")
            with tempfile.NamedTemporaryFile(dir=self._state) as file:
                updater.download_target(target, file.name)
                return published, Path(file.name).read_bytes()

    def known(self) -> dict[int, Published]:
        """Return the images of the metadata that was verified last, by version; {} before the first time.

        It does not expire: it says what a living peer may run, also while the repository is away.

        Raises:
            FirmwareRefused: The kept metadata is not readable.
        """
        path = self._state / "targets.json"
        if not path.exists():
            return {}
        try:
            targets = Metadata[Targets].from_file(str(path)).signed
        except (RepositoryError, OSError, ValueError) as error:
            raise FirmwareRefused(f"the kept metadata is not readable: {type(error).__name__}") from None
        return images_of(targets)

    def _updater(self) -> Updater:
        """Return an updater with fresh metadata."""
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The TUF library downloads into temporary files; under Landlock /tmp is out of reach.
        tempfile.tempdir = str(self._state)
        config = UpdaterConfig(
            max_root_rotations=32,
            max_delegations=1,
            root_max_length=_METADATA_BYTES_MAX,
            snapshot_max_length=_METADATA_BYTES_MAX,
            targets_max_length=_METADATA_BYTES_MAX,
        )
        base = self._repository.resolve().as_uri()
        updater = Updater(
            str(self._state),
            f"{base}/metadata/",
            str(self._state),
            f"{base}/targets/",
            fetcher=_Files(self._repository),
            config=config,
            bootstrap=self._root,
        )
        updater.refresh()
        return updater
