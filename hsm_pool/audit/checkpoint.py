"""Checkpoints of an audit log: signed notes (C2SP tlog-checkpoint) with cosignatures (C2SP tlog-cosignature).

The signing key is an Ed25519 key (RFC 8032) that one incarnation of a partition makes and
never stores; it is certified with the partition's key that the pool's owner certified, so whoever
has the owner's root certificate can check a checkpoint of any time. Checkpoints are numbered and
each names the digest of the one before, so that a dropped one shows.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hsm_pool.audit.tree import HASH_BYTES
from hsm_pool.enclave.evidence import Attester
from hsm_pool.enclave.verifier import verified_statement
from hsm_pool.errors import EvidenceRefused
from mhsm.audit.v1 import audit_pb2

_SIGNATURE_TYPE = b"\x01"
_COSIGNATURE_TYPE = b"\x04"
_STATEMENT = b"mhsm/audit-checkpoint-signer/v1\x00"
_NOTE_BYTES_MAX = 8 * 1024
_PREFIX = "\u2014 "
_BODY = re.compile(
    r"(?P<origin>[0-9a-z/-]{1,200})\n(?P<size>0|[1-9][0-9]{0,18})\n(?P<root>[0-9A-Za-z+/=]{44})\n"
    r"number (?P<number>[1-9][0-9]{0,18})\nprevious (?P<previous>[0-9A-Za-z+/=]{44})\n"
)
FIRST_PREVIOUS = bytes(HASH_BYTES)
"""What the first checkpoint of a log names as the one before it."""


class CheckpointInvalid(Exception):
    """A checkpoint is malformed or its signature does not fit. The text says what."""


def origin(pool_id: str, partition: int, log_id: str) -> str:
    """Return the name of a log."""
    return f"mhsm/{pool_id}/partition/{partition}/{log_id}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says."""

    origin: str
    size: int
    root: bytes
    number: int
    previous: bytes
    """SHA-256 of the text of the checkpoint before, without signatures."""

    @property
    def text(self) -> str:
        """The text that is signed."""
        root, previous = (base64.b64encode(value).decode() for value in (self.root, self.previous))
        return f"{self.origin}\n{self.size}\n{root}\nnumber {self.number}\nprevious {previous}\n"

    @property
    def digest(self) -> bytes:
        """What the next checkpoint names as its previous one."""
        return hashlib.sha256(self.text.encode()).digest()

    @property
    def partition(self) -> int:
        """Index of the partition whose log this is; -1 when the origin names none."""
        parts = self.origin.split("/")
        return int(parts[3]) if len(parts) == 5 and parts[3].isdigit() else -1

    @property
    def pool_id(self) -> str:
        """Id of the pool whose log this is; "" when the origin names none."""
        parts = self.origin.split("/")
        return parts[1] if len(parts) == 5 else ""

    def check_follows(self, before: Checkpoint) -> None:
        """Check that this is the next checkpoint of a log.

        Raises:
            CheckpointInvalid: Others were between them, or it names another one before it.
        """
        if self.number != before.number + 1:
            raise CheckpointInvalid(f"checkpoint {self.number} follows {before.number}: some were dropped")
        if self.previous != before.digest:
            raise CheckpointInvalid(f"checkpoint {self.number} names another one before it")
        if self.size < before.size:
            raise CheckpointInvalid(f"checkpoint {self.number} is of a smaller log than the one before")


