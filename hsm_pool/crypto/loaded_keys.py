"""Parsed private keys, kept: parsing an RSA key costs about fifty signatures."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, mlkem, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hsm_pool.core.model import KeyType
from hsm_pool.crypto.secret import SecretBytes


@dataclass(frozen=True, slots=True, repr=False)
class RSAKey:
    """A parsed RSA key."""

    private: rsa.RSAPrivateKey
    public: rsa.RSAPublicKey


@dataclass(frozen=True, slots=True, repr=False)
class ECKey:
    """A parsed EC key."""

    private: ec.EllipticCurvePrivateKey
    public: ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True, repr=False)
class OctKey:
    """A symmetric key: ready for GCM, and raw for everything else."""

    gcm: AESGCM
    raw: SecretBytes


MLDSAPrivateKey = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
MLDSAPublicKey = mldsa.MLDSA44PublicKey | mldsa.MLDSA65PublicKey | mldsa.MLDSA87PublicKey


@dataclass(frozen=True, slots=True, repr=False)
class MLDSAKey:
    """A parsed ML-DSA key."""

    private: MLDSAPrivateKey
    public: MLDSAPublicKey


MLKEMPrivateKey = mlkem.MLKEM768PrivateKey | mlkem.MLKEM1024PrivateKey
MLKEMPublicKey = mlkem.MLKEM768PublicKey | mlkem.MLKEM1024PublicKey


@dataclass(frozen=True, slots=True, repr=False)
class MLKEMKey:
    """A parsed ML-KEM key."""

    private: MLKEMPrivateKey
    public: MLKEMPublicKey


LoadedKey = RSAKey | ECKey | MLDSAKey | MLKEMKey | OctKey


def load(key_type: KeyType, material: SecretBytes) -> LoadedKey:
    """Parse key material that :mod:`hsm_pool.crypto.key_generation` made.

    Raises:
        ValueError: It is not of that type.
    """
    if key_type is KeyType.OCT:
        return OctKey(AESGCM(material.reveal()), material)
    # The material was checked when it came in; checking again would double the cost.
    key = serialization.load_der_private_key(material.reveal(), None, unsafe_skip_rsa_key_validation=True)
    if key_type is KeyType.RSA and isinstance(key, rsa.RSAPrivateKey):
        return RSAKey(key, key.public_key())
    if key_type is KeyType.EC and isinstance(key, ec.EllipticCurvePrivateKey):
        return ECKey(key, key.public_key())
    if key_type is KeyType.AKP and isinstance(key, MLDSAPrivateKey):
        return MLDSAKey(key, key.public_key())
    if key_type is KeyType.AKP and isinstance(key, MLKEMPrivateKey):
        return MLKEMKey(key, key.public_key())
    raise ValueError("key material does not fit its type")


class LoadedKeyCache:
    """Least recently used parsed keys. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys: OrderedDict[Hashable, LoadedKey] = OrderedDict()
        self._lock = threading.Lock()
        self._forgotten = 0
        """How often keys were forgotten; a key parsed meanwhile is not kept."""

    def get(self, token: Hashable, load_material: Callable[[], tuple[KeyType, SecretBytes]]) -> LoadedKey:
        """Return the parsed key of a token; load_material is called when it is not kept."""
        with self._lock:
            key = self._keys.get(token)
            if key is not None:
                self._keys.move_to_end(token)
                return key
            forgotten = self._forgotten
        key = load(*load_material())
        with self._lock:
            if self._forgotten == forgotten:
                self._keys[token] = key
                while len(self._keys) > self._capacity:
                    self._keys.popitem(last=False)
        return key

    def discard(self, token: Hashable) -> None:
        """Forget one key."""
        with self._lock:
            self._keys.pop(token, None)
            self._forgotten += 1

    def clear(self) -> None:
        """Forget all keys."""
        with self._lock:
            self._keys.clear()
            self._forgotten += 1
