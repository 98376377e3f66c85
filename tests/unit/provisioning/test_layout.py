"""The data directory: made whole or not at all, never over something else, readable by its owner only."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsm_pool import settings
from hsm_pool.provisioning.layout import (
    DirectoryRefused,
    ExternalStore,
    NewPool,
    OwnIssuer,
    is_pool,
    pool_settings,
    provision,
)
from hsm_pool.settings import NodeSettings, PartitionSettings
from hsm_pool.tokens.issuer import object_id
from tests.running_pool import mhsm

NEW = NewPool(attended=False, recoverable_days=7, etcd_binary="/etcd")
Snapshot = dict[str, tuple[int, bytes]]


def snapshot(directory: Path) -> Snapshot:
    """Return mode and content of everything below a directory."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in directory.rglob("*")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the data directory of a pool that was made without a umask."""
    directory = tmp_path_factory.mktemp("layout") / "data"
    before = os.umask(0)
    try:
        provision(directory, NEW)
    finally:
        os.umask(before)
    return directory


def partition(directory: Path, index: int) -> PartitionSettings:
    return settings.load(PartitionSettings, directory / "nodes" / str(index) / "partition.json")


def node(directory: Path, index: int) -> NodeSettings:
    return settings.load(NodeSettings, directory / "nodes" / str(index) / "node.json")


# -- what is made ------------------------------------------------------------------------


def test_every_file_that_settings_name_is_there_under_its_final_path(made: Path) -> None:
    runtime = {"lock", "incarnation", "admission-policy.json"}
    seen = 0

    def check(value: Any) -> None:
        nonlocal seen
        if isinstance(value, dict):
            for inner in value.values():
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)
        elif isinstance(value, str) and value.startswith(str(made.parent)):
            seen += 1
            assert Path(value).is_relative_to(made)
            assert Path(value).exists() or Path(value).name in runtime, value

    for path in made.rglob("*.json"):
        assert ".new-" not in path.read_text()
        check(json.loads(path.read_text()))
    assert seen > 3 * 20


def test_settings_of_the_three_nodes_agree(made: Path) -> None:
    partitions = [partition(made, index) for index in range(3)]
    nodes = [node(made, index) for index in range(3)]
    fabric = json.loads((made / "fabric" / "fabric.json").read_text())
    pool_id = pool_settings(made)["pool_id"]
    assert {s.pool_id for s in partitions} | {s.pool_id for s in nodes} == {pool_id, fabric["pool_id"]}
    for index, own in enumerate(partitions):
        others = [other for other in partitions if other.index != index]
        assert (own.index, nodes[index].index, own.partition_count) == (index, index, 3)
        assert (own.sealing, own.recoverable_days) == ("platform", 7)
        assert [(p.index, p.peer_endpoint, p.node_endpoint) for p in own.peers] == [
            (other.index, other.peer_endpoint, other.node_endpoint) for other in others
        ]
        assert set(own.store.endpoints) == set(partitions[0].store.endpoints)
        assert nodes[index].peer_node_endpoints == tuple(other.node_endpoint for other in others)
        assert nodes[index].partition_lock_file == f"{own.data_directory}/lock"
        assert nodes[index].incarnation_file == f"{own.data_directory}/incarnation"
        member = nodes[index].store_member
        assert member
        assert member.client_url == f"https://{own.store.endpoints[0]}"
        assert f"{member.name}={member.peer_url}" in member.initial_cluster.split(",")
        assert member.cluster_token == pool_id
        assert fabric["partitions"][index] == {"index": index, "enclave_endpoint": own.enclave_endpoint}
    assert len({s.store_member.initial_cluster for s in nodes if s.store_member}) == 1


def test_all_endpoints_are_distinct_and_on_the_loopback_interface(made: Path) -> None:
    endpoints = []
    for index in range(3):
        own, member = partition(made, index), node(made, index).store_member
        assert member
        endpoints += [own.client_endpoint, own.peer_endpoint, own.enclave_endpoint, own.node_endpoint]
        endpoints += [member.client_url.removeprefix("https://"), member.peer_url.removeprefix("https://")]
        assert own.tokens
        assert own.rest
        endpoints += [own.tokens.endpoint, own.rest.endpoint]
    assert len(set(endpoints)) == 24
    assert {endpoint.partition(":")[0] for endpoint in endpoints} == {"127.0.0.1"}


def test_each_node_has_its_own_sealing_key(made: Path) -> None:
    keys = {(made / f"nodes/{index}/platform/sealing.key").read_bytes() for index in range(3)}
    assert len(keys) == 3
    assert bytes(32) not in keys


def test_an_attended_pool_is_not_sealed_to_its_platform(tmp_path: Path) -> None:
    provision(tmp_path / "data", NewPool(attended=True, recoverable_days=90, etcd_binary="/etcd"))
    assert pool_settings(tmp_path / "data")["attended"] is True
    assert {partition(tmp_path / "data", index).sealing for index in range(3)} == {"none"}


