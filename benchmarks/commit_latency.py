"""How long a write takes: creating an EC key in the pool, and a plain put in its etcd as the peer."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import grpc

from benchmarks.bench_pool import PARTITIONS, BenchmarkPool
from benchmarks.summaries import percentile, summary
from mhsm.etcd.v3 import rpc_pb2, rpc_pb2_grpc
from mhsm.keys.v1 import keys_pb2

PUT_BYTES = 1024
_CALL_SECONDS = 10.0


def _rounds(write: Callable[[int, int], None], writers: int, writes: int, repeats: int) -> dict[str, Any]:
    """Let writers write at once, several rounds; each writer waits for one write before the next."""
    measured = [_round(write, writers, range(n * writes, (n + 1) * writes)) for n in range(repeats)]
    return {
        "writers": writers,
        "writes_per_repeat": writers * writes,
        "p50_ms": summary([percentile(latencies, 0.5) for latencies, _ in measured], 2),
        "p99_ms": summary([percentile(latencies, 0.99) for latencies, _ in measured], 2),
        "writes_per_second": summary([len(latencies) / seconds for latencies, seconds in measured]),
    }


def _round(write: Callable[[int, int], None], writers: int, numbers: range) -> tuple[list[float], float]:
    """Let writers write at once; return all latencies in milliseconds, and the seconds it took."""
    latencies: list[float] = []
    errors: list[Exception] = []

    def run(writer: int) -> None:
        try:
            for number in numbers:
                began = time.monotonic()
                write(writer, number)
                latencies.append((time.monotonic() - began) * 1000)
        except Exception as error:  # noqa: BLE001 - raised again below, in the main thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(writer,)) for writer in range(writers)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return latencies, time.monotonic() - began


def create_key_latency(pool: BenchmarkPool, writers: int, writes: int, repeats: int) -> dict[str, Any]:
    """Measure CreateKey of P-256 keys, from the call to the acknowledgement."""
    label = os.urandom(4).hex()
    with ExitStack() as stack:
        clients = [stack.enter_context(pool.client()) for _ in range(writers)]

        def create(writer: int, number: int) -> None:
            clients[writer].create_key(
                f"commit-{label}-{writer}-{number}",
                key_type=keys_pb2.KEY_TYPE_EC,
                curve=keys_pb2.CURVE_P256,
            )

        for client in clients:
            for _ in range(PARTITIONS):  # the warm-up: a connection to each partition
                client.get_key("keys/benchmark-p256")
        return _rounds(create, writers, writes, repeats)


def etcd_put_latency(pool: BenchmarkPool, writers: int, writes: int, repeats: int) -> dict[str, Any]:
    """Measure puts of 1 KiB into the pool's own etcd, beside the pool's keys, over the same TLS."""
    credentials = pool.store_credentials()
    with ExitStack() as stack:
        stubs: list[rpc_pb2_grpc.KVStub] = []
        for writer in range(writers):
            endpoint = pool.connection.partitions[writer % PARTITIONS].store_endpoint
            options = (("grpc.use_local_subchannel_pool", 1),)
            channel = stack.enter_context(grpc.secure_channel(endpoint, credentials, options=options))
            stubs.append(rpc_pb2_grpc.KVStub(channel))

        def put(writer: int, number: int) -> None:
            key = f"/benchmark/{writer}/{number % 16}".encode()
            stubs[writer].Put(rpc_pb2.PutRequest(key=key, value=os.urandom(PUT_BYTES)), timeout=_CALL_SECONDS)

        for writer in range(writers):
            put(writer, 0)
        return _rounds(put, writers, writes, repeats)
