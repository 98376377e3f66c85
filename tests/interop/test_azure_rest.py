"""The official SDK and az's own commands against the REST front of real pools (G4).

``azure-keyvault-securitydomain`` is the client that az uses; the functions are those behind
``az keyvault security-domain``. Both are unmodified; only az's login is not part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

pytest.importorskip("azure.cli", reason="azure-cli is not installed (scripts/setup azure): az is not tested")
pytest.importorskip("azure.keyvault.securitydomain", reason="its client is not installed, see above")

from azure.cli.command_modules.keyvault import custom
from azure.core.credentials import AccessToken
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError
from azure.keyvault.securitydomain import SecurityDomainClient

from hsm_pool.client import tokens
from mhsm.keys.v1 import keys_pb2
from security_domain.officers import save_private_key
from tests.rest_client import download_body
from tests.running_pool import RunningPool, TestOfficer

pytestmark = [pytest.mark.pool, pytest.mark.slow]

EC: dict[str, Any] = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}


class Credential:
    """Gets tokens of the development issuer; notes what the challenge asked for."""

    def __init__(self, pool: RunningPool, name: str = "administrator") -> None:
        self._pool, self._name = pool, name
        self.scopes: list[str] = []

    def get_token(self, *scopes: str, **_: Any) -> AccessToken:
        self.scopes.extend(scopes)
        token = tokens.development_token(self._pool.connection, self._name)["access_token"]
        return AccessToken(token, int(time.time()) + 600)


def client_of(pool: RunningPool, partition: int, credential: Any = None) -> SecurityDomainClient:
    endpoint = pool.connection.partitions[partition].rest_endpoint
    assert endpoint
    return SecurityDomainClient(
        f"https://localhost:{endpoint.rpartition(':')[2]}",
        credential or Credential(pool),
        verify_challenge_resource=False,
        connection_verify=pool.connection.client_ca_file,
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, officers: list[TestOfficer]) -> Path:
    """A directory with the officers' keys and certificates, as az reads them."""
    path = tmp_path_factory.mktemp("desk")
    for index, officer in enumerate(officers):
        (path / f"{index}.key").write_bytes(save_private_key(officer.key))
        certificate = x509.load_der_x509_certificate(officer.certificate_der)
        (path / f"{index}.cer").write_bytes(certificate.public_bytes(Encoding.PEM))
    return path


@pytest.fixture(scope="module")
def new_pool(make_pool: Callable[..., RunningPool]) -> Iterator[RunningPool]:
    """An attended pool without a security domain."""
    pool = make_pool(attended=True)
    yield pool
    pool.down()


def certificates(desk: Path) -> list[str]:
    return [str(desk / f"{index}.cer") for index in range(3)]


def keys(desk: Path, *quorum: int) -> list[str]:
    return [str(desk / f"{index}.key") for index in quorum]


def test_az_downloads_and_the_pool_is_active(new_pool: RunningPool, desk: Path) -> None:
    """The challenge leads to a token; a second download is refused; so is whoever has no role."""
    credential = Credential(new_pool)
    client = client_of(new_pool, 0, credential)
    with pytest.raises(HttpResponseError, match="NotActivated"):
        client.get_download_status()
    assert credential.scopes[0] == "https://managedhsm.azure.net/.default"
    status = custom.security_domain_download(client, certificates(desk), str(desk / "domain.json"), 2)
    assert status.status == "Success"
    new_pool.await_states(["SERVING"] * 3)
    with new_pool.client() as user:
        user.create_key("kept", **EC)
    with pytest.raises(HttpResponseError, match="AlreadyActivated"):
        custom.security_domain_download(client, certificates(desk), str(desk / "second.json"), 2)
    assert not (desk / "second.json").exists()
    stranger = client_of(new_pool, 1, Credential(new_pool, "stranger"))
    with pytest.raises(HttpResponseError, match="AccessDenied"):
        stranger.get_transfer_key()


def test_az_restores_a_locked_pool(new_pool: RunningPool, desk: Path) -> None:
    """``init-recovery``, ``restore-blob`` on an offline desk, ``upload --restore-blob``."""
    new_pool.kill_everything()
    new_pool.await_states(["LOCKED"] * 3)
    client = client_of(new_pool, 1)
    custom.security_domain_init_recovery(client, str(desk / "exchange.pem"))
    custom.security_domain_restore_blob(
        str(desk / "domain.json"), str(desk / "exchange.pem"), keys(desk, 2, 0), str(desk / "blob.json")
    )
    status = custom.security_domain_upload(client, str(desk / "blob.json"), restore_blob=True)
    assert status.status == "Success"
    new_pool.await_states(["SERVING"] * 3)
    with new_pool.client() as user:
        user.sign("keys/kept", "ES256", bytes(32))


def test_az_brings_a_lost_domain_into_a_new_pool(make_pool: Callable[..., RunningPool], desk: Path) -> None:
    """``upload`` with keys and file in one step; refused before: a bad token, a blob for another key."""
    pool = make_pool(attended=True)

    class Bad(Credential):
        def get_token(self, *_: str, **__: Any) -> AccessToken:
            return AccessToken("x", int(time.time()) + 600)

    with pytest.raises(ClientAuthenticationError):
        client_of(pool, 0, Bad(pool)).get_transfer_key()
    client = client_of(pool, 2)
    custom.security_domain_init_recovery(client, str(desk / "other.pem"))
    with pytest.raises(HttpResponseError, match="BadParameter"):
        custom.security_domain_upload(client, str(desk / "blob.json"), restore_blob=True)
    status = custom.security_domain_upload(
        client,
        str(desk / "domain.json"),
        sd_exchange_key=str(desk / "other.pem"),
        sd_wrapping_keys=keys(desk, 1, 2),
    )
    assert status.status == "Success"
    pool.await_states(["SERVING"] * 3)
    pool.down()


def test_the_sdks_poller_waits_for_the_activation(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """Not done at once, and the security domain is that of the first answer, not of the polls."""
    pool = make_pool(attended=True)
    body = download_body(officers, 2)
    poller = client_of(pool, 0).begin_download(certificate_info=body)
    assert not poller.done()
    assert '"shamir_share"' in poller.result().value
    pool.await_states(["SERVING"] * 3)
    pool.down()
