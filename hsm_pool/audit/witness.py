"""What a partition has seen of the logs of the others: it cosigns only what continues that (G7).

The newest checkpoint of every log it saw stays on its own disk, so that a log that is
cut, forked or deleted contradicts a witness.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509

from hsm_pool import limits
from hsm_pool.audit import files
from hsm_pool.audit.checkpoint import Checkpoint, CheckpointInvalid, Note, Signer, SignerKey
from hsm_pool.audit.tree import EMPTY_ROOT, ProofRefused, verify_consistency
from hsm_pool.errors import CheckpointRefused
from hsm_pool.store.state_file import write_atomically
from mhsm.peer.v1 import peer_pb2


class Witness:
    """Cosigns checkpoints of other partitions. Thread-safe.

    Args:
        directory: Holds the file of what was seen.
        pool_id: Of the pool.
        root: Root certificate of the pool's owner.
        signer: Of this partition.
    """

    def __init__(self, directory: Path, pool_id: str, root: x509.Certificate, signer: Signer) -> None:
        self._path = directory / files.PEERS
        self._pool_id, self._root, self._signer = pool_id, root, signer
        self._lock = threading.Lock()
        self._seen: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            for entry in read_peers(self._path):
                self._seen[entry["checkpoint"].partition("\n")[0]] = entry

    def newest(self) -> list[str]:
        """Return the newest note of every log, cosigned by this partition."""
        with self._lock:
            return [entry["checkpoint"] for entry in self._seen.values()]

    def cosign(self, request: peer_pb2.CosignRequest, partition: int) -> peer_pb2.CosignResponse:
        """Cosign a checkpoint, or say from which size a proof is wanted.

        Args:
            request: From the other partition.
            partition: The other partition, as its certificate says.

        Raises:
            CheckpointRefused: It is not signed by that partition, or does not continue what was seen.
        """
        key = SignerKey.from_message(request.signer)
        try:
            note = Note.parse(request.checkpoint)
            if key.check(self._root, self._pool_id) != partition or note.checkpoint.partition != partition:
                raise CheckpointRefused("the checkpoint is of another partition")
            key.verify(note.checkpoint, note.signatures[0])
        except CheckpointInvalid as error:
            raise CheckpointRefused(str(error)) from None
        with self._lock:
            return self._cosign(request, note, key)

    def _cosign(self, request: peer_pb2.CosignRequest, note: Note, key: SignerKey) -> peer_pb2.CosignResponse:
        checkpoint = note.checkpoint
        entry = self._seen.get(checkpoint.origin)
        if entry is None:
            self._make_room(checkpoint.partition)
            known_size = 0
        else:
            known = Note.parse(entry["checkpoint"]).checkpoint
            _check_order(known, checkpoint)
            known_size = known.size
        response = peer_pb2.CosignResponse(known_size=known_size, signer=self._signer.public.message())
        if request.old_size != known_size:
            return response
        _check_continues(
            known_size,
            known.root if entry else EMPTY_ROOT,
            checkpoint,
            list(request.consistency_proof),
        )
        line = self._signer.cosign(checkpoint)
        self._seen[checkpoint.origin] = {
            "checkpoint": Note(checkpoint, (note.signatures[0], line)).text,
            "signers": [key.document(), self._signer.public.document()],
        }
        # On the own disk before the other one may rely on it.
        self._write()
        response.cosignature = line
        return response

    def _make_room(self, partition: int) -> None:
        seen = [origin for origin in self._seen if f"/partition/{partition}/" in origin]
        if len(seen) >= limits.AUDIT_LOGS_MAX:
            raise CheckpointRefused("that partition has begun too many logs")

    def _write(self) -> None:
        document = {"format": files.FORMAT, "logs": list(self._seen.values())}
        write_atomically(self._path, json.dumps(document, sort_keys=True, indent=1).encode() + b"\n")


def _check_order(known: Checkpoint, new: Checkpoint) -> None:
    if new.number < known.number or (new.number == known.number and new != known):
        raise CheckpointRefused("the checkpoint does not follow the one that was cosigned before")
    if new.number == known.number + 1 and new.previous != known.digest:
        raise CheckpointRefused("the checkpoint names another history before it")


def _check_continues(size: int, root: bytes, checkpoint: Checkpoint, proof: list[bytes]) -> None:
    try:
        verify_consistency(size, root, checkpoint.size, checkpoint.root, proof)
    except ProofRefused as error:
        raise CheckpointRefused(f"the log was rewritten or cut: {error}") from None


def read_peers(path: Path) -> list[dict[str, Any]]:
    """Return what a partition has seen: notes and the keys that signed them.

    Raises:
        Unreadable: The file is not what a partition writes.
        OSError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            document = files.parse_json(stream.read(limits.AUDIT_PEERS_BYTES_MAX))
        entries = list(document["logs"])
        if document["format"] != files.FORMAT or not all(isinstance(e["checkpoint"], str) for e in entries):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise files.Unreadable(f"{path.name} is not readable") from None
    return entries


CosignPeer = Callable[[int, peer_pb2.CosignRequest], peer_pb2.CosignResponse]
"""Sends a checkpoint to the partition of an index."""