def test_an_external_store_gets_no_members_and_a_prefix_of_its_own(tmp_path: Path) -> None:
    external = ExternalStore(("store.example:2379",), "/ca", "/certificate", "/key")
    pool_id = provision(tmp_path / "data", NewPool(True, 90, "", external))
    for index in range(3):
        assert node(tmp_path / "data", index).store_member is None
        store = partition(tmp_path / "data", index).store
        assert store.endpoints == external.endpoints
        assert store.identity == settings.Identity("/certificate", "/key", "/ca")
        assert store.prefix == f"/mhsm/{pool_id}/"
    assert not list((tmp_path / "data").rglob("store-*"))


def test_two_pools_share_nothing(tmp_path: Path) -> None:
    ids = {provision(tmp_path / name, NEW) for name in ("a", "b")}
    assert len(ids) == 2
    roots = {(tmp_path / name / "pki" / "client-ca.crt").read_bytes() for name in ("a", "b")}
    assert len(roots) == 2


# -- modes -------------------------------------------------------------------------------


def test_only_the_owner_enters_the_directory_or_reads_a_file_whatever_the_umask(made: Path) -> None:
    assert made.stat().st_mode & 0o7777 == 0o700
    files = [path for path in made.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert {path.stat().st_mode & 0o7777 for path in files} == {0o600}


def test_directories_with_keys_are_their_owners_only(made: Path) -> None:
    holders = {path.parent for path in made.rglob("*.key")} | set(made.glob("nodes/*/partition"))
    assert len(holders) == 4 + 3 * 4
    assert {path.stat().st_mode & 0o7777 for path in holders} == {0o700}


def test_every_directory_is_its_owners_only(made: Path) -> None:
    assert {path.stat().st_mode & 0o7777 for path in made.rglob("*") if path.is_dir()} == {0o700}


# -- what is refused ---------------------------------------------------------------------


def foreign_file(directory: Path) -> None:
    directory.mkdir()
    (directory / "thesis.txt").write_text("years of work")


def hidden_file(directory: Path) -> None:
    directory.mkdir()
    (directory / ".profile").write_text("")


def empty_subdirectory(directory: Path) -> None:
    (directory / "nodes").mkdir(parents=True)


def plain_file(directory: Path) -> None:
    directory.write_text("no directory")


def half_a_pool(directory: Path) -> None:
    provision(directory, NEW)
    (directory / "pool.json").unlink()


@pytest.mark.parametrize("lay", [foreign_file, hidden_file, empty_subdirectory, plain_file, half_a_pool])
def test_a_foreign_directory_is_refused_and_left_as_it_is(
    tmp_path: Path, lay: Callable[[Path], None]
) -> None:
    lay(tmp_path / "data")
    before = snapshot(tmp_path)
    assert not is_pool(tmp_path / "data")
    with pytest.raises(DirectoryRefused, match="is not a pool's data directory"):
        provision(tmp_path / "data", NEW)
    assert snapshot(tmp_path) == before


def test_a_pool_is_not_made_over_a_pool(tmp_path: Path) -> None:
    """A second ``up`` finds the pool; whoever would provision again anyway destroys nothing."""
    directory = tmp_path / "data"
    assert not is_pool(directory)
    pool_id = provision(directory, NEW)
    before = snapshot(tmp_path)
    assert is_pool(directory)
    assert pool_settings(directory)["pool_id"] == pool_id
    with pytest.raises(DirectoryRefused):
        provision(directory, NEW)
    assert snapshot(tmp_path) == before


def test_a_second_up_does_not_change_what_the_pool_is(tmp_path: Path) -> None:
    """An unattended pool does not become an attended one; nothing is started nor written."""
    provision(tmp_path / "data", NEW)
    before = snapshot(tmp_path)
    completed = mhsm("up", "--attended", "--data-dir", str(tmp_path / "data"), check=False)
    assert completed.returncode
    assert "made unattended" in completed.stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("changed", [{"format": 1}, {"format": "1"}, {"format": None}])
def test_a_pool_of_another_format_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    provision(tmp_path / "data", NEW)
    file = tmp_path / "data" / "pool.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(DirectoryRefused, match="another format"):
        pool_settings(tmp_path / "data")


@pytest.mark.parametrize("days", [-1, 6, 91])
def test_a_retention_that_azure_does_not_have_makes_nothing(tmp_path: Path, days: int) -> None:
    with pytest.raises(DirectoryRefused, match="7 to 90 days"):
        provision(tmp_path / "data", NewPool(attended=True, recoverable_days=days, etcd_binary="/etcd"))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_taken_and_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    provision(tmp_path / "data", NEW)
    assert is_pool(tmp_path / "data")
    assert (tmp_path / "data").stat().st_mode & 0o7777 == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_an_empty_directory_is_followed(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    provision(tmp_path / "data", NEW)
    assert (tmp_path / "data").is_symlink()
    assert is_pool(tmp_path / "disk")


# -- all or nothing ----------------------------------------------------------------------


class Syncs:
    """Counts the moments at which a file is to be on disk, and does something at one of them.

    The disk itself is not waited for: no test here cuts the power.
    """

    def __init__(self) -> None:
        self.count = 0
        self.at = 0
        self.then: Callable[[], object] = lambda: None

    def __call__(self, _: int) -> None:
        self.count += 1
        if self.count == self.at:
            self.then()


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Syncs]:
    made = Syncs()
    monkeypatch.setattr(os, "fsync", made)
    yield made


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", [_full, _interrupted])
def test_a_failure_on_the_way_leaves_nothing(
    tmp_path: Path, syncs: Syncs, failure: Callable[[], None], existing: bool
) -> None:
    """Tried at the first file and at the last one, pool.json."""
    provision(tmp_path / "counted", NEW)
    last = syncs.count
    assert last > 100
    for at in (1, last - 1):
        directory = tmp_path / str(at) / "data"
        directory.mkdir(parents=True)
        if not existing:
            directory.rmdir()
        syncs.count, syncs.at, syncs.then = 0, at, failure
        with pytest.raises((OSError, KeyboardInterrupt)):
            provision(directory, NEW)
        assert snapshot(tmp_path / str(at)).keys() == ({"data"} if existing else set())
        assert not is_pool(directory)
        provision(directory, NEW)
        assert is_pool(directory)


def test_a_failure_after_the_last_step_leaves_a_whole_pool(tmp_path: Path, syncs: Syncs) -> None:
    provision(tmp_path / "counted", NEW)
    (tmp_path / "parent").mkdir()
    syncs.at, syncs.count, syncs.then = syncs.count, 0, _full
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        provision(tmp_path / "parent" / "data", NEW)
    assert [path.name for path in (tmp_path / "parent").iterdir()] == ["data"]
    assert snapshot(tmp_path / "parent" / "data").keys() == snapshot(tmp_path / "counted").keys()


def test_of_two_that_make_the_same_pool_at_once_one_wins_whole(tmp_path: Path, syncs: Syncs) -> None:
    winners = []
    syncs.at, syncs.then = 50, lambda: winners.append(provision(tmp_path / "data", NEW))
    with pytest.raises((OSError, DirectoryRefused)):
        provision(tmp_path / "data", NEW)
    assert pool_settings(tmp_path / "data")["pool_id"] == winners[0]
    assert {partition(tmp_path / "data", index).pool_id for index in range(3)} == {winners[0]}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


_KILLED_AT = """
import os, signal, sys
from pathlib import Path
from hsm_pool.provisioning.layout import NewPool, provision
left, sync = int(sys.argv[2]), os.fsync
def dying(descriptor):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = dying
provision(Path(sys.argv[1]), NewPool(False, 7, "/etcd"))
"""


def test_a_kill_on_the_way_leaves_no_pool_and_does_not_hinder_the_next_try(
    tmp_path: Path, syncs: Syncs
) -> None:
    provision(tmp_path / "counted", NEW)
    directory = tmp_path / "data"
    completed = subprocess.run(
        [sys.executable, "-c", _KILLED_AT, str(directory), str(syncs.count - 1)], timeout=30, check=False
    )
    assert completed.returncode == -signal.SIGKILL
    assert not directory.exists()
    provision(directory, NEW)
    assert snapshot(directory).keys() == snapshot(tmp_path / "counted").keys()


@pytest.mark.parametrize(
    "own", [None, OwnIssuer("https://issuer", "audience", "/keys.json")], ids=["none", "own"]
)
def test_only_the_development_profile_has_an_issuer(tmp_path: Path, own: OwnIssuer | None) -> None:
    provision(tmp_path / "data", NewPool(False, 7, "/etcd", tokens=own))
    assert not (tmp_path / "data/token-issuer").exists()
    for index in range(3):
        found = partition(tmp_path / "data", index).tokens
        assert (found is None) if own is None else (found and found.issuer == "https://issuer")


def test_the_rest_front_sends_its_clients_to_the_pools_issuer(tmp_path: Path) -> None:
    """With the development issuer its administrator begins as one; with an own issuer those who are named."""
    provision(tmp_path / "a", NewPool(False, 7, "/etcd"))
    own, guid = OwnIssuer("https://login.example/tenant/v2.0", "audience", "/keys.json"), "0" * 36
    provision(tmp_path / "b", NewPool(False, 7, "/etcd", tokens=own, administrators=(guid,)))
    provision(tmp_path / "c", NewPool(False, 7, "/etcd", tokens=None))
    first, second, third = (partition(tmp_path / name, 1) for name in "abc")
    assert first.tokens
    assert first.rest
    assert first.rest.authority == f"{first.tokens.issuer}/{uuid.UUID(first.pool_id)}"
    administrator = object_id(first.pool_id, "administrator")
    assert first.initial_administrators == ("client/administrator", administrator)
    assert second.rest
    assert second.rest.authority == own.issuer
    assert second.initial_administrators == ("client/administrator", guid)
    assert (third.rest, third.initial_administrators) == (None, ("client/administrator",))
