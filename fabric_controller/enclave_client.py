"""Client of the enclave interface: the only module that knows its messages (G5).

A partition is trusted as little as the partition trusts the controller: replies are
bounded, unknown fields are dropped, values outside the contract refuse the whole
reply, and of an error nothing but the name of its code is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fabric_controller.observe import Failure, Observation, State, Status
from fabric_controller.settings import FabricSettings
from fabric_controller.work import FIRMWARE_VERSION_MAX, INCARNATION_MAX, OPEN_CODES, Verb
from mhsm.enclave.v1 import enclave_pb2, enclave_pb2_grpc

CALL_SECONDS: Final = 2.0
"""Deadline of a look at a partition."""

COMMAND_SECONDS: Final = 10.0
"""Deadline of a command."""

MESSAGE_BYTES_MAX: Final = 256
"""Bytes of one message; the largest legal reply has about 30."""

METADATA_BYTES_MAX: Final = 4096
"""Bytes of all headers or trailers of one call."""

REPLY_REFUSED: Final = "REPLY_REFUSED"
"""Code of a reply that does not keep the contract; all other codes are gRPC's."""

_CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
    # A repeat is the loop's or the administrator's decision; a proxy would see the traffic.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    # A restarted partition is seen within about one round.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # This also bounds how long a TLS handshake may take: not too short for a busy machine.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class EnclaveError(Exception):
    """A call failed or its reply was refused. ``code`` is all that is known."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code

    @property
    def outcome_open(self) -> bool:
        """Whether a command may have been obeyed all the same."""
        return self.code in OPEN_CODES


class EnclaveClient:
    """One mutually authenticated channel a partition. Close it, or use it as a context manager."""

    def __init__(self, settings: FabricSettings) -> None:
        """Open the channels; connecting happens with the first call.

        Raises:
            OSError: A file of the identity cannot be read.
        """
        identity = settings.identity
        credentials = grpc.ssl_channel_credentials(
            root_certificates=Path(identity.ca_file).read_bytes(),
            private_key=Path(identity.key_file).read_bytes(),
            certificate_chain=Path(identity.certificate_file).read_bytes(),
        )
        self._channels = {
            partition.index: grpc.secure_channel(
                partition.enclave_endpoint,
                credentials,
                # A command does not say whom it is for, so whoever answers must have that one's certificate.
                options=(
                    *_CHANNEL_OPTIONS,
                    ("grpc.ssl_target_name_override", f"partition-{partition.index}.{settings.pool_id}"),
                ),
            )
            for partition in settings.partitions
        }
        self._stubs: Mapping[int, enclave_pb2_grpc.EnclaveServiceStub] = {
            index: enclave_pb2_grpc.EnclaveServiceStub(channel) for index, channel in self._channels.items()
        }
        self._health_stubs: Mapping[int, Any] = {
            index: health_pb2_grpc.HealthStub(channel) for index, channel in self._channels.items()
        }
        # A blocking call in a thread of ours, not a future of gRPC: those are driven by a thread that the
        # interpreter drops as it ends, maybe while it holds a lock that the rest of the end waits for.
        self._threads = ThreadPoolExecutor(2 * len(self._channels))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all channels; calls under way end."""
        for channel in self._channels.values():
            channel.close()
        self._threads.shutdown()

    def get_status_of_all(self) -> dict[int, Observation]:
        """Ask all partitions at once; takes at most one deadline. Never raises for a partition."""
        # All calls are started before the first is waited for: three silent partitions cost 2 s, not 6.
        calls = {
            index: self._threads.submit(_reply, stub.GetStatus, enclave_pb2.GetStatusRequest(), CALL_SECONDS)
            for index, stub in self._stubs.items()
        }
        checks = {
            index: self._threads.submit(_reply, stub.Check, health_pb2.HealthCheckRequest(), CALL_SECONDS)
            for index, stub in self._health_stubs.items()
        }
        observations: dict[int, Observation] = {}
        for index, call in calls.items():
            try:
                observations[index] = self._status(call.result(), healthy=_is_healthy(checks[index]))
            except EnclaveError as error:
                observations[index] = Failure(error.code)
        return observations

    def command(
        self, verb: Verb, index: int, counter: int, expires_ms: int, argument: int | None = None
    ) -> State:
        """Send a command to a partition and return its state afterwards.

        Args:
            verb: What to do.
            index: The partition.
            counter: Above that of every command before.
            expires_ms: When the command is void, Unix milliseconds.
            argument: The partition to be replaced, for HEAL; the version, for STAGE and ACTIVATE.

        Raises:
            EnclaveError: Refused (FAILED_PRECONDITION: fewer than two would serve; ABORTED: the
                counter is not the highest), or not answered.
        """
        stub = self._stubs[index]
        stamp: dict[str, int] = {"counter": counter, "expires_ms": expires_ms}
        number = argument or 0
        method: Callable[..., Any]
        request: Any
        match verb:
            case Verb.DRAIN:
                method, request = stub.Drain, enclave_pb2.DrainRequest(**stamp)
            case Verb.RESUME:
                method, request = stub.Resume, enclave_pb2.ResumeRequest(**stamp)
            case Verb.RELINQUISH:
                method, request = stub.Relinquish, enclave_pb2.RelinquishRequest(**stamp)
            case Verb.RESTART:
                method, request = stub.Restart, enclave_pb2.RestartRequest(**stamp)
            case Verb.HEAL:
                method, request = stub.Heal, enclave_pb2.HealRequest(**stamp, index=number)
            case Verb.STAGE:
                method, request = (
                    stub.StageFirmware,
                    enclave_pb2.StageFirmwareRequest(**stamp, version=number),
                )
            case Verb.ACTIVATE:
                method, request = (
                    stub.ActivateFirmware,
                    enclave_pb2.ActivateFirmwareRequest(**stamp, version=number),
                )
        return _state(_reply(method, request, COMMAND_SECONDS).state)

    def _status(self, reply: enclave_pb2.GetStatusResponse, *, healthy: bool) -> Status:
        if reply.serving_count > len(self._stubs) or reply.incarnation > INCARNATION_MAX:
            raise EnclaveError(REPLY_REFUSED)
        if reply.firmware_version > FIRMWARE_VERSION_MAX:
            raise EnclaveError(REPLY_REFUSED)
        state = _state(reply.state)
        return Status(
            State.REPLACED if reply.replaced and state is State.DRAINED else state,
            reply.fresh,
            reply.applied_sequence,
            reply.serving_count,
            reply.incarnation,
            reply.housekeeper,
            healthy,
            reply.firmware_version,
        )


def _is_healthy(check: Future[Any]) -> bool:
    try:
        return bool(check.result().status == health_pb2.HealthCheckResponse.SERVING)
    except EnclaveError:
        return False


def _reply(method: Callable[..., Any], request: Any, seconds: float) -> Any:
    """Call and return the reply; raises EnclaveError."""
    try:
        reply, code = method(request, timeout=seconds), None
    except grpc.RpcError as error:
        reply, code = None, _code_name(error)
    if code is not None:
        # Raised outside the handler: the gRPC error with its details and trailers is not kept as context.
        raise EnclaveError(code)
    reply.DiscardUnknownFields()
    return reply


def _code_name(error: grpc.RpcError) -> str:
    read_code: Callable[[], object] | None = getattr(error, "code", None)
    code = read_code() if callable(read_code) else None
    return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"


def _state(number: enclave_pb2.PartitionState.ValueType) -> State:
    # proto3 enums are open: a number outside the contract arrives unhindered.
    try:
        return State(enclave_pb2.PartitionState.Name(number).removeprefix("PARTITION_STATE_"))
    except ValueError:
        pass
    raise EnclaveError(REPLY_REFUSED)
