"""Kill -9 of the operator's command at each step: whole files or none, a legal pool, a repeat works (G8).

tests/killed_command.py says what a step is. Each command is run again and again, killed one step later
each time, until it comes to its end; after every death the test does what an operator would do next.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mhsm.keys.v1 import keys_pb2
from security_domain import container
from security_domain import officers as officer_files
from security_domain.azure import document
from security_domain.officers import save_private_key
from tests.running_pool import RunningPool, TestOfficer, mhsm

pytestmark = [pytest.mark.pool, pytest.mark.slow]

EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
STEPS_MAX = 60
SHARE_REFUSED = 4

Some = Callable[[Sequence[int]], Sequence[int]]
"""Chooses the steps at which this run kills."""
Whole = Callable[[bytes], Any]
"""Parses a file; raises if it is not whole."""


class Room:
    """A directory with the officers' files, and a command that dies in it."""

    def __init__(
        self, directory: Path, pool: RunningPool, officers: list[TestOfficer], some_of: Some
    ) -> None:
        self.directory = directory
        self.steps = some_of(range(1, STEPS_MAX))
        self.pool = pool
        self.output = directory / "output"
        for number, officer in enumerate(officers, start=1):
            (directory / f"{number}.key").write_bytes(save_private_key(officer.key, None))
            (directory / f"{number}.pem").write_bytes(officer_files.certificate_pem(officer.certificate_der))
        self.certificates = [
            part for number in range(1, len(officers) + 1) for part in ("--officer", f"{number}.pem")
        ]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return mhsm(*arguments, "--data-dir", str(self.pool.directory), check=check, cwd=self.directory)

    def clear(self) -> None:
        """Take the files away that a command may have written."""
        self.output.mkdir(exist_ok=True)
        for file in self.output.iterdir():
            file.unlink()

    def die(self, step: int, *arguments: str) -> bool:
        """Run a command that is killed at a step; return whether it was."""
        argv = [sys.executable, "-m", "tests.killed_command", str(step), *arguments]
        argv += ["--data-dir", str(self.pool.directory)]
        ended = subprocess.run(
            argv, capture_output=True, text=True, timeout=150, check=False, cwd=self.directory
        )
        if ended.returncode != -signal.SIGKILL:
            assert ended.returncode == 0, ended.stderr
        return ended.returncode != 0

    def at_every_step(self, *arguments: str, files: dict[str, Whole], then: Callable[[], None]) -> int:
        """Kill a command at its first step, its second one, ...; return the last at which it could be.

        Args:
            arguments: The command; it writes into ``output/`` only.
            files: What it may write there, and how to tell that it is whole.
            then: What an operator does after the death (also after the run that is not killed).
        """
        for step in self.steps:
            self.clear()
            killed = self.die(step, *arguments)
            there = {path.name: path.read_bytes() for path in self.output.iterdir()}
            assert there.keys() <= files.keys(), "nothing half-written is left under another name"
            for name, content in there.items():
                assert files[name](content)
            if not killed:
                assert there.keys() == files.keys()
            then()
            if not killed:
                return step - 1
        raise AssertionError("the command has no end")

    def cancel(self) -> None:
        """Cancel the ceremony that the dead command may have begun, without an attempt file."""
        with self.pool.client("administrator") as client:
            under_way = client.get_ceremony(0) is not None
        cancelled = self.run("security-domain", "cancel", "--partition", "0", check=False)
        assert (cancelled.returncode == 0) == under_way, cancelled.stderr
        with self.pool.client("administrator") as client:
            assert client.get_ceremony(0) is None


@pytest.fixture
def room(pool: RunningPool, officers: list[TestOfficer], tmp_path: Path, some_of: Some) -> Room:
    return Room(tmp_path, pool, officers, some_of)


