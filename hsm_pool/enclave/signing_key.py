"""A COSE key whose signatures are the same each time (RFC 6979), so that a statement has one form.

Imported late: the COSE library costs a partition's start more than it needs before its first signature.
"""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cwt import COSEKey
from cwt.algs.ec2 import EC2Key

_NUMBER_BYTES = 32


class SigningKey(EC2Key):
    """A P-256 key that signs with ES256 (RFC 9053) without randomness.

    Raises:
        ValueError: The PEM is no P-256 private key.
    """

    def __init__(self, key_pem: bytes) -> None:
        super().__init__(COSEKey.from_pem(key_pem).to_dict())
        private = serialization.load_pem_private_key(key_pem, None)
        if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
            raise ValueError("evidence is signed with a P-256 key")
        self._deterministic = private

    def sign(self, msg: bytes) -> bytes:
        """Return r || s."""
        algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        r, s = decode_dss_signature(self._deterministic.sign(msg, algorithm))
        return r.to_bytes(_NUMBER_BYTES, "big") + s.to_bytes(_NUMBER_BYTES, "big")
