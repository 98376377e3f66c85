"""Verifies evidence: both chains, both signatures, what it was made for, the floor and the policy.

Needs files only, no network and no pool: partitions use it, and officers on their own machines.
Whatever is wrong with the evidence, the answer is :class:`EvidenceRefused`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hsm_pool import limits
from hsm_pool.core import release_policy
from hsm_pool.core.release_policy import PolicyNotMet, ReleasePolicy
from hsm_pool.enclave import admission
from hsm_pool.enclave.claims import Claims
from hsm_pool.enclave.evidence import ALGORITHM, X5CHAIN
from hsm_pool.errors import EvidenceRefused
from mhsm.evidence.v1 import evidence_pb2

_COSE_SIGN1 = 18


@dataclass(frozen=True, slots=True)
class TrustAnchors:
    """The two roots of a pool; whoever verifies got them beforehand, not with the evidence."""

    platform_root: x509.Certificate
    owner_root: x509.Certificate

    @staticmethod
    def load(platform_root_file: str | Path, owner_root_file: str | Path) -> TrustAnchors:
        """Read the roots, PEM.

        Raises:
            OSError: A file cannot be read.
            ValueError: A file is not a certificate.
        """
        roots = [
            x509.load_pem_x509_certificate(Path(name).read_bytes())
            for name in (platform_root_file, owner_root_file)
        ]
        return TrustAnchors(*roots)


@dataclass(frozen=True, slots=True)
class Expected:
    """What evidence must have been made for. Empty fields are not asked for."""

    nonce: bytes
    report_data: bytes
    exchange_key: bytes = b""
    """HPKE public key that the partition must hold."""
    peer_tls_key: bytes = b""
    """SubjectPublicKeyInfo of whom the verifier talks to on the peer plane."""
    pool_id: str = ""
    partition_index: int | None = None
    boot_count_min: int = 0
    """What the verifier has seen of this partition: an earlier start than that is refused."""


class Verifier:
    """Verifies evidence under a pool's two roots and an admission policy. Thread-safe."""

    def __init__(
        self,
        anchors: TrustAnchors,
        policy: ReleasePolicy,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        security_version_floor: int = 0,
    ) -> None:
        """Take what evidence is held against.

        Args:
            anchors: The roots.
            policy: What the claims must say.
            now: Gives the time.
            security_version_floor: Least security version, whatever the policy says.
        """
        self._anchors = anchors
        self._policy = policy
        self._security_version_floor = security_version_floor
        self._now = now

    def replace_policy(self, policy: ReleasePolicy, security_version_floor: int) -> None:
        """Verify under another policy and floor from now on."""
        self._security_version_floor = security_version_floor
        self._policy = policy

    def verify(self, evidence: evidence_pb2.Evidence, expected: Expected) -> Claims:
        """Return the claims of evidence that is worth believing.

        Raises:
            EvidenceRefused: A chain, a signature, the occasion, the floor or the policy does not fit.
        """
        now = self._now()
        platform, platform_uri, _ = open_token(
            evidence.platform_token, self._anchors.platform_root, "platform", now
        )
        owner, owner_uri, _ = open_token(evidence.owner_token, self._anchors.owner_root, "owner", now)
        if platform != owner:
            raise EvidenceRefused("the two tokens hold different claims")
        try:
            claims = Claims.decode(platform)
        except Exception:  # noqa: BLE001 - the CBOR parser raises several kinds
            raise EvidenceRefused("the claims are not readable") from None
        names = (
            f"spiffe://{claims.pool_id}/platform/{claims.partition_index}",
            f"spiffe://{claims.pool_id}/partition/{claims.partition_index}",
        )
        if (platform_uri, owner_uri) != names:
            raise EvidenceRefused("the evidence is signed for another partition than it names")
        self._check_occasion(claims, expected)
        if claims.security_version < self._security_version_floor:
            raise EvidenceRefused("the evidence is of firmware below the pool's security version")
        try:
            release_policy.require(self._policy, admission.AUTHORITY, claims.named())
        except PolicyNotMet as unmet:
            raise EvidenceRefused(f"the evidence does not meet the admission policy: {unmet}") from None
        return claims

    def _check_occasion(self, claims: Claims, expected: Expected) -> None:
        if expected.pool_id and claims.pool_id != expected.pool_id:
            raise EvidenceRefused("the evidence is of another pool")
        if expected.partition_index is not None and claims.partition_index != expected.partition_index:
            raise EvidenceRefused("the evidence is of another partition")
        if claims.boot_count < expected.boot_count_min:
            raise EvidenceRefused("the evidence is of an earlier start of the partition than was seen")
        if claims.nonce != expected.nonce:
            raise EvidenceRefused("the evidence is not fresh: it was made for another nonce")
        if claims.exchange_key != _digest(expected.exchange_key):
            raise EvidenceRefused("the evidence is for another exchange key")
        if expected.peer_tls_key and claims.peer_tls_key != _digest(expected.peer_tls_key):
            raise EvidenceRefused("the evidence is of another than whom the channel leads to")
        if claims.report_data != expected.report_data:
            raise EvidenceRefused("the evidence was made for another purpose")
        if claims.expires_at and claims.expires_at <= self._now().timestamp():
            raise EvidenceRefused("the evidence has expired")


