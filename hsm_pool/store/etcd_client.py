"""A thin etcd client: transactions that are never retried, one ordered watch, bulk reads.

It trusts etcd for two things only: a committed transaction stays committed, and one
watch delivers every revision in order. It never uses etcd leases, progress
notifications or reads to decide anything (see docs/architecture.md, "Store").
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from hsm_pool.settings import StoreSettings
from mhsm.etcd.v3 import rpc_pb2, rpc_pb2_grpc

CALL_SECONDS = 1.0
"""Deadline of one call; its outcome is ambiguous when it passes."""

_MEMBER_SECONDS = 5.0
"""Deadline of a change of the members."""

_COMPACTION_SECONDS = 5.0
"""Deadline of a compaction; it goes on in the store when that passes."""

_DEFRAGMENT_SECONDS = 120.0
"""Deadline of a defragmentation: a member writes all it holds anew."""

_STOP_POLL_SECONDS = 0.2
"""How soon a wait for a defragmentation ends when the partition stops."""

_AVOID_SECONDS = 2.0
"""How long an endpoint that failed is tried last; doubled with each failure in a row, up to 32 s."""

_PAGE_RECORDS = 500
"""Records of one bulk read."""

_CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # This also bounds how long a TLS handshake may take: not too short for a busy machine.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 300),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)


class Ambiguous(Exception):
    """The call may or may not have taken effect."""


class Compacted(Exception):
    """The watch asked for a revision that is compacted away: load everything anew."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A transaction took effect at a revision; read holds the value of the key that was read along."""

    revision: int
    read: bytes | None = None


@dataclass(frozen=True, slots=True)
class Conflict:
    """The comparison failed; nothing was changed."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key of the store, without the pool's prefix; value None stands for a deletion."""

    key: str
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Revision:
    """Everything one transaction changed, in the order of the watch."""

    revision: int
    changes: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """What a member says of itself."""

    size_bytes: int
    """Of its file."""
    in_use_bytes: int
    """Without what is free in it."""
    alarm: bool
    """Whether any member met its quota, so that none takes a write until the alarm is disarmed."""


@dataclass(slots=True)
class _Endpoint:
    address: str
    channel: grpc.Channel
    kv: rpc_pb2_grpc.KVStub
    watch: rpc_pb2_grpc.WatchStub
    maintenance: rpc_pb2_grpc.MaintenanceStub
    cluster: rpc_pb2_grpc.ClusterStub
    avoid_until: float = float("-inf")
    failures: int = 0


