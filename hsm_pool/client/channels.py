"""TLS credentials and channel options of a client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc

from hsm_pool import limits
from hsm_pool.client.connection import ClientIdentity, Connection, NoClient

T = TypeVar("T")

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


def open_channels(
    connection: Connection, client: str, token: str | None, channel: Callable[..., T]
) -> list[T]:
    """Return a channel to each partition, with a client certificate or with a bearer token.

    Args:
        connection: The connection file's content.
        client: Which client certificate to use; not used with a token.
        token: The token.
        channel: Makes one, as grpc.secure_channel.

    Raises:
        NoClient: No client has that name, or the pool accepts no tokens.
    """
    if token is None:
        chosen = credentials(connection, client)
        return [channel(entry.endpoint, chosen, options=OPTIONS) for entry in connection.partitions]
    endpoints = [entry.token_endpoint for entry in connection.partitions]
    if None in endpoints:
        raise NoClient("the pool accepts no bearer tokens")
    tls = grpc.ssl_channel_credentials(Path(connection.client_ca_file).read_bytes())
    with_token = grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(token))
    return [channel(endpoint, with_token, options=OPTIONS) for endpoint in endpoints]


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
