"""Evidence of a partition, made by its simulated platform (RATS, RFC 9334: attester and verifier).

The platform key stands for the hardware's quoting key and is certified by the platform
root. What is simulated is that the platform, not the software itself, takes the
measurement; docs/threat-model.md says what follows.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hsm_pool.errors import EvidenceRefused
from hsm_pool.settings import PlatformSettings
from mhsm.peer.v1 import peer_pb2

SECURITY_VERSION = 1
"""Security version number of this distribution; only ever raised."""

_LABEL = b"mhsm/evidence/v1\x00"
_MEASURED_PACKAGES = ("hsm_pool", "security_domain", "mhsm")


@cache
def measurement() -> bytes:
    """Return SHA-384 over the sorted (path, SHA-384) of the installed distribution's modules."""
    lines: list[str] = []
    for package in _MEASURED_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError(f"package {package} is not installed")
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            digest = hashlib.sha384(path.read_bytes()).hexdigest()
            lines.append(f"{package}/{path.relative_to(root)} {digest}")
    return hashlib.sha384("\n".join(lines).encode()).digest()


def report_data(role: str, *parts: bytes) -> bytes:
    """Return SHA-256 over an unambiguous encoding of what evidence is made for."""
    digest = hashlib.sha256(b"mhsm/report-data/v1\x00" + role.encode())
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Platform:
    """The simulated hardware root of one node."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    root: x509.Certificate

    @staticmethod
    def load(settings: PlatformSettings) -> Platform:
        """Read the platform's files."""
        key = serialization.load_pem_private_key(Path(settings.key_file).read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("the platform key is not an EC key")
        return Platform(
            key,
            x509.load_pem_x509_certificate(Path(settings.certificate_file).read_bytes()),
            x509.load_pem_x509_certificate(Path(settings.root_certificate_file).read_bytes()),
        )

    def attest(self, pool_id: str, index: int, incarnation: int, data: bytes) -> peer_pb2.Evidence:
        """Make evidence of this process for the given report data (32 bytes)."""
        claims = peer_pb2.EvidenceClaims(
            pool_id=pool_id,
            partition_index=index,
            incarnation=incarnation,
            measurement=measurement(),
            security_version=SECURITY_VERSION,
            debug=False,
            report_data=data,
        ).SerializeToString(deterministic=True)
        return peer_pb2.Evidence(
            claims=claims,
            signature=self.key.sign(_LABEL + claims, ec.ECDSA(hashes.SHA256())),
            platform_certificate_der=self.certificate.public_bytes(serialization.Encoding.DER),
        )

    def verify(
        self, evidence: peer_pb2.Evidence, pool_id: str, index: int, data: bytes
    ) -> peer_pb2.EvidenceClaims:
        """Verify another partition's evidence.

        Raises:
            EvidenceRefused: It is not evidence of that partition of this pool, running the
                same distribution without a debugger, made for this report data.
        """
        claims = self._verified_claims(evidence, pool_id, index)
        if claims.pool_id != pool_id or claims.partition_index != index:
            raise EvidenceRefused("the evidence is of another partition")
        if claims.report_data != data:
            raise EvidenceRefused("the evidence was made for another purpose or is not fresh")
        if claims.debug:
            raise EvidenceRefused("the partition may be debugged")
        if claims.security_version < SECURITY_VERSION:
            raise EvidenceRefused("the partition runs an older security version")
        if claims.measurement != measurement():
            raise EvidenceRefused("the partition runs another distribution")
        return claims

    def _verified_claims(
        self, evidence: peer_pb2.Evidence, pool_id: str, index: int
    ) -> peer_pb2.EvidenceClaims:
        try:
            certificate = x509.load_der_x509_certificate(evidence.platform_certificate_der)
            certificate.verify_directly_issued_by(self.root)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
            key = certificate.public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise EvidenceRefused("the platform key is not an EC key")
            key.verify(evidence.signature, _LABEL + evidence.claims, ec.ECDSA(hashes.SHA256()))
            claims = peer_pb2.EvidenceClaims.FromString(evidence.claims)
        except EvidenceRefused:
            raise
        except (InvalidSignature, x509.ExtensionNotFound, ValueError, TypeError):
            raise EvidenceRefused("the evidence is not signed by a platform of this pool") from None
        except Exception:  # noqa: BLE001 - the protobuf parser's own error
            raise EvidenceRefused("the evidence is not readable") from None
        if uris != [f"spiffe://{pool_id}/platform/{index}"]:
            raise EvidenceRefused("the evidence is signed by another node's platform")
        return claims
