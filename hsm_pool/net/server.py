"""The listeners of a partition: one a plane, each with its own certificate authority.

The client plane has a second one for callers with bearer tokens, if tokens are configured:
gRPC cannot make client certificates optional, so it asks for none.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from hsm_pool import limits
from hsm_pool.net import reflection
from hsm_pool.net.admission import THREADS, CallAdmission
from hsm_pool.net.answers import UnreadAnswers
from hsm_pool.net.audit_service import AuditService
from hsm_pool.net.authorization import Caller
from hsm_pool.net.backup_service import BackupService
from hsm_pool.net.calls import Translator
from hsm_pool.net.crypto_service import CryptoService
from hsm_pool.net.enclave_guard import CallFrequency, EnclaveGuard
from hsm_pool.net.enclave_service import EnclaveService
from hsm_pool.net.identities import CertificateIdentities, TokenIdentities
from hsm_pool.net.interceptors import Gate
from hsm_pool.net.key_service import KeyService
from hsm_pool.net.listening import listening
from hsm_pool.net.plane_services import (
    HealthService,
    NodeService,
    PeerService,
    PoolService,
)
from hsm_pool.net.requests import RequestReader
from hsm_pool.net.role_gate import RoleGate
from hsm_pool.net.role_service import RoleService
from hsm_pool.net.security_domain_service import SecurityDomainService
from hsm_pool.observability.calls import CallObserver
from hsm_pool.observability.metrics import MetricsListener, PartitionMetrics
from hsm_pool.partition.backups import Backups
from hsm_pool.partition.ceremonies import Ceremonies
from hsm_pool.partition.command_counter import CommandCounter
from hsm_pool.partition.partition import Partition
from hsm_pool.settings import Identity, PartitionSettings
from hsm_pool.tokens.attestation import AttestationVerifier
from hsm_pool.tokens.issuer_keys import IssuerKeys
from hsm_pool.tokens.verification import TokenVerifier
from mhsm.audit.v1 import audit_pb2_grpc
from mhsm.backup.v1 import backup_pb2_grpc
from mhsm.crypto.v1 import crypto_pb2_grpc
from mhsm.enclave.v1 import enclave_pb2_grpc
from mhsm.keys.v1 import keys_pb2_grpc
from mhsm.node.v1 import node_pb2_grpc
from mhsm.peer.v1 import peer_pb2_grpc
from mhsm.pool.v1 import pool_pb2_grpc
from mhsm.roles.v1 import roles_pb2_grpc
from mhsm.security_domain.v1 import security_domain_pb2_grpc

if TYPE_CHECKING:
    from hsm_pool.observability.traces import Tracing

_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", 128),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)
# The last of two equal options counts: the guard's own bound is smaller than this one.
_FABRIC_OPTIONS = (
    *_OPTIONS,
    ("grpc.max_receive_message_length", 4096),
    ("grpc.max_metadata_size", 4096),
    ("grpc.absolute_max_metadata_size", 4096),
)
_STOP_SECONDS = 1.0
_CLIENT_READS = (limits.REQUESTS_READ_MAX, limits.REQUESTS_READ_MAX * 3 // 4)
_INNER_THREADS = 8
_INNER_READS = (6, 2)
"""Requests that are read at once, and of one principal: two threads stay free for the others."""
_SOLE_CALLER_READS = (6, 6)
"""The same on the fabric plane, whose one caller is several processes: controller and operators' commands."""


