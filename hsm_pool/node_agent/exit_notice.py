"""Tells the other partitions that an incarnation of this node's partition has exited."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import grpc

from hsm_pool.settings import NodeSettings
from mhsm.node.v1 import node_pb2, node_pb2_grpc

_CALL_SECONDS = 1.0


def incarnation(settings: NodeSettings) -> int:
    """Return the newest incarnation of the partition, 0 when it never started."""
    path = Path(settings.incarnation_file)
    return int(path.read_text()) if path.exists() else 0


def partition_is_dead(settings: NodeSettings) -> bool:
    """Return whether no process holds the partition's lock (a stopped one still would)."""
    try:
        descriptor = os.open(settings.partition_lock_file, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


class ExitNotices:
    """Sends notices in threads of their own, bounded; :meth:`close` joins them."""

    def __init__(self, settings: NodeSettings) -> None:
        identity = settings.identity
        self._endpoints = settings.peer_node_endpoints
        self._credentials = grpc.ssl_channel_credentials(
            root_certificates=Path(identity.ca_file).read_bytes(),
            private_key=Path(identity.key_file).read_bytes(),
            certificate_chain=Path(identity.certificate_file).read_bytes(),
        )
        self._threads: list[threading.Thread] = []

    def send(self, exited: int) -> None:
        """Say that an incarnation has exited, to all peers at once; returns at once."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for endpoint in self._endpoints:
            thread = threading.Thread(target=self._notify, args=(endpoint, exited), daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Wait for notices under way; each is bounded."""
        for thread in self._threads:
            thread.join()

    def _notify(self, endpoint: str, exited: int) -> None:
        try:
            with grpc.secure_channel(endpoint, self._credentials) as channel:
                stub = node_pb2_grpc.NodeServiceStub(channel)
                stub.NotifyExit(node_pb2.NotifyExitRequest(incarnation=exited), timeout=_CALL_SECONDS)
        except grpc.RpcError:
            return  # best effort: without the notice, peers wait for the lease to run out
