"""Azure's ``sp108_kdf``: NIST SP 800-108 in counter mode with HMAC-SHA512."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from security_domain.secret import Secret

NAME = "sp108_kdf"
ITEM_KEY_BYTES = 64
"""Of A256CBC-HS512: MAC key and AES key, 32 bytes each (RFC 7518 section 5.2.5)."""


def derive(key: bytes, label: bytes, context: bytes, length: int) -> bytes:
    """Return ``length`` bytes: 32-bit counter before the fixed input, 32-bit length in bits at its end."""
    return KBKDFHMAC(
        algorithm=hashes.SHA512(),
        mode=Mode.CounterMode,
        length=length,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=label,
        context=context,
        fixed=None,
    ).derive(key)


def item_key(master: Secret, tag: str) -> Secret:
    """Return the key that encrypts the item with this tag."""
    return Secret(derive(master.reveal(), tag.encode(), b"", ITEM_KEY_BYTES))
