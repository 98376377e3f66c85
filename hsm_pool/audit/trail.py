"""One partition's audit trail: its log, its checkpoints, and what it witnesses of the others.

While there are new records, one thread makes a checkpoint every second and has it cosigned by
the peers.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import structlog
from cryptography import x509

from hsm_pool.audit.checkpoint import CheckpointInvalid, Note, Signer, SignerKey, origin
from hsm_pool.audit.history import CheckpointHistory
from hsm_pool.audit.log import AuditLog
from hsm_pool.audit.record import own_record
from hsm_pool.audit.removal import Removals
from hsm_pool.audit.tree import Forgotten
from hsm_pool.audit.witness import CosignPeer, Witness
from hsm_pool.enclave.evidence import Attester
from hsm_pool.errors import AuditUnavailable, MHSMError
from hsm_pool.settings import PartitionSettings
from mhsm.peer.v1 import peer_pb2

_log = structlog.get_logger()
_CHECKPOINT_SECONDS = 1.0
_SYNC_SECONDS = 5.0
_OWED_MAX = 64


class AuditTrail:
    """The audit trail of one incarnation. Thread-safe; :meth:`close` ends its threads.

    Args:
        settings: Of the partition.
        incarnation: Of the partition.
        attester: Certifies the signing key.
        owner_root: Certificate of the pool's owner.
        cosign_peer: Sends a checkpoint to a peer.
    """

    def __init__(
        self,
        settings: PartitionSettings,
        incarnation: int,
        attester: Attester,
        owner_root: x509.Certificate,
        cosign_peer: CosignPeer,
    ) -> None:
        self.identity = f"spiffe://{settings.pool_id}/partition/{settings.index}"
        self.partition = settings.index
        directory = Path(settings.audit_directory)
        self.log = AuditLog(directory, self.identity, settings.index, settings.audit_failure)
        self.signer = Signer(attester, settings.pool_id, settings.index, incarnation)
        self.history = CheckpointHistory(directory)
        retention_bytes = settings.audit_retention_mebibytes * 1024 * 1024
        self.removals = Removals(self.log, self.history, retention_bytes)
        self.witness = Witness(directory, settings.pool_id, owner_root, self.signer)
        self.origin = origin(settings.pool_id, settings.index, self.log.log_id)
        self._settings = settings
        self._root = owner_root
        self._cosign_peer = cosign_peer
        self._paying = threading.Lock()
        self._owed: deque[bytes] = deque(maxlen=_OWED_MAX)
        self._known_sizes: dict[int, int] = {}
        self._missing: set[int] = set()
        """Peers that did not cosign the newest checkpoint yet."""
        self._refusals: dict[int, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit-checkpoint", daemon=True)

    def start(self) -> None:
        """Begin to make checkpoints."""
        self._thread.start()

    def close(self) -> None:
        """Make a last checkpoint and end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self.step()
        self.log.close()
        self.history.close()

    def note(self, name: str, **properties: str | int) -> None:
        """Put something that the partition does by itself on record, as soon as the log can be written."""
        self._owed.append(own_record(name, self.identity, self.partition, **properties))
        self._pay()

    def _pay(self) -> None:
        with self._paying, contextlib.suppress(AuditUnavailable):
            while self._owed:
                self.log.append(self._owed[0])
                self._owed.popleft()

    def failure(self) -> str:
        """Return why the log is not written or not cosigned; "" when all is well."""
        if self.log.failure:
            return f"the audit log cannot be written: {self.log.failure}"
        return "; ".join(f"partition {index}: {text}" for index, text in sorted(self._refusals.items()))

    def newest_checkpoints(self) -> Sequence[str]:
        """Return the newest cosigned note of every log that this partition knows, its own included."""
        own = self.history.newest_cosigned or self.history.newest
        return sorted([*([own.text] if own else []), *self.witness.newest()])

    def worth_noting(self, noted_size: int) -> Note | None:
        """Return the newest cosigned checkpoint if the chain should take note of it.

        Args:
            noted_size: Of the checkpoint that the chain knows of this log.
        """
        newest = self.history.newest_cosigned
        worth = newest is not None and noted_size < min(self.log.noteworthy_size, newest.checkpoint.size)
        return newest if worth else None

    # -- the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(_CHECKPOINT_SECONDS):
            self.step()

    def step(self) -> None:
        """Make a checkpoint if anything is new, and have it cosigned."""
        self._pay()
        try:
            made = self._checkpoint()
            if made is not None:
                self._missing = {peer.index for peer in self._settings.peers}
            newest = self.history.newest
            for index in sorted(self._missing):
                if newest and self._have_cosigned(newest, index):
                    self._missing.discard(index)
        except OSError as error:
            # The next step tries again; what is not in a checkpoint yet is said to be so.
            _log.warning("no checkpoint could be written", reason=error.strerror)

    def _checkpoint(self) -> Note | None:
        """Make a checkpoint of what is synced; None when nothing is new."""
        newest = self.history.newest
        size = self.log.size
        if newest and newest.checkpoint.size >= size:
            return None
        if not self.log.wait_synced(size, _SYNC_SECONDS):
            return None
        note = self.signer.sign(self.history.next(self.origin, size, self.log.root_of(size)))
        self.history.append(note, self.signer.public)
        return note

    def _have_cosigned(self, note: Note, index: int) -> bool:
        """Ask one peer; return whether it is done with this checkpoint."""
        try:
            for _ in range(2):
                response = self._cosign_peer(index, self._request(note, index))
                self._known_sizes[index] = response.known_size
                if response.cosignature:
                    break
            else:
                return False
            key = SignerKey.from_message(response.signer)
            if key.check(self._root, self._settings.pool_id) != index:
                raise CheckpointInvalid("another partition cosigned")
            key.verify_cosignature(note.checkpoint, response.cosignature)
        except MHSMError as error:
            if error.definite and error.reason == "CHECKPOINT_REFUSED":
                if index not in self._refusals:
                    _log.error("checkpoint refused", peer=index, reason=error.message)
                self._refusals[index] = error.message
                return True
            return False
        except (CheckpointInvalid, Forgotten) as error:
            _log.warning("no cosignature", peer=index, reason=str(error) or "too old a proof is wanted")
            return True
        self._refusals.pop(index, None)
        self._known_sizes[index] = note.checkpoint.size
        self.history.append_cosignature(note, response.cosignature, key)
        return True

    def _request(self, note: Note, index: int) -> peer_pb2.CosignRequest:
        old_size = min(self._known_sizes.get(index, 0), note.checkpoint.size)
        proof = self.log.consistency_proof(old_size, note.checkpoint.size) if old_size else ()
        return peer_pb2.CosignRequest(
            checkpoint=note.text,
            signer=self.signer.public.message(),
            old_size=old_size,
            consistency_proof=proof,
        )
