"""Backup, restore and disaster recovery on real processes (G1, G3, G4, G8)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hsm_pool.client import backup_calls, backups, calls
from hsm_pool.client.locations import Location, open_location
from hsm_pool.client.pool import Pool
from hsm_pool.errors import (
    BackupRefused,
    InvalidField,
    KeyExists,
    KeyNotFound,
    MHSMError,
    NotFresh,
    RestoreState,
)
from mhsm.backup.v1 import backup_pb2
from mhsm.keys.v1 import keys_pb2
from tests.running_pool import RunningPool, TestOfficer, mhsm, until

pytestmark = [pytest.mark.pool, pytest.mark.slow]

EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
AES = {"key_type": keys_pb2.KEY_TYPE_OCT, "size_bits": 256}
DIGEST = bytes(range(32))
ATTEMPTS_MAX = 5


def quiet(*_: object) -> None:
    """Report no progress."""


def contents(pool: Pool) -> dict[str, list[keys_pb2.Key]]:
    """Return all that a client can see: each key's versions, and the soft-deleted keys."""
    seen = {
        key.name: list(pool.list_key_versions(key.name.rsplit("/versions", 1)[0])) for key in pool.list_keys()
    }
    for deleted in pool.list_deleted_keys():
        seen[deleted.key.name + " deleted"] = [deleted.key]
    return seen


def fill(user: Pool, count: int) -> None:
    """Make keys of each kind, some with versions, attributes and tags, one soft-deleted."""
    for number in range(count):
        user.create_key(f"ec-{number}", **EC, tags={"number": str(number)})
    user.create_key("ec-0", **EC)
    user.create_key("wrap", **AES)
    user.create_key("rsa", key_type=keys_pb2.KEY_TYPE_RSA, size_bits=2048)
    user.update_key("keys/ec-1", key_attributes=calls.attributes(enabled=False))
    user.create_key("gone", **EC)
    user.delete_key("keys/gone")


