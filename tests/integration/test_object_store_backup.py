"""Backups in real object stores, by the commands: S3 (moto), Azure Blob Storage (Azurite) (G1, G8)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from hsm_pool.client.locations import open_location
from hsm_pool.errors import KeyExists
from mhsm.keys.v1 import keys_pb2
from tests import object_stores
from tests.object_stores import ObjectStore
from tests.running_pool import RunningPool, TestOfficer

pytestmark = [pytest.mark.pool, pytest.mark.slow]

EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
LARGE = {f"tag-{number}": "x" * 250 for number in range(15)}
KEYS = 100
"""Large enough, with those tags, for more than one part."""


@pytest.fixture(scope="module")
def filled(make_pool: Callable[..., RunningPool], officers: list[TestOfficer]) -> Iterator[RunningPool]:
    """A pool whose backup has several parts."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    with pool.client() as user:
        for number in range(KEYS):
            user.create_key(f"key-{number}", **EC, tags=LARGE)
    yield pool
    pool.down()


@pytest.fixture(scope="module", params=["s3", "azure"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A running object store."""
    home = tmp_path_factory.mktemp("store") / "home"
    home.mkdir()
    with ExitStack() as stack:
        yield stack.enter_context(getattr(object_stores, request.param)(home))


class Operator:
    """Runs commands at a pool, with a store's credentials where its driver looks for them."""

    def __init__(self, pool: RunningPool, store: ObjectStore) -> None:
        self.pool = pool
        self.store = store

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `mhsm backup ...`."""
        argv = [sys.executable, "-m", "hsm_pool.cli", "backup", *arguments]
        return subprocess.Popen(
            [*argv, "--data-dir", str(self.pool.directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.store.environment(),
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run `mhsm backup ...`; return its standard output, or its standard error if it is to fail."""
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=150)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return err if code else out


@pytest.fixture
def operator(filled: RunningPool, store: ObjectStore) -> Operator:
    return Operator(filled, store)


def test_a_backup_in_a_store_is_taken_checked_and_restored(operator: Operator) -> None:
    """G1: the whole way by commands; a second backup in the same place is refused."""
    place = operator.store.place()
    missing = operator.run("check", "--from", place, code=1)
    assert "no complete backup" in missing
    taken = json.loads(operator.run("create", "--output", place, "--json"))
    assert taken["keys"] == KEYS
    assert taken["parts"] > 1
    parts = [f"part-{number:05d}" for number in range(taken["parts"])]
    assert operator.store.names(place) == ["manifest.json", *parts, "started.json"]
    assert "a complete backup is there" in operator.run("create", "--output", place, code=1)
    assert json.loads(operator.run("check", "--from", place, "--json"))["keys"] == KEYS
    with operator.pool.client() as user:
        names = {key.name for key in user.list_keys()}
        last = max(names, key=lambda name: int(name.split("/")[1].removeprefix("key-")))
        user.delete_key("/".join(last.split("/")[:2]))
        user.purge_deleted_key("/".join(last.split("/")[:2]))
        operator.run("restore-key", last.split("/")[1], "--from", place)
        assert {key.name for key in user.list_keys()} == names
        user.create_key("newer", **EC)
        user.delete_key("keys/key-0")
        operator.run("restore", "--yes", "--from", place)
        assert {key.name for key in user.list_keys()} == names


def test_what_was_changed_in_the_store_is_refused(operator: Operator) -> None:
    """G6, G8: a part or a manifest that is cut, changed or gone; the pool is as it was."""
    place, store = operator.store.place(), operator.store
    operator.run("create", "--output", place)
    with operator.pool.client() as user:
        before = sorted(key.name for key in user.list_keys())
    for name in ("part-00001", "manifest.json"):
        path = store.path(place, name)
        good = store.filesystem.cat_file(path)
        for bad in (good[:-1], good[:-20] + bytes([good[-20] ^ 1]) + good[-19:], None):
            if bad is None:
                store.filesystem.rm_file(path)
            else:
                store.filesystem.pipe_file(path, bad)
            operator.run("restore", "--yes", "--from", place, code=1)
            if name.startswith("part"):
                operator.run("cancel")
        store.filesystem.pipe_file(path, good)
    with operator.pool.client() as user:
        assert sorted(key.name for key in user.list_keys()) == before
    operator.run("restore", "--yes", "--from", place)


def write(place: str, name: str, content: bytes, both: threading.Barrier, refused: list[bytes]) -> None:
    """Write an object at the same moment as somebody else; note a refusal."""
    location = open_location(place)
    both.wait(30)
    try:
        location.write(name, content)
    except KeyExists:
        refused.append(content)


def test_only_one_of_two_writers_writes_an_object(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: the store itself refuses the second one, so nothing is overwritten by two commands at once."""
    import fsspec

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (store.filesystem, url.partition("://")[2]))
    place = store.place()
    for number in range(10):
        both = threading.Barrier(2)
        refused: list[bytes] = []
        name = f"object-{number}"
        writers = [
            threading.Thread(target=write, args=(place, name, octets, both, refused))
            for octets in (b"one", b"two")
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
        assert len(refused) == 1
        found = open_location(place).read(name, 10)
        assert {found, *refused} == {b"one", b"two"}


@pytest.mark.parametrize("store", ["s3"], indirect=True)  # whose server can stop in the middle of a request
def test_an_upload_that_is_killed_is_gone_on_with(operator: Operator) -> None:
    """G8: kill -9 with half of a part sent: no half object, no complete backup; a repeat finishes it."""
    store, place = operator.store, operator.store.place()
    process = operator.start("create", "--output", place)
    store.kill_at_next = ("part-00001", process.pid)
    with process:
        process.communicate(timeout=150)
    assert process.returncode == -9
    assert store.names(place) == ["part-00000", "started.json"]
    assert "no complete backup" in operator.run("check", "--from", place, code=1)
    store.written.clear()
    operator.run("create", "--output", place)
    assert "part-00000" not in store.written, "what was whole is not written again"
    assert json.loads(operator.run("check", "--from", place, "--json"))["keys"] == KEYS
    operator.run("restore", "--yes", "--from", place)


def test_a_bucket_that_is_not_there_is_named(operator: Operator) -> None:
    """G8: no traceback."""
    nowhere = operator.store.url.replace(object_stores.BUCKET, "no-such-bucket") + "/place"
    assert "no-such-bucket" in operator.run("create", "--output", nowhere, code=1)


@pytest.mark.parametrize("store", ["s3"], indirect=True)  # Azure's driver tries again for more than a minute
def test_a_store_that_does_not_answer_is_said_in_words(operator: Operator) -> None:
    """G3, G8: no traceback, no credentials in what is printed."""
    config = operator.store.home / ".aws" / "config"
    original = config.read_text()
    try:
        config.write_text(re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:1", original))
        said = operator.run("create", "--output", operator.store.place(), code=1)
    finally:
        config.write_text(original)
    assert "127.0.0.1:1" in said
    credentials = (operator.store.home / ".aws" / "credentials").read_text()
    for secret in re.findall(r"= (\w+)", credentials):
        assert secret not in said
