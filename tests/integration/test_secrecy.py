"""G3: no secret stands in plaintext outside a partition, after use, healing and a ceremony."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hsm_pool.client import backups
from hsm_pool.client.locations import open_location
from hsm_pool.errors import MHSMError
from mhsm.record.v1 import record_pb2
from security_domain import container, shares
from security_domain.azure import document
from security_domain.azure import submission as azure_submission
from security_domain.encoding import decode, parse_object
from security_domain.recovery import Recovery
from security_domain.secret import Secret
from security_domain.submission import VERIFICATION, make_submission, open_own_share
from security_domain.wrapping import DerivedKeys, open_payload
from tests.running_pool import RunningPool, TestOfficer, until
from tests.scan import Scanner, Unreadable, encodings, files_under, mnemonic_encodings
from tests.store_access import StoreAccess

pytestmark = pytest.mark.pool

DIGEST = b"d" * 32
NEVER_IN_PARTITIONS = ("security domain", "share")
"""Secrets with these names belong to the ceremony child alone."""

_PAYLOAD_FIELDS: dict[str, type] = {"pool_id": str, "generation": int, "root": str, "owner_key": str}


@dataclass(frozen=True)
class Used:
    """A pool with a life behind it, and all its secrets that a test can learn."""

    pool: RunningPool
    secrets: dict[str, bytes]
    mnemonics: dict[str, str]
    backup: list[Path]

    @property
    def scanner(self) -> Scanner:
        return Scanner(self.secrets, self.mnemonics)


def pkcs8(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def open_shares(
    file: bytes, officers: list[TestOfficer]
) -> tuple[dict[str, str], container.SecurityDomainFile]:
    """Return every officer's words, and the parsed file."""
    domain = container.parse(file)
    return {
        f"share {number}": open_own_share(domain, officer.key)[1]
        for number, officer in enumerate(officers, start=1)
    }, domain


def import_and_use(pool: RunningPool) -> dict[str, bytes]:
    """Import known keys, provoke refusals with them, and return what is secret of them."""
    octets = os.urandom(32)
    rsa_key = rsa.generate_private_key(65537, 2048)
    ec_key = ec.generate_private_key(ec.SECP256R1())
    refused: list[Callable[[], object]] = []
    with pool.client() as client:
        client.import_key("known-oct", octets=octets)
        client.import_key("known-rsa", pkcs8_der=pkcs8(rsa_key))
        client.import_key("known-ec", pkcs8_der=pkcs8(ec_key))
        # Parsers like to quote what they cannot read.
        for der in (pkcs8(rsa_key), pkcs8(ec_key)):
            refused.append(partial(client.import_key, "cut", pkcs8_der=der[:-1]))
            refused.append(partial(client.import_key, "cut", octets=der))
        refused.append(partial(client.import_key, "cut", octets=octets + b"x"))
        refused.append(partial(client.import_key, "not/a/name", octets=octets))
        refused.append(partial(client.import_key, "cut", pkcs8_der=octets))
        for call in refused:
            with pytest.raises(MHSMError):
                call()
    use(pool)
    numbers = rsa_key.private_numbers()
    return {
        "oct key": octets,
        "RSA p": numbers.p.to_bytes(128, "big"),
        "RSA q": numbers.q.to_bytes(128, "big"),
        "RSA d": numbers.d.to_bytes(256, "big"),
        "EC private value": ec_key.private_numbers().private_value.to_bytes(32, "big"),
    }


def use(pool: RunningPool) -> None:
    """Use the imported keys on every partition."""
    for index in range(3):
        with pool.client(partition=index) as client:
            sealed = client.encrypt("keys/known-oct", "A256GCM", b"plaintext")
            assert client.decrypt("keys/known-oct", "A256GCM", sealed) == b"plaintext"
            client.sign("keys/known-rsa", "RS256", DIGEST)
            client.sign("keys/known-ec", "ES256", DIGEST)


def hold_ceremonies(pool: RunningPool, officers: list[TestOfficer], place: Path) -> bytes:
    """Prove quorums, rotate the shares and restore a backup; return the new file in Azure's format."""
    with pool.client("administrator") as client:
        begun = client.verify_security_domain(2)
        for officer in officers[:2]:
            client.submit_share(2, begun.attempt_id, pool.submission(officer, begun))
        begun = client.rotate_shares([officer.certificate_der for officer in officers], 2, 0)
        for officer in officers[1:]:
            after = client.submit_share(0, begun.attempt_id, pool.submission(officer, begun))
        for officer in officers[:2]:
            assert client.submit_share(0, begun.attempt_id, pool.submission(officer, after)).required == 2
        proof = client.verify_security_domain(1)
        parsed = document.parse(after.azure_security_domain_file)
        for officer in officers[:2]:
            client.submit_share(
                1,
                proof.attempt_id,
                azure_submission.make_submission(
                    parsed,
                    officer.key,
                    officer.certificate_der,
                    proof.attempt_id,
                    proof.exchange_public_key,
                    VERIFICATION,
                ),
            )
        assert client.rotate_key_encryption_key(1) == 2
        location = open_location(str(place))
        backups.take(client, location, lambda *_: None, 1)
        backups.restore(client, location, lambda *_: None)
    with pool.client() as user:
        user.backup_key("keys/known-oct")
    pool.file = after.security_domain_file
    return after.azure_security_domain_file


