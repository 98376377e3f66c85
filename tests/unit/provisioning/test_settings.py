"""Settings files: what is unknown, missing, of the wrong type or out of range is refused by its name."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsm_pool import settings
from hsm_pool.settings import (
    AttestationAuthority,
    FirmwareSettings,
    Identity,
    InitialAssignment,
    NodeSettings,
    OwnerSettings,
    PartitionSettings,
    Peer,
    PlatformSettings,
    RestSettings,
    StoreMemberSettings,
    StoreSettings,
    TokenSettings,
    TraceSettings,
)

Place = tuple[str | int, ...]
_IDENTITY = Identity("/certificate", "/key", "/ca")
PARTITION = PartitionSettings(
    pool_id="0" * 32,
    index=0,
    partition_count=3,
    data_directory="/data",
    client_endpoint="127.0.0.1:1",
    peer_endpoint="127.0.0.1:2",
    enclave_endpoint="127.0.0.1:3",
    node_endpoint="127.0.0.1:4",
    client_plane=_IDENTITY,
    peer_plane=_IDENTITY,
    fabric_plane=_IDENTITY,
    node_plane=_IDENTITY,
    peers=(Peer(1, "127.0.0.1:5", "127.0.0.1:6"), Peer(2, "127.0.0.1:7", "127.0.0.1:8")),
    store=StoreSettings(("127.0.0.1:9", "127.0.0.1:10"), _IDENTITY, "/prefix/", (), 2**30),
    platform=PlatformSettings("/certificate", "/key", "/root", "/sealing"),
    owner=OwnerSettings("/certificate", "/key", "/root"),
    admission_policy_file="/policy.json",
    sealing="none",
    recoverable_days=90,
    purge_protection=False,
    keys_max=5_000,
    versions_per_key_max=100,
    initial_administrators=("client/administrator",),
    initial_assignments=(InitialAssignment("client/application", "0" * 36),),
    tokens=TokenSettings("127.0.0.1:11", "https://issuer", "audience", "https://127.0.0.1:12/keys", "/ca"),
    rest=RestSettings("127.0.0.1:13", "https://issuer/tenant"),
    attestation_authorities=(AttestationAuthority("https://attest", "/keys.json", ""),),
    firmware=FirmwareSettings("/repository", "/root.json", "/firmware"),
    audit_directory="/audit",
    audit_failure="stop",
    metrics_endpoint="127.0.0.1:9",
    traces=TraceSettings("127.0.0.1:4317"),
    audit_retention_mebibytes=64,
)
NODE = NodeSettings(
    pool_id="0" * 32,
    index=2,
    data_directory="/data",
    partition_settings_file="/partition.json",
    partition_lock_file="/lock",
    incarnation_file="/incarnation",
    log_directory="/logs",
    identity=_IDENTITY,
    peer_node_endpoints=("127.0.0.1:1", "127.0.0.1:2"),
    store_member=StoreMemberSettings(
        binary="/etcd",
        name="member",
        data_directory="/data",
        client_url="https://127.0.0.1:1",
        peer_url="https://127.0.0.1:2",
        initial_cluster="member=https://127.0.0.1:2",
        cluster_token="0" * 32,
        client_identity=_IDENTITY,
        peer_identity=_IDENTITY,
        quota_bytes=2**30,
    ),
    firmware=FirmwareSettings("/repository", "/root.json", "/firmware"),
)
WHOLE: dict[str, PartitionSettings | NodeSettings] = {"partition.json": PARTITION, "node.json": NODE}


def _places(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield every place in a JSON document with its value, the document itself left out."""
    items: Iterator[tuple[str | int, Any]] = iter(())
    if isinstance(value, dict):
        items = iter(value.items())
    elif isinstance(value, list):
        items = iter(enumerate(value))
    for name, inner in items:
        yield (*place, name), inner
        yield from _places(inner, (*place, name))


