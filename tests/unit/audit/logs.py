"""Audit logs of three partitions, made with the real classes; only the wire between them is left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cryptography import x509

from hsm_pool import settings as settings_module
from hsm_pool.audit.record import Operation
from hsm_pool.audit.retention import KeptFrom, stated
from hsm_pool.audit.trail import AuditTrail
from hsm_pool.audit.verify import Report, Verifier
from hsm_pool.client.errors import PoolUnreachable
from hsm_pool.enclave.evidence import Attester
from hsm_pool.provisioning.layout import NewPool, provision
from hsm_pool.settings import PartitionSettings
from mhsm.peer.v1 import peer_pb2


class ThreeLogs:
    """Three trails that cosign each other, in the layout of a real pool's data directory."""

    def __init__(self, directory: Path, **overrides: Any) -> None:
        self.directory = directory
        self.pool_id = provision(directory, NewPool(attended=True, recoverable_days=7, etcd_binary="/etcd"))
        self._settings = [
            dataclasses.replace(
                settings_module.load(PartitionSettings, directory / f"nodes/{index}/partition.json"),
                **overrides,
            )
            for index in range(3)
        ]
        self._root = owner_root(directory)
        self._incarnations = [0, 0, 0]
        self.sequence = 0
        self.kept: dict[int, KeptFrom] = {}
        """What the chain says is kept of the logs."""
        self.unreachable: set[int] = set()
        self.trails = [self._open(index) for index in range(3)]

    def _open(self, index: int) -> AuditTrail:
        self._incarnations[index] += 1

        def cosign(peer: int, request: peer_pb2.CosignRequest) -> peer_pb2.CosignResponse:
            if peer in self.unreachable:
                raise PoolUnreachable("not now")
            return self.trails[peer].witness.cosign(request, index)

        settings, incarnation = self._settings[index], self._incarnations[index]
        return AuditTrail(settings, incarnation, Attester(settings, incarnation), self._root, cosign)

    def restart(self, index: int) -> None:
        """End a trail in order and open it again."""
        self.trails[index].close()
        self.trails[index] = self._open(index)

    def restart_without_state(self, index: int) -> None:
        """End a trail and open it again when the partition has lost its count of starts."""
        self.trails[index].close()
        self._incarnations[index] = 0
        self.trails[index] = self._open(index)

    def read(self, index: int, count: int = 1) -> None:
        """Put reads on record at one partition."""
        for _ in range(count):
            self.trails[index].log.append(Operation("KeyGet", "spiffe://pool/client/one").record())

    def mutate(self, partitions: tuple[int, ...] = (0, 1, 2), count: int = 1) -> None:
        """Put mutations of the chain on record, as each partition does that applies them."""
        for _ in range(count):
            self._commit([Operation("KeyCreate", "spiffe://pool/client/one")] * 2, partitions)

    def _commit(self, operations: list[Operation], partitions: tuple[int, ...]) -> None:
        self.sequence += 1
        records = [operation.record(self.sequence, len(operations)) for operation in operations]
        for index in partitions:
            self.trails[index].log.append_mutations(self.sequence, records)

    def note(self, index: int, partitions: tuple[int, ...] = (0, 1, 2), elsewhere: int | None = None) -> None:
        """Do what a partition's housekeeping does: remove what it may, have the chain take note of the rest.

        Args:
            index: Of the partition.
            partitions: Which of them put the note on record.
            elsewhere: What another one is known to have applied, by default everything.
        """
        applied = self.sequence if elsewhere is None else elsewhere
        trail = self.trails[index]
        removal = trail.removals.step(self.kept.get(index), self.sequence, applied)
        kept_from = stated(self.kept.values(), removal)
        if removal:
            self.kept[index] = removal
        operation = Operation("NoteCheckpoint", trail.identity, partition=index, kept_from=kept_from)
        self._commit([operation], partitions)

    def checkpoint(self) -> None:
        """Make a checkpoint of every log that has news."""
        for trail in self.trails:
            trail.step()

    def close(self) -> None:
        """End all trails."""
        for trail in self.trails:
            trail.close()

    def log_directory(self, index: int) -> Path:
        """Return where the log of a partition lies."""
        return Path(self._settings[index].audit_directory)


@dataclasses.dataclass(frozen=True)
class Honest:
    """Logs of an honest pool, closed."""

    directory: Path
    pool_id: str
    checkpoints: tuple[str, ...]


def owner_root(pool: Path) -> x509.Certificate:
    """Return the root certificate of a pool's owner."""
    return x509.load_pem_x509_certificate((pool / "nodes/0/owner/root.crt").read_bytes())


def verify(
    pool: Path, pool_id: str, kept: tuple[tuple[str, str], ...] = (), partitions: tuple[int, ...] = (0, 1, 2)
) -> Report:
    """Verify the logs below a pool's data directory."""
    directories = {index: pool / f"nodes/{index}/audit" for index in partitions}
    return Verifier(pool_id, owner_root(pool)).verify(directories, kept)
