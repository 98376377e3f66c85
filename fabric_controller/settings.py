"""Settings of the fabric controller: frozen dataclasses, read from one JSON file.

The file is written by the provisioning of the pool::

    {"pool_id": "...",
     "partitions": [{"index": 0, "enclave_endpoint": "127.0.0.1:7301"}, ...],
     "identity": {"certificate_file": "...", "key_file": "...", "ca_file": "..."},
     "data_directory": "..."}

Unknown, missing and doubled keys are refused, so a misspelt setting cannot be ignored.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fabric_controller.own_files import NotOwnFile, open_own_file

FILE_BYTES_MAX: Final = 64 * 1024
"""Bytes of a settings file; a real one has about 1 KiB."""

PARTITIONS_MAX: Final = 16
"""Partitions of one pool; a Managed HSM pool has three."""

POOL_ID_LENGTH_MAX: Final = 128
"""Characters of a pool id."""

_ENDPOINT: Final = re.compile(r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})")


class SettingsError(ValueError):
    """The settings are refused; the message names the setting, never its value."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of the pool; the endpoint is host:port of its enclave interface."""

    index: int
    enclave_endpoint: str


@dataclass(frozen=True, slots=True)
class Identity:
    """The controller's own TLS identity on the fabric plane: files in PEM, absolute paths."""

    certificate_file: str
    key_file: str
    ca_file: str


@dataclass(frozen=True, slots=True)
class FabricSettings:
    """Everything the fabric controller needs. Partitions are ordered by index."""

    pool_id: str
    partitions: tuple[Partition, ...]
    identity: Identity
    data_directory: str

    @property
    def indexes(self) -> tuple[int, ...]:
        """The partitions of the pool."""
        return tuple(partition.index for partition in self.partitions)


def _fields(value: Any, names: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"{where}: an object is needed")
    unknown, missing = sorted(set(value) - names), sorted(names - set(value))
    if unknown or missing:
        raise SettingsError(f"{where}: unknown {unknown}, missing {missing}")
    return value


def _text(value: Any, where: str, length_max: int = 4096) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= length_max or not value.isprintable():
        raise SettingsError(f"{where}: a text of 1-{length_max} printable characters is needed")
    return value


def _absolute_path(value: Any, where: str) -> str:
    text = _text(value, where)
    if not Path(text).is_absolute():
        raise SettingsError(f"{where}: an absolute path is needed")
    return text


def _partition(value: Any, where: str) -> Partition:
    fields = _fields(value, {"index", "enclave_endpoint"}, where)
    index = fields["index"]
    # bool is a kind of int in Python, not in JSON.
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < PARTITIONS_MAX:
        raise SettingsError(f"{where}.index: a whole number of 0-{PARTITIONS_MAX - 1} is needed")
    endpoint = _text(fields["enclave_endpoint"], f"{where}.enclave_endpoint")
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None or not 1 <= int(found[1]) <= 65_535:
        raise SettingsError(f"{where}.enclave_endpoint: host:port is needed")
    return Partition(index, endpoint)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise SettingsError("a key stands twice in one object")
    return fields


def parse(text: str) -> FabricSettings:
    """Check the JSON text of a settings file and return the settings.

    Raises:
        SettingsError: Not JSON, or a setting is unknown, missing, doubled or out of its bounds.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except SettingsError:
        raise
    except (ValueError, RecursionError):
        raise SettingsError("the file is not JSON") from None
    fields = _fields(value, {"pool_id", "partitions", "identity", "data_directory"}, "settings")
    entries = fields["partitions"]
    if not isinstance(entries, list) or not 1 <= len(entries) <= PARTITIONS_MAX:
        raise SettingsError(f"settings.partitions: a list of 1-{PARTITIONS_MAX} is needed")
    partitions = [_partition(entry, f"settings.partitions[{i}]") for i, entry in enumerate(entries)]
    if len({partition.index for partition in partitions}) != len(partitions):
        raise SettingsError("settings.partitions: an index stands twice")
    if len({partition.enclave_endpoint for partition in partitions}) != len(partitions):
        raise SettingsError("settings.partitions: an enclave_endpoint stands twice")
    names = ("certificate_file", "key_file", "ca_file")
    files = _fields(fields["identity"], set(names), "settings.identity")
    return FabricSettings(
        pool_id=_text(fields["pool_id"], "settings.pool_id", POOL_ID_LENGTH_MAX),
        partitions=tuple(sorted(partitions, key=lambda partition: partition.index)),
        identity=Identity(*(_absolute_path(files[name], f"settings.identity.{name}") for name in names)),
        data_directory=_absolute_path(fields["data_directory"], "settings.data_directory"),
    )


def load(path: Path) -> FabricSettings:
    """Read the settings file.

    Raises:
        SettingsError: The file is refused, see :func:`parse`, or it is not a file of its own, or
            names a data directory that is not its writer's to name.
        OSError: The file cannot be read.
    """
    try:
        descriptor = open_own_file(path, os.O_RDONLY)
    except NotOwnFile:
        raise SettingsError("it is not a file of its own") from None
    with os.fdopen(descriptor, "rb") as file:
        owner = os.fstat(descriptor).st_uid
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise SettingsError(f"the file has more than {FILE_BYTES_MAX} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise SettingsError("the file is not UTF-8") from None
    settings, directory = parse(text), path.parent.absolute()
    others = {owner, directory.stat().st_uid} - {os.geteuid()}
    if others and not Path(settings.data_directory).samefile(directory):
        # Else its owner would have root write wherever he likes.
        raise SettingsError("settings.data_directory: another user's file names the directory it lies in")
    return replace(settings, data_directory=str(directory)) if others else settings
