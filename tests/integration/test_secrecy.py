"""G3: no secret stands in plaintext outside a partition, after use, healing and a ceremony."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from hsm_pool.client import backups
from hsm_pool.client.locations import open_location
from mhsm.record.v1 import record_pb2
from security_domain.azure import document, transfer_key
from security_domain.azure import submission as azure_submission
from security_domain.azure.restore_blob import make_restore_blob
from security_domain.submission import VERIFICATION
from tests import scan
from tests.canaries import every_form, holding_process, import_and_use, learn_secrets, use
from tests.running_pool import RunningPool, TestOfficer, until
from tests.scan import Scanner, Unreadable, files_under
from tests.store_access import StoreAccess

pytestmark = pytest.mark.pool

NEVER_IN_PARTITIONS = ("security domain", "share")
"""Secrets with these names belong to the ceremony child alone."""


@dataclass(frozen=True)
class Used:
    """A pool with a life behind it, and all its secrets that a test can learn."""

    pool: RunningPool
    secrets: dict[str, bytes]
    mnemonics: dict[str, str]
    backup: list[Path]
    after_ceremonies: dict[str, Counter[str]] | Unreadable
    """What stood in the partitions' memory before they were killed, or why nobody could look."""

    @property
    def scanner(self) -> Scanner:
        return Scanner(self.secrets, self.mnemonics)


def cannot_look(why: str) -> NoReturn:
    """End a test that could not read the memory it judges: a failure where it may, else a skip."""
    if scan.may_trace():
        pytest.fail(f"{why}, although this user may trace every process: nothing was proved")
    pytest.skip(f"{why}: run as root, or with CAP_SYS_PTRACE")


