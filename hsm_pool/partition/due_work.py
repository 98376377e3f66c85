"""Due work: keys whose retention is over are purged, keys whose policy says so are rotated (G1).

The partition that holds the housekeeping role looks, pass by pass, at a bounded number of keys. What it
finds is decided again by the core on the state that the command is committed on: whoever comes second,
or too late, is refused, so a rotation happens once and a recovered key is never purged. The time is
one that a majority of the partitions agrees on; without it nothing is due.
"""

from __future__ import annotations

import os

import structlog

from hsm_pool import limits
from hsm_pool.audit import record
from hsm_pool.audit.record import Operation
from hsm_pool.core import rotation as core_rotation
from hsm_pool.core.commands import PurgeDueKey, RotateKey
from hsm_pool.core.model import KeyVersionRecord
from hsm_pool.core.rotation import DueAction, PurgeDue
from hsm_pool.crypto.key_generation import KeyGenerator
from hsm_pool.errors import KeyChanged, LimitExceeded, MHSMError
from hsm_pool.partition.passes import Passes
from hsm_pool.store.committer import Committer, Mutation
from hsm_pool.store.replica import Replica, boot_time
from hsm_pool.store.sealing import PoolKeys, seal_material

_log = structlog.get_logger()
_PASS_SECONDS = 1.0
_ROTATION_SECONDS = 15.0
"""How long a key may be made; it is asked for again in a later pass."""


def rotation(
    keys: PoolKeys,
    generator: KeyGenerator,
    newest: KeyVersionRecord,
    time_ms: int,
    timeout_seconds: float,
    replaces: str = "",
) -> RotateKey:
    """Return the command that gives a key a new version like its newest.

    Raises:
        Overloaded: The material was not made in time.
    """
    material = generator.generate_like(newest, timeout_seconds)
    version_id = os.urandom(16).hex()
    return RotateKey(
        time_ms=time_ms,
        key_id=newest.key_id,
        version_id=version_id,
        key_type=material.key_type,
        curve=material.curve,
        size_bits=material.size_bits,
        public_key_der=material.public_key_der,
        sealed_material=seal_material(
            keys,
            newest.key_id,
            version_id,
            material.key_type,
            material.curve,
            material.size_bits,
            material.material,
        ),
        replaces=replaces,
    )


class DueWork(Passes):
    """Only the partition that holds the housekeeping role does anything."""

    def __init__(
        self, keys: PoolKeys, replica: Replica, committer: Committer, generator: KeyGenerator
    ) -> None:
        super().__init__("due-work", _PASS_SECONDS)
        self._keys = keys
        self._replica = replica
        self._committer = committer
        self._generator = generator
        self._position = ""
        self._full: set[tuple[str, str]] = set()
        """Keys without room for another version, with the newest one: not tried again."""

    def _pass(self) -> None:
        """Do what is due among the next keys, and say how much that was."""
        replica = self._replica
        if not replica.lease_remaining() or not replica.is_housekeeper():
            return
        now_ms = replica.agreed_time_ms()
        if now_ms is None:
            return
        with replica.condition:
            actions, self._position = core_rotation.due_work(replica.state, now_ms, self._position)
        counts = dict.fromkeys(("purged", "rotated", "changed", "put_off"), 0)
        for action in actions:
            if self._stopping.is_set() or not replica.is_housekeeper():
                break
            if isinstance(action, PurgeDue) or (action.key_id, action.newest.version_id) not in self._full:
                counts[self._do(action, now_ms)] += 1
        if any(counts.values()):
            _log.info("due work", **counts)

    def _do(self, action: DueAction, now_ms: int) -> str:
        """Do one action; return what became of it."""
        try:
            if isinstance(action, PurgeDue):
                self._submit(PurgeDueKey(now_ms, action.key_id), "KeyPurge")
                return "purged"
            newest = action.newest
            command = rotation(
                self._keys, self._generator, newest, now_ms, _ROTATION_SECONDS, newest.version_id
            )
            self._submit(command, "KeyRotateIfDue", command.version_id)
        except KeyChanged:
            return "changed"
        except LimitExceeded:
            if not isinstance(action, PurgeDue):
                if len(self._full) >= limits.KEYS_MAX:
                    self._full.clear()
                self._full.add((action.key_id, action.newest.version_id))
            return "put_off"
        except MHSMError as error:
            # Deleted or recovered meanwhile, or the store does not answer: a later pass looks again.
            _log.debug("due work put off", reason=error.reason)
            return "put_off"
        return "rotated"

    def _submit(self, command: PurgeDueKey | RotateKey, name: str, version_id: str = "") -> None:
        index = self._replica.index
        identity = f"spiffe://{self._replica.keys.pool_id}/partition/{index}"
        operation = Operation(
            name, identity, partition=index, key_name=command.key_id, key_version=version_id
        )
        mutation = Mutation(command, None, lambda _: b"", None, b"", 0)
        record.begin(operation)
        try:
            self._committer.submit(mutation, boot_time() + limits.MUTATION_SECONDS_MAX)
        finally:
            record.begin(None)
