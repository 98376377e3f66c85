"""G3, G5: a certificate says who somebody is, for one plane and one use only."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from hsm_pool.provisioning.layout import NewPool, provision
from hsm_pool.provisioning.pki import Authority

URI = "spiffe://0123456789abcdef/partition/1"
PLANES = ("client", "peer", "fabric", "node")
_ROUNDS_MAX = 10


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("a plane")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the data directory of a pool whose files nobody can read by the process's umask alone."""
    made = tmp_path_factory.mktemp("pki") / "data"
    before = os.umask(0)
    try:
        provision(made, NewPool(attended=True, recoverable_days=90, etcd_binary="etcd"))
    finally:
        os.umask(before)
    return made


def load(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def names_of(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def public_bytes(key: object) -> bytes:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def roots_in(directory: Path) -> dict[bytes, x509.Certificate]:
    """Return every authority's certificate that lies anywhere in a pool, by public key."""
    found = {}
    for path in directory.rglob("*.crt"):
        certificate = load(path.read_bytes())
        if certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            found[public_bytes(certificate.public_key())] = certificate
    return found


def identities_in(directory: Path) -> dict[Path, x509.Certificate]:
    """Return every certificate that is no authority's, by file."""
    loaded = {path: load(path.read_bytes()) for path in sorted(directory.rglob("*.crt"))}
    return {
        path: certificate
        for path, certificate in loaded.items()
        if not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    }


def signed_by(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    """Return whether a root's key signed a certificate, whatever the names say."""
    key, algorithm = root.public_key(), certificate.signature_hash_algorithm
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert algorithm is not None
    try:
        key.verify(certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(algorithm))
    except InvalidSignature:
        return False
    return True


@pytest.mark.parametrize("server", [False, True])
def test_an_identity_has_exactly_one_uri(authority: Authority, server: bool) -> None:
    names = names_of(load(authority.issue(URI, server=server)[0]))
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [URI]


def test_only_a_server_is_named_for_this_machine_and_for_nothing_else(authority: Authority) -> None:
    client, server = (
        names_of(load(authority.issue(URI, server=is_server)[0])) for is_server in (False, True)
    )
    assert len(client) == 1
    assert len(server) == 3
    assert server.get_values_for_type(x509.DNSName) == ["localhost"]
    assert server.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1")]


@pytest.mark.parametrize(
    ("server", "client", "expected"),
    [
        (False, True, [ExtendedKeyUsageOID.CLIENT_AUTH]),
        (True, True, [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
        (True, False, [ExtendedKeyUsageOID.SERVER_AUTH]),
    ],
)
def test_extended_key_usages_are_those_that_were_asked_for(
    authority: Authority, server: bool, client: bool, expected: Sequence[ObjectIdentifier]
) -> None:
    certificate = load(authority.issue(URI, server=server, client=client)[0])
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == expected


def test_an_authority_signs_certificates_of_identities_only() -> None:
    certificate = load(Authority("a plane").certificate_pem)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature


def test_an_identity_signs_no_certificates_and_leads_to_its_authority(authority: Authority) -> None:
    certificate, root = load(authority.issue(URI)[0]), load(authority.certificate_pem)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert not constraints.value.ca
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    certificate.verify_directly_issued_by(root)
    named = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    own = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert named.key_identifier == own.digest


def test_every_identity_has_its_own_key_and_serial_number_and_is_valid_now(authority: Authority) -> None:
    issued = [authority.issue(URI) for _ in range(4)]
    certificates = [load(certificate) for certificate, _ in issued]
    assert len({certificate.serial_number for certificate in certificates}) == 4
    assert len({public_bytes(certificate.public_key()) for certificate in certificates}) == 4
    for certificate, (_, key_pem) in zip(certificates, issued, strict=True):
        key = serialization.load_pem_private_key(key_pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert public_bytes(key.public_key()) == public_bytes(certificate.public_key())
        now = datetime.now(UTC)
        assert certificate.not_valid_before_utc < now < certificate.not_valid_after_utc


# -- in a pool ---------------------------------------------------------------------------


def test_eight_authorities_and_each_identity_leads_to_one_of_them(directory: Path) -> None:
    """Client, peer, fabric and node plane, store clients, store members, platform and owner (G5)."""
    roots = roots_in(directory)
    assert len(roots) == 8
    assert len({root.subject for root in roots.values()}) == 8
    identities = identities_in(directory)
    # 2 clients, controller, token issuer; a node: 4 planes, agent, platform, owner, 3 of the store.
    assert len(identities) == 4 + 3 * 10
    for path, certificate in identities.items():
        issuers = [root for root in roots.values() if signed_by(certificate, root)]
        assert len(issuers) == 1, path
        trusted = path.with_name(f"{path.stem}-trusted.crt")
        if path.name in {"platform.crt", "owner.crt"}:
            trusted = path.with_name("root.crt")
        assert load(trusted.read_bytes()) == issuers[0], path


def test_every_name_in_a_pool_is_one_uri_and_belongs_to_its_owner(directory: Path) -> None:
    pool_ids = set()
    for path, certificate in identities_in(directory).items():
        (uri,) = names_of(certificate).get_values_for_type(x509.UniformResourceIdentifier)
        pool_id, _, owner = uri.removeprefix("spiffe://").partition("/")
        pool_ids.add(pool_id)
        parts = path.relative_to(directory).parts
        if parts[0] == "clients":
            assert owner == f"client/{path.stem}"
        elif parts[0] in {"fabric", "token-issuer"}:
            assert owner == parts[0]
        else:
            kind = {"agent": "node", "platform": "platform", "store-server": "store", "store-peer": "store"}
            assert owner == f"{kind.get(path.stem, 'partition')}/{parts[1]}"
    assert len(pool_ids) == 1


def test_who_only_calls_cannot_serve(directory: Path) -> None:
    """A stolen client, agent or controller identity does not stand in for a partition."""
    for path, certificate in identities_in(directory).items():
        if path.parent.name in {"platform", "owner"}:
            continue  # signs evidence; its authority is no root of any plane
        usages = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        only_calls = path.stem in {"administrator", "application", "controller", "agent", "store-client"}
        assert (ExtendedKeyUsageOID.SERVER_AUTH not in usages) == only_calls, path


def _handshake(directory: Path, server: Path, client: Path) -> bool:
    """Return whether two identities accept each other in TLS, both sides verifying."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, identity in ((server_context, server), (client_context, client)):
        context.load_cert_chain(identity.with_suffix(".crt"), identity.with_suffix(".key"))
        context.load_verify_locations(identity.with_name(f"{identity.stem}-trusted.crt"))
        context.verify_mode = ssl.CERT_REQUIRED
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client_context.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server_context.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(_ROUNDS_MAX):
        waiting = []
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                waiting.append(side)
            except ssl.SSLError:
                return False
        sides = waiting
        if not sides:
            return True
    raise AssertionError("the handshake does not end")


def test_an_identity_of_one_plane_fails_in_the_handshake_of_every_other(directory: Path) -> None:
    """G5: tried with the files that the processes load, each plane against each."""
    server, client = directory / "nodes" / "0" / "pki", directory / "nodes" / "1" / "pki"
    planes = (*PLANES, "store-client")
    accepted = {
        (mine, theirs)
        for mine in (*PLANES, "store-server", "store-peer")
        for theirs in (*planes, "store-peer")
        if _handshake(directory, server / mine, client / theirs)
    }
    expected = {(plane, plane) for plane in PLANES}
    assert accepted == expected | {("store-server", "store-client"), ("store-peer", "store-peer")}


def test_clients_agent_and_controller_reach_their_own_plane_only(directory: Path) -> None:
    callers = {
        "client": directory / "clients" / "application",
        "fabric": directory / "fabric" / "controller",
        "node": directory / "nodes" / "1" / "pki" / "agent",
    }
    for own, caller in callers.items():
        served = [
            plane for plane in PLANES if _handshake(directory, directory / "nodes/0/pki" / plane, caller)
        ]
        assert served == [own]


def test_no_authority_key_is_kept_but_the_customers(directory: Path) -> None:
    """Whoever reads the whole data directory can name no new partition, agent or platform (G3)."""
    roots = roots_in(directory)
    kept = []
    for path in directory.rglob("*.key"):
        if path.name == "sealing.key":
            assert len(path.read_bytes()) == 32
            continue
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        if public_bytes(key.public_key()) in roots:
            kept.append(path.relative_to(directory))
    assert kept == [Path("pki/client-ca.key")]


def test_key_files_are_their_owners_only(directory: Path) -> None:
    keys = list(directory.rglob("*.key"))
    assert len(keys) == 1 + 4 + 3 * 11
    assert {path.stat().st_mode & 0o7777 for path in keys} == {0o600}
    for path in directory.rglob("*"):
        if path.is_file() and path.suffix != ".key":
            assert b"PRIVATE KEY" not in path.read_bytes(), path


def test_an_authority_that_was_kept_issues_as_before(authority: Authority) -> None:
    """What `mhsm client create` does: the certificate leads to the same root; a strange key is refused."""
    loaded = Authority.load(authority.certificate_pem, authority.key_pem)
    certificate = load(loaded.issue(URI)[0])
    certificate.verify_directly_issued_by(load(authority.certificate_pem))
    with pytest.raises(ValueError, match="do not fit"):
        Authority.load(authority.certificate_pem, Authority("another").key_pem)
