"""The fixed values of FORMAT.md, checked against our code and against the openssl program."""

from __future__ import annotations

import re
import subprocess

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from security_domain import shares
from security_domain.encoding import bind
from security_domain.secret import Secret
from security_domain.wrapping import DerivedKeys, raw_public
from tests.running_pool import ROOT

ROOT_SECRET = bytes(range(32))
POOL = "0" * 32


def documented() -> list[str]:
    """Return the values of the table of vectors, in order."""
    text = (ROOT / "security_domain" / "FORMAT.md").read_text()
    return re.findall(r"\| `([0-9a-f]{32,})` \|", text)


def openssl_hkdf(label: str, length: int) -> bytes:
    """HKDF-SHA256 by the openssl program."""
    command = ["openssl", "kdf", "-keylen", str(length), "-kdfopt", "digest:SHA256", "-binary"]
    options = {
        "hexkey": ROOT_SECRET.hex(),
        "hexsalt": POOL.encode().hex(),
        "hexinfo": bind(f"mhsm-sd/{label}/v1", POOL, 1).hex(),
    }
    for name, value in options.items():
        command += ["-kdfopt", f"{name}:{value}"]
    return subprocess.run([*command, "HKDF"], capture_output=True, check=True).stdout


def openssl_public(private: bytes) -> bytes:
    """The public half of an X25519 key by the openssl program."""
    der = X25519PrivateKey.from_private_bytes(private).private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    command = ["openssl", "pkey", "-inform", "DER", "-pubout", "-outform", "DER"]
    return subprocess.run(command, input=der, capture_output=True, check=True).stdout[-32:]


def test_the_documented_values_are_what_the_code_computes() -> None:
    derived = DerivedKeys(Secret(ROOT_SECRET), POOL, 1)
    computed = [
        bind("mhsm-sd/recovery/v1", "p", 1),
        raw_public(derived.recovery.public_key()),
        raw_public(derived.backup.public_key()),
        derived.check_value,
        shares.commitment(POOL, 1, 1, "duckling enlarge"),
    ]
    assert documented() == [value.hex() for value in computed]


def test_another_implementation_derives_the_same() -> None:
    derived = DerivedKeys(Secret(ROOT_SECRET), POOL, 1)
    assert openssl_hkdf("check-value", 16) == derived.check_value
    assert openssl_public(openssl_hkdf("recovery", 32)) == raw_public(derived.recovery.public_key())
    assert openssl_public(openssl_hkdf("backup", 32)) == raw_public(derived.backup.public_key())
