"""A partition that serves, as far as its services see it: real keys, state, roles and lease, but no store."""

from __future__ import annotations

import uuid
from typing import Any, cast

import pytest

from hsm_pool.core import lifecycle
from hsm_pool.core.commands import Command, CreateRoleAssignment
from hsm_pool.core.model import KeyOperation, KeyReleasePolicy, KeyVersionRecord, RoleAssignment
from hsm_pool.core.state import Overlay
from hsm_pool.crypto.key_generation import KeyMaterial
from hsm_pool.crypto.loaded_keys import LoadedKeyCache
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.net import interceptors
from hsm_pool.net.authorization import Caller, Kind, authorize
from hsm_pool.partition.serving import Serving
from hsm_pool.store.committer import Mutation
from hsm_pool.store.replica import Replica, boot_time
from hsm_pool.store.sealing import PoolKeys, seal_material
from tests.role_tables import GUIDS
from tests.unit.test_core import create

LEASE_SECONDS = 600.0


class Served:
    """What a partition serves with; :meth:`do` commits by the real core, here and at once."""

    def __init__(self) -> None:
        keys = PoolKeys.generate("0" * 32, 1, SecretBytes(bytes(32)))
        self.replica = Replica(keys, 0, 1)
        self.replica._fresh_until = boot_time() + LEASE_SECONDS
        self.until = boot_time() + LEASE_SECONDS
        # The real one, without the threads that follow and write to a store.
        self.serving: Serving = object.__new__(Serving)
        self.serving.keys, self.serving.replica = keys, self.replica
        self.serving.committer = cast("Any", self)
        self.serving._loaded = LoadedKeyCache(8)

    def do(self, command: Command) -> Any:
        """Decide and apply a command; return the core's reply."""
        outcome = lifecycle.apply(command, Overlay(self.replica.state))
        self.replica.state.apply(outcome.changes)
        return outcome.reply

    def submit(self, mutation: Mutation, until: float) -> bytes:
        """Stand for the committer."""
        del until
        return mutation.encode_reply(self.do(mutation.command))

    def hold(
        self,
        key_id: str,
        made: KeyMaterial,
        operations: tuple[KeyOperation, ...],
        release_policy: KeyReleasePolicy | None = None,
    ) -> KeyVersionRecord:
        """Keep a key with this material; return its version."""
        kind = {"key_type": made.key_type, "curve": made.curve, "size_bits": made.size_bits}
        command = create(
            key_id,
            1,
            **kind,
            public_key_der=made.public_key_der,
            sealed_material=seal_material(
                self.serving.keys,
                key_id,
                f"{1:032x}",
                made.key_type,
                made.curve,
                made.size_bits,
                made.material,
            ),
            key_operations=operations,
            release_policy=release_policy,
        )
        version: KeyVersionRecord = self.do(command).version
        return version

    def give(self, principal: str, role: str, scope: str) -> None:
        """Give somebody a role."""
        self.do(CreateRoleAssignment(RoleAssignment(str(uuid.uuid4()), principal, GUIDS[role], scope)))


def called_by(monkeypatch: pytest.MonkeyPatch, principal: str, method: str) -> None:
    """Make this thread serve a call, as if it had come through the gate."""
    caller = Caller(f"spiffe://{'0' * 32}/{principal}", Kind.CLIENT, principals=(principal,))
    monkeypatch.setattr(interceptors._call, "caller", caller, raising=False)
    monkeypatch.setattr(interceptors._call, "rule", authorize(caller, method), raising=False)
