"""Client certificates of the customer's own authority, made for a test."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hsm_pool.client.connection import ClientIdentity
from hsm_pool.client.pool import Pool
from tests.running_pool import RunningPool


def issue(directory: Path, uris: list[str], *, expired: bool = False) -> tuple[bytes, bytes]:
    """Return a certificate of the customer's own authority with any names, also those it should not make."""
    issuer = x509.load_pem_x509_certificate((directory / "pki/client-ca.crt").read_bytes())
    issuer_key = serialization.load_pem_private_key((directory / "pki/client-ca.key").read_bytes(), None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        # The common name of an administrator gives nobody his roles.
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "client/administrator")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=-1 if expired else 1))
    )
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(issuer_key, hashes.SHA256())
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Clients:
    """Any number of clients of a pool, by name; their certificates lie beside the pool's own."""

    def __init__(self, pool: RunningPool) -> None:
        self._pool = pool
        self._made: dict[str, ClientIdentity] = {}

    def files(self, name: str) -> ClientIdentity:
        """Return the files of client/NAME, made when it is first asked for."""
        if name not in self._made:
            uri = f"spiffe://{self._pool.connection.pool_id}/client/{name}"
            certificate, key = issue(self._pool.directory, [uri])
            base = self._pool.directory / f"test-{name}"
            base.with_suffix(".crt").write_bytes(certificate)
            base.with_suffix(".key").write_bytes(key)
            self._made[name] = ClientIdentity(str(base.with_suffix(".crt")), str(base.with_suffix(".key")))
        return self._made[name]

    def connect(self, name: str, **options: Any) -> Pool:
        """Connect as client/NAME."""
        connection = self._pool.connection
        clients = {**connection.clients, name: self.files(name)}
        return Pool(dataclasses.replace(connection, clients=clients), name, **options)
