"""Where backups lie: a directory, or an object store by its URL (through fsspec).

``file://``, ``s3://``, ``abfs://`` and whatever else fsspec finds a driver for; the drivers
(s3fs, adlfs) are installed by whoever needs them and take their credentials from their own
configuration, never from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec

from hsm_pool.client.new_file import write_new_file
from hsm_pool.errors import InvalidField, KeyExists

_SAID_MAX = 200
"""Characters of a driver's error that are shown."""


class Location(Protocol):
    """A flat collection of objects that are written once, whole."""

    def names(self) -> set[str]:
        """Return the names of all objects."""

    def read(self, name: str, bytes_max: int) -> bytes:
        """Return an object.

        Raises:
            InvalidField: It is not there, or larger than it may be.
        """

    def write(self, name: str, content: bytes) -> None:
        """Write an object that must not exist.

        Raises:
            KeyExists: It exists.
        """


def open_location(url: str) -> Location:
    """Return the location of a path or URL.

    Raises:
        InvalidField: There is no driver for it.
    """
    if "://" not in url:
        return _Directory(Path(url))
    if url.startswith("file://"):
        return _Directory(Path(url.removeprefix("file://")))
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InvalidField(f"{url.split('://', maxsplit=1)[0]}: {error}", field="location") from None
    return _ObjectStore(filesystem, root)


class _Directory:
    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> set[str]:
        if not self._path.is_dir():
            return set()
        return {entry.name for entry in self._path.iterdir() if not entry.name.startswith(".")}

    def read(self, name: str, bytes_max: int) -> bytes:
        try:
            with (self._path / name).open("rb") as stream:
                content = stream.read(bytes_max + 1)
        except FileNotFoundError:
            raise InvalidField(f"{self._path / name} is missing", field="location") from None
        return _bounded(content, name, bytes_max)

    def write(self, name: str, content: bytes) -> None:
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            write_new_file(self._path / name, content)
        except FileExistsError:
            raise KeyExists(f"{self._path / name} exists and is not overwritten") from None


class _ObjectStore:
    """An object store writes an object whole or not at all; S3 and Azure refuse a second one by themselves.

    A driver raises whatever its libraries raise. That becomes an OSError with the first line of what it
    says, without the query of an address (which may hold a signature).
    """

    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")

    def names(self) -> set[str]:
        self._filesystem.invalidate_cache()
        try:
            with _in_words(self._root):
                listed = self._filesystem.ls(self._root, detail=False)
        except FileNotFoundError:
            return set()
        return {entry.rsplit("/", 1)[-1] for entry in listed}

    def read(self, name: str, bytes_max: int) -> bytes:
        path = f"{self._root}/{name}"
        try:
            with _in_words(path):
                content = self._filesystem.cat_file(path, start=0, end=bytes_max + 1)
        except FileNotFoundError:
            raise InvalidField(f"{path} is missing", field="location") from None
        return _bounded(content, name, bytes_max)

    def write(self, name: str, content: bytes) -> None:
        path = f"{self._root}/{name}"
        exists = KeyExists(f"{path} exists and is not overwritten")
        if name in self.names():  # for a store that cannot refuse by itself
            raise exists
        try:
            with _in_words(path):
                self._filesystem.pipe_file(path, content, mode="create")
        except FileExistsError:
            raise exists from None
        except FileNotFoundError:
            raise InvalidField(f"{path}: there is no such bucket or container", field="location") from None


@contextmanager
def _in_words(path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:  # noqa: BLE001 - of any library
        said = re.sub(r"\?\S*", "", next(iter(str(error).splitlines()), ""))
        raise OSError(f"{path}: {type(error).__name__}: {said[:_SAID_MAX]}") from None


def _bounded(content: bytes, name: str, bytes_max: int) -> bytes:
    if len(content) > bytes_max:
        raise InvalidField(f"{name} has more than {bytes_max} bytes", field="location")
    return content