@pytest.fixture
def filled(make_pool: Callable[..., RunningPool], officers: list[TestOfficer]) -> Iterator[RunningPool]:
    """An active pool with a few keys."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    with pool.client() as user:
        fill(user, 5)
    yield pool
    pool.down()


def take(pool: RunningPool, place: Path) -> None:
    """Take a full backup."""
    with pool.client("administrator") as administrator:
        backups.take(administrator, open_location(str(place)), quiet)


def test_a_lost_pool_comes_back_in_a_new_one(
    filled: RunningPool,
    make_pool: Callable[..., RunningPool],
    officers: list[TestOfficer],
    tmp_path: Path,
) -> None:
    """G1, G4: same keys, versions, attributes; old signatures verify, old ciphertext decrypts."""
    with filled.client() as user:
        before = contents(user)
        signature = user.sign("keys/ec-0", "ES256", DIGEST)
        wrapped = user.wrap_key("keys/wrap", "A256KW", b"k" * 32)
    take(filled, tmp_path / "backup")
    file = filled.file
    filled.down()
    found = make_pool(attended=True)
    with found.client("administrator") as administrator:
        with pytest.raises(MHSMError):
            backups.restore(administrator, open_location(str(tmp_path / "backup")), quiet)
        begun = administrator.init_recovery(0, file)
        for officer in officers[1:]:
            administrator.submit_share(0, begun.attempt_id, found.submission(officer, begun))
        found.await_states(["SERVING"] * 3)
        state = backups.restore(administrator, open_location(str(tmp_path / "backup")), quiet)
        assert state.phase == backup_pb2.RESTORE_PHASE_DONE
    for index in range(3):
        with found.client(partition=index) as user:
            assert contents(user) == before
            user.verify("keys/ec-0", "ES256", DIGEST, signature)
            assert user.unwrap_key("keys/wrap", "A256KW", wrapped) == b"k" * 32
            user.sign("keys/rsa", "RS256", DIGEST)
    with found.client() as user:
        user.recover_deleted_key("keys/gone")
        user.sign("keys/gone", "ES256", DIGEST)
    found.down()
    filled.up()


def test_a_restore_is_all_or_nothing(filled: RunningPool, tmp_path: Path) -> None:
    """G1, G2: nothing is served while it runs; a cancelled one changes nothing; a done one, everything."""
    take(filled, tmp_path / "backup")
    place = open_location(str(tmp_path / "backup"))
    with filled.client() as user, filled.client("administrator") as administrator:
        user.create_key("newer", **EC)
        before = contents(user)
        manifest = backups.manifest_of(place)
        state = administrator.call(backup_calls.start_restore(manifest))
        for call in (
            lambda: user.get_key("keys/newer"),
            lambda: list(user.list_keys()),
            lambda: list(user.list_deleted_keys()),
            lambda: user.create_key("other", **EC),
            lambda: user.sign("keys/newer", "ES256", DIGEST),
            lambda: user.delete_key("keys/newer"),
            lambda: user.purge_deleted_key("keys/gone"),
            lambda: user.backup_key("keys/newer"),
            lambda: administrator.call(backup_calls.start_restore(manifest)),
            lambda: administrator.call(backup_calls.start_backup("a" * 32), 1),
            lambda: administrator.call(backup_calls.commit_restore(state.restore_id)),  # parts are missing
        ):
            with pytest.raises(RestoreState):
                call()
        part = place.read("part-00000", 1 << 22)
        for bad in (part[:-1], part + b"x", bytes([part[0] ^ 1]) + part[1:]):
            with pytest.raises(BackupRefused):
                administrator.call(backup_calls.stage_restore_part(state.restore_id, 0, bad))
        administrator.call(backup_calls.stage_restore_part(state.restore_id, 0, part))
        assert backups.cancel(administrator, quiet).phase == backup_pb2.RESTORE_PHASE_CANCELLED
        assert contents(user) == before
        with pytest.raises(RestoreState):
            administrator.call(backup_calls.commit_restore(state.restore_id))
        assert backups.restore(administrator, place, quiet).phase == backup_pb2.RESTORE_PHASE_DONE
        with pytest.raises(KeyNotFound):
            user.get_key("keys/newer")
        del before["keys/newer/versions/" + before_version(before, "newer")]
        assert contents(user) == before
        with pytest.raises(RestoreState):
            administrator.call(backup_calls.cancel_restore(state.restore_id))


def before_version(seen: dict[str, list[keys_pb2.Key]], key_id: str) -> str:
    """Return the newest version id of a key."""
    return next(name.rsplit("/", 1)[1] for name in seen if name.startswith(f"keys/{key_id}/"))


@pytest.mark.parametrize("then", ["repeated", "cancelled"])
def test_a_restore_that_dies_undecided_is_repeated_or_cancelled(
    filled: RunningPool, tmp_path: Path, then: str, officers: list[TestOfficer]
) -> None:
    """G1: all partitions are killed before the commit; a repeat has the backup, a cancel what was before."""
    place = open_location(str(tmp_path / "backup"))
    with filled.client() as user:
        at_backup = contents(user)
        take(filled, tmp_path / "backup")
        changed = change(user)
    with filled.client("administrator", timeout_seconds=30) as administrator:
        stage(administrator, place)
        filled.kill_everything()
        filled.await_states(["LOCKED"] * 3)
    filled.unlock(officers[:2])
    with filled.client("administrator", timeout_seconds=30) as administrator, filled.client() as user:
        with pytest.raises(RestoreState):
            user.get_key("keys/newer")
        found = administrator.call(backup_calls.get_restore())
        assert (found.phase, found.staged_parts) == (backup_pb2.RESTORE_PHASE_STAGING, [0])
        if then == "repeated":
            assert backups.restore(administrator, place, quiet).phase == backup_pb2.RESTORE_PHASE_DONE
        else:
            assert backups.cancel(administrator, quiet).phase == backup_pb2.RESTORE_PHASE_CANCELLED
        assert contents(user) == (at_backup if then == "repeated" else changed)


@pytest.mark.parametrize("victims", ["the one that works", "all"])
@pytest.mark.parametrize("phase", ["REMOVING", "PLACING"])
def test_partitions_die_in_the_middle_of_a_restore(
    filled: RunningPool, tmp_path: Path, phase: str, victims: str, officers: list[TestOfficer]
) -> None:
    """G1: killed between two batches; what was decided goes on, and nothing of before is left."""
    place = open_location(str(tmp_path / "backup"))
    with filled.client() as user:
        for number in range(200):
            user.create_key(f"many-{number}", **AES)
        at_backup = contents(user)
    take(filled, tmp_path / "backup")
    for _ in range(ATTEMPTS_MAX):
        with filled.client() as user:
            assert change(user) != at_backup
        landed = killed_while_it_works(filled, place, phase, everybody=victims == "all")
        if victims == "all" and landed:
            filled.await_states(["LOCKED"] * 3)
            filled.unlock(officers[:2])
        filled.await_states(["SERVING"] * 3)
        with filled.client("administrator", timeout_seconds=30) as administrator:
            until(
                lambda: administrator.call(backup_calls.get_restore()).phase == backup_pb2.RESTORE_PHASE_DONE,
                60,
                "the end of the restore, which nobody asks for",
            )
        for index in range(3):
            with filled.client(partition=index, timeout_seconds=30) as user:
                assert contents(user) == at_backup
        if landed:
            return
    raise AssertionError(f"no kill of {ATTEMPTS_MAX} came in the phase {phase}")


def change(user: Pool) -> dict[str, list[keys_pb2.Key]]:
    """Create, change, delete, purge and recover keys of a filled pool; return what clients see then."""
    user.create_key("newer", **EC)
    user.create_key("rsa", key_type=keys_pb2.KEY_TYPE_RSA, size_bits=2048)
    user.update_key("keys/ec-2", key_attributes=calls.attributes(enabled=False), tags={"changed": "yes"})
    user.update_key("keys/ec-1", key_attributes=calls.attributes(enabled=True))
    user.delete_key("keys/ec-3")
    user.delete_key("keys/wrap")
    user.purge_deleted_key("keys/wrap")
    user.recover_deleted_key("keys/gone")
    return contents(user)


def stage(administrator: Pool, place: Location) -> None:
    """Start a restore and stage all its parts."""
    state = administrator.call(backup_calls.start_restore(backups.manifest_of(place)))
    for index in range(state.parts):
        part = place.read(f"part-{index:05d}", 1 << 22)
        administrator.call(backup_calls.stage_restore_part(state.restore_id, index, part))


def killed_while_it_works(pool: RunningPool, place: Location, phase: str, *, everybody: bool) -> bool:
    """Kill partition 0, which does the work, or all, between two batches of a phase.

    It is stopped as soon as another one sees the phase, and killed if the phase is not over then.

    Returns:
        Whether it was killed. If not, the restore has come to its end.
    """
    wanted = backup_pb2.RestorePhase.Value(f"RESTORE_PHASE_{phase}")
    over = backup_pb2.RESTORE_PHASE_DONE
    ended: list[object] = []
    with (
        pool.client("administrator", timeout_seconds=60) as client,
        pool.client("administrator", timeout_seconds=60) as other,
    ):
        stage(client, place)

        def restore() -> None:
            try:
                ended.append(backups.restore(client, place, quiet).phase)
            except MHSMError as error:
                ended.append(error)

        def now() -> backup_pb2.Restore:
            return other.call(backup_calls.get_restore(), 1)

        thread = threading.Thread(target=restore)
        thread.start()
        deadline = time.monotonic() + 60
        while now().phase not in {wanted, over} and time.monotonic() < deadline:
            pass  # each look is a call
        assert pool.signal(0, "partition", signal.SIGSTOP)
        try:
            seen = now()  # as of now, but told when the stopped one's lease is over
            landed = seen.phase == wanted and seen.records_left > 0
        except NotFresh:  # on a busy machine nobody can tell: not landed, another attempt
            landed = False
        if landed and everybody:
            pool.kill_everything()
        else:
            assert pool.signal(0, "partition", signal.SIGKILL if landed else signal.SIGCONT)
        thread.join(90)
        assert not thread.is_alive()
    # Whoever waits for a pool that is locked meanwhile is told so.
    assert ended == [over] or (landed and everybody and isinstance(ended[0], MHSMError))
    return landed


def test_one_key_comes_back(filled: RunningPool, tmp_path: Path) -> None:
    """Selective restore of a purged key, and a single key's own backup; neither overwrites (G8)."""
    take(filled, tmp_path / "backup")
    place = open_location(str(tmp_path / "backup"))
    with filled.client() as user, filled.client("administrator") as administrator:
        versions = list(user.list_key_versions("keys/ec-0"))
        single = user.backup_key("keys/ec-0")
        for restore in (
            lambda: backups.restore_key(administrator, place, "keys/ec-0", quiet),
            lambda: user.restore_key(single),
        ):
            with pytest.raises(KeyExists):
                restore()
            user.delete_key("keys/ec-0")
            with pytest.raises(KeyExists):
                restore()
            user.purge_deleted_key("keys/ec-0")
            assert restore().name == versions[-1].name
            assert list(user.list_key_versions("keys/ec-0")) == versions
            for version in versions:
                user.verify(version.name, "ES256", DIGEST, user.sign(version.name, "ES256", DIGEST))
        with pytest.raises(InvalidField):
            backups.restore_key(administrator, place, "keys/never", quiet)
        with pytest.raises(KeyNotFound):
            user.backup_key("keys/never")
        for bad in (single[:-1], single.replace(b"mhsm-key-backup/1", b"mhsm-key-backup/2"), b"{}", b""):
            with pytest.raises(BackupRefused):
                user.restore_key(bad)
        with pytest.raises(BackupRefused):  # a manifest of the other kind
            administrator.call(backup_calls.check_restore(single))


