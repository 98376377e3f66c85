"""The enclave interface: all that the fabric controller may ask; the partition decides (G5)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import grpc
import structlog

from hsm_pool.audit import record
from hsm_pool.core.commands import (
    ActivateFirmware,
    Command,
    DrainPartition,
    RelinquishHousekeeping,
    RestartPartition,
    ResumePartition,
)
from hsm_pool.errors import InvalidField, Overloaded, PartitionReplaced, PartitionStarting
from hsm_pool.firmware.running import running
from hsm_pool.net.calls import deadline
from hsm_pool.partition.admissions import admit
from hsm_pool.partition.command_counter import CommandCounter
from hsm_pool.partition.partition import Partition
from hsm_pool.partition.serving import Serving
from hsm_pool.store.committer import Mutation
from mhsm.enclave.v1 import enclave_pb2, enclave_pb2_grpc

_log = structlog.get_logger()


class _Stamped(Protocol):
    """A command: what every request but that of GetStatus carries."""

    @property
    def counter(self) -> int:
        """Counter of the issuer."""

    @property
    def expires_ms(self) -> int:
        """When it is void, Unix milliseconds."""


class EnclaveService(enclave_pb2_grpc.EnclaveServiceServicer):
    """The verbs of the controller; one command at a time, and none after a restart.

    Otherwise a partition could be resumed, and counted as serving, while it already ends.
    """

    def __init__(self, partition: Partition, counter: CommandCounter) -> None:
        self._partition = partition
        self._counter = counter
        self._index = partition.settings.index
        self._command = threading.Lock()
        self._ending = False

    def GetStatus(  # noqa: N802, D102
        self,
        request: enclave_pb2.GetStatusRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> enclave_pb2.GetStatusResponse:
        response = enclave_pb2.GetStatusResponse(
            state=self._state(),
            incarnation=self._partition.state_directory.incarnation,
            firmware_version=running().version,
        )
        serving = self._partition.holding_keys()
        if serving:
            response.fresh = serving.replica.lease_remaining() > 0
            response.applied_sequence = serving.replica.head.sequence
            response.serving_count = len(serving.replica.serving())
            response.housekeeper = response.fresh and serving.replica.is_housekeeper()
            response.replaced = self._index in serving.replica.half_replaced()
        return response

    def Drain(  # noqa: N802, D102
        self, request: enclave_pb2.DrainRequest, context: grpc.ServicerContext
    ) -> enclave_pb2.DrainResponse:
        with self._accepted("Drain", request) as serving:
            if not serving.replica.drained:
                self._commit(serving, DrainPartition(self._index, serving.replica.await_serving()), context)
        return enclave_pb2.DrainResponse(state=self._state())

    def Resume(  # noqa: N802, D102
        self, request: enclave_pb2.ResumeRequest, context: grpc.ServicerContext
    ) -> enclave_pb2.ResumeResponse:
        with self._accepted("Resume", request) as serving:
            if self._index in serving.replica.half_replaced():
                # It follows the chain no more, perhaps, and cannot decide: but what was admitted stays so.
                raise PartitionReplaced("a new partition was admitted in place of this one")
            if serving.replica.drained:
                incarnation = self._partition.state_directory.incarnation
                self._commit(serving, ResumePartition(self._index, incarnation), context)
        return enclave_pb2.ResumeResponse(state=self._state())

    def Relinquish(  # noqa: N802, D102
        self, request: enclave_pb2.RelinquishRequest, context: grpc.ServicerContext
    ) -> enclave_pb2.RelinquishResponse:
        with self._accepted("Relinquish", request) as serving:
            self._commit(
                serving, RelinquishHousekeeping(self._index, serving.replica.await_serving()), context
            )
        return enclave_pb2.RelinquishResponse(state=self._state())

    def Restart(  # noqa: N802, D102
        self, request: enclave_pb2.RestartRequest, context: grpc.ServicerContext
    ) -> enclave_pb2.RestartResponse:
        with self._accepted("Restart", request) as serving:
            self._commit(serving, RestartPartition(self._index, serving.replica.await_serving()), context)
            self._ending = True
            state = self._state()
            # An orderly end: the servers wait for this very answer; the node agent starts a new process.
            os.kill(os.getpid(), signal.SIGTERM)
        return enclave_pb2.RestartResponse(state=state)

    def Heal(  # noqa: N802, D102
        self, request: enclave_pb2.HealRequest, context: grpc.ServicerContext
    ) -> enclave_pb2.HealResponse:
        with self._accepted("Heal", request):
            serving = self._partition.serving()
            if request.index == self._index:
                raise InvalidField("a partition is not replaced by itself", field="index")
            urls = self._partition.settings.store.member_peer_urls
            admit(serving, self._partition.store, urls, request.index, deadline(context))
        return enclave_pb2.HealResponse(state=self._state())

    def StageFirmware(  # noqa: N802, D102
        self,
        request: enclave_pb2.StageFirmwareRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> enclave_pb2.StageFirmwareResponse:
        record.note(firmware_version=request.version)
        with self._accepted("StageFirmware", request) as serving:
            floor = serving.replica.state.pool().security_version_floor
            self._partition.firmware.stage(request.version, floor)
        return enclave_pb2.StageFirmwareResponse(state=self._state())

    def ActivateFirmware(  # noqa: N802, D102
        self, request: enclave_pb2.ActivateFirmwareRequest, context: grpc.ServicerContext
    ) -> enclave_pb2.ActivateFirmwareResponse:
        record.note(firmware_version=request.version)
        with self._accepted("ActivateFirmware", request) as serving:
            firmware = self._partition.firmware
            security_version = firmware.security_version_of(request.version)
            self._commit(serving, ActivateFirmware(self._index, security_version), context)
            firmware.activate(request.version)
        return enclave_pb2.ActivateFirmwareResponse(state=self._state())

    @contextmanager
    def _accepted(self, verb: str, command: _Stamped) -> Iterator[Serving]:
        """Take a command's counter for good, and give what serves, drained or not.

        Raises:
            CommandStale: It is a repeat, too old, or void.
            Overloaded: Another command is being obeyed.
            MHSMError: This partition does not hold the keys, or is ending.
        """
        serving = self._partition.holding_keys()
        now_ms = serving.now_ms() if serving else time.time_ns() // 1_000_000
        self._counter.accept(command.counter, command.expires_ms, now_ms)
        _log.info("command", verb=verb, counter=command.counter)
        if not self._command.acquire(blocking=False):
            raise Overloaded("another command is being obeyed")
        try:
            if self._ending:
                raise PartitionStarting("this partition is restarting")
            if serving is None:
                raise self._partition.refusal()
            yield serving
        finally:
            self._command.release()

    def _commit(self, serving: Serving, command: Command, context: grpc.ServicerContext) -> None:
        serving.committer.submit(Mutation(command, None, lambda _: b"", None, b"", 0), deadline(context))

    def _state(self) -> enclave_pb2.PartitionState.ValueType:
        return enclave_pb2.PartitionState.ValueType(self._partition.state.value)
