"""Processes that offer batches of signatures to a pool: at their own pace, or at a fixed rate.

It is only load, on the machine that also serves it, so it must be cheap: requests are sent by libcurl
(gRPC over HTTP/2, PROTOCOL-HTTP2.md of gRPC), which takes half the processor
time of gRPC's own client in Python.
"""

from __future__ import annotations

import base64
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pycurl
from google.rpc import error_details_pb2, status_pb2

from benchmarks.bench_pool import PARTITIONS
from hsm_pool.client import calls
from hsm_pool.client.connection import load_connection
from mhsm.crypto.v1 import crypto_pb2

ITEMS = 32
"""Signatures of a batch."""
KEY = "benchmark-rsa-4096"

_CALL_SECONDS = 5
_WAITING_MAX = 4_000
"""Calls of one process that wait for their answers; more are not offered, and counted."""
_REFUSALS_PER_LOOK = 50
"""Of the delays that refusals ask for, one in so many is read."""
_OK, _RESOURCE_EXHAUSTED = b"0", b"8"
_WAIT_SECONDS = 0.02
_PAUSE_SECONDS = 0.005
"""Between two looks: answers that come meanwhile are read together."""


@dataclass(slots=True)
class Outcome:
    """What one process offered and got."""

    offered: int = 0
    not_offered: int = 0
    done: int = 0
    refused: int = 0
    failed: int = 0
    late: int = 0
    """Done after the measured time."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    retry_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Load:
    """What one process does: callers that wait for their answers, or a fixed rate of calls."""

    client: str
    seconds: float
    callers: int = 0
    """Of each partition."""
    calls_per_second: float = 0.0


class _Call:
    """One request that can be sent again and again, and what came of it last."""

    def __init__(self, url: str, files: dict[int, str], body: bytes) -> None:
        self.handle = handle = pycurl.Curl()
        self.began = 0.0
        self.status = b""
        self.details = b""
        handle.setopt(pycurl.URL, url)
        for option, file in files.items():
            handle.setopt(option, file)
        handle.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2TLS)
        handle.setopt(pycurl.PIPEWAIT, 1)
        handle.setopt(pycurl.NOSIGNAL, 1)
        handle.setopt(
            pycurl.HTTPHEADER,
            ["content-type: application/grpc", "te: trailers", f"grpc-timeout: {_CALL_SECONDS}S", "expect:"],
        )
        handle.setopt(pycurl.POSTFIELDS, body)
        handle.setopt(pycurl.TIMEOUT, 2 * _CALL_SECONDS)
        handle.setopt(pycurl.HEADERFUNCTION, self._header)
        handle.setopt(pycurl.WRITEFUNCTION, len)

    def _header(self, line: bytes) -> None:
        if line.startswith(b"grpc-status: "):
            self.status = line[13:].strip()
        elif line.startswith(b"grpc-status-details-bin: "):
            self.details = line[25:].strip()

    def retry_ms(self) -> float:
        """Return after how long the refusal asks to come back."""
        octets = self.details + b"=" * (-len(self.details) % 4)
        status = status_pb2.Status.FromString(base64.b64decode(octets))
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in status.details), unquote(status.message)
        return float(retry.retry_delay.ToMilliseconds())


class _Sender:
    """Sends calls over one connection to each partition, and notes their outcomes."""

    def __init__(self, directory: Path, client: str) -> None:
        connection = load_connection(directory)
        identity = connection.clients[client]
        self._files = {
            pycurl.CAINFO: connection.client_ca_file,
            pycurl.SSLCERT: identity.certificate_file,
            pycurl.SSLKEY: identity.key_file,
        }
        call = calls.sign_batch(f"keys/{KEY}", "RS256", [os.urandom(32) for _ in range(ITEMS)])
        octets = call.request.SerializeToString()
        self._body = b"\0" + len(octets).to_bytes(4, "big") + octets
        service = crypto_pb2.DESCRIPTOR.services_by_name["CryptoService"].full_name
        self._urls = [f"https://{entry.endpoint}/{service}/{call.method}" for entry in connection.partitions]
        self._idle: list[list[_Call]] = [[] for _ in self._urls]
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_PIPELINING, pycurl.PIPE_MULTIPLEX)
        self._multi.setopt(pycurl.M_MAX_HOST_CONNECTIONS, 1)
        self._under_way: dict[pycurl.Curl, tuple[int, _Call]] = {}
        self.outcome = Outcome()

    @property
    def waiting(self) -> int:
        """How many calls wait for their answers."""
        return len(self._under_way)

    def send(self, partition: int) -> None:
        """Begin a call."""
        idle = self._idle[partition]
        call = idle.pop() if idle else _Call(self._urls[partition], self._files, self._body)
        call.began, call.status = time.monotonic(), b""
        self.outcome.offered += 1
        self._under_way[call.handle] = partition, call
        self._multi.add_handle(call.handle)

    def work(self, answered: Callable[[int], None] = lambda _partition: None) -> None:
        """Send and receive what there is, wait a moment if there is nothing; hears of each answer."""
        self._multi.perform()
        left = 1
        while left:
            left, succeeded, failed = self._multi.info_read()
            for handle in (*succeeded, *(entry[0] for entry in failed)):
                partition, call = self._under_way.pop(handle)
                self._multi.remove_handle(handle)
                self._note(call)
                self._idle[partition].append(call)
                answered(partition)
        self._multi.select(_WAIT_SECONDS)
        time.sleep(_PAUSE_SECONDS)

    def _note(self, call: _Call) -> None:
        outcome = self.outcome
        if call.status == _OK:
            outcome.done += 1
            outcome.latencies_ms.append((time.monotonic() - call.began) * 1000)
        elif call.status == _RESOURCE_EXHAUSTED:
            outcome.refused += 1
            if outcome.refused % _REFUSALS_PER_LOOK == 1:
                outcome.retry_ms.append(call.retry_ms())
        else:
            outcome.failed += 1


def _closed(sender: _Sender, load: Load) -> None:
    end = time.monotonic() + load.seconds
    for partition in range(PARTITIONS):
        for _ in range(load.callers):
            sender.send(partition)

    def again(partition: int) -> None:
        if time.monotonic() < end:
            sender.send(partition)

    while sender.waiting:
        sender.work(again)


def _open(sender: _Sender, load: Load) -> None:
    outcome, number = sender.outcome, 0
    began = time.monotonic()
    while (now := time.monotonic()) < began + load.seconds:
        due = int((now - began) * load.calls_per_second)
        while number < due:
            number += 1
            if sender.waiting < _WAITING_MAX:
                sender.send(number % PARTITIONS)
            else:
                outcome.not_offered += 1
        sender.work()
    done_in_time, outcome.seconds = outcome.done, time.monotonic() - began
    while sender.waiting:
        sender.work()
    outcome.late, outcome.done = outcome.done - done_in_time, done_in_time


def _process(pipe: Pipe, directory: Path, load: Load) -> None:
    sender = _Sender(directory, load.client)
    for partition in range(PARTITIONS):
        sender.send(partition)
    while sender.waiting:
        sender.work()
    sender.outcome = Outcome()
    pipe.send("ready")
    pipe.recv()
    began, cpu_began = time.monotonic(), time.process_time()
    (_closed if load.callers else _open)(sender, load)
    outcome = sender.outcome
    outcome.seconds = outcome.seconds or time.monotonic() - began
    outcome.cpu_seconds = time.process_time() - cpu_began
    pipe.send(outcome)


def offered(directory: Path, loads: list[Load]) -> list[Outcome]:
    """Let processes of their own offer loads at the same time; return what came of each.

    Args:
        directory: Of the pool, which has the key :data:`KEY`.
        loads: One a process.
    """
    context = multiprocessing.get_context("spawn")
    pipes: list[Pipe] = []
    processes: list[BaseProcess] = []
    for load in loads:
        own, other = context.Pipe()
        process = context.Process(target=_process, args=(other, directory, load), daemon=True)
        process.start()
        other.close()
        pipes.append(own)
        processes.append(process)
    try:
        for pipe in pipes:
            _received(pipe, 60.0)
        for pipe in pipes:
            pipe.send("go")
        return [_received(pipe, load.seconds + 60.0) for pipe, load in zip(pipes, loads, strict=True)]
    finally:
        for started in processes:
            started.join(10.0)
            if started.is_alive():
                started.terminate()


def _received(pipe: Pipe, seconds: float) -> Any:
    if not pipe.poll(seconds):
        raise RuntimeError("a client process did not answer")
    return pipe.recv()