def open_token(
    token: bytes, root: x509.Certificate, what: str, now: datetime
) -> tuple[bytes, str, x509.Certificate]:
    """Return payload, URI and certificate of the signer of a token whose certificate is valid now.

    Args:
        token: At most EVIDENCE_TOKEN_BYTES_MAX bytes.
        root: Under which it must verify.
        what: "platform" or "owner", for the words of a refusal.
        now: The time.

    Raises:
        EvidenceRefused: It does not verify.
    """
    if not token or len(token) > limits.EVIDENCE_TOKEN_BYTES_MAX:
        raise EvidenceRefused(f"the {what}'s token is absent or too large")
    try:
        payload, uri, certificate = _verified_token(token, root)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise ValueError("the certificate is out of date")
    except Exception:  # noqa: BLE001 - parsers of CBOR, COSE and X.509 raise many kinds
        text = f"the {what}'s token does not verify under the {what} root of this pool"
        raise EvidenceRefused(text) from None
    return payload, uri, certificate


def claimed_pool_id(evidence: evidence_pb2.Evidence) -> str:
    """Return the pool that evidence says it is of, for the words of a refusal: nothing is verified.

    "" if it says nothing readable.
    """
    import cbor2

    try:
        if len(evidence.platform_token) > limits.EVIDENCE_TOKEN_BYTES_MAX:
            return ""
        _, _, payload, _ = cbor2.loads(evidence.platform_token).value
        return Claims.decode(payload).pool_id
    except Exception:  # noqa: BLE001 - the CBOR parser raises several kinds
        return ""


def verified_statement(token: bytes, root: x509.Certificate) -> tuple[bytes, str]:
    """Return (payload, URI of the signer) of a token that outlives its certificate, as an audit log's does.

    Raises:
        EvidenceRefused: It does not verify under this root.
    """
    try:
        if len(token) > limits.EVIDENCE_TOKEN_BYTES_MAX:
            raise ValueError("too large")
        payload, uri, _ = _verified_token(token, root)
    except Exception:  # noqa: BLE001 - parsers of CBOR, COSE and X.509 raise many kinds
        raise EvidenceRefused("the statement does not verify under the root of this pool") from None
    return payload, uri


def _verified_token(token: bytes, root: x509.Certificate) -> tuple[bytes, str, x509.Certificate]:
    import cbor2
    from cwt import COSE, COSEKey

    outer = cbor2.loads(token)
    protected, unprotected, _, _ = outer.value
    header = cbor2.loads(protected)
    if outer.tag != _COSE_SIGN1 or unprotected != {} or set(header) != {1, X5CHAIN}:
        raise ValueError("not a token of this profile")
    if header[1] != ALGORITHM or cbor2.dumps(outer, canonical=True) != token:
        raise ValueError("not a token of this profile")
    certificate = x509.load_der_x509_certificate(header[X5CHAIN])
    certificate.verify_directly_issued_by(root)
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the key is not of P-256")
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    payload = COSE.new().decode(token, COSEKey.from_pem(pem))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    return payload, uri, certificate


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest() if key else b""
