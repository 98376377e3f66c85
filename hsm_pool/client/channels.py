"""TLS credentials and channel options of a client."""

from __future__ import annotations

from pathlib import Path

import grpc

from hsm_pool import limits
from hsm_pool.client.connection import ClientIdentity, Connection, NoClient

OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # This also bounds how long a TLS handshake may take: not too short for a busy machine.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES_MAX),
)


def credentials(connection: Connection, client: str) -> grpc.ChannelCredentials:
    """Return the credentials of one of the connection file's clients, or of one made later.

    Raises:
        NoClient: No client has that name.
    """
    identity = connection.clients.get(client)
    if identity is None:
        base = Path(connection.data_directory) / "clients" / client
        identity = ClientIdentity(f"{base}.crt", f"{base}.key")
        if not Path(identity.certificate_file).is_file():
            raise NoClient(f"the pool has no client {client}")
    return grpc.ssl_channel_credentials(
        root_certificates=Path(connection.client_ca_file).read_bytes(),
        private_key=Path(identity.key_file).read_bytes(),
        certificate_chain=Path(identity.certificate_file).read_bytes(),
    )
