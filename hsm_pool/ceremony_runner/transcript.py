"""Transcripts of ceremonies: a chain of entries, signed by the pool's administrator.

A transcript is one canonical JSON object. Its entries form a chain: each holds the SHA-256 of the one
before (the first that of the header, which is everything but entries, end time and signature), and
the last says how the ceremony ended. The signature is ECDSA with P-256 and SHA-256 (DER, base64url)
over the canonical object without the field ``signature``. While a ceremony runs, its journal holds
header and entries line by line, so that a crash leaves a record, though an unsigned one.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hsm_pool.ceremony_runner.plan import Plan
from security_domain import fingerprints
from security_domain.encoding import canonical, encode

FORMAT: Final = "mhsm-ceremony-transcript/1"
TRANSCRIPT_BYTES_MAX: Final = 48 * 1024 * 1024
"""Filled-in steps, those repeated, output (1 Mi characters each) and plan; escaped, each may be 12 bytes."""
REPEATS_MAX: Final = 20
"""How often steps that failed may be done again in one ceremony."""
EVIDENCE_BYTES_MAX: Final = 16 * 1024 * 1024
PEM_BYTES_MAX: Final = 32 * 1024
JOURNAL_SUFFIX: Final = ".partial"

DONE, FAILED, ABORTED, COMPLETED = "done", "failed", "aborted", "completed"

SIGNATURE_ALGORITHM = ec.ECDSA(hashes.SHA256())


class IdentityRefused(Exception):
    """The administrator's certificate and key cannot sign a transcript."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who signs: the pool's administrator, with a P-256 key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> str:
        """The certificate, PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()


def now() -> str:
    """Return the time, UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def load_identity(certificate_pem: bytes, key_pem: bytes, pool_id: str) -> Identity:
    """Return the identity that signs the transcripts of a pool.

    Raises:
        IdentityRefused: It is not the administrator of this pool, not P-256, or key and certificate
            do not belong together.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
        uri = uri_of(certificate)
    except (ValueError, TypeError, x509.ExtensionNotFound):
        raise IdentityRefused("the administrator's certificate or key is not readable") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityRefused("the administrator's key is not a P-256 key")
    if key.public_key() != certificate.public_key():
        raise IdentityRefused("the administrator's key and certificate do not belong together")
    if uri != administrator_uri(pool_id):
        raise IdentityRefused(f"the certificate is of {uri}, not of this pool's administrator")
    return Identity(certificate, key)


def evidence(path: str) -> dict[str, str]:
    """Return path, SHA-256 (hexadecimal) and word form of a file.

    Raises:
        OSError: It cannot be read, is not a regular file, or has more than EVIDENCE_BYTES_MAX bytes.
    """
    # Non-blocking, so that a pipe without a writer is refused and not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "is not a regular file", path)
        content = stream.read(EVIDENCE_BYTES_MAX + 1)
    if len(content) > EVIDENCE_BYTES_MAX:
        raise OSError(0, f"has more than {EVIDENCE_BYTES_MAX} bytes", path)
    return {"path": path, "sha256": sha256(content), "words": fingerprints.words(content)}


def sha256(octets: bytes) -> str:
    """Return the digest, hexadecimal."""
    return hashlib.sha256(octets).hexdigest()


def make_header(
    plan: Plan, parameters: Mapping[str, str], identity: Identity, pool_id: str, software: str, answers: str
) -> dict[str, Any]:
    """Return the header of a ceremony that starts now.

    Args:
        plan: What will be done.
        parameters: Their values, data_directory included.
        identity: Who will sign.
        pool_id: Of the pool.
        software: Name and version of what runs the ceremony.
        answers: "terminal", or "file" if no people were asked.
    """
    return {
        "format": FORMAT,
        "software": software,
        "pool_id": pool_id,
        "plan": {"title": plan.title, "digest": plan.digest, "words": plan.words, "text": plan.text},
        "parameters": dict(parameters),
        "answers": answers,
        "started": now(),
        "certificate": identity.certificate_pem,
    }


class Journal:
    """The record of a ceremony under way: made exclusively, one line an event, on disk before it counts.

    Args:
        output: Where the transcript will be; the journal lies beside it.
        header: As make_header() returns it.

    Raises:
        FileExistsError: There is a journal of this name: an unfinished ceremony, or one under way.
    """

    def __init__(self, output: Path, header: dict[str, Any]) -> None:
        self.path = journal_path(output)
        self.header = header
        self.entries: list[dict[str, Any]] = []
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._write({"header": header})
        sync_directory(self.path.parent)

    def begin(self, index: int) -> None:
        """Note that a step begins: after a crash it may or may not have had its effect."""
        self._write({"under_way": index})

    def append(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Add an entry to the chain and return it."""
        previous = self.entries[-1] if self.entries else self.header
        entry = {
            "index": len(self.entries) + 1,
            "previous_digest": sha256(canonical(previous)),
            **fields,
        }
        self._write({"entry": entry})
        self.entries.append(entry)
        return entry

    def sealed(
        self, identity: Identity, result: str, reason: str, audit_checkpoints: Sequence[str] = ()
    ) -> bytes:
        """Add the end entry and return the signed transcript.

        Args:
            identity: Signs.
            result: How the ceremony ended.
            reason: Why it did not complete.
            audit_checkpoints: Newest checkpoints of the partitions' audit logs, as far as they answered.
        """
        self.append({"result": result, "reason": reason, "audit_checkpoints": list(audit_checkpoints)})
        body = {**self.header, "entries": self.entries, "ended": now()}
        signature = identity.key.sign(canonical(body), SIGNATURE_ALGORITHM)
        return canonical({**body, "signature": encode(signature)})

    def remove(self) -> None:
        """Remove the journal, after the transcript has been written."""
        self.path.unlink()
        os.close(self._descriptor)
        sync_directory(self.path.parent)

    def _write(self, line: Mapping[str, Any]) -> None:
        octets = canonical(line) + b"\n"
        while octets:
            octets = octets[os.write(self._descriptor, octets) :]
        os.fsync(self._descriptor)


def journal_path(output: Path) -> Path:
    """Return where the journal of a transcript lies."""
    return output.with_name(output.name + JOURNAL_SUFFIX)


def sync_directory(directory: Path) -> None:
    """Make what was created or removed in a directory survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def administrator_uri(pool_id: str) -> str:
    """Return the name of a pool's administrator."""
    return f"spiffe://{pool_id}/client/administrator"


def uri_of(certificate: x509.Certificate) -> str:
    """Return a certificate's only URI name; "" if there is not exactly one.

    Raises:
        x509.ExtensionNotFound: It has no alternative names.
    """
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return uris[0] if len(uris) == 1 else ""
