"""The command line of an etcd member (flags of etcd 3.4 and later)."""

from __future__ import annotations

from pathlib import Path

from hsm_pool.settings import NodeSettings, StoreMemberSettings

_CIPHERS = ",".join(
    (
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    )
)
_HEARTBEAT_MS = 100
_ELECTION_MS = 1000
_SNAPSHOT_COUNT = 1000
"""Transactions between two snapshots; so many and 5,000 more stay in memory."""


def has_joined(settings: NodeSettings) -> bool:
    """Return whether the node's member, if it has one, knows its own id: etcd writes it into its first log.

    A member that joins takes the id that stands in the list at its address at that moment.
    """
    if settings.store_member is None:
        return True
    # The directory comes by a rename, with the log in it; its owner may be another user.
    try:
        return (Path(settings.store_member.data_directory) / "member" / "wal").is_dir()
    except PermissionError:  # before the member's first start it is closed to the agent
        return False


def command(settings: StoreMemberSettings, *, joining: bool) -> list[str]:
    """Return the command of one member.

    Args:
        settings: Of the member.
        joining: Whether it joins running members, as a new one in place of a dead one.

    Compaction is explicit (the partitions know what they have applied), so etcd's own
    automatic compaction stays off; so do its authentication and leases.
    """
    options = {
        "name": settings.name,
        "data-dir": settings.data_directory,
        "listen-client-urls": settings.client_url,
        "advertise-client-urls": settings.client_url,
        "listen-peer-urls": settings.peer_url,
        "initial-advertise-peer-urls": settings.peer_url,
        "initial-cluster": settings.initial_cluster,
        "initial-cluster-state": "existing" if joining else "new",
        "initial-cluster-token": settings.cluster_token,
        "logger": "zap",
        "log-outputs": "stderr",
        "heartbeat-interval": str(_HEARTBEAT_MS),
        "election-timeout": str(_ELECTION_MS),
        "cert-file": settings.client_identity.certificate_file,
        "key-file": settings.client_identity.key_file,
        "trusted-ca-file": settings.client_identity.ca_file,
        "peer-cert-file": settings.peer_identity.certificate_file,
        "peer-key-file": settings.peer_identity.key_file,
        "peer-trusted-ca-file": settings.peer_identity.ca_file,
        "snapshot-count": str(_SNAPSHOT_COUNT),
        "quota-backend-bytes": str(settings.quota_bytes),
        "experimental-corrupt-check-time": "30s",
        "cipher-suites": _CIPHERS,
    }
    flags = ["client-cert-auth", "peer-client-cert-auth", "pre-vote", "experimental-initial-corrupt-check"]
    return [
        settings.binary,
        *(f"--{name}={value}" for name, value in options.items()),
        *(f"--{flag}" for flag in flags),
    ]
