"""The store as an attacker has it: the pool's keys in etcd, read and written past the partitions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from hsm_pool.client.connection import Connection
from mhsm.etcd.v3 import rpc_pb2, rpc_pb2_grpc


class StoreAccess:
    """Reads and writes raw keys, without the pool's prefix."""

    def __init__(self, connection: Connection, index: int = 0) -> None:
        store = connection.store
        credentials = grpc.ssl_channel_credentials(
            Path(store["ca_file"]).read_bytes(),
            Path(store["key_file"]).read_bytes(),
            Path(store["certificate_file"]).read_bytes(),
        )
        self._prefix = store["prefix"].encode()
        self._channel = grpc.secure_channel(
            connection.partitions[index].store_endpoint,
            credentials,
            options=[("grpc.max_receive_message_length", 256 * 1024 * 1024)],
        )
        self._kv = rpc_pb2_grpc.KVStub(self._channel)
        self.maintenance = rpc_pb2_grpc.MaintenanceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def dump(self) -> dict[str, bytes]:
        """Return everything that stands under the pool's prefix."""
        end = self._prefix[:-1] + bytes([self._prefix[-1] + 1])
        response = self._kv.Range(rpc_pb2.RangeRequest(key=self._prefix, range_end=end), timeout=10)
        return {kv.key[len(self._prefix) :].decode(): kv.value for kv in response.kvs}

    def head(self) -> bytes:
        """Return the head of the chain, alone and therefore quickly."""
        response = self._kv.Range(rpc_pb2.RangeRequest(key=self._prefix + b"head"), timeout=10)
        return bytes(response.kvs[0].value)

    def records(self) -> dict[str, bytes]:
        """Return the sealed records."""
        return {key: value for key, value in self.dump().items() if key.startswith("record/")}

    def write(self, puts: Mapping[str, bytes], deletes: tuple[str, ...] = ()) -> None:
        """Write in one transaction, comparing nothing."""
        request = rpc_pb2.TxnRequest()
        for key, value in puts.items():
            put = rpc_pb2.PutRequest(key=self._prefix + key.encode(), value=value)
            request.success.add(request_put=put)
        for key in deletes:
            delete = rpc_pb2.DeleteRangeRequest(key=self._prefix + key.encode())
            request.success.add(request_delete_range=delete)
        self._kv.Txn(request, timeout=10)

    def restore(self, snapshot: Mapping[str, bytes]) -> None:
        """Put everything back as it was, in batches that etcd takes."""
        gone = [key for key in self.dump() if key not in snapshot]
        items = list(snapshot.items())
        for start in range(0, len(items), 100):
            self.write(dict(items[start : start + 100]))
        for start in range(0, len(gone), 100):
            self.write({}, tuple(gone[start : start + 100]))