def test_download_and_what_follows(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], tmp_path: Path, some_of: Some
) -> None:
    """From an empty pool to an active one, though every command of the activation dies at every step."""
    pool = make_pool(attended=True)
    room = Room(tmp_path, pool, officers, some_of)
    files: dict[str, Whole] = {"sd": container.parse, "attempt": json.loads, "azure": document.parse}
    named = ("--output", "output/sd", "--azure-output", "output/azure", "--attempt-output", "output/attempt")
    last = False

    def recover() -> None:
        assert pool.states() == ["PROVISIONED"] * 3
        if last:
            return
        with pool.client("administrator") as client:
            begun = client.get_ceremony(0)
        if begun is not None:  # everything that the dead command would have written can still be had
            there = {path.name for path in room.output.iterdir()}
            room.clear()
            room.run("security-domain", "fetch-file", *named)
            assert {path.name for path in room.output.iterdir()} == files.keys() >= there
            assert (room.output / "sd").read_bytes() == begun.security_domain_file
        room.cancel()

    download = ("security-domain", "download", "--required", "2", *room.certificates, *named)
    assert room.at_every_step(*download, files=files, then=recover) >= 5
    # The run that was not killed was cancelled too: the same command again, and the officers prove.
    last = True
    room.clear()
    room.run(*download)
    for number in (1, 2, 3):
        share = ("submit-share", "--attempt", "output/attempt", "--security-domain", "output/sd")
        arguments = ("security-domain", *share, "--officer-key", f"{number}.key")
        # A share is accepted once: after the first death that came too late, the pool says so.
        for step in range(1, STEPS_MAX):
            with pool.client("administrator") as client:
                begun = client.get_ceremony(0)
            if begun is None or begun.accepted == number:
                break
            room.die(step, *arguments)
        repeated = room.run(*arguments, check=False)
        if number < 3:
            assert repeated.returncode == SHARE_REFUSED
            assert "before" in repeated.stderr
        else:
            assert repeated.returncode == 1, "the ceremony is over"
    pool.await_states(["SERVING"] * 3)
    pool.down()


@pytest.mark.parametrize("verb", ["verify", "rotate-shares", "new-generation"])
def test_beginning_a_ceremony(room: Room, verb: str) -> None:
    """A ceremony of which the operator lost the answer is cancelled by its partition, and begun again."""
    more = () if verb == "verify" else ("--required", "2", *room.certificates)

    def recover() -> None:
        assert room.pool.states() == ["SERVING"] * 3
        room.cancel()

    begin = ("security-domain", verb, "--output", "output/attempt", *more)
    assert room.at_every_step(*begin, files={"attempt": json.loads}, then=recover) >= 3


def test_submitting_offline_and_by_file(room: Room) -> None:
    """The submission is whole or not there; submitting it dies before or after it counts, never between."""
    pool = room.pool
    (room.directory / "sd").write_bytes(pool.file)
    verify = ("security-domain", "verify", "--output", "attempt")
    room.run(*verify)
    share = ("security-domain", "submit-share", "--attempt", "attempt")
    offline = (*share, "--security-domain", "sd", "--officer-key", "1.key", "--output", "output/submission")
    assert room.at_every_step(*offline, files={"submission": json.loads}, then=lambda: None) >= 1
    submit = (*share, "--submission", "output/submission")
    seen = set()
    for step in range(1, STEPS_MAX):
        killed = room.die(step, *submit)
        with pool.client("administrator") as client:
            begun = client.get_ceremony(0)
        assert begun is not None
        seen.add(begun.accepted)
        if begun.accepted:
            repeated = room.run(*submit, check=False)
            assert repeated.returncode == SHARE_REFUSED
            break
        assert killed
    assert seen == {0, 1}
    room.cancel()
    assert pool.states() == ["SERVING"] * 3


def test_rotating_the_key_encryption_key(room: Room) -> None:
    """A repeat after a death rotates once more at most; the pool serves all the time."""
    epochs = []

    def look() -> None:
        found = json.loads(room.run("security-domain", "rotate-kek", "--json").stdout)["epoch"]
        epochs.append(found)
        assert room.pool.states() == ["SERVING"] * 3

    steps = room.at_every_step("security-domain", "rotate-kek", files={}, then=look)
    assert steps >= 2
    assert epochs == sorted(set(epochs)), "epochs only rise"
    assert epochs[-1] - epochs[0] <= 2 * steps