def test_a_backup_of_another_domain_is_refused(
    filled: RunningPool, make_pool: Callable[..., RunningPool], officers: list[TestOfficer], tmp_path: Path
) -> None:
    """G3, G4: another pool with the very same officers cannot open it."""
    take(filled, tmp_path / "backup")
    with filled.client() as user:
        single = user.backup_key("keys/wrap")
    other = make_pool(attended=True)
    other.activate(officers, 2)
    with other.client("administrator") as administrator, other.client() as user:
        with pytest.raises(BackupRefused):
            backups.restore(administrator, open_location(str(tmp_path / "backup")), quiet)
        with pytest.raises(BackupRefused):
            user.restore_key(single)
        assert contents(user) == {}
    other.down()


def test_a_backup_holds_no_plaintext(filled: RunningPool, tmp_path: Path) -> None:
    """G3: neither key material nor a key's name is found in what the administrator takes."""
    known = os.urandom(32)
    with filled.client() as user:
        user.import_key("known-by-name", octets=known)
    take(filled, tmp_path / "backup")
    taken = b"".join(path.read_bytes() for path in sorted((tmp_path / "backup").iterdir()))
    for needle in (known, known.hex().encode(), b"known-by-name", b"ec-0"):
        assert needle not in taken
    with filled.client() as user:
        single = user.backup_key("keys/known-by-name")
    for needle in (known, known.hex().encode(), b"known-by-name"):
        assert needle not in single


