"""What is measured: three kinds of operations, through the pool and in the library alone."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hsm_pool.client.pool import Pool
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2

Mode = Literal["unary", "batch", "stream", "library"]
MODES: tuple[Mode, ...] = ("unary", "batch", "stream")

PLAINTEXT_BYTES = 1024
STREAM_MESSAGES_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of operation.

    Args:
        name: As in the report.
        key_id: The pool's key for it.
        algorithm: As the pool calls it.
        batch_items: Items of a batch or stream message, the pool's bound.
        openssl: Name of its row in the output of ``openssl speed``.
    """

    name: str
    key_id: str
    algorithm: str
    batch_items: int
    openssl: str


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("ES256 sign", "benchmark-p256", "ES256", 256, "ecdsap256"),
        Operation("PS256 sign", "benchmark-rsa-2048", "PS256", 32, "rsa2048"),
        Operation("A256GCM encrypt 1 KiB", "benchmark-aes-256", "A256GCM", 256, "aes-256-gcm"),
    )
}


def create_keys(pool: Pool) -> None:
    """Create the keys of all operations."""
    pool.create_key("benchmark-p256", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    pool.create_key("benchmark-rsa-2048", key_type=keys_pb2.KEY_TYPE_RSA, size_bits=2048)
    pool.create_key("benchmark-aes-256", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=256)


def call_of(operation: Operation, mode: Mode, pool: Pool) -> Callable[[], int]:
    """Return a function that makes one call and returns how many operations it did."""
    count = 1 if mode == "unary" else operation.batch_items
    name = f"keys/{operation.key_id}"
    if operation.algorithm == "A256GCM":
        items = [(os.urandom(PLAINTEXT_BYTES), b"")] * count
        return lambda: len(pool.encrypt_batch(name, operation.algorithm, items))
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(count)]
    return lambda: len(pool.sign_batch(name, operation.algorithm, digests))


def library_call(operation: Operation) -> Callable[[], int]:
    """Return a function that does one operation in the library, without the pool."""
    digest = hashlib.sha256(b"to be signed").digest()
    if operation.algorithm == "ES256":
        ec_key = ec.generate_private_key(ec.SECP256R1())
        ecdsa = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
        return lambda: bool(ec_key.sign(digest, ecdsa))
    if operation.algorithm == "PS256":
        rsa_key = rsa.generate_private_key(65537, 2048)
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)
        prehashed = utils.Prehashed(hashes.SHA256())
        return lambda: bool(rsa_key.sign(digest, pss, prehashed))
    gcm, plaintext = AESGCM(os.urandom(32)), os.urandom(PLAINTEXT_BYTES)
    return lambda: bool(gcm.encrypt(os.urandom(12), plaintext, None))


def stream_counts(
    operation: Operation, pool: Pool, partition: int, wanted: Callable[[], bool]
) -> Iterator[int]:
    """Yield how many operations each message of one stream did, while more are wanted.

    Raises:
        RuntimeError: A message was refused.
    """
    name = f"keys/{operation.key_id}"
    if operation.algorithm == "A256GCM":
        plaintext = crypto_pb2.Plaintext(plaintext=os.urandom(PLAINTEXT_BYTES))
        request = crypto_pb2.StreamOperationsRequest(
            encrypt=crypto_pb2.EncryptRequest(
                name=name, algorithm=operation.algorithm, items=[plaintext] * operation.batch_items
            )
        )
    else:
        digests = [hashlib.sha256(str(number).encode()).digest() for number in range(operation.batch_items)]
        request = crypto_pb2.StreamOperationsRequest(
            sign=crypto_pb2.SignRequest(name=name, algorithm=operation.algorithm, digests=digests)
        )
    room = threading.Semaphore(STREAM_MESSAGES_IN_FLIGHT)

    def requests() -> Iterator[crypto_pb2.StreamOperationsRequest]:
        while wanted():
            if room.acquire(timeout=0.1):
                yield request

    for response in pool.stream(requests(), partition):
        room.release()
        if response.WhichOneof("result") == "error":
            raise RuntimeError(f"a batch on a stream was refused: {response.error.message}")
        yield len(response.sign.signatures) or len(response.encrypt.items)
