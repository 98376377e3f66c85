"""Healing: a partition without the pool's keys gets them from one that holds them.

Both sides show evidence. The healing partition's evidence binds both nonces, its TLS key
and a fresh HPKE key (RFC 9180); the giver encrypts the pool keys to that HPKE key, so a
relay of the channel gains nothing, and attests the ciphertext in return.
"""

from __future__ import annotations

import os
import threading

from cryptography.hazmat.primitives import hpke, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.enclave.evidence import Attester, report_data
from hsm_pool.enclave.verifier import Expected, Verifier
from hsm_pool.errors import EvidenceRefused
from hsm_pool.store.replica import boot_time
from hsm_pool.store.sealing import PoolKeys
from mhsm.peer.v1 import peer_pb2

_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_NONCE_BYTES = 32
_NONCE_SECONDS = 10.0
_NONCES_MAX = 16


def _public_bytes(key: X25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


class HealGiver:
    """The side that holds the keys. Thread-safe."""

    def __init__(self, attester: Attester, verifier: Verifier, pool_id: str) -> None:
        self._attester = attester
        self._verifier = verifier
        self._pool_id = pool_id
        self._nonces: dict[bytes, float] = {}
        self._lock = threading.Lock()

    def begin(self) -> bytes:
        """Return a nonce for one healing."""
        nonce, now = os.urandom(_NONCE_BYTES), boot_time()
        with self._lock:
            for old in [known for known, until in self._nonces.items() if until < now]:
                del self._nonces[old]
            while len(self._nonces) >= _NONCES_MAX:
                del self._nonces[next(iter(self._nonces))]
            self._nonces[nonce] = now + _NONCE_SECONDS
        return nonce

    def give(
        self,
        request: peer_pb2.HealRequest,
        peer_index: int,
        peer_tls_key: bytes,
        keys: PoolKeys,
        boot_count_min: int,
    ) -> peer_pb2.HealResponse:
        """Verify the evidence and encrypt the keys to it.

        Args:
            request: The healing partition's request.
            peer_index: Index in the TLS identity of the caller.
            peer_tls_key: SubjectPublicKeyInfo of the caller's TLS certificate.
            keys: The pool's keys.
            boot_count_min: The least that the caller's evidence may say.

        Raises:
            EvidenceRefused: The nonce is not known or the evidence does not verify.
        """
        with self._lock:
            until = self._nonces.pop(request.nonce, 0.0)
        if until < boot_time():
            raise EvidenceRefused("the nonce is unknown, used or too old")
        transcript = (request.nonce, request.healing_nonce, request.hpke_public_key, peer_tls_key)
        expected = Expected(
            nonce=request.nonce,
            report_data=report_data("heal/request", *transcript),
            exchange_key=request.hpke_public_key,
            peer_tls_key=peer_tls_key,
            pool_id=self._pool_id,
            partition_index=peer_index,
            boot_count_min=boot_count_min,
        )
        self._verifier.verify(request.evidence, expected)
        info = report_data("heal/info", *transcript)
        try:
            public_key = X25519PublicKey.from_public_bytes(request.hpke_public_key)
            sealed = _SUITE.encrypt(keys.export().reveal(), public_key, info)
        except ValueError:
            raise EvidenceRefused("the HPKE key is not usable") from None
        answer = report_data("heal/response", *transcript, sealed)
        evidence = self._attester.attest(request.healing_nonce, answer)
        return peer_pb2.HealResponse(sealed_pool_keys=sealed, evidence=evidence)


class HealAttempt:
    """The side that needs the keys: one attempt with one peer."""

    def __init__(self, attester: Attester, verifier: Verifier, pool_id: str, own_tls_key: bytes) -> None:
        self._attester = attester
        self._verifier = verifier
        self._pool_id = pool_id
        self._healing_nonce = os.urandom(_NONCE_BYTES)
        self._own_tls_key = own_tls_key
        self._key = X25519PrivateKey.generate()
        self._transcript: tuple[bytes, ...] = ()

    def request(self, nonce: bytes) -> peer_pb2.HealRequest:
        """Return the request for a peer's nonce."""
        public_key = _public_bytes(self._key.public_key())
        self._transcript = (nonce, self._healing_nonce, public_key, self._own_tls_key)
        data = report_data("heal/request", *self._transcript)
        return peer_pb2.HealRequest(
            nonce=nonce,
            healing_nonce=self._healing_nonce,
            hpke_public_key=public_key,
            evidence=self._attester.attest(nonce, data, public_key),
        )

    def open(self, response: peer_pb2.HealResponse, peer_index: int) -> PoolKeys:
        """Verify the peer's evidence and open the keys.

        Raises:
            EvidenceRefused: The evidence does not verify or the keys do not open.
        """
        data = report_data("heal/response", *self._transcript, response.sealed_pool_keys)
        expected = Expected(self._healing_nonce, data, pool_id=self._pool_id, partition_index=peer_index)
        self._verifier.verify(response.evidence, expected)
        info = report_data("heal/info", *self._transcript)
        try:
            opened = _SUITE.decrypt(response.sealed_pool_keys, self._key, info)
            return PoolKeys(self._pool_id, SecretBytes(opened))
        except Exception:  # noqa: BLE001 - HPKE and protobuf raise several kinds
            raise EvidenceRefused("the pool keys of the peer do not open") from None