def learn_secrets(pool: RunningPool, officers: list[TestOfficer]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Open the security domain as a quorum would, and with it the pool's keys from the store."""
    mnemonics, domain = open_shares(pool.file, officers)
    wrapping_key = shares.combine(list(mnemonics.values())[: domain.required], domain.required)
    payload = parse_object(
        open_payload(wrapping_key, domain.payload, domain.header()), container.FILE_BYTES_MAX, _PAYLOAD_FIELDS
    )
    root = decode(payload["root"], 32)
    owner = serialization.load_der_private_key(decode(payload["owner_key"]), None)
    assert isinstance(owner, ec.EllipticCurvePrivateKey)
    derived = DerivedKeys(Secret(root), domain.pool_id, domain.generation)
    secrets = {
        "security domain root": root,
        "security domain wrapping key": wrapping_key.reveal(),
        "security domain owner key": owner.private_numbers().private_value.to_bytes(48, "big"),
        "security domain recovery key": derived.recovery.private_bytes_raw(),
    }
    recovery = Recovery(pool.file, b"a" * 16)
    for officer in officers[: domain.required]:
        recovery.submit(make_submission(pool.file, officer.key, b"a" * 16, recovery.exchange_public_key))
    with StoreAccess(pool.connection) as store:
        header = record_pb2.PoolHeader.FromString(store.dump()["header"])
    entry = header.sealed_epoch
    keys = record_pb2.PoolKeysSecret.FromString(
        recovery.unseal_pool_keys(entry.sealed_pool_keys, entry.epoch)
    )
    secrets["pool name key"], secrets["pool chain key"] = keys.name_key, keys.chain_key
    # It follows from the security domain's root, and partitions keep it to restore backups.
    assert keys.backup_private_keys[1] == derived.backup.private_bytes_raw()
    secrets["pool backup key"] = keys.backup_private_keys[1]
    for epoch, key in keys.key_encryption_keys.items():
        secrets[f"pool key-encryption key {epoch}"] = key
    return secrets, mnemonics


@pytest.fixture(scope="module", params=["attended", "unattended"])
def used(
    request: pytest.FixtureRequest,
    make_pool: Callable[..., RunningPool],
    officers: list[TestOfficer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Used]:
    """A pool that was used, healed and restarted as a whole: by a ceremony, if it is attended."""
    attended = request.param == "attended"
    pool = make_pool(attended=attended)
    place = tmp_path_factory.mktemp("secrecy") / "backup"
    pool.activate(officers, 2)
    secrets = import_and_use(pool)
    pool.signal(1, "partition", signal.SIGKILL)
    until(lambda: (s := pool.status(1)) is not None and s.incarnation == 2, 30, "a new incarnation")
    pool.await_states(["SERVING"] * 3)
    use(pool)
    first, _ = open_shares(pool.file, officers)
    azure_file = hold_ceremonies(pool, officers, place)
    azure = document.parse(azure_file)
    for number, (officer, share) in enumerate(zip(officers, azure.shares, strict=True), start=1):
        secrets[f"share {number} of Azure's format"] = document.open_share(
            azure, officer.key, share.thumbprint
        ).reveal()
    pool.kill_everything()
    if attended:
        pool.await_states(["LOCKED"] * 3)
        pool.unlock(officers[1:])
    pool.await_states(["SERVING"] * 3)
    use(pool)
    learnt, mnemonics = learn_secrets(pool, officers)
    before = {f"{name} of the first file": words for name, words in first.items()}
    yield Used(pool, {**secrets, **learnt}, {**mnemonics, **before}, files_under(place))
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
            pytest.skip(f"the memory of the {name} cannot be read: {error}")
        assert size > 1024 * 1024, f"hardly any memory of the {name} was read"
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_no_security_domain_secret_stays_in_a_partition(
    used: Used, capsys: pytest.CaptureFixture[str]
) -> None:
    """G3: shares and the security domain's root exist in the ceremony child only.

    A partition may hold key material; what is found of it is reported, not judged.
    """
    scanner = used.scanner
    residues: dict[str, Counter[str]] = {}
    for index in range(3):
        process_id = used.pool.process_id(index, "partition")
        assert process_id
        try:
            residues[f"partition {index}"], size = scanner.scan_process(process_id)
        except Unreadable as error:
            pytest.skip(f"the memory of partition {index} cannot be read: {error}")
        assert size > 1024 * 1024
        assert not ceremony_children(process_id), "a ceremony child outlives its ceremony"
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


def planted(used: Used) -> list[tuple[str, str, bytes]]:
    """Return (secret, encoding, octets) of every secret in every encoding."""
    octets = [(name, encodings(value)) for name, value in used.secrets.items()]
    words = [(name, mnemonic_encodings(value)) for name, value in used.mnemonics.items()]
    return [(name, kind, text) for name, pieces in [*octets, *words] for kind, text, _ in pieces]


def test_the_scanner_sees_planted_secrets_in_a_file(used: Used, tmp_path: Path) -> None:
    """G3, positive control: every secret, in every encoding, at every alignment."""
    scanner = used.scanner
    file = tmp_path / "planted"
    for number, (name, kind, text) in enumerate(planted(used)):
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
    pieces = planted(used)
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == b"started\n"
        try:
            assert not scanner.scan_process(child.pid)[0]
        except Unreadable as error:
            pytest.skip(f"not even the memory of an own child can be read: {error}")
        for number, (_, _, text) in enumerate(pieces):
            piece = bytes(number % 8) + text
            child.stdin.write(len(piece).to_bytes(4, "big") + piece)
        child.stdin.write(bytes(4))
        child.stdin.flush()
        assert child.stdout.readline() == b"read\n"
        seen = scanner.scan_process(child.pid)[0]
    finally:
        child.kill()
        child.wait()
    assert {f"{name} ({kind})" for name, kind, _ in pieces} <= set(seen)


CHILD = """
import sys
print("started", flush=True)
kept = []
while size := int.from_bytes(sys.stdin.buffer.read(4), "big"):
    kept.append(sys.stdin.buffer.read(size))
print("read", flush=True)
sys.stdin.buffer.read()
"""