class EtcdClient:
    """A client of one pool's keys. Thread-safe; call :meth:`close` when done."""

    def __init__(self, settings: StoreSettings) -> None:
        identity = settings.identity
        credentials = grpc.ssl_channel_credentials(
            root_certificates=Path(identity.ca_file).read_bytes(),
            private_key=Path(identity.key_file).read_bytes(),
            certificate_chain=Path(identity.certificate_file).read_bytes(),
        )
        self._prefix = settings.prefix
        self._endpoints = [self._open(address, credentials) for address in settings.endpoints]
        self._lock = threading.Lock()
        self._watched = self._endpoints[0]

    @staticmethod
    def _open(address: str, credentials: grpc.ChannelCredentials) -> _Endpoint:
        channel = grpc.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        return _Endpoint(
            address,
            channel,
            rpc_pb2_grpc.KVStub(channel),
            rpc_pb2_grpc.WatchStub(channel),
            rpc_pb2_grpc.MaintenanceStub(channel),
            rpc_pb2_grpc.ClusterStub(channel),
        )

    @property
    def endpoint_count(self) -> int:
        """How many endpoints there are."""
        return len(self._endpoints)

    def close(self) -> None:
        """Close all channels; calls under way fail."""
        for endpoint in self._endpoints:
            endpoint.channel.close()

    def transact(
        self,
        compare_key: str | None,
        compare_value: bytes | None,
        puts: Mapping[str, bytes],
        deletes: Sequence[str] = (),
        read_key: str | None = None,
    ) -> Committed | Conflict:
        """Commit one transaction, once.

        Args:
            compare_key: Key that must hold compare_value (None: must not exist); None compares nothing.
            compare_value: See compare_key.
            puts: Values by key.
            deletes: Keys to delete.
            read_key: A key to read in the same transaction.

        Raises:
            Ambiguous: No answer; the transaction may have been committed.
        """
        request = rpc_pb2.TxnRequest()
        if compare_key is not None:
            comparison = request.compare.add(key=self._key(compare_key))
            if compare_value is None:
                comparison.target = rpc_pb2.Compare.CREATE
                comparison.create_revision = 0
            else:
                comparison.target = rpc_pb2.Compare.VALUE
                comparison.value = compare_value
        for key, value in puts.items():
            request.success.add(request_put=rpc_pb2.PutRequest(key=self._key(key), value=value))
        for key in deletes:
            request.success.add(request_delete_range=rpc_pb2.DeleteRangeRequest(key=self._key(key)))
        if read_key is not None:
            request.success.add(request_range=rpc_pb2.RangeRequest(key=self._key(read_key)))
        endpoint = self._best()
        try:
            response = endpoint.kv.Txn(request, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            self._failed(endpoint)
            raise Ambiguous(_code(error)) from None
        endpoint.failures = 0
        if not response.succeeded:
            return Conflict()
        read = None
        if read_key is not None:
            found = response.responses[-1].response_range.kvs
            read = found[0].value if found else None
        return Committed(response.header.revision, read)

    def get(self, key: str) -> bytes | None:
        """Read one key. The result is not to be taken as fresh.

        Raises:
            Ambiguous: The store was not reached.
        """
        endpoint = self._best()
        try:
            response = endpoint.kv.Range(rpc_pb2.RangeRequest(key=self._key(key)), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            self._failed(endpoint)
            raise Ambiguous(_code(error)) from None
        return response.kvs[0].value if response.kvs else None

    def load(self) -> tuple[int, dict[str, bytes]]:
        """Read all keys of the pool at one revision. The result is not to be taken as fresh.

        Raises:
            Ambiguous: The store was not reached.
        """
        endpoint = self._best()
        found: dict[str, bytes] = {}
        start, revision = self._key(""), 0
        end = _after_prefix(self._key(""))
        try:
            while True:
                response = endpoint.kv.Range(
                    rpc_pb2.RangeRequest(key=start, range_end=end, limit=_PAGE_RECORDS, revision=revision),
                    timeout=5 * CALL_SECONDS,
                )
                revision = revision or response.header.revision
                for kv in response.kvs:
                    found[_text(kv.key)[len(self._prefix) :]] = kv.value
                if not response.more:
                    return revision, found
                start = response.kvs[-1].key + b"\x00"
        except grpc.RpcError as error:
            self._failed(endpoint)
            raise Ambiguous(_code(error)) from None

    def watch(self, start_revision: int, stop: threading.Event) -> Iterator[Revision | None]:
        """Yield every revision from start_revision on, in order, through one endpoint.

        The first item is None: it says that the watch is established.

        Raises:
            Ambiguous: The stream broke; watch again from the last delivered revision + 1.
            Compacted: start_revision is compacted away.
        """
        endpoint = self._watched = self._best()
        requests = _OneRequest(
            rpc_pb2.WatchRequest(
                create_request=rpc_pb2.WatchCreateRequest(
                    key=self._key(""),
                    range_end=_after_prefix(self._key("")),
                    start_revision=start_revision,
                )
            )
        )
        call = endpoint.watch.Watch(iter(requests))
        watcher = threading.Thread(
            target=lambda: (stop.wait(), call.cancel()), name="watch-cancel", daemon=True
        )
        watcher.start()
        try:
            for response in call:
                if response.compact_revision:
                    raise Compacted
                if response.canceled:
                    raise Ambiguous("the watch was cancelled")
                if response.created:
                    yield None
                yield from self._revisions(response.events)
        except grpc.RpcError as error:
            if not stop.is_set():
                self._failed(endpoint)
            raise Ambiguous(_code(error)) from None
        finally:
            requests.end()
            call.cancel()
            stop.set()
            watcher.join()
        raise Ambiguous("the watch ended")

    def compact(self, revision: int) -> None:
        """Forget what lies before a revision, and wait until its room is free.

        Raises:
            Ambiguous: It may or may not have been done; a later one makes up for it.
        """
        endpoint = self._best()
        request = rpc_pb2.CompactionRequest(revision=revision, physical=True)
        try:
            endpoint.kv.Compact(request, timeout=_COMPACTION_SECONDS)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.OUT_OF_RANGE:
                raise Ambiguous(_code(error)) from None

    def member_status(self, number: int) -> MemberStatus:
        """Return how full a member is.

        Args:
            number: Of its endpoint; 0 is the member beside the partition.

        Raises:
            Ambiguous: It does not answer.
        """
        try:
            answer = self._endpoints[number].maintenance.Status(rpc_pb2.StatusRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise Ambiguous(_code(error)) from None
        alarm = any(rpc_pb2.AlarmType.Name(rpc_pb2.NOSPACE) in text for text in answer.errors)
        return MemberStatus(answer.db_size, answer.db_size_in_use, alarm)

    def defragment(self, number: int, stop: threading.Event) -> None:
        """Have a member write its file anew without what is free in it; it answers nothing meanwhile.

        Args:
            number: Of its endpoint.
            stop: Ends the wait.

        Raises:
            Ambiguous: It was not done, or it is not known.
        """
        maintenance = self._endpoints[number].maintenance
        call = maintenance.Defragment.future(rpc_pb2.DefragmentRequest(), timeout=_DEFRAGMENT_SECONDS)
        while True:
            try:
                call.result(timeout=_STOP_POLL_SECONDS)
                return
            except grpc.FutureTimeoutError:
                if stop.is_set():
                    call.cancel()
                    raise Ambiguous("the partition stops") from None
            except (grpc.RpcError, grpc.FutureCancelledError):
                raise Ambiguous("a member was not defragmented") from None

    def disarm(self) -> None:
        """End the alarm that a member met its quota; the next write raises it again if that is still so.

        Raises:
            Ambiguous: It may or may not have been done.
        """
        maintenance = self._best().maintenance
        try:
            raised = maintenance.Alarm(
                rpc_pb2.AlarmRequest(action=rpc_pb2.AlarmRequest.GET, alarm=rpc_pb2.NOSPACE),
                timeout=CALL_SECONDS,
            )
            for member in raised.alarms:
                if member.alarm == rpc_pb2.NOSPACE:
                    request = rpc_pb2.AlarmRequest(
                        action=rpc_pb2.AlarmRequest.DEACTIVATE, member_id=member.member_id, alarm=member.alarm
                    )
                    maintenance.Alarm(request, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise Ambiguous(_code(error)) from None

    def members(self) -> dict[str, int]:
        """Return the ids of the store's members by their peer URL. Not to be taken as fresh.

        Raises:
            Ambiguous: The store was not reached.
        """
        endpoint = self._best()
        try:
            response = endpoint.cluster.MemberList(rpc_pb2.MemberListRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            self._failed(endpoint)
            raise Ambiguous(_code(error)) from None
        return {url: member.ID for member in response.members for url in member.peerURLs}

    def replace_member(self, member_id: int, peer_url: str) -> None:
        """Make the members be those without this id, and with a new one at this peer URL.

        It may be repeated: whatever was done before is not done again.

        Raises:
            Ambiguous: It may or may not have been done, or the store does not take it now.
        """
        endpoint = self._best()
        try:
            if member_id and member_id in self.members().values():
                request = rpc_pb2.MemberRemoveRequest(ID=member_id)
                endpoint.cluster.MemberRemove(request, timeout=_MEMBER_SECONDS)
            if peer_url not in self.members():
                endpoint.cluster.MemberAdd(
                    rpc_pb2.MemberAddRequest(peerURLs=[peer_url]), timeout=_MEMBER_SECONDS
                )
        except grpc.RpcError as error:
            raise Ambiguous(_code(error)) from None
        # The list of one member may lag: what is not seen to be done is not done.
        if self.members().get(peer_url) in {None, member_id}:
            raise Ambiguous("the members were not changed yet")

    def version(self) -> str:
        """Return the version of the first reachable member, "" when none is."""
        endpoint = self._best()
        try:
            return str(endpoint.maintenance.Status(rpc_pb2.StatusRequest(), timeout=CALL_SECONDS).version)
        except grpc.RpcError:
            self._failed(endpoint)
            return ""

    def watch_stalled(self) -> None:
        """Say that the watched endpoint is stuck: the next calls go elsewhere first."""
        self._failed(self._watched)

    def _best(self) -> _Endpoint:
        now = time.monotonic()
        with self._lock:
            for endpoint in self._endpoints:
                if now >= endpoint.avoid_until:
                    return endpoint
            return min(self._endpoints, key=lambda endpoint: endpoint.avoid_until)

    def _failed(self, endpoint: _Endpoint) -> None:
        with self._lock:
            endpoint.failures = min(endpoint.failures + 1, 5)
            endpoint.avoid_until = time.monotonic() + _AVOID_SECONDS * 2 ** (endpoint.failures - 1)

    def _key(self, key: str) -> bytes:
        return (self._prefix + key).encode()

    def _revisions(self, events: Sequence[rpc_pb2.Event]) -> Iterator[Revision]:
        revision, changes = 0, list[KeyValue]()
        for event in events:
            if event.kv.mod_revision != revision and changes:
                yield Revision(revision, tuple(changes))
                changes = []
            revision = event.kv.mod_revision
            deleted = event.type == rpc_pb2.Event.DELETE
            key = _text(event.kv.key)[len(self._prefix) :]
            changes.append(KeyValue(key, None if deleted else event.kv.value))
        if changes:
            yield Revision(revision, tuple(changes))


class _OneRequest:
    """A request stream of one message that stays open until it is ended."""

    def __init__(self, request: rpc_pb2.WatchRequest) -> None:
        self._request = request
        self._ended = threading.Event()

    def __iter__(self) -> Iterator[rpc_pb2.WatchRequest]:
        yield self._request
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()


def _text(key: bytes) -> str:
    """Return a key as text; a foreign key that is no UTF-8 must not end the thread that reads it."""
    return key.decode(errors="replace")


def _after_prefix(prefix: bytes) -> bytes:
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _code(error: grpc.RpcError) -> str:
    return str(error.code().name)