def test_unlocking_with_a_restore_blob(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], tmp_path: Path, some_of: Some
) -> None:
    """init-recovery, restore-blob and upload die at every step; then the pool is unlocked all the same."""
    pool = make_pool(attended=True)
    pool.activate(officers, 2)
    room = Room(tmp_path, pool, officers, some_of)
    with pool.client("administrator") as client:
        begun = client.rotate_shares([officer.certificate_der for officer in officers], 2, 0)
        for officer in officers[:2]:
            middle = client.submit_share(0, begun.attempt_id, pool.submission(officer, begun))
        (tmp_path / "azure").write_bytes(middle.azure_security_domain_file)
        for officer in officers[:2]:
            client.submit_share(0, begun.attempt_id, pool.submission(officer, middle))
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)

    def recover() -> None:
        assert pool.states() == ["LOCKED"] * 3
        room.cancel()

    init = ("security-domain", "init-recovery", "--output", "output/attempt")
    exchange = ("--exchange-certificate-output", "output/exchange.pem")
    files: dict[str, Whole] = {"attempt": json.loads, "exchange.pem": officer_files.certificate_der}
    assert room.at_every_step(*init, *exchange, files=files, then=recover) >= 4
    room.run("security-domain", "init-recovery", "--output", "attempt", exchange[0], "exchange.pem")
    blob = ("security-domain", "restore-blob", "--azure-file", "azure", "--attempt")
    keys = ("--officer", "1.pem", "1.key", "--officer", "2.pem", "2.key", "--output", "output/blob")
    made = room.at_every_step(*blob, "attempt", *keys, files={"blob": json.loads}, then=lambda: None)
    assert made >= 1
    upload = ("security-domain", "upload", "--attempt", "attempt", "--restore-blob", "output/blob")
    for step in range(1, STEPS_MAX):
        assert room.die(step, *upload)
        with pool.client("administrator") as client:
            if client.get_ceremony(0) is None:
                break
        assert pool.states() == ["LOCKED"] * 3
    pool.await_states(["SERVING"] * 3)
    pool.down()


def test_backups(room: Room) -> None:
    """A backup and a restore that died are finished by the same command; a key's backup is whole or none."""
    with room.pool.client() as user:
        for name in ("a", "b"):
            user.create_key(name, **EC)
    for step in range(1, STEPS_MAX):
        place = f"taken-{step}"
        killed = room.die(step, "backup", "create", "--output", place)
        if not killed:
            break
        again = room.run("backup", "create", "--output", place, check=False)
        complete = "a complete backup is there" in again.stderr
        assert again.returncode == (1 if complete else 0), again.stderr
        found = json.loads(room.run("backup", "check", "--from", place, "--json").stdout)
        assert found["keys"] == 2
    assert step > 5
    for step in range(1, STEPS_MAX):
        if not room.die(step, "backup", "restore", "--from", "taken-1", "--yes"):
            break
        room.run("backup", "restore", "--from", "taken-1", "--yes")
        with room.pool.client() as user:
            assert len(list(user.list_keys())) == 2
            user.sign("keys/a", "ES256", bytes(32))
    assert step > 5
    key = ("key", "backup", "a", "--output", "output/a")
    assert room.at_every_step(*key, files={"a": lambda content: content}, then=lambda: None) >= 2


def test_officers_are_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """Each file of officers make is whole; what is left of a death is named by the next run."""
    for step in range(1, STEPS_MAX):
        place = tmp_path / f"officers-{step}"
        argv = [sys.executable, "-m", "tests.killed_command", str(step), "officers", "make"]
        argv += ["--output-dir", str(place)]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=150, check=False)
        for path in place.glob("*") if place.exists() else ():
            content = path.read_bytes()
            if path.suffix == ".key":
                officer_files.load_private_key(content, lambda: b"")
            else:
                officer_files.certificate_der(content)
        if ended.returncode == 0:
            return
        assert ended.returncode == -signal.SIGKILL
    raise AssertionError("the command has no end")


def test_the_count_of_steps_can_kill(room: Room) -> None:
    """Positive control: without the kill the same command writes its file, with it at step 1 nothing."""
    verify = ("security-domain", "verify", "--output", "output/attempt")
    room.clear()
    assert room.die(1, *verify)
    assert not list(room.output.iterdir())
    room.cancel()
    assert not room.die(STEPS_MAX, *verify)
    assert list(room.output.iterdir())
    room.cancel()
