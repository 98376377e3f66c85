"""The states of a partition, from provisioned to serving.

::

    STARTING ─► PROVISIONED ──activation──► SERVING ◄─► DRAINED
        │            │ (another partition activated)  ▲
        └────────────┴──► HEALING ◄─► LOCKED ──quorum─┘      any ──► QUARANTINED

HEALING looks for the keys with the platform seal (if the pool has one) and with each
peer; LOCKED says that no peer gives them either: none has them, so that a quorum must
unlock the pool, or those that have them refuse this partition. The reason says which.
"""

from __future__ import annotations

import threading
from enum import Enum
from pathlib import Path
from typing import Protocol

import structlog

from hsm_pool.audit.record import Operation, current
from hsm_pool.audit.trail import AuditTrail
from hsm_pool.audit.witness import CosignPeer
from hsm_pool.core.commands import ReportSecurityVersion
from hsm_pool.core.model import (
    CheckpointRecord,
    PoolRecord,
    checkpoint_name,
)
from hsm_pool.crypto.key_generation import KeyGenerator
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.enclave.evidence import Attester
from hsm_pool.enclave.healing import HealGiver
from hsm_pool.enclave.verifier import TrustAnchors, Verifier
from hsm_pool.errors import (
    DISK_IS_EMPTY,
    DOWNLOADED_OVER_REST,
    AlreadyActivated,
    CommitUnknown,
    EvidenceRefused,
    FirmwareRefused,
    MHSMError,
    NotActivated,
    PartitionDrained,
    PartitionQuarantined,
    PartitionStarting,
    PoolLocked,
)
from hsm_pool.partition.activation import first_transaction
from hsm_pool.partition.firmware import PartitionFirmware
from hsm_pool.partition.serving import Serving
from hsm_pool.settings import PartitionSettings
from hsm_pool.store import chain
from hsm_pool.store.etcd_client import Ambiguous, Conflict, EtcdClient
from hsm_pool.store.replica import boot_time
from hsm_pool.store.sealing import PoolKeys, Tampered
from hsm_pool.store.state_file import StateDirectory
from mhsm.record.v1 import record_pb2
from security_domain import container

_log = structlog.get_logger()
_POLL_SECONDS = 0.3
_ACTIVATION_TRIES = 10
_HEALING_SECONDS = 2.0
"""How long peers are asked before the pool is called locked; it goes on being healed afterwards."""
_REPLACED = "a new partition was admitted in place of this one, which serves no more"
_NOBODY_HOLDS_KEYS = "no partition holds the pool's keys: a quorum must unlock it"
_REFUSED = (
    "the partitions that hold the pool's keys refuse this one's evidence, or it theirs: was code or policy "
    "changed while the pool ran?"
)


class PartitionState(Enum):
    """State of a partition; numbers as in mhsm.enclave.v1.PartitionState."""

    STARTING = 1
    PROVISIONED = 2
    HEALING = 3
    LOCKED = 4
    SERVING = 5
    DRAINED = 6
    QUARANTINED = 7


class PeerUnlocked(Protocol):
    """Asks the peers for the pool's keys."""

    def __call__(self, attester: Attester, verifier: Verifier, epoch: int = 0) -> PoolKeys | None:
        """Return the keys from the first peer that gives them, None when no peer does.

        Args:
            attester: Makes this partition's evidence.
            verifier: Verifies the peer's.
            epoch: Keys without this epoch are not what is wanted; 0 for any.

        Raises:
            EvidenceRefused: A peer has them, and this partition's evidence or the peer's was refused.
        """


