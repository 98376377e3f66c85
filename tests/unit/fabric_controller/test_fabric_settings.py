"""G8: a settings file is taken as it is meant or refused."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_controller.settings import (
    FILE_BYTES_MAX,
    FabricSettings,
    Identity,
    Partition,
    SettingsError,
    load,
    parse,
)

VALID: dict[str, Any] = {
    "pool_id": "contoso",
    "partitions": [
        {"index": 2, "enclave_endpoint": "[::1]:7303"},
        {"index": 0, "enclave_endpoint": "127.0.0.1:7301"},
        {"index": 1, "enclave_endpoint": "hsm-1.example:7302"},
    ],
    "identity": {"certificate_file": "/p/f.crt", "key_file": "/p/f.key", "ca_file": "/p/ca.crt"},
    "data_directory": "/p/fabric",
}


def test_a_valid_file_is_read_in_index_order(tmp_path: Path) -> None:
    path = tmp_path / "fabric.json"
    path.write_text(json.dumps(VALID))
    assert load(path) == FabricSettings(
        pool_id="contoso",
        partitions=(
            Partition(0, "127.0.0.1:7301"),
            Partition(1, "hsm-1.example:7302"),
            Partition(2, "[::1]:7303"),
        ),
        identity=Identity("/p/f.crt", "/p/f.key", "/p/ca.crt"),
        data_directory="/p/fabric",
    )


def _set(*where: Any, value: Any) -> Callable[[Any], None]:
    def change(settings: Any) -> None:
        for step in where[:-1]:
            settings = settings[step]
        settings[where[-1]] = value

    return change


def _drop(*where: Any) -> Callable[[Any], None]:
    def change(settings: Any) -> None:
        for step in where[:-1]:
            settings = settings[step]
        del settings[where[-1]]

    return change


REFUSED = {
    "unknown key": _set("pool_name", value="x"),
    "unknown key of a partition": _set("partitions", 0, "client_endpoint", value="127.0.0.1:1"),
    "unknown key of the identity": _set("identity", "passphrase", value="x"),
    "missing pool": _drop("pool_id"),
    "missing key file": _drop("identity", "key_file"),
    "missing index": _drop("partitions", 1, "index"),
    "empty pool": _set("pool_id", value=""),
    "pool with a line break": _set("pool_id", value="a\nb"),
    "long pool": _set("pool_id", value="x" * 129),
    "no partition": _set("partitions", value=[]),
    "partitions as object": _set("partitions", value={"0": "127.0.0.1:1"}),
    "too many partitions": _set(
        "partitions", value=[{"index": i, "enclave_endpoint": f"h:{i + 1}"} for i in range(17)]
    ),
    "double index": _set("partitions", 0, "index", value=1),
    "double endpoint": _set("partitions", 0, "enclave_endpoint", value="127.0.0.1:7301"),
    "index as bool": _set("partitions", 0, "index", value=True),
    "index as text": _set("partitions", 0, "index", value="2"),
    "negative index": _set("partitions", 0, "index", value=-1),
    "large index": _set("partitions", 0, "index", value=16),
    "endpoint without port": _set("partitions", 0, "enclave_endpoint", value="127.0.0.1"),
    "endpoint with port 0": _set("partitions", 0, "enclave_endpoint", value="127.0.0.1:0"),
    "endpoint with port 65536": _set("partitions", 0, "enclave_endpoint", value="127.0.0.1:65536"),
    "endpoint with a scheme": _set("partitions", 0, "enclave_endpoint", value="unix:/p/socket:1"),
    "relative key file": _set("identity", "key_file", value="f.key"),
    "relative data directory": _set("data_directory", value="fabric"),
    "identity as text": _set("identity", value="/p/f.key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_g8_refused(name: str) -> None:
    settings = copy.deepcopy(VALID)
    REFUSED[name](settings)
    with pytest.raises(SettingsError):
        parse(json.dumps(settings))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "null",
        "[]",
        "[" * 60_000,
        json.dumps(VALID)[:-1],
        json.dumps(VALID)[:-1] + ', "pool_id": "other"}',
    ],
    ids=["empty", "nonsense", "null", "list", "deep", "cut", "doubled key"],
)
def test_g8_refused_text(text: str) -> None:
    with pytest.raises(SettingsError):
        parse(text)


@pytest.mark.parametrize(
    "content",
    [json.dumps(VALID).encode() + b" " * FILE_BYTES_MAX, b"\xff\xfe{}"],
    ids=["too large", "not UTF-8"],
)
def test_g8_refused_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fabric.json"
    path.write_bytes(content)
    with pytest.raises(SettingsError):
        load(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from([(), ("partitions",), ("partitions", 0), ("identity",), ("data_directory",)]))
def test_g8_anything_is_taken_or_refused(value: Any, where: tuple[Any, ...]) -> None:
    settings: Any = copy.deepcopy(VALID)
    if where:
        _set(*where, value=value)(settings)
    else:
        settings = value
    with contextlib.suppress(SettingsError):
        parse(json.dumps(settings))


def test_g5_no_link_is_taken_for_a_settings_file(tmp_path: Path) -> None:
    """Its reader may be root, and who owns the directory another user."""
    path, elsewhere = tmp_path / "fabric.json", tmp_path / "elsewhere"
    elsewhere.write_text("{}")
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic"):
        load(path)
    path.unlink()
    path.hardlink_to(elsewhere)
    with pytest.raises(SettingsError, match="file of its own"):
        load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SettingsError, match="file of its own"):
        load(path)


def test_g5_another_users_settings_send_root_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal is made, cut and given away in the data directory."""
    path, link = tmp_path / "fabric.json", tmp_path / "link"
    link.symlink_to(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    for directory in (tmp_path, link):
        path.write_text(json.dumps({**VALID, "data_directory": str(directory)}))
        assert load(path).data_directory == str(tmp_path)
    (tmp_path / "state").mkdir()
    path.write_text(json.dumps({**VALID, "data_directory": str(tmp_path / "state")}))
    with pytest.raises(SettingsError, match="data_directory"):
        load(path)