def test_an_interrupted_backup_is_gone_on_with_or_refused(filled: RunningPool, tmp_path: Path) -> None:
    """G8: without its manifest a backup is none; a repeat completes it; nothing is overwritten."""
    place = open_location(str(tmp_path / "backup"))

    class Interrupted(Exception):
        pass

    def interrupt(what: str, done: int, total: int) -> None:
        raise Interrupted

    with filled.client("administrator") as administrator:
        with pytest.raises(Interrupted):
            backups.take(administrator, place, interrupt)
        with pytest.raises(InvalidField):
            backups.restore(administrator, place, quiet)
        with pytest.raises(RestoreState):  # one at a time
            administrator.call(backup_calls.start_backup("a" * 32), 0)
        taken = backups.take(administrator, place, quiet)
        assert taken.keys == 8
        with pytest.raises(KeyExists):
            backups.take(administrator, place, quiet)
        assert administrator.call(backup_calls.check_restore(backups.manifest_of(place))).keys == 8


def test_a_partition_dies_while_a_backup_is_taken_from_it(filled: RunningPool, tmp_path: Path) -> None:
    """G8: the place is known as incomplete and never mixed; a new place at once, also at that partition."""
    at = ("--data-dir", str(filled.directory))
    place = str(tmp_path / "backup")

    def kill(what: str, done: int, total: int) -> None:
        victim = filled.signal(0, "partition", signal.SIGKILL)
        assert victim is not None
        filled.await_states(["SERVING"] * 3)

    with (
        filled.client("administrator") as administrator,
        pytest.raises(RestoreState, match="stays incomplete"),
    ):
        backups.take(administrator, open_location(place), kill)
    before = {path.name: path.read_bytes() for path in (tmp_path / "backup").iterdir()}
    assert sorted(before) == ["part-00000", "started.json"]
    again = mhsm("backup", "create", "--output", place, *at, check=False)
    assert again.returncode == 1
    assert "take a new backup in another place and remove this one" in again.stderr
    assert "begun and not finished" in mhsm("backup", "check", "--from", place, *at, check=False).stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "backup").iterdir()} == before
    mhsm("backup", "create", "--output", f"{place}-2", *at)
    assert "keys can be restored" in mhsm("backup", "check", "--from", f"{place}-2", *at).stdout