def learn(
    pool: RunningPool, officers: list[TestOfficer], when: str
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return (octets, words) of the security domain in force, in both formats, and of the pool's keys."""
    secrets, mnemonics = learn_secrets(pool, officers)
    azure = document.parse(azure_file(pool))
    for number, (officer, share) in enumerate(zip(officers, azure.shares, strict=True), start=1):
        opened = document.open_share(azure, officer.key, share.thumbprint)
        secrets[f"share {number} of Azure's format"] = opened.reveal()
    return (
        {f"{name} {when}": value for name, value in secrets.items()},
        {f"{name} {when}": words for name, words in mnemonics.items()},
    )


def azure_file(pool: RunningPool) -> bytes:
    """Return the security-domain file in force, in Azure's format."""
    with StoreAccess(pool.connection) as store:
        header = record_pb2.PoolHeader.FromString(store.dump()["header"])
    return header.azure_security_domain_file


def unlock_with_blob(pool: RunningPool, officers: list[TestOfficer]) -> None:
    """Kill the pool and unlock it at partition 0 with a restore blob of Azure's format."""
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    pairs = [(officer.key, officer.certificate_der) for officer in officers[:2]]
    with pool.client("administrator") as client:
        begun = client.init_recovery(0)
        certificate = transfer_key.parse_transfer_key(begun.transfer_key)
        blob = make_restore_blob(document.parse(azure_file(pool)), pairs, certificate)
        assert client.upload_restore_blob(0, begun.attempt_id, blob).complete
    pool.await_states(["SERVING"] * 3)


def restore_backup(pool: RunningPool, place: Path) -> None:
    """Change the key-encryption key, take a backup and restore it, back up a key."""
    with pool.client("administrator") as client:
        assert client.rotate_key_encryption_key(1) == 2
        location = open_location(str(place))
        backups.take(client, location, lambda *_: None, 1)
        backups.restore(client, location, lambda *_: None)
    with pool.client() as user:
        user.backup_key("keys/known-oct")


def prove_and_rotate(pool: RunningPool, officers: list[TestOfficer]) -> None:
    """Prove a quorum at partition 2 and rotate the shares at partition 1."""
    with pool.client("administrator") as client:
        begun = client.verify_security_domain(2)
        for officer in officers[:2]:
            proved = client.submit_share(2, begun.attempt_id, pool.submission(officer, begun))
        assert proved.complete
        begun = client.rotate_shares([officer.certificate_der for officer in officers], 2, 1)
        for officer in officers[1:]:
            after = client.submit_share(1, begun.attempt_id, pool.submission(officer, begun))
        for officer in officers[:2]:
            rotated = client.submit_share(1, begun.attempt_id, pool.submission(officer, after))
        assert (rotated.complete, rotated.required) == (True, 2)
    pool.file = after.security_domain_file


def prove_and_renew(pool: RunningPool, officers: list[TestOfficer]) -> None:
    """Prove a quorum in Azure's format at partition 1 and make a new generation at partition 2."""
    parsed = document.parse(azure_file(pool))
    with pool.client("administrator") as client:
        begun = client.verify_security_domain(1)
        agreed = (begun.attempt_id, begun.exchange_public_key, VERIFICATION)
        for officer in officers[:2]:
            share = azure_submission.make_submission(parsed, officer.key, officer.certificate_der, *agreed)
            proved = client.submit_share(1, begun.attempt_id, share)
        assert proved.complete
        begun = client.new_generation([officer.certificate_der for officer in officers], 2, 2)
        for officer in officers:
            renewed = client.submit_share(2, begun.attempt_id, pool.submission(officer, begun))
        assert renewed.complete
    pool.file = renewed.security_domain_file


def residues_in_partitions(pool: RunningPool, scanner: Scanner) -> dict[str, Counter[str]]:
    """Scan the memory of the three partitions.

    Raises:
        Unreadable: The kernel refuses.
    """
    residues: dict[str, Counter[str]] = {}
    for index in range(3):
        process_id = pool.process_id(index, "partition")
        assert process_id
        residues[f"partition {index}"], size = scanner.scan_process(process_id)
        assert size > 1024 * 1024
        assert not ceremony_children(process_id), "a ceremony child outlives its ceremony"
    return residues


@pytest.fixture(scope="module", params=["attended", "unattended"])
def used(
    request: pytest.FixtureRequest,
    make_pool: Callable[..., RunningPool],
    officers: list[TestOfficer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Used]:
    """A pool that was used, healed and restarted as a whole: by a ceremony, if it is attended.

    Between them the two pools hold each ceremony, and each is the last one of its partition when that
    partition is scanned: restore blob, share rotation and proof in the attended pool, activation, proof in
    Azure's format and new generation in the other.
    """
    attended = request.param == "attended"
    pool = make_pool(attended=attended)
    place = tmp_path_factory.mktemp("secrecy") / "backup"
    pool.activate(officers, 2)
    first, first_words = learn(pool, officers, "at first")
    if attended:
        unlock_with_blob(pool, officers)
    imported = import_and_use(pool)
    killed = pool.status(1).incarnation
    pool.signal(1, "partition", signal.SIGKILL)
    until(lambda: (s := pool.status(1)) is not None and s.incarnation > killed, 30, "a new incarnation")
    pool.await_states(["SERVING"] * 3)
    use(pool)
    restore_backup(pool, place)
    (prove_and_rotate if attended else prove_and_renew)(pool, officers)
    last, last_words = learn(pool, officers, "at last")
    changed = {name: value for name, value in last.items() if value not in first.values()}
    secrets, mnemonics = {**imported, **first, **changed}, {**first_words, **last_words}
    after_ceremonies: dict[str, Counter[str]] | Unreadable
    try:
        after_ceremonies = residues_in_partitions(pool, Scanner(secrets, mnemonics))
    except Unreadable as error:
        after_ceremonies = error
    pool.kill_everything()
    if attended:
        pool.await_states(["LOCKED"] * 3)
        pool.unlock(officers[1:])
    pool.await_states(["SERVING"] * 3)
    use(pool)
    yield Used(pool, secrets, mnemonics, files_under(place), after_ceremonies)
    pool.down()


def test_no_secret_stands_in_a_file(used: Used) -> None:
    """G3: the whole data directory, that is store members' data, logs, state files, platform, settings."""
    scanner = used.scanner
    files = files_under(used.pool.directory)
    names = {path.name for path in files}
    assert {"db", "partition.log", "store.log", "connection.json", "head", "platform.key"} <= names
    assert {"manifest.json", "part-00000"} <= {path.name for path in used.backup}
    files += used.backup
    found = {str(path): dict(hits) for path in files if (hits := scanner.scan_file(path))}
    assert not found


def test_no_secret_stands_in_the_store(used: Used) -> None:
    """G3: everything that the store's own interface gives, keys and values."""
    with StoreAccess(used.pool.connection) as store:
        dump = store.dump()
    assert "header" in dump
    assert len([key for key in dump if key.startswith("record/")]) >= 7
    scanner = used.scanner
    found = scanner.scan("\n".join(dump).encode())
    for value in dump.values():
        found += scanner.scan(value)
    assert not found


def test_no_secret_stands_in_another_process(used: Used, capsys: pytest.CaptureFixture[str]) -> None:
    """G3: supervisor, node agents, fabric controller and store members never see one."""
    connection = used.pool.connection
    processes = {
        "supervisor": connection.supervisor_process_id,
        "fabric controller": connection.fabric_controller["process_id"],
    }
    for entry in connection.partitions:
        processes[f"node agent {entry.index}"] = entry.process_ids["node_agent"]
        processes[f"store member {entry.index}"] = entry.process_ids["store_member"]
    scanner = used.scanner
    found: dict[str, Counter[str]] = {}
    for name, process_id in processes.items():
        assert process_id
        try:
            found[name], size = scanner.scan_process(process_id)
        except Unreadable as error:
            cannot_look(f"the memory of the {name} cannot be read: {error}")
        assert size > 1024 * 1024, f"hardly any memory of the {name} was read"
    assert {name: hits for name, hits in found.items() if hits} == {}


@pytest.mark.parametrize("when", ["after ceremonies", "after a restart"])
def test_no_security_domain_secret_stays_in_a_partition(
    used: Used, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """G3: shares and the security domain's root exist in the ceremony child only.

    A partition may hold key material; what is found of it is reported, not judged.
    """
    try:
        residues = (
            used.after_ceremonies
            if when == "after ceremonies"
            else residues_in_partitions(used.pool, used.scanner)
        )
        if isinstance(residues, Unreadable):
            raise residues
    except Unreadable as error:
        cannot_look(f"the memory of the partitions cannot be read: {error}")
    with capsys.disabled():
        for name, hits in residues.items():
            print(f"\n  {name}: {dict(hits) or 'no residue'}", end="")
    for hits in residues.values():
        assert not [hit for hit in hits if hit.startswith(NEVER_IN_PARTITIONS)]


def test_partitions_leave_no_core_files(used: Used) -> None:
    """G3: the limit of a core file is 0 in each partition."""
    for index in range(3):
        limits = Path(f"/proc/{used.pool.process_id(index, 'partition')}/limits").read_text()
        (line,) = (line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert line.split()[4:6] == ["0", "0"]


def ceremony_children(process_id: int) -> list[int]:
    """Return the children of a process that run a ceremony."""
    found = []
    for task in Path(f"/proc/{process_id}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(FileNotFoundError):
                if b"ceremony" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


# -- positive controls: what the scanner must see -----------------------------------------


def test_the_scanner_sees_planted_secrets_in_a_file(used: Used, tmp_path: Path) -> None:
    """G3, positive control: every secret, in every encoding, at every alignment."""
    scanner = used.scanner
    file = tmp_path / "planted"
    for number, (name, kind, text) in enumerate(every_form(used.secrets, used.mnemonics)):
        file.write_bytes(os.urandom(1000 + number % 8) + text + os.urandom(1000))
        assert scanner.scan_file(file)[f"{name} ({kind})"] == 1, (name, kind)
        # A buffer that was freed and overwritten in part.
        file.write_bytes(os.urandom(1000 + number % 8) + text[8:] + os.urandom(1000))
        assert scanner.scan_file(file)[f"{name} ({kind})"] == 1, (name, kind, "in part")
    file.write_bytes(os.urandom(1024 * 1024))
    assert not scanner.scan_file(file)


def test_the_scanner_sees_planted_secrets_in_a_process(used: Used) -> None:
    """G3, positive control: the same in the memory of a process that read them from a pipe."""
    scanner = used.scanner
    pieces = every_form(used.secrets, used.mnemonics)
    with holding_process() as (process_id, give):
        try:
            assert not scanner.scan_process(process_id)[0]
        except Unreadable as error:
            cannot_look(f"not even the memory of an own child can be read: {error}")
        give(pieces)
        seen = scanner.scan_process(process_id)[0]
    assert {f"{name} ({kind})" for name, kind, _ in pieces} <= set(seen)


def test_root_is_not_let_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that cannot be read fails where it must be readable; elsewhere the skip is counted."""
    if os.geteuid() == 0:
        assert scan.may_trace(), "root without CAP_SYS_PTRACE proves nothing about memory"
    for may, ending in ((True, pytest.fail.Exception), (False, pytest.skip.Exception)):
        monkeypatch.setattr(scan, "may_trace", lambda may=may: may)
        with pytest.raises(ending):
            cannot_look("the memory cannot be read")
