"""Secrets of a real pool that a test can learn, and a process that holds what is to be found (G3, G5)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hsm_pool.errors import MHSMError
from mhsm.record.v1 import record_pb2
from security_domain import container, shares
from security_domain.encoding import decode, parse_object
from security_domain.recovery import Recovery
from security_domain.secret import Secret
from security_domain.submission import make_submission, open_own_share
from security_domain.wrapping import DerivedKeys, open_payload
from tests.running_pool import RunningPool, TestOfficer
from tests.scan import Piece, encodings, mnemonic_encodings
from tests.store_access import StoreAccess

DIGEST = b"d" * 32

_PAYLOAD_FIELDS: dict[str, type] = {"pool_id": str, "generation": int, "root": str, "owner_key": str}


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
            try:
                call()
            except MHSMError:
                continue
            raise AssertionError("a damaged key was imported")
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
    secrets["pool name key"] = keys.name_key
    # It follows from the security domain's root, and partitions keep it to restore backups.
    assert keys.backup_private_keys[domain.generation] == derived.backup.private_bytes_raw()
    for generation, key in keys.backup_private_keys.items():
        secrets[f"pool backup key {generation}"] = key
    for epoch, key in keys.key_encryption_keys.items():
        secrets[f"pool key-encryption key {epoch}"] = key
    return secrets, mnemonics


def learn_tls_keys(directory: Path) -> dict[str, bytes]:
    """Return the private keys of all planes, platforms and clients of a pool, but not the controller's own.

    Args:
        directory: The pool's data directory.
    """
    found: dict[str, bytes] = {}
    for path in sorted(directory.rglob("*.key")):
        name = path.relative_to(directory)
        if name.parts[0] == "fabric":
            continue
        octets = path.read_bytes()
        if octets.startswith(b"-----BEGIN"):
            key = serialization.load_pem_private_key(octets, None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            octets = key.private_numbers().private_value.to_bytes((key.key_size + 7) // 8, "big")
        found[f"file {name}"] = octets
    return found


# -- positive controls: what the scanner must see -----------------------------------------


def every_form(secrets: Mapping[str, bytes], mnemonics: Mapping[str, str]) -> list[Piece]:
    """Return (secret, encoding, octets) of every secret in every encoding."""
    octets = [(name, encodings(value)) for name, value in secrets.items()]
    words = [(name, mnemonic_encodings(value)) for name, value in mnemonics.items()]
    return [(name, kind, text) for name, pieces in [*octets, *words] for kind, text, _ in pieces]


@contextlib.contextmanager
def holding_process() -> Iterator[tuple[int, Callable[[Sequence[Piece]], None]]]:
    """Run a process that holds in its memory what it is given.

    Yields:
        (its process id, a function that hands it pieces, once; they are there when it returns).
    """
    child = subprocess.Popen([sys.executable, "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def give(pieces: Sequence[Piece]) -> None:
        assert child.stdin
        assert child.stdout
        for number, (_, _, text) in enumerate(pieces):
            piece = bytes(number % 8) + text
            child.stdin.write(len(piece).to_bytes(4, "big") + piece)
        child.stdin.write(bytes(4))
        child.stdin.flush()
        assert child.stdout.readline() == b"read\n"

    try:
        assert child.stdout
        assert child.stdout.readline() == b"started\n"
        yield child.pid, give
    finally:
        child.kill()
        child.communicate()


_HOLDER = """
import sys
print("started", flush=True)
kept = []
while size := int.from_bytes(sys.stdin.buffer.read(4), "big"):
    kept.append(sys.stdin.buffer.read(size))
print("read", flush=True)
sys.stdin.buffer.read()
"""
