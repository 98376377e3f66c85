"""Proofs about one audit log as files of their own: checked with the owner's root certificate alone (G7).

An inclusion proof shows one record in the tree of a checkpoint, a consistency proof that this tree
continues an older one (RFC 6962 section 2.1, RFC 9162 sections 2.1.3 and 2.1.4). The file holds the
checkpoint with its cosignatures and the certificates of those who signed it. It is JSON in one
form only, so that no changed octet goes unread. What it holds is that of C2SP tlog-proof, which has no
place for certificates.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from cryptography import x509

from hsm_pool import limits
from hsm_pool.audit import files
from hsm_pool.audit.checkpoint import Checkpoint, CheckpointInvalid, Note, SignerKey
from hsm_pool.audit.signers import Signers
from hsm_pool.audit.tree import (
    HASH_BYTES,
    ProofRefused,
    leaf_hash,
    verify_consistency,
    verify_inclusion,
)

FORMAT = 1
_INCLUSION, _CONSISTENCY = "inclusion_proof", "consistency_proof"


@dataclass(frozen=True, slots=True)
class Inclusion:
    """That a record stands at an index of the log."""

    index: int
    record: str
    """The record, canonical JSON."""
    hashes: tuple[bytes, ...]
    """Nodes, from the leaf up."""

    def document(self) -> dict[str, Any]:
        """Return it for the file."""
        return {"hashes": _encoded(self.hashes), "index": self.index, "record": self.record}

    @staticmethod
    def from_document(value: dict[str, Any]) -> Inclusion:
        """Read it; raises ValueError, KeyError or TypeError if it is none."""
        record = value["record"]
        files.parse(record.encode(), "what the file holds")
        return Inclusion(files.whole_number(value["index"]), record, _hashes(value["hashes"]))

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ProofRefused unless the record is in the tree of this checkpoint."""
        leaf = leaf_hash(self.record.encode())
        verify_inclusion(leaf, self.index, checkpoint.size, self.hashes, checkpoint.root)


@dataclass(frozen=True, slots=True)
class Consistency:
    """That the log continues the one of an older size and root."""

    old_size: int
    old_root: bytes
    hashes: tuple[bytes, ...]

    def document(self) -> dict[str, Any]:
        """Return it for the file."""
        (root,) = _encoded((self.old_root,))
        return {"hashes": _encoded(self.hashes), "old_root": root, "old_size": self.old_size}

    @staticmethod
    def from_document(value: dict[str, Any]) -> Consistency:
        """Read it; raises ValueError, KeyError or TypeError if it is none."""
        (root,) = _hashes([value["old_root"]])
        return Consistency(files.whole_number(value["old_size"]), root, _hashes(value["hashes"]))

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ProofRefused unless the tree of this checkpoint continues the older one."""
        verify_consistency(self.old_size, self.old_root, checkpoint.size, checkpoint.root, self.hashes)


@dataclass(frozen=True, slots=True)
class Proof:
    """A checkpoint, who signed it, and what is shown of its tree."""

    note: Note
    signers: tuple[SignerKey, ...]
    shown: Inclusion | Consistency

    def render(self) -> bytes:
        """Return the file."""
        kind = _INCLUSION if isinstance(self.shown, Inclusion) else _CONSISTENCY
        value = {
            "checkpoint": self.note.text,
            "format": FORMAT,
            kind: self.shown.document(),
            "signers": [signer.document() for signer in self.signers],
        }
        return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"

    @staticmethod
    def parse(octets: bytes) -> Proof:
        """Read a file; nothing in it is verified yet.

        Raises:
            ProofRefused: It is no such file.
        """
        try:
            if len(octets) > limits.AUDIT_PROOF_BYTES_MAX:
                raise ValueError
            value = files.parse_json(octets)
            shown: Inclusion | Consistency
            if _INCLUSION in value:
                shown = Inclusion.from_document(value[_INCLUSION])
            else:
                shown = Consistency.from_document(value[_CONSISTENCY])
            signers = tuple(SignerKey.from_document(entry) for entry in value["signers"])
            proof = Proof(Note.parse(value["checkpoint"]), signers, shown)
            if proof.render() != octets:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, CheckpointInvalid, files.Unreadable):
            raise ProofRefused("the file is no proof of an audit log, or was changed") from None
        return proof

    def verify(self, root: x509.Certificate) -> dict[int, int]:
        """Check certificates, signature, cosignatures and hashes.

        Args:
            root: Root certificate of the pool's owner. The pool is the one of the checkpoint.

        Returns:
            When each partition that cosigned says it did, in seconds since 1970.

        Raises:
            ProofRefused: Something does not fit, or no other partition cosigned.
        """
        checkpoint = self.note.checkpoint
        signers = Signers(checkpoint.pool_id, root)
        try:
            for key in self.signers:
                signers.trust(key)
            cosigned = signers.check_note(self.note, checkpoint.partition)
        except CheckpointInvalid as error:
            raise ProofRefused(str(error)) from None
        if not cosigned:
            raise ProofRefused("no other partition has cosigned the checkpoint")
        self.shown.check(checkpoint)
        return cosigned


def _encoded(hashes: tuple[bytes, ...]) -> list[str]:
    return [base64.b64encode(value).decode() for value in hashes]


def _hashes(values: Any) -> tuple[bytes, ...]:
    if not isinstance(values, list):
        raise TypeError
    found = tuple(base64.b64decode(value, validate=True) for value in values)
    if any(len(value) != HASH_BYTES for value in found):
        raise ValueError
    return found
