"""Published vectors over gRPC, on a real pool: the keys are imported, the client library asks (G8).

The other modules of this directory send all vectors through our own functions. Here a part of each
stratum (file, result and class of parameters, see :mod:`tests.vectors.published`) goes the whole way:
one case of each by default, a tenth with --full. docs/testing.md says which direction is checked.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hsm_pool.client.pool import Pool
from hsm_pool.crypto.algorithms import Scheme
from hsm_pool.errors import InvalidField, MHSMError
from hsm_pool.limits import VERSIONS_PER_KEY_MAX
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2
from tests.running_pool import RunningPool
from tests.vectors import published_rsa, published_signatures, published_symmetric
from tests.vectors.published import Key, Vector, left_out
from tests.vectors.vector_files import print_counts

pytestmark = pytest.mark.pool

WORKERS = 6
"""Calls at once: an import mostly waits for the three partitions to take note of it."""
REFUSALS = {"DECRYPTION_FAILED", "DIGEST_LENGTH"}
OCT_OPERATIONS = [
    keys_pb2.KEY_OPERATION_SIGN,
    keys_pb2.KEY_OPERATION_VERIFY,
    keys_pb2.KEY_OPERATION_ENCRYPT,
    keys_pb2.KEY_OPERATION_DECRYPT,
    keys_pb2.KEY_OPERATION_WRAP_KEY,
    keys_pb2.KEY_OPERATION_UNWRAP_KEY,
]
KINDS = {
    "ES256": (keys_pb2.KEY_TYPE_EC, keys_pb2.CURVE_P256, 0),
    "ES384": (keys_pb2.KEY_TYPE_EC, keys_pb2.CURVE_P384, 0),
    "ES512": (keys_pb2.KEY_TYPE_EC, keys_pb2.CURVE_P521, 0),
    "ES256K": (keys_pb2.KEY_TYPE_EC, keys_pb2.CURVE_P256K, 0),
    "ML-DSA-44": (keys_pb2.KEY_TYPE_AKP, keys_pb2.CURVE_UNSPECIFIED, 10_496),
    "ML-DSA-65": (keys_pb2.KEY_TYPE_AKP, keys_pb2.CURVE_UNSPECIFIED, 15_616),
    "ML-DSA-87": (keys_pb2.KEY_TYPE_AKP, keys_pb2.CURVE_UNSPECIFIED, 20_736),
}
"""What to make where nobody published a private key."""
FAMILIES: dict[str, Callable[[], Iterator[Vector]]] = {
    "GCM": published_symmetric.gcm,
    "CBC": published_symmetric.cbc,
    "key wrap": published_symmetric.key_wrap,
    "HMAC": published_symmetric.hmac,
    "RSA signatures, NIST": published_rsa.nist_rsa_signatures,
    "RSA signatures, Wycheproof": published_rsa.wycheproof_rsa_signatures,
    "RSA encryption": published_rsa.rsa_encryption,
    "ECDSA": published_signatures.ecdsa,
    "ML-DSA": published_signatures.ml_dsa,
}
SHARED_FAMILIES: dict[str, Callable[[Path], Iterator[Vector]]] = {
    "CBC with padding, shared": published_symmetric.cbc_with_padding,
    "HMAC, shared": published_symmetric.shared_hmac,
}
counts: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    print_counts(request, "Over gRPC", counts)
    print_counts(request, "Not over gRPC", left_out)


def stratified(vectors: Iterable[Vector], *, full: bool, seed: int) -> list[Vector]:
    """Return a seeded tenth of each stratum, at least one; by default one."""
    strata: dict[tuple[str, str, str], list[Vector]] = {}
    for vector in vectors:
        strata.setdefault(vector.stratum, []).append(vector)
    chosen = random.Random(seed)
    found = []
    for cases in strata.values():
        found += chosen.sample(cases, -(-len(cases) // 10) if full else 1)
    return found


def bring(client: Pool, key_id: str, key: Key) -> str:
    """Import a key as a version, or make one of its kind; return the version's name."""
    if key.kind:
        key_type, curve, size_bits = KINDS[key.kind]
        return client.create_key(key_id, key_type=key_type, curve=curve, size_bits=size_bits).name
    if key.symmetric:
        return client.import_key(key_id, octets=key.material, key_operations=OCT_OPERATIONS).name
    return client.import_key(key_id, pkcs8_der=key.material).name


