"""Server reflection of the client plane: what its services look like, and nothing of other planes."""

from __future__ import annotations

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from mhsm.audit.v1 import audit_pb2
from mhsm.backup.v1 import backup_pb2
from mhsm.crypto.v1 import crypto_pb2
from mhsm.error.v1 import reasons_pb2
from mhsm.keys.v1 import keys_pb2
from mhsm.pool.v1 import pool_pb2
from mhsm.roles.v1 import roles_pb2
from mhsm.security_domain.v1 import security_domain_pb2

_OFFERED = (audit_pb2, backup_pb2, crypto_pb2, health_pb2, keys_pb2, pool_pb2, roles_pb2, security_domain_pb2)


def _files() -> list[FileDescriptor]:
    """Return the described files, each after those that it imports."""
    ordered: dict[str, FileDescriptor] = {}

    def add(file: FileDescriptor) -> None:
        for imported in file.dependencies:
            add(imported)
        ordered.setdefault(file.name, file)

    for module in (*_OFFERED, reasons_pb2):
        add(module.DESCRIPTOR)
    return list(ordered.values())


def add_to(server: grpc.Server) -> None:
    """Serve grpc.reflection.v1alpha with the descriptors of the client plane alone."""
    pool = descriptor_pool.DescriptorPool()
    for file in _files():
        described = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(described)
        pool.Add(described)
    services = [
        service.full_name for module in _OFFERED for service in module.DESCRIPTOR.services_by_name.values()
    ]
    reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server, pool)