class PlaneServers:
    """All listeners of one partition."""

    def __init__(self, partition: Partition, ceremonies: Ceremonies) -> None:
        settings = partition.settings
        translate = Translator(partition)
        roles = RoleGate(partition)
        certificates = CertificateIdentities(settings.pool_id)
        log = partition.audit.log
        admission = CallAdmission()
        metrics = PartitionMetrics(partition, admission)
        self._tracing = _tracing(settings)
        self._metrics_endpoint, self._registry = settings.metrics_endpoint, metrics.registry
        self._metrics_listener: MetricsListener | None = None
        observer = CallObserver(metrics.calls, self._tracing)
        self._frequency = CallFrequency(settings.index, log)
        self._watches: list[RequestReader | UnreadAnswers] = []

        def gate(
            identify: Callable[[grpc.ServicerContext], Caller],
            reads: tuple[int, int] = _INNER_READS,
            **options: Any,
        ) -> Gate:
            reader, answers = RequestReader(*reads), UnreadAnswers()
            self._watches += (reader, answers)
            return Gate(settings.index, identify, translate, roles, log, observer, reader, answers, **options)

        backups = Backups(partition)
        attestations = AttestationVerifier(settings.attestation_authorities)

        def client_plane(server: grpc.Server) -> None:
            keys = KeyService(partition, backups, admission, attestations)
            keys_pb2_grpc.add_KeyServiceServicer_to_server(keys, server)
            backup = BackupService(partition, backups)
            backup_pb2_grpc.add_BackupServiceServicer_to_server(backup, server)
            crypto = CryptoService(partition, translate, attestations)
            crypto_pb2_grpc.add_CryptoServiceServicer_to_server(crypto, server)
            roles_pb2_grpc.add_RoleServiceServicer_to_server(RoleService(partition), server)
            pool_pb2_grpc.add_PoolServiceServicer_to_server(PoolService(partition, ceremonies), server)
            ceremony = SecurityDomainService(partition, ceremonies)
            security_domain_pb2_grpc.add_SecurityDomainServiceServicer_to_server(ceremony, server)
            audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditService(partition), server)
            health_pb2_grpc.add_HealthServicer_to_server(HealthService(partition), server)
            reflection.add_to(server)

        def peer_plane(server: grpc.Server) -> None:
            peer_pb2_grpc.add_PeerServiceServicer_to_server(PeerService(partition), server)

        def fabric_plane(server: grpc.Server) -> None:
            enclave = EnclaveService(partition, CommandCounter(Path(settings.data_directory)))
            enclave_pb2_grpc.add_EnclaveServiceServicer_to_server(enclave, server)
            health_pb2_grpc.add_HealthServicer_to_server(HealthService(partition), server)

        def node_plane(server: grpc.Server) -> None:
            node_pb2_grpc.add_NodeServiceServicer_to_server(NodeService(partition), server)

        self._servers = [
            _server(
                settings.client_endpoint,
                settings.client_plane,
                gate(certificates, _CLIENT_READS, admission=admission),
                client_plane,
                threads=THREADS,
                calls=limits.CLIENT_CALLS_MAX,
            ),
            _server(settings.peer_endpoint, settings.peer_plane, gate(certificates), peer_plane),
            _server(
                settings.enclave_endpoint,
                settings.fabric_plane,
                gate(
                    certificates,
                    _SOLE_CALLER_READS,
                    frequency=self._frequency,
                    bare_errors=True,
                ),
                fabric_plane,
                guards=(EnclaveGuard(),),
                options=_FABRIC_OPTIONS,
            ),
            _server(settings.node_endpoint, settings.node_plane, gate(certificates), node_plane),
        ]
        tokens = settings.tokens
        if tokens is not None:
            verifier = TokenVerifier(tokens, IssuerKeys(tokens.keys, tokens.keys_ca_file))
            self._servers.append(
                _server(
                    tokens.endpoint,
                    settings.client_plane,
                    gate(TokenIdentities(verifier), _CLIENT_READS, admission=admission),
                    client_plane,
                    threads=THREADS,
                    calls=limits.CLIENT_CALLS_MAX,
                    client_certificates=False,
                )
            )

    def start(self) -> None:
        """Begin to listen."""
        for server in self._servers:
            server.start()
        with listening(self._metrics_endpoint):
            self._metrics_listener = MetricsListener(self._metrics_endpoint, self._registry)

    def close(self) -> None:
        """Stop listening and wait, bounded, for calls under way."""
        stopped = [server.stop(_STOP_SECONDS) for server in self._servers]
        for event in stopped:
            event.wait(2 * _STOP_SECONDS)
        for watch in self._watches:
            watch.close()
        self._frequency.close()
        if self._metrics_listener:
            self._metrics_listener.close()
        if self._tracing:
            self._tracing.close()


def _tracing(settings: PartitionSettings) -> Tracing | None:
    """Return what sends traces; the library is loaded only if there is a collector."""
    if settings.traces is None:
        return None
    from hsm_pool.observability.traces import Tracing

    return Tracing(settings.traces, settings.pool_id, settings.index)


def _server(
    endpoint: str,
    identity: Identity,
    gate: Gate,
    add_services: Callable[[grpc.Server], None],
    *,
    threads: int = _INNER_THREADS,
    calls: int = limits.CALLS_IN_FLIGHT_MAX,
    guards: tuple[grpc.ServerInterceptor, ...] = (),
    options: tuple[tuple[str, int], ...] = _OPTIONS,
    client_certificates: bool = True,
) -> grpc.Server:
    credentials = grpc.ssl_server_credentials(
        [(Path(identity.key_file).read_bytes(), Path(identity.certificate_file).read_bytes())],
        root_certificates=Path(identity.ca_file).read_bytes() if client_certificates else None,
        require_client_auth=client_certificates,
    )
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="call"),
        interceptors=[gate, *guards],
        options=options,
        maximum_concurrent_rpcs=calls,
    )
    add_services(server)
    with listening(endpoint):
        if server.add_secure_port(endpoint, credentials) == 0:
            raise OSError
    return server
