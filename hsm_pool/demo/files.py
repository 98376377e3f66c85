"""The real files of the demo: the project's own wheel, and ten megabytes to encrypt."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import cryptography
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FILE_BYTES = 10 * 1024 * 1024
_ROOT = Path(__file__).resolve().parent.parent.parent


def build_wheel(directory: Path) -> Path:
    """Build the wheel of this project.

    Raises:
        RuntimeError: It cannot be built; the text says why.
    """
    completed = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(directory.glob("*.whl"))
    if completed.returncode or not wheels:
        raise RuntimeError(f"the wheel was not built: {completed.stderr.strip()[-300:]}")
    return wheels[0]


def make_large_file(path: Path) -> None:
    """Make a file of ten megabytes: an archive of an installed library, cut to size."""
    archive = path.with_suffix(".tar")
    with tarfile.open(archive, "w") as tar:
        tar.add(Path(cryptography.__file__).parent, arcname="cryptography")
        while archive.stat().st_size < FILE_BYTES:
            tar.add(Path(cryptography.__file__).parent, arcname="again")
    with archive.open("rb") as source, path.open("wb") as target:
        target.write(source.read(FILE_BYTES))
    archive.unlink()


def sha256(path: Path) -> bytes:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def encrypt_file(source: Path, target: Path, data_key: bytes) -> None:
    """Encrypt a file with AES-256-GCM under a data key: nonce || ciphertext || tag."""
    nonce = os.urandom(12)
    target.write_bytes(nonce + AESGCM(data_key).encrypt(nonce, source.read_bytes(), None))


def decrypt_file(source: Path, data_key: bytes) -> bytes:
    """Return what :func:`encrypt_file` encrypted."""
    content = source.read_bytes()
    return AESGCM(data_key).decrypt(content[:12], content[12:], None)


def verify_with_openssl(public_key_der: bytes, signature: bytes, file: Path, directory: Path) -> None:
    """Verify an RS256 signature with the openssl program.

    Raises:
        RuntimeError: It does not verify.
    """
    key_file, signature_file = directory / "public-key.der", directory / "signature.bin"
    key_file.write_bytes(public_key_der)
    signature_file.write_bytes(signature)
    command = ["openssl", "dgst", "-sha256", "-keyform", "DER", "-verify", str(key_file)]
    completed = subprocess.run(
        [*command, "-signature", str(signature_file), str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode:
        raise RuntimeError(f"openssl does not verify the signature: {completed.stdout.strip()}")