def receive(client: Pool, name: str, vector: Vector) -> bytes | None:
    """Decrypt, unwrap or verify; return what came out (of a verification the digest), None if refused."""
    algorithm = vector.algorithm.name
    try:
        if vector.operation == "unwrap":
            return client.unwrap_key(name, algorithm, vector.given)
        if vector.operation == "verify":
            pairs = [(vector.expected, vector.given)]
            return vector.expected if client.verify_batch(name, algorithm, pairs) == [True] else None
        ciphertext = crypto_pb2.Ciphertext(
            ciphertext=vector.given,
            initialization_vector=vector.initialization_vector,
            authentication_tag=vector.authentication_tag,
            additional_data=vector.additional_data,
        )
        return client.decrypt(name, algorithm, ciphertext)
    except MHSMError as error:
        if error.reason not in REFUSALS:
            raise
        return None


def make(client: Pool, name: str, vector: Vector) -> bytes:
    """Do the sender's part of a vector in which nothing is random."""
    algorithm = vector.algorithm.name
    if vector.operation == "unwrap":
        return client.wrap_key(name, algorithm, vector.expected)
    if vector.operation == "verify":
        return client.sign(name, algorithm, vector.expected)
    made = client.encrypt(name, algorithm, vector.expected, b"", vector.initialization_vector)
    return made.ciphertext


def check(client: Pool, name: str, vector: Vector) -> str:
    """Check one vector; return how it is counted."""
    seen = receive(client, name, vector)
    implicit = vector.algorithm.scheme is Scheme.RSA_PKCS1V15_ENCRYPTION and vector.accepted is False
    if seen is None:
        assert vector.accepted is not True, vector
        return f"{vector.algorithm.name}, refused"
    if implicit:
        # A wrong padding is answered with octets that have nothing to do with the message, always the same.
        assert seen != vector.expected or not seen, vector
        assert receive(client, name, vector) == seen, vector
        return f"{vector.algorithm.name}, implicitly rejected"
    assert vector.accepted is not False, vector
    assert seen == vector.expected, vector
    if not vector.again:
        return vector.algorithm.name
    assert make(client, name, vector) == vector.given, vector
    return f"{vector.algorithm.name}, both ways"


def check_refused(client: Pool, key: Key) -> None:
    """Check that the pool takes no such key."""
    with pytest.raises(InvalidField):
        bring(client, "refused", key)


def check_key(client: Pool, key_id: str, key: Key, vectors: list[Vector]) -> list[str]:
    """Check all vectors of a key; return how each is counted."""
    name = bring(client, key_id, key)
    return [check(client, name, vector) for vector in vectors]


def check_all(pool: RunningPool, prefix: str, vectors: list[Vector]) -> Counter[str]:
    """Check vectors, key by key, and leave no key behind; return how many are counted as what."""
    by_key: dict[Key, list[Vector]] = {}
    for vector in vectors:
        by_key.setdefault(vector.key, []).append(vector)
    held = [key for key in by_key if key.held]
    refused = [key for key in by_key if not key.held]
    # One version for each key of the vectors: a pool has room for few keys and many versions.
    names = [f"{prefix}-{number // VERSIONS_PER_KEY_MAX}" for number in range(len(held))]
    with pool.client() as client, ThreadPoolExecutor(WORKERS) as workers:
        for checked in [workers.submit(check_refused, client, key) for key in refused]:
            checked.result()
        under_way = [
            workers.submit(check_key, client, key_id, key, by_key[key])
            for key_id, key in zip(names, held, strict=True)
        ]
        seen = Counter(label for future in under_way for label in future.result())
        for key_id in dict.fromkeys(names):
            client.delete_key(f"keys/{key_id}")
            client.purge_deleted_key(f"keys/{key_id}")
    seen["keys refused"] = sum(len(by_key[key]) for key in refused)
    return seen


@pytest.mark.parametrize("family", [*FAMILIES, *SHARED_FAMILIES])
def test_vectors(
    pool: RunningPool, family: str, full: bool, seed: int, request: pytest.FixtureRequest
) -> None:
    """Whatever is accepted is what was published, and every `invalid` is refused."""
    if family in SHARED_FAMILIES:
        shared: Path = request.getfixturevalue("shared_vectors")
        vectors = list(SHARED_FAMILIES[family](shared))
    else:
        vectors = list(FAMILIES[family]())
    chosen = stratified(vectors, full=full, seed=seed)
    assert {vector.published for vector in vectors} == {vector.published for vector in chosen}
    assert any(not vector.accepted for vector in chosen) or family == "CBC"
    seen = check_all(pool, "".join(letter for letter in family if letter.isalnum()), chosen)
    assert seen.total() == len(chosen)
    counts.update(seen)
