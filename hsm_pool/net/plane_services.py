"""The small services: status, peers, node agents, health."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hsm_pool import limits
from hsm_pool.core.model import CheckpointRecord, checkpoint_name
from hsm_pool.enclave import hardening
from hsm_pool.enclave.evidence import certificate_key, client_report_data
from hsm_pool.errors import InvalidField, NotFresh, PermissionDenied
from hsm_pool.firmware.running import running
from hsm_pool.net.interceptors import current_caller
from hsm_pool.partition.ceremonies import Ceremonies
from hsm_pool.partition.partition import Partition, PartitionState
from hsm_pool.partition.serving import Serving
from mhsm.enclave.v1 import enclave_pb2
from mhsm.node.v1 import node_pb2, node_pb2_grpc
from mhsm.peer.v1 import peer_pb2, peer_pb2_grpc
from mhsm.pool.v1 import pool_pb2, pool_pb2_grpc
from security_domain import container


class PoolService(pool_pb2_grpc.PoolServiceServicer):
    """Status for customers."""

    def __init__(self, partition: Partition, ceremonies: Ceremonies) -> None:
        self._partition = partition
        self._ceremonies = ceremonies

    def GetPartitionStatus(  # noqa: N802, D102
        self,
        request: pool_pb2.GetPartitionStatusRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pool_pb2.GetPartitionStatusResponse:
        partition = self._partition
        settings = partition.settings
        response = pool_pb2.GetPartitionStatusResponse(
            pool_id=settings.pool_id,
            partition_index=settings.index,
            state=enclave_pb2.PartitionState.ValueType(partition.state.value),
            state_reason=partition.reason,
            incarnation=partition.state_directory.incarnation,
            sealing=settings.sealing,
            store_version=partition.store.version(),
            accepted_shares=self._ceremonies.accepted_shares,
            recovery_path=partition.recovery_path,
            hardening=[measure.value for measure in hardening.in_force()],
            ceremony_child_hardening=self._ceremonies.child_hardening,
        )
        if partition.header is not None:
            response.required = container.parse(partition.header.security_domain_file).required
        audit = partition.audit
        response.audit_records = audit.log.size
        response.audit_lost_records = audit.log.lost
        response.audit_failure = audit.failure()
        cosigned = audit.history.newest_cosigned
        response.audit_cosignatures = len(cosigned.signatures) - 1 if cosigned else 0
        serving = partition.holding_keys()
        if serving:
            replica = serving.replica
            lease = replica.lease_remaining()
            response.fresh = lease > 0
            response.lease_remaining_ms = int(lease * 1000)
            response.applied_sequence = replica.head.sequence
            response.audit_notes = sum(
                record.notes
                for index in range(settings.partition_count)
                if isinstance(record := replica.state.get(checkpoint_name(index)), CheckpointRecord)
            )
            response.head_digest_prefix = replica.head.digest[:8].hex()
            response.secret_memory = serving.keys.memory_kind
            response.key_count = replica.state.key_count()
            response.half_replaced.extend(sorted(replica.half_replaced()))
            room = serving.committer.room
            response.store_full = room is not None and room.full
        return response

    def GetEvidence(  # noqa: N802, D102
        self,
        request: pool_pb2.GetEvidenceRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pool_pb2.GetEvidenceResponse:
        least, most = limits.EVIDENCE_NONCE_BYTES_MIN, limits.EVIDENCE_NONCE_BYTES_MAX
        if not least <= len(request.nonce) <= most:
            raise InvalidField(f"a nonce has {least} to {most} bytes", field="nonce")
        evidence = self._partition.attester.attest(request.nonce, client_report_data(request.nonce))
        return pool_pb2.GetEvidenceResponse(evidence=evidence)


class PeerService(peer_pb2_grpc.PeerServiceServicer):
    """Gives the pool's keys to a partition that shows evidence, and cosigns audit logs."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition

    def BeginHeal(  # noqa: N802, D102
        self,
        request: peer_pb2.BeginHealRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> peer_pb2.BeginHealResponse:
        self._keys_to_give()
        # Whoever asks may run firmware that was published after this partition looked last.
        self._partition.firmware.refresh()
        return peer_pb2.BeginHealResponse(
            nonce=self._partition.heal_giver.begin(), firmware_version=running().version
        )

    def Heal(  # noqa: N802, D102
        self, request: peer_pb2.HealRequest, context: grpc.ServicerContext
    ) -> peer_pb2.HealResponse:
        index = current_caller().index
        if index is None or index == self._partition.settings.index:
            raise PermissionDenied("a partition does not heal from itself")
        certificate = bytes(next(iter(context.auth_context()["x509_pem_cert"])))
        serving = self._keys_to_give()
        response = self._partition.heal_giver.give(
            request, index, certificate_key(certificate), serving.keys, serving.replica.boot_count_min(index)
        )
        self._keys_to_give()  # checked again before it leaves
        return response

    def Cosign(  # noqa: N802, D102
        self,
        request: peer_pb2.CosignRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> peer_pb2.CosignResponse:
        index = current_caller().index
        if index is None or index == self._partition.settings.index:
            raise PermissionDenied("a partition does not cosign its own audit log")
        return self._partition.audit.witness.cosign(request, index)

    def _keys_to_give(self) -> Serving:
        """Return what serves: a partition that is drained, quarantined or not fresh gives no keys."""
        serving = self._partition.serving_or_unconfirmed()
        if not serving.replica.lease_remaining():
            raise NotFresh("this partition holds no freshness lease at the moment")
        return serving


class NodeService(node_pb2_grpc.NodeServiceServicer):
    """Takes exit notices of node agents, and tells of admissions, each for its own partition only."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition

    def NotifyExit(  # noqa: N802, D102
        self,
        request: node_pb2.NotifyExitRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> node_pb2.NotifyExitResponse:
        index = current_caller().index
        serving = self._partition.holding_keys()
        if index is not None and serving:
            serving.replica.peer_exited(index, request.incarnation)
        return node_pb2.NotifyExitResponse()

    def GetAdmission(  # noqa: N802, D102
        self,
        request: node_pb2.GetAdmissionRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> node_pb2.GetAdmissionResponse:
        index = current_caller().index
        serving = self._partition.holding_keys()
        admission = (
            serving.replica.state.pool().admissions.get(index) if serving and index is not None else None
        )
        if admission is None or not admission.ready:
            return node_pb2.GetAdmissionResponse()
        return node_pb2.GetAdmissionResponse(number=admission.number, incarnation=admission.incarnation)


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1: SERVING means that this partition holds the keys and a lease."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition

    def Check(  # noqa: N802, D102
        self,
        request: health_pb2.HealthCheckRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> health_pb2.HealthCheckResponse:
        serving = self._partition.holding_keys()
        fresh = (
            self._partition.state is PartitionState.SERVING
            and serving is not None
            and serving.replica.lease_remaining() > 0
        )
        status = health_pb2.HealthCheckResponse.ServingStatus
        return health_pb2.HealthCheckResponse(status=status.SERVING if fresh else status.NOT_SERVING)