def _document(file: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(settings.dump(WHOLE[file]))
    return document


def _text(file: str, place: Place) -> str:
    """Return a place as the loader names it: partition.json.peers[0].index."""
    return file + "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in place)


EVERY_PLACE = [(file, place) for file in WHOLE for place, _ in _places(_document(file))]
EVERY_FIELD = [(file, place) for file, place in EVERY_PLACE if isinstance(place[-1], str)]
EVERY_OBJECT = [
    (file, place)
    for file in WHOLE
    for place, value in [((), {}), *_places(_document(file))]
    if isinstance(value, dict)
]


def _name(parameter: Any) -> str:
    return parameter if isinstance(parameter, str) else ".".join(map(str, parameter))


every_place = pytest.mark.parametrize(("file", "place"), EVERY_PLACE, ids=_name)
every_field = pytest.mark.parametrize(("file", "place"), EVERY_FIELD, ids=_name)
every_object = pytest.mark.parametrize(("file", "place"), EVERY_OBJECT, ids=_name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


@pytest.fixture
def refused(files: Path) -> Callable[[str, Any], str]:
    """Load a document that must be refused and return the reason."""

    def load(file: str, document: Any) -> str:
        path = files / file
        path.write_text(json.dumps(document))
        with pytest.raises(ValueError) as refusal:
            settings.load(type(WHOLE[file]), path)
        return str(refusal.value)

    return load


def _holder(document: Any, place: Place) -> Any:
    for name in place[:-1]:
        document = document[name]
    return document


@pytest.mark.parametrize("file", WHOLE)
def test_what_was_dumped_is_loaded_again(tmp_path: Path, file: str) -> None:
    whole = WHOLE[file]
    path = tmp_path / file
    path.write_text(settings.dump(whole))
    loaded = settings.load(type(whole), path)
    assert loaded == whole
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.index = 1  # type: ignore[misc]


def test_store_member_and_firmware_may_be_absent_and_are_then_null(tmp_path: Path) -> None:
    node = dataclasses.replace(NODE, store_member=None, firmware=None)
    path = tmp_path / "node.json"
    path.write_text(settings.dump(node))
    assert settings.load(NodeSettings, path) == node


@every_field
def test_a_missing_field_is_refused(refused: Callable[[str, Any], str], file: str, place: Place) -> None:
    document = _document(file)
    del _holder(document, place)[place[-1]]
    assert refused(file, document) == f"{_text(file, place[:-1])}: unknown [], missing ['{place[-1]}']"


@every_object
def test_an_unknown_field_is_refused(refused: Callable[[str, Any], str], file: str, place: Place) -> None:
    document = _document(file)
    _holder(document, (*place, ""))["recoverable_day"] = 7
    assert refused(file, document) == f"{_text(file, place)}: unknown ['recoverable_day'], missing []"


@every_place
def test_a_field_of_another_type_is_refused(
    refused: Callable[[str, Any], str], file: str, place: Place
) -> None:
    original = _document(file)
    value = _holder(original, place)[place[-1]]
    may_be_null = place in {("store_member",), ("tokens",), ("rest",), ("firmware",), ("traces",)}
    alien: list[Any] = [*([] if value is False else [True]), 1.5, *([] if may_be_null else [None])]
    alien += [other for other in ("7", 7, list[Any](), dict[str, Any]()) if type(other) is not type(value)]
    for other in alien:
        document = copy.deepcopy(original)
        _holder(document, place)[place[-1]] = other
        assert refused(file, document).startswith(f"{_text(file, place)}: "), other


@pytest.mark.parametrize("value", ["", "Platform", "attended", "none "])
def test_a_kind_of_sealing_that_does_not_exist_is_refused(
    refused: Callable[[str, Any], str], value: str
) -> None:
    reason = refused("partition.json", _document("partition.json") | {"sealing": value})
    assert reason == "partition.json.sealing: one of ('platform', 'none') is needed"


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("partition.json", "index", -1),
        ("partition.json", "index", 3),
        ("partition.json", "partition_count", 0),
        ("partition.json", "recoverable_days", 6),
        ("partition.json", "recoverable_days", 91),
        ("partition.json", "audit_retention_mebibytes", 63),
        ("node.json", "index", -1),
    ],
)
def test_a_number_out_of_range_is_refused(
    refused: Callable[[str, Any], str], file: str, name: str, value: int
) -> None:
    """Azure keeps a deleted key for 7 to 90 days; a partition is one of the pool's."""
    assert name in refused(file, _document(file) | {name: value})


@pytest.mark.parametrize(
    "endpoint", ["", "127.0.0.1", "127.0.0.1:0", "0.0.0.0:9", "10.0.0.1:9", "127.0.0.1:x"]
)
def test_what_has_no_tls_stays_on_this_machine(refused: Callable[[str, Any], str], endpoint: str) -> None:
    document = _document("partition.json")
    assert "loopback" in refused("partition.json", document | {"metrics_endpoint": endpoint})
    assert "loopback" in refused("partition.json", document | {"traces": {"endpoint": endpoint}})


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"partition"', "{} {}"])
def test_what_is_no_object_in_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "partition.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        settings.load(PartitionSettings, path)


def test_what_is_no_text_is_refused_and_a_file_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError):
        settings.load(PartitionSettings, path)
    with pytest.raises(FileNotFoundError):
        settings.load(PartitionSettings, tmp_path / "absent.json")
