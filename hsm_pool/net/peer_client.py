"""Asks the other partitions for the pool's keys, and for cosignatures of the audit log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import structlog

from hsm_pool.client.errors import from_rpc
from hsm_pool.enclave.evidence import Attester, certificate_key
from hsm_pool.enclave.healing import HealAttempt
from hsm_pool.enclave.verifier import Verifier
from hsm_pool.errors import EvidenceRefused
from hsm_pool.settings import Identity, PartitionSettings, Peer
from hsm_pool.store.sealing import PoolKeys
from mhsm.peer.v1 import peer_pb2, peer_pb2_grpc

_log = structlog.get_logger()
_CALL_SECONDS = 2.0
_OPTIONS = (("grpc.max_reconnect_backoff_ms", 1_000), ("grpc.use_local_subchannel_pool", 1))


class PeerHealing:
    """Tries each peer in turn."""

    def __init__(self, settings: PartitionSettings) -> None:
        self._credentials = _credentials(settings.peer_plane)
        self._tls_key = certificate_key(Path(settings.peer_plane.certificate_file).read_bytes())
        self._settings = settings
        self.on_refused: Callable[[int], None] = lambda _: None
        """Called with a peer's firmware version when its evidence, or this partition's, was refused."""

    def __call__(self, attester: Attester, verifier: Verifier, epoch: int = 0) -> PoolKeys | None:
        """Return the keys from the first peer that gives them (with this epoch), None when no peer has them.

        Raises:
            EvidenceRefused: A peer has them, and this partition's evidence or the peer's was refused.
        """
        refused: EvidenceRefused | None = None
        for peer in self._settings.peers:
            try:
                keys = self._heal(attester, verifier, peer)
                if not epoch or keys.holds(epoch):
                    return keys
            except EvidenceRefused as error:
                _log.warning("healing refused", peer=peer.index, reason=error.message)
                refused = error
            except grpc.RpcError as error:
                _log.info("peer does not heal", peer=peer.index, code=error.code().name)
                typed = from_rpc(error)
                refused = typed if isinstance(typed, EvidenceRefused) else refused
        if refused is not None:
            raise refused
        return None

    def _heal(self, attester: Attester, verifier: Verifier, peer: Peer) -> PoolKeys:
        with grpc.secure_channel(peer.peer_endpoint, self._credentials) as channel:
            stub = peer_pb2_grpc.PeerServiceStub(channel)
            begun = stub.BeginHeal(peer_pb2.BeginHealRequest(), timeout=_CALL_SECONDS)
            attempt = HealAttempt(attester, verifier, self._settings.pool_id, self._tls_key)
            try:
                response = stub.Heal(attempt.request(begun.nonce), timeout=_CALL_SECONDS)
                return attempt.open(response, peer.index)
            except (EvidenceRefused, grpc.RpcError) as error:
                if isinstance(error, EvidenceRefused) or isinstance(from_rpc(error), EvidenceRefused):
                    self.on_refused(begun.firmware_version)
                raise


class PeerCosigning:
    """Sends checkpoints of the own audit log to the other partitions. :meth:`close` ends the channels."""

    def __init__(self, settings: PartitionSettings) -> None:
        credentials = _credentials(settings.peer_plane)
        self._channels = {
            peer.index: grpc.secure_channel(peer.peer_endpoint, credentials, options=_OPTIONS)
            for peer in settings.peers
        }

    def __call__(self, index: int, request: peer_pb2.CosignRequest) -> peer_pb2.CosignResponse:
        """Send one checkpoint.

        Raises:
            MHSMError: The other partition refused it, or does not answer.
        """
        try:
            stub = peer_pb2_grpc.PeerServiceStub(self._channels[index])
            response: peer_pb2.CosignResponse = stub.Cosign(request, timeout=_CALL_SECONDS)
            return response
        except grpc.RpcError as error:
            raise from_rpc(error) from None

    def close(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            channel.close()


def _credentials(identity: Identity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=Path(identity.ca_file).read_bytes(),
        private_key=Path(identity.key_file).read_bytes(),
        certificate_chain=Path(identity.certificate_file).read_bytes(),
    )