class Partition:
    """One partition of a pool. Thread-safe; :meth:`close` ends it."""

    def __init__(
        self, settings: PartitionSettings, heal_from_peers: PeerUnlocked, cosign_peer: CosignPeer
    ) -> None:
        self.settings = settings
        self.state_directory = StateDirectory(Path(settings.data_directory))
        self.attester = Attester(settings, self.state_directory.incarnation)
        anchors = TrustAnchors.load(
            settings.platform.root_certificate_file, settings.owner.root_certificate_file
        )
        self.firmware = PartitionFirmware(settings, anchors)
        self.verifier = self.firmware.verifier
        self.audit = AuditTrail(
            settings, self.state_directory.incarnation, self.attester, anchors.owner_root, cosign_peer
        )
        self.store = EtcdClient(settings.store)
        self.heal_giver = HealGiver(self.attester, self.verifier, settings.pool_id)
        self.key_generator = KeyGenerator()
        self.recovery_path = ""
        self.header: record_pb2.PoolHeader | None = None
        self._heal_from_peers = heal_from_peers
        self._state = PartitionState.STARTING
        self._reason = ""
        self._serving: Serving | None = None
        self._healing_since: float | None = None
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="partition", daemon=True)

    def start(self) -> None:
        """Begin to look for the pool and its keys."""
        self.audit.start()
        self._thread.start()

    def close(self) -> None:
        """Stop everything and release the data directory."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._serving:
            self._serving.close()
        self.firmware.close()
        self.key_generator.close()
        self.store.close()
        self.audit.close()
        self.state_directory.close()

    # -- what the services ask -----------------------------------------------------------

    @property
    def state(self) -> PartitionState:
        """State now."""
        serving = self._serving
        if self._state is PartitionState.SERVING and self.unconfirmed:
            return PartitionState.PROVISIONED
        if self._state is PartitionState.SERVING and serving and serving.replica.drained:
            return PartitionState.DRAINED
        return self._state

    @property
    def unconfirmed(self) -> bool:
        """Whether the pool is not active because nobody polled the status of its download yet."""
        header = self.header
        return header is not None and header.unconfirmed

    @property
    def reason(self) -> str:
        """Why the state is what it is, in words; "" when there is nothing to say."""
        if self.state is PartitionState.PROVISIONED and self.unconfirmed:
            return DOWNLOADED_OVER_REST
        serving = self.holding_keys()
        if serving and self.settings.index in serving.replica.half_replaced():
            return _REPLACED
        return self._reason

    def holding_keys(self) -> Serving | None:
        """Return what serves, drained or not; None while the keys are not here."""
        return self._serving if self._state is PartitionState.SERVING else None

    def serving(self) -> Serving:
        """Return what serves.

        Raises:
            MHSMError: This partition does not serve; the error says why.
        """
        serving = self._serving
        if self.state is PartitionState.SERVING and serving:
            return serving
        raise self.refusal()

    def serving_or_unconfirmed(self) -> Serving:
        """Return what serves, or would if the pool's download were confirmed.

        Raises:
            MHSMError: There is nothing of the kind; the error says why.
        """
        serving = self._serving
        return (
            serving
            if self._state is PartitionState.SERVING and serving and self.unconfirmed
            else self.serving()
        )

    def refusal(self) -> MHSMError:
        """Return the typed error that says why this partition does not serve."""
        match self.state:
            case PartitionState.PROVISIONED if self.unconfirmed:
                return NotActivated(f"the pool is not active: {self.reason}")
            case PartitionState.PROVISIONED:
                return NotActivated("the pool is not active: download its security domain first")
            case PartitionState.LOCKED if self._reason == _NOBODY_HOLDS_KEYS:
                return PoolLocked("the pool is locked: a quorum of officers must unlock it")
            case PartitionState.LOCKED:
                return PoolLocked("this partition is locked: those that hold the pool's keys give it none")
            case PartitionState.QUARANTINED:
                return PartitionQuarantined(f"this partition is quarantined: {self._reason}")
            case PartitionState.DRAINED:
                return PartitionDrained("this partition is drained; another one serves")
            case _:
                return PartitionStarting("this partition is starting")

    def quarantine(self, reason: str) -> None:
        """Refuse to serve from now on (G6)."""
        with self._lock:
            self._state, self._reason = PartitionState.QUARANTINED, reason
            serving = self._serving
        if serving:
            serving.replica.stop()

    def noted_checkpoints(self) -> list[str]:
        """Return the checkpoints of audit logs that the chain has taken note of, as far as applied here."""
        serving = self._serving
        if serving is None:
            return []
        state = serving.replica.state
        found = [state.get(checkpoint_name(index)) for index in range(self.settings.partition_count)]
        return [record.checkpoint for record in found if isinstance(record, CheckpointRecord)]

    # -- life ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set() and self._serving is None:
            self._wake.clear()
            try:
                self._step()
            except Ambiguous:
                self._reason = "no store member answers"
                self.firmware.note_waiting()
            except Tampered as error:
                self.quarantine(str(error))
                return
            self._wake.wait(_POLL_SECONDS)

    def _step(self) -> None:
        """Look once for the pool's header and the keys."""
        if self.header is None:
            # Asked before the store: an activation that runs here meanwhile writes a head, too.
            known = self.state_directory.has_head()
            value = self.store.get(chain.HEADER_KEY)
            if value is None:
                if known:
                    raise Tampered("the store has lost the pool header")
                self._move(PartitionState.PROVISIONED, "the security domain was not downloaded yet")
                self.firmware.note_waiting()
                return
            self.header = self._parse_header(value)
        if self._state is not PartitionState.LOCKED:
            self._move(PartitionState.HEALING, "looking for a peer that holds the pool's keys")
        why = _NOBODY_HOLDS_KEYS
        try:
            keys, path = self._find_keys()
        except EvidenceRefused:
            keys, path = None, ""
            why = _REFUSED if self.state_directory.has_head() else DISK_IS_EMPTY
        if keys is None:
            if self._healing_since is None:
                self._healing_since = boot_time()
            # Peers that restart at the same time, or have just been activated, need a moment.
            if boot_time() - self._healing_since < _HEALING_SECONDS:
                return
            self._move(PartitionState.LOCKED, why)
            self.firmware.note_waiting()
        else:
            self.adopt(keys, path)

    def _find_keys(self) -> tuple[PoolKeys | None, str]:
        if self.settings.sealing == "platform":
            keys = self.state_directory.read_seal(self._sealing_key(), self.settings.pool_id)
            # Written before a rotation that this partition slept through: peers have more.
            if keys is not None and self.header and keys.holds(self.header.sealed_epoch.epoch):
                return keys, "seal"
        return self._heal_from_peers(self.attester, self.verifier), "peer"

    def follow_firmware(self, version: int) -> None:
        """Run what a peer runs that refused this partition, unless this one has the keys already."""
        if self._serving is None:
            self.firmware.follow(version)

    def hold_epoch(self, epoch: int) -> bool:
        """Get the key of a proposed epoch from a peer and keep it; return whether it is here now."""
        serving = self._serving
        if serving is None:
            return False
        if not serving.keys.holds(epoch):
            try:
                keys = self._heal_from_peers(self.attester, self.verifier, epoch)
            except EvidenceRefused:
                return False
            if keys is None:
                return False
            self.keep(keys)
        return True

    def _report_firmware(self, pool: PoolRecord, *, serves: bool) -> ReportSecurityVersion | None:
        """Return what the pool does not know of the firmware that runs here; below its floor, stop."""
        if not serves:
            if self.settings.index in pool.drained:
                self.firmware.note_waiting()
            return None
        self.firmware.note_serving()
        try:
            return self.firmware.report(pool)
        except FirmwareRefused as refused:
            self.quarantine(refused.message)
            return None

    def _check_loaded(self, pool: PoolRecord) -> None:
        """Stop before the first lease, if the pool's floor is above what runs here."""
        try:
            self.firmware.take_floor(pool)
        except FirmwareRefused as refused:
            self.quarantine(refused.message)

    def keep(self, keys: PoolKeys) -> None:
        """Add keys to those that serve, and to the platform's seal."""
        serving = self._serving
        assert serving is not None
        serving.keys.take(keys)
        if self.settings.sealing == "platform":
            self.state_directory.write_seal(self._sealing_key(), serving.keys)

    def adopt(self, keys: PoolKeys, path: str) -> None:
        """Take the pool's keys and begin to serve; a no-op when they are here already."""
        if self.settings.sealing == "platform" and path != "seal":
            self.state_directory.write_seal(self._sealing_key(), keys)
        with self._lock:
            if self._serving is not None or self._state is PartitionState.QUARANTINED:
                return
            self.recovery_path = path
            self._serving = Serving(
                self.store,
                self.settings.store,
                keys,
                self.settings.index,
                self.state_directory,
                self.quarantine,
                self._take_header,
                self._check_loaded,
                self.hold_epoch,
                self._report_firmware,
                self.audit,
                self.key_generator,
            )
            self._move(PartitionState.SERVING, "")
        self._wake.set()
        self.audit.note("PartitionServe", recoveryPath=path)
        _log.info("serving", recovery_path=path)

    def _move(self, state: PartitionState, reason: str) -> None:
        with self._lock:
            if self._state is PartitionState.QUARANTINED:
                return
            # Activation or a quorum brought the keys while this search was still under way.
            if self._serving is not None and state is not PartitionState.SERVING:
                return
            if state is not self._state:
                _log.info("state", state=state.name, reason=reason)
            self._state, self._reason = state, reason

    def _sealing_key(self) -> SecretBytes:
        return SecretBytes(Path(self.settings.platform.sealing_key_file).read_bytes())

    def _take_header(self, value: bytes) -> None:
        """Take the header that the chain names (its digest was checked)."""
        self.header = self._parse_header(value)

    def _parse_header(self, value: bytes) -> record_pb2.PoolHeader:
        try:
            header = record_pb2.PoolHeader.FromString(value)
            container.parse(header.security_domain_file)
        except Exception:  # noqa: BLE001 - the parsers' own errors
            raise Tampered("the pool header in the store is not readable") from None
        if header.pool_id != self.settings.pool_id:
            raise Tampered("the pool header in the store is of another pool")
        return header

    # -- activation ----------------------------------------------------------------------

    def activated_by(self, request_digest: bytes) -> record_pb2.PoolHeader | None:
        """Return the pool's header if this very request activated the pool before.

        Raises:
            AlreadyActivated: Another request did.
            StoreUnavailable: That cannot be told now.
        """
        header = self.stored_header()
        if header is None:
            return None
        if header.activation_request_digest != request_digest:
            raise AlreadyActivated("the pool is active already")
        return header

    def stored_header(self) -> record_pb2.PoolHeader | None:
        """Return the pool's header as it stands in the store, None when the pool has none.

        Raises:
            CommitUnknown: That cannot be told now.
            Tampered: It is not readable.
        """
        value = self._read_header()
        return None if value is None else self._parse_header(value)

    def _read_header(self) -> bytes | None:
        for _ in range(_ACTIVATION_TRIES):
            try:
                return self.store.get(chain.HEADER_KEY)
            except Ambiguous:
                if self._stopping.wait(_POLL_SECONDS):
                    break
        raise CommitUnknown("the store does not answer; repeat the request with the same request_id")

    def activate(self, header: record_pb2.PoolHeader, keys: PoolKeys) -> None:
        """Commit the first transaction of the chain together with the header.

        Args:
            header: The new header, with the security-domain file.
            keys: The pool keys that the header's epochs seal.

        Raises:
            AlreadyActivated: Another activation came first.
            CommitUnknown: The store gave no answer in time.
        """
        value = header.SerializeToString(deterministic=True)
        operation = current() or Operation("Activate", self.audit.identity, partition=self.settings.index)
        puts = {**first_transaction(self.settings, value, keys, operation).puts, chain.HEADER_KEY: value}
        # The comparison makes a repeat harmless: at most one header is ever committed.
        for _ in range(_ACTIVATION_TRIES):
            try:
                answer = self.store.transact(chain.HEADER_KEY, None, puts)
            except Ambiguous:
                continue
            if isinstance(answer, Conflict):
                committed = self._read_header()
                if committed != value:
                    raise AlreadyActivated("the pool is active already")
            operation.on_chain = True
            self.header = header
            self.adopt(keys, "activation")
            return
        raise CommitUnknown("the store gave no answer; repeat the request with the same request_id")
