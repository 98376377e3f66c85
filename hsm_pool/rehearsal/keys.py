"""The keys of a rehearsal: of every kind, with versions, attributes and tags, some deleted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from hsm_pool.client import calls
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2

_THREADS = 8
_EC: dict[str, Any] = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
_AES: dict[str, Any] = {"key_type": keys_pb2.KEY_TYPE_OCT, "size_bits": 256}
_RSA: dict[str, Any] = {"key_type": keys_pb2.KEY_TYPE_RSA, "size_bits": 2048}
_RSA_EVERY = 50
"""An RSA key takes the time of a hundred others to make."""
DIGEST = hashlib.sha256(b"signed before and after the disaster").digest()
PLAINTEXT = b"encrypted before the disaster"


@dataclass(slots=True)
class Recorded:
    """What was known of one key before the disaster."""

    key_id: str
    deleted: bool
    versions: list[bytes]
    """Each version as a client sees it, serialised."""
    public_keys_der: list[bytes]
    signature: bytes = b""
    ciphertext: crypto_pb2.Ciphertext | None = None


@dataclass(slots=True)
class Record:
    """What was known of the pool before the disaster."""

    keys: list[Recorded] = field(default_factory=list)


def _each(work: Callable[[Any], Any], items: Iterable[Any], progress: Callable[[int], None]) -> list[Any]:
    done: list[Any] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for result in threads.map(work, items):
            done.append(result)
            progress(len(done))
    return done


def make(pool: Pool, count: int, seed: int, progress: Callable[[int], None]) -> None:
    """Make the keys; the same seed makes the same mixture."""
    chosen = random.Random(seed)  # noqa: S311 - a mixture, not a secret
    plan = [(number, chosen.random(), chosen.random()) for number in range(count)]

    def one(entry: tuple[int, float, float]) -> None:
        number, kind, fate = entry
        key_id = f"rehearsal-{number:05d}"
        made = _RSA if number % _RSA_EVERY == 0 else _EC if kind < 0.7 else _AES
        attributes = calls.attributes(expires=datetime.now(UTC) + timedelta(days=365) if fate < 0.3 else None)
        pool.create_key(key_id, **made, tags={"number": str(number)}, key_attributes=attributes)
        if fate > 0.85:
            pool.create_key(key_id, **made)
        if 0.3 < fate < 0.35:
            pool.update_key(f"keys/{key_id}", key_attributes=calls.attributes(enabled=False))
        if 0.35 < fate < 0.4:
            pool.delete_key(f"keys/{key_id}")

    _each(one, plan, progress)


def record(pool: Pool, progress: Callable[[int], None], *, use: bool) -> Record:
    """Write down everything that a client can see; with use, also sign and encrypt with each key."""
    active = [key.name.split("/versions/")[0] for key in pool.list_keys()]

    def one(name: str) -> Recorded:
        versions = list(pool.list_key_versions(name))
        newest = versions[-1]
        found = Recorded(
            name.removeprefix("keys/"),
            False,
            [version.SerializeToString(deterministic=True) for version in versions],
            [version.public_key_der for version in versions],
        )
        if use and newest.attributes.enabled:
            if newest.key_type == keys_pb2.KEY_TYPE_OCT:
                found.ciphertext = pool.encrypt(newest.name, "A256GCM", PLAINTEXT)
            else:
                found.signature = pool.sign(newest.name, _algorithm(newest.key_type), DIGEST)
        return found

    keys = _each(one, active, progress)
    for deleted in pool.list_deleted_keys():
        key_id = deleted.key.name.split("/")[1]
        seen = deleted.SerializeToString(deterministic=True)
        keys.append(Recorded(key_id, True, [seen], [deleted.key.public_key_der]))
    return Record(keys)


def mismatches(before: Record, pool: Pool, progress: Callable[[int], None]) -> list[str]:
    """Return what differs in a pool from what was known: nothing, after a good recovery."""
    after = record(pool, lambda _: None, use=False)
    found = {entry.key_id: entry for entry in after.keys}
    uneven = {entry.key_id for entry in before.keys} ^ set(found)
    wrong = [f"{key_id} is in one of the pools only" for key_id in sorted(uneven)]

    def one(entry: Recorded) -> None:
        now = found.get(entry.key_id)
        if now is None:
            return
        if (now.deleted, now.versions) != (entry.deleted, entry.versions):
            wrong.append(f"{entry.key_id} has other versions or attributes")
            return
        try:
            _check_use(entry, pool)
        except (MHSMError, InvalidSignature) as error:
            wrong.append(f"{entry.key_id}: {type(error).__name__}")

    _each(one, before.keys, progress)
    return wrong


def _check_use(entry: Recorded, pool: Pool) -> None:
    """Old signatures verify in the new pool, new ones under the old public key; old ciphertext decrypts."""
    name = f"keys/{entry.key_id}"
    if entry.signature:
        public_key = serialization.load_der_public_key(entry.public_keys_der[-1])
        algorithm = "RS256" if isinstance(public_key, rsa.RSAPublicKey) else "ES256"
        pool.verify(name, algorithm, DIGEST, entry.signature)
        _verify(public_key, pool.sign(name, algorithm, DIGEST))
    if entry.ciphertext is not None and pool.decrypt(name, "A256GCM", entry.ciphertext) != PLAINTEXT:
        raise InvalidSignature


def _verify(public_key: Any, signature: bytes) -> None:
    prehashed = utils.Prehashed(hashes.SHA256())
    if isinstance(public_key, rsa.RSAPublicKey):
        public_key.verify(signature, DIGEST, padding.PKCS1v15(), prehashed)
        return
    half = len(signature) // 2
    r, s = (int.from_bytes(part, "big") for part in (signature[:half], signature[half:]))
    public_key.verify(utils.encode_dss_signature(r, s), DIGEST, ec.ECDSA(prehashed))


def _algorithm(key_type: keys_pb2.KeyType.ValueType) -> str:
    return "RS256" if key_type == keys_pb2.KEY_TYPE_RSA else "ES256"