def test_a_part_of_another_snapshot_is_never_taken_for_this_one(filled: RunningPool, tmp_path: Path) -> None:
    """G8: the partition was restarted unnoticed, or somebody changed the place."""
    place = open_location(str(tmp_path / "backup"))

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with filled.client("administrator") as administrator:
        with pytest.raises(KeyboardInterrupt):
            backups.take(administrator, place, interrupt)
        part = tmp_path / "backup" / "part-00000"
        good = part.read_bytes()
        part.write_bytes(good[:-1])
        with pytest.raises(RestoreState, match="stays incomplete"):
            backups.take(administrator, place, quiet)
        assert "manifest.json" not in place.names()
        part.write_bytes(good)
        assert backups.take(administrator, place, quiet).keys == 8


def test_the_backup_commands(filled: RunningPool, tmp_path: Path) -> None:
    """The way of docs/operations.md, by commands and their exit codes."""
    at = ("--data-dir", str(filled.directory))
    place = str(tmp_path / "backup")
    assert '"keys": 8' in mhsm("backup", "create", "--output", place, *at, "--json").stdout
    assert mhsm("backup", "create", "--output", place, *at, check=False).returncode == 1
    assert "8 keys can be restored" in mhsm("backup", "check", "--from", place, *at).stdout
    mhsm("key", "backup", "wrap", "--output", str(tmp_path / "wrap.backup"), *at)
    mhsm("key", "delete", "wrap", *at)
    mhsm("key", "purge", "wrap", "--yes", *at)
    mhsm("key", "restore", "--file", str(tmp_path / "wrap.backup"), *at)
    assert "there was no restore" in mhsm("backup", "status", *at).stdout
    assert mhsm("backup", "cancel", *at, check=False).returncode == 1
    assert "8 keys are restored" in mhsm("backup", "restore", "--yes", "--from", place, *at).stdout
    assert "done" in mhsm("backup", "status", *at).stdout
    mhsm("key", "purge", "gone", "--yes", *at)
    assert mhsm("backup", "restore-key", "gone", "--from", place, *at).returncode == 0
    assert "deleted" in mhsm("key", "show-deleted", "gone", *at).stdout
    missing = mhsm("backup", "check", "--from", str(tmp_path / "nowhere"), *at, check=False)
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr
