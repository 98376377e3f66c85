"""Evidence of a partition: made by its simulated platform and by the key that its owner certified.

Attester of RATS (RFC 9334); :mod:`hsm_pool.enclave.verifier` is the other side. As with the
real service both chains must verify: the platform root says that it is an HSM, the owner root
says that it is ours. What is simulated is that the platform, not the software itself, takes
the measurement; docs/threat-model.md says what follows.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from hsm_pool.enclave.claims import Claims, DebugStatus
from hsm_pool.firmware.image import PRODUCT_ID
from hsm_pool.firmware.running import running
from hsm_pool.settings import PartitionSettings
from mhsm.evidence.v1 import evidence_pb2
from security_domain.encoding import canonical, encode

ALGORITHM = -7
"""ES256 (RFC 9053): ECDSA P-256 with SHA-256."""

X5CHAIN = 33
"""COSE header with the signer's certificate, DER (RFC 9360)."""

DISTRIBUTION = "mhsm-pool-simulator"
_PR_GET_DUMPABLE = 3
_RANDOM_DEVICE_ID = b"\x01"


def measurement() -> bytes:
    """Return SHA-384 over what this process runs, as :mod:`hsm_pool.firmware.measurement` says."""
    return running().measurement


def report_data(role: str, *parts: bytes) -> bytes:
    """Return SHA-256 over an unambiguous encoding of what evidence is made for."""
    digest = hashlib.sha256(b"mhsm/report-data/v1\x00" + role.encode())
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def exchange_key_report_data(
    attempt_id: bytes, exchange_public_key: bytes, exchange_certificate_der: bytes = b""
) -> bytes:
    """Return the report data of evidence over what a ceremony's officers encrypt to.

    Args:
        attempt_id: Of the ceremony.
        exchange_public_key: For shares (HPKE); b"" if it takes none.
        exchange_certificate_der: For a restore blob; b"" if it takes none.
    """
    return report_data("exchange-key", attempt_id, exchange_public_key, exchange_certificate_der)


def client_report_data(nonce: bytes) -> bytes:
    """Return the report data of evidence that a client asked for."""
    return report_data("client", nonce)


def debug_status() -> DebugStatus:
    """Return whether another process may attach to this one, as the kernel says now."""
    dumpable = ctypes.CDLL(None).prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    status = Path("/proc/self/status").read_text()
    traced = any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in status.splitlines())
    return DebugStatus.ENABLED if dumpable or traced else DebugStatus.DISABLED_SINCE_BOOT


def certificate_key(certificate_pem: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) of a certificate."""
    return _public_key_info(x509.load_pem_x509_certificate(certificate_pem).public_key())


class Signer:
    """A P-256 key and the certificate that leads from it to one of the two roots."""

    def __init__(self, certificate_pem: bytes, key_pem: bytes) -> None:
        from hsm_pool.enclave.signing_key import SigningKey

        self.certificate = x509.load_pem_x509_certificate(certificate_pem)
        self._key = SigningKey(key_pem)

    @staticmethod
    def load(certificate_file: str, key_file: str) -> Signer:
        """Read a signer's files, PEM."""
        return Signer(Path(certificate_file).read_bytes(), Path(key_file).read_bytes())

    def token(self, claims: bytes) -> bytes:
        """Return the claims as a CBOR web token."""
        from cwt import COSE

        header = {1: ALGORITHM, X5CHAIN: self.certificate.public_bytes(serialization.Encoding.DER)}
        signed = COSE.new(deterministic_header=True).encode_and_sign(claims, self._key, protected=header)
        if not isinstance(signed, bytes):
            raise RuntimeError("the token is not encoded")
        return signed

    def json_web_signature(self, payload: bytes, root: x509.Certificate) -> str:
        """Return a payload as a JWS (RFC 7515, compact) with the chain up to the root.

        What it signs begins otherwise than any COSE structure, so that neither passes for the other.
        """
        certificate = self.certificate.public_bytes(serialization.Encoding.DER)
        thumbprint = encode(hashlib.sha256(certificate).digest())
        chain = [certificate, root.public_bytes(serialization.Encoding.DER)]
        header = {
            "alg": "ES256",
            "kid": thumbprint,
            "x5c": [base64.b64encode(entry).decode() for entry in chain],
            "x5t#S256": thumbprint,
        }
        signed = f"{encode(canonical(header))}.{encode(payload)}"
        return f"{signed}.{encode(self._key.sign(signed.encode()))}"


class Attester:
    """Makes evidence of this process."""

    def __init__(
        self,
        settings: PartitionSettings,
        boot_count: int,
        debug: Callable[[], DebugStatus] = debug_status,
    ) -> None:
        platform, owner = settings.platform, settings.owner
        self._platform = Signer.load(platform.certificate_file, platform.key_file)
        self._owner = Signer.load(owner.certificate_file, owner.key_file)
        self._owner_root = x509.load_pem_x509_certificate(Path(owner.root_certificate_file).read_bytes())
        platform_root = Path(platform.root_certificate_file).read_bytes()
        self._platform_root = x509.load_pem_x509_certificate(platform_root)
        self._settings = settings
        self._boot_count = boot_count
        self._debug = debug
        self._client_tls_key = _tls_key_digest(settings.client_plane.certificate_file)
        self._peer_tls_key = _tls_key_digest(settings.peer_plane.certificate_file)
        platform_key = _public_key_info(self._platform.certificate.public_key())
        self._device_id = _RANDOM_DEVICE_ID + hashlib.sha256(platform_key).digest()
        self._signer = _signer(settings)
        self._software_version = importlib.metadata.version(DISTRIBUTION)

    @property
    def pool_id(self) -> str:
        """Pool of the partition."""
        return self._settings.pool_id

    @property
    def partition_index(self) -> int:
        """Index of the partition."""
        return self._settings.index

    def certify(self, statement: bytes) -> bytes:
        """Return a statement of this partition, signed with the key that its owner certified."""
        return self._owner.token(statement)

    def certify_key(self, claims: bytes) -> bytes:
        """Return claims about a key as the owner's token over the platform's: both chains must verify."""
        return self._owner.token(self._platform.token(claims))

    @property
    def certificates_pem(self) -> bytes:
        """The chains of both signers: the platform's and its root, the owner-certified one and its root."""
        chain = (
            self._platform.certificate,
            self._platform_root,
            self._owner.certificate,
            self._owner_root,
        )
        return b"".join(entry.public_bytes(serialization.Encoding.PEM) for entry in chain)

    def certify_release(self, payload: bytes) -> str:
        """Return the answer to a key release, as a JWS of the key that its owner certified."""
        return self._owner.json_web_signature(payload, self._owner_root)

    def attest(
        self, nonce: bytes, data: bytes, exchange_key: bytes = b"", expires_at: int = 0
    ) -> evidence_pb2.Evidence:
        """Make evidence.

        Args:
            nonce: Of whoever will verify it, 8-64 bytes.
            data: Report data, 32 bytes: what the evidence is for.
            exchange_key: HPKE public key that this process holds; b"" for none.
            expires_at: Seconds since 1970 after which it is refused; 0 when the nonce is enough.
        """
        claims = Claims(
            pool_id=self._settings.pool_id,
            partition_index=self._settings.index,
            nonce=nonce,
            device_id=self._device_id,
            debug_status=self._debug(),
            boot_count=self._boot_count,
            software_name=DISTRIBUTION,
            software_version=self._software_version,
            product_id=PRODUCT_ID,
            security_version=running().security_version,
            measurement=measurement(),
            client_tls_key=self._client_tls_key,
            peer_tls_key=self._peer_tls_key,
            report_data=data,
            issued_at=int(time.time()),
            signer=self._signer,
            exchange_key=hashlib.sha256(exchange_key).digest() if exchange_key else b"",
            expires_at=expires_at,
        ).encode()
        return evidence_pb2.Evidence(
            platform_token=self._platform.token(claims), owner_token=self._owner.token(claims)
        )


def _signer(settings: PartitionSettings) -> bytes:
    """Return the digest of the pinned root that images are verified under; b"" when none runs."""
    if settings.firmware is None or not running().version:
        return b""
    return hashlib.sha256(Path(settings.firmware.root_file).read_bytes()).digest()


def _public_key_info(key: object) -> bytes:
    octets: bytes = key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return octets


def _tls_key_digest(certificate_file: str) -> bytes:
    return hashlib.sha256(certificate_key(Path(certificate_file).read_bytes())).digest()