@dataclass(frozen=True, slots=True)
class Note:
    """A checkpoint with its signature lines; the first one is the log's own."""

    checkpoint: Checkpoint
    signatures: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole note."""
        return self.checkpoint.text + "\n" + "".join(line + "\n" for line in self.signatures)

    def with_cosignatures(self, lines: Iterable[str]) -> Note:
        """Return the note with further lines."""
        known = set(self.signatures)
        return Note(self.checkpoint, (*self.signatures, *(line for line in lines if line not in known)))

    @staticmethod
    def parse(text: object) -> Note:
        """Read a note.

        Raises:
            CheckpointInvalid: It is none.
        """
        if not isinstance(text, str):
            raise CheckpointInvalid("this is no checkpoint")
        body, blank, lines = text.partition("\n\n")
        found = _BODY.fullmatch(body + "\n") if len(text) <= _NOTE_BYTES_MAX else None
        if found is None or not blank or not lines.endswith("\n"):
            raise CheckpointInvalid("this is no checkpoint")
        try:
            root, previous = (base64.b64decode(found[name], validate=True) for name in ("root", "previous"))
        except binascii.Error:
            raise CheckpointInvalid("this is no checkpoint") from None
        checkpoint = Checkpoint(found["origin"], int(found["size"]), root, int(found["number"]), previous)
        if checkpoint.text != body + "\n":
            raise CheckpointInvalid("the checkpoint is not in its canonical form")
        return Note(checkpoint, tuple(lines.splitlines()))


def signer_of(line: str) -> str:
    """Return the name in a signature line."""
    return line.removeprefix(_PREFIX).partition(" ")[0]


def _key_id(name: str, kind: bytes, public_key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + kind + public_key).digest()[:4]


def _statement(name: str, public_key: bytes) -> bytes:
    return _STATEMENT + public_key + name.encode()


def _cosigned(text: str, seconds: int) -> bytes:
    return f"cosignature/v1\ntime {seconds}\n{text}".encode()


@dataclass(frozen=True, slots=True)
class SignerKey:
    """Public half of a signing key, and whose it is."""

    name: str
    public_key: bytes
    certificate: bytes
    """COSE_Sign1 token (RFC 9052) of the partition's owner-certified key over name and public key."""

    @staticmethod
    def from_message(message: audit_pb2.CheckpointSigner) -> SignerKey:
        """Return the key of a message."""
        return SignerKey(message.name, message.public_key, message.certificate)

    def message(self) -> audit_pb2.CheckpointSigner:
        """Return the key as a message."""
        return audit_pb2.CheckpointSigner(
            name=self.name, public_key=self.public_key, certificate=self.certificate
        )

    def document(self) -> dict[str, str]:
        """Return the key for a JSON file."""
        return {
            "name": self.name,
            "public_key": base64.b64encode(self.public_key).decode(),
            "certificate": base64.b64encode(self.certificate).decode(),
        }

    @staticmethod
    def from_document(document: dict[str, str]) -> SignerKey:
        """Return the key of a JSON file.

        Raises:
            CheckpointInvalid: It is none.
        """
        try:
            name = document["name"]
            if not isinstance(name, str):
                raise TypeError
            return SignerKey(
                name,
                base64.b64decode(document["public_key"], validate=True),
                base64.b64decode(document["certificate"], validate=True),
            )
        except (KeyError, TypeError, ValueError):
            raise CheckpointInvalid("this is no signer of checkpoints") from None

    @property
    def partition(self) -> int:
        """Index of the partition in the name, which :meth:`check` must have accepted."""
        return int(self.name.split("/")[2])

    def check(self, root: x509.Certificate, pool_id: str) -> int:
        """Check whose key this is; return the partition.

        Args:
            root: Of the pool's owner.
            pool_id: Of the pool.

        Raises:
            CheckpointInvalid: It is no key of a partition of this pool.
        """
        parts = self.name.split("/")
        if len(parts) != 4 or parts[:2] != [pool_id, "partition"] or not all(p.isdigit() for p in parts[2:]):
            raise CheckpointInvalid("the signer is no partition of this pool")
        try:
            statement, uri = verified_statement(self.certificate, root)
        except EvidenceRefused as error:
            raise CheckpointInvalid(f"signer {self.name}: {error.message}") from None
        if uri != f"spiffe://{pool_id}/partition/{parts[2]}" or statement != _statement(
            self.name, self.public_key
        ):
            raise CheckpointInvalid(f"the certificate of {self.name} is of another key or partition")
        return int(parts[2])

    def is_named_by(self, line: str) -> bool:
        """Return whether a signature line has the name and the id of this key (C2SP signed-note)."""
        try:
            key_id = base64.b64decode(line.rpartition(" ")[2], validate=True)[:4]
        except ValueError:
            return False
        kinds = (_SIGNATURE_TYPE, _COSIGNATURE_TYPE)
        return signer_of(line) == self.name and key_id in {
            _key_id(self.name, kind, self.public_key) for kind in kinds
        }

    def verify(self, checkpoint: Checkpoint, line: str) -> None:
        """Check the log's own signature.

        Raises:
            CheckpointInvalid: It does not fit.
        """
        self._verify(line, _SIGNATURE_TYPE, 64, lambda _: checkpoint.text.encode())

    def verify_cosignature(self, checkpoint: Checkpoint, line: str) -> int:
        """Check a cosignature; return when it was made, in seconds since 1970.

        Raises:
            CheckpointInvalid: It does not fit.
        """
        head = self._verify(
            line,
            _COSIGNATURE_TYPE,
            72,
            lambda head: _cosigned(checkpoint.text, int.from_bytes(head, "big")),
        )
        return int.from_bytes(head, "big")

    def _verify(self, line: str, kind: bytes, length: int, message: Callable[[bytes], bytes]) -> bytes:
        name, _, encoded = line.removeprefix(_PREFIX).partition(" ")
        try:
            octets = base64.b64decode(encoded, validate=True)
            if not line.startswith(_PREFIX) or name != self.name or len(octets) != 4 + length:
                raise ValueError
            if octets[:4] != _key_id(self.name, kind, self.public_key):
                raise ValueError
            head, signature = octets[4:-64], octets[-64:]
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, message(head))
        except (ValueError, InvalidSignature):
            raise CheckpointInvalid(f"a signature of {self.name} does not fit the checkpoint") from None
        return head


class Signer:
    """Signs checkpoints of one incarnation; the private key exists in its memory only."""

    def __init__(self, attester: Attester, pool_id: str, partition: int, incarnation: int) -> None:
        self._key = Ed25519PrivateKey.generate()
        name = f"{pool_id}/partition/{partition}/{incarnation}"
        public_key = self._key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        certificate = attester.certify(_statement(name, public_key))
        self.public = SignerKey(name, public_key, certificate)

    def sign(self, checkpoint: Checkpoint) -> Note:
        """Sign a checkpoint of the own log."""
        return Note(checkpoint, (self._line(_SIGNATURE_TYPE, self._key.sign(checkpoint.text.encode())),))

    def cosign(self, checkpoint: Checkpoint) -> str:
        """Return the cosignature of another partition's checkpoint."""
        seconds = int(time.time())
        signature = self._key.sign(_cosigned(checkpoint.text, seconds))
        return self._line(_COSIGNATURE_TYPE, seconds.to_bytes(8, "big") + signature)

    def _line(self, kind: bytes, octets: bytes) -> str:
        key_id = _key_id(self.public.name, kind, self.public.public_key)
        return f"{_PREFIX}{self.public.name} {base64.b64encode(key_id + octets).decode()}"
