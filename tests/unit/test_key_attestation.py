"""G3, G5, G6: a key attestation says what never changes, and is refused for every reason there is."""

from __future__ import annotations

import dataclasses
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from hsm_pool.core.commands import RotateKey, UpdateKeyVersion, UpdateRotationPolicy
from hsm_pool.core.model import (
    Curve,
    KeyOperation,
    KeyOrigin,
    KeyType,
    KeyVersionRecord,
    RotationPolicy,
    SealedMaterial,
)
from hsm_pool.core.state import State
from hsm_pool.enclave import key_attestation
from hsm_pool.enclave.evidence import Signer
from hsm_pool.enclave.key_attestation import VERSION, KeyAttestation, verify
from hsm_pool.enclave.key_claims import KeyClaims, Part
from hsm_pool.enclave.verifier import Expected, TrustAnchors
from hsm_pool.errors import EvidenceRefused
from hsm_pool.store import codec
from mhsm.evidence.v1 import evidence_pb2
from tests.unit.attested import POOL, Node, TestPool, signer
from tests.unit.test_core import create, run
from tests.unit.test_key_release import newest

PUBLIC_KEY = b"a public key"
DIGEST = hashlib.sha256(PUBLIC_KEY).digest()
OCT = {"key_type": KeyType.OCT, "curve": Curve.NONE, "size_bits": 256, "public_key_der": b""}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> TestPool:
    return TestPool(tmp_path_factory.mktemp("attested") / "pool")


@pytest.fixture(scope="module")
def other_pool(tmp_path_factory: pytest.TempPathFactory) -> TestPool:
    return TestPool(tmp_path_factory.mktemp("attested") / "other", "1" * 32)


@pytest.fixture
def node(pool: TestPool) -> Node:
    return pool.nodes[1]


def made(**fields: Any) -> KeyVersionRecord:
    state = State()
    run(state, create("a", 1, **{"public_key_der": PUBLIC_KEY, "origin": KeyOrigin.GENERATED, **fields}))
    return newest(state)


def attested(node: Node, **fields: Any) -> KeyAttestation:
    return key_attestation.attest(made(**fields), node.attester)


def test_an_attestation_verifies_and_says_what_the_key_is(pool: TestPool, node: Node) -> None:
    claims = verify(attested(node), pool.anchors, datetime.now(UTC))
    assert claims == KeyClaims(
        pool_id=POOL,
        partition_index=1,
        key_id="a",
        version_id=f"{1:032x}",
        part=Part.PRIVATE,
        key_type=KeyType.EC,
        curve=Curve.P256,
        size_bits=256,
        public_key=DIGEST,
        exportable=False,
        origin=KeyOrigin.GENERATED,
    )
    assert claims.named()["public_key"] == DIGEST.hex()
    symmetric = attested(node, **OCT, origin=KeyOrigin.IMPORTED)
    assert symmetric.public_key == b""
    assert "publicKeyAttestation" not in symmetric.to_json()
    said = verify(symmetric, pool.anchors, datetime.now(UTC))
    assert (said.key_type, said.public_key, said.origin) == (KeyType.OCT, b"", KeyOrigin.IMPORTED)


def test_it_is_the_same_after_an_update_and_holds_nothing_else(node: Node) -> None:
    """As Azure's: its clients compare it. Another partition signs the same claims with its own keys."""
    state = State()
    run(state, create("a", 1, public_key_der=PUBLIC_KEY, tags={"customers-tag": "customers-tag"}))
    first = key_attestation.attest(newest(state), node.attester)
    changed = UpdateKeyVersion(
        2_000, "a", enabled=False, expires_ms=9_000, key_operations=(KeyOperation.VERIFY,), tags={"x": "y"}
    )
    run(state, changed)
    assert key_attestation.attest(newest(state), node.attester) == first
    assert b"customers-tag" not in first.private_key + first.public_key + first.certificates_pem


def test_another_version_is_attested_otherwise_and_a_rotated_one_was_made_here() -> None:
    """The origin is that of each version, and the store keeps it."""
    state = State()
    run(state, create("a", 1, origin=KeyOrigin.IMPORTED))
    assert newest(state).origin is KeyOrigin.IMPORTED
    run(state, UpdateRotationPolicy(2, "a", RotationPolicy(time_after_create="P90D")))
    material = SealedMaterial(1, b"m" * 12, b"d" * 32)
    run(state, RotateKey(3, "a", f"{2:032x}", KeyType.EC, Curve.P256, 256, b"other", material))
    assert newest(state).origin is KeyOrigin.GENERATED
    assert codec.decode(*codec.encode(newest(state))) == newest(state)
    old = dataclasses.replace(newest(state), origin=KeyOrigin.UNKNOWN)
    assert codec.decode(*codec.encode(old)) == old


def test_members_have_azures_names_and_come_back(node: Node) -> None:
    whole = attested(node)
    members = whole.to_json()
    assert set(members) == {
        "certificatePemFile",
        "privateKeyAttestation",
        "publicKeyAttestation",
        "version",
    }
    assert KeyAttestation.from_json(members) == whole
    assert "MRVL" not in VERSION
    for bad in (
        None,
        [],
        {},
        {**members, "version": 1},
        {**members, "more": ""},
        {**members, "privateKeyAttestation": "a==="},
        {name: value for name, value in members.items() if name != "certificatePemFile"},
    ):
        with pytest.raises(ValueError, match=r"."):
            KeyAttestation.from_json(bad)


def test_each_blob_is_a_nested_token_under_the_two_roots(pool: TestPool, node: Node) -> None:
    """Opened without any of the product's code but the claims' labels."""
    outer = cbor2.loads(attested(node).private_key)
    inner = cbor2.loads(outer.value[2])
    assert (outer.tag, inner.tag) == (18, 18)  # COSE_Sign1
    for token, root in ((outer, pool.anchors.owner_root), (inner, pool.anchors.platform_root)):
        header = cbor2.loads(token.value[0])
        x509.load_der_x509_certificate(header[33]).verify_directly_issued_by(root)
        assert header[1] == -7  # ES256
    claims = cbor2.loads(inner.value[2])
    assert claims[2] == f"keys/a/versions/{1:032x}"
    assert claims[265].startswith("tag:mhsm-pool-simulator,2026:key-attestation/")


def changed_claims(node: Node, **changes: Any) -> bytes:
    """Return what this node's keys sign of other claims."""
    claims = dataclasses.replace(KeyClaims.of(made(), Part.PRIVATE, POOL, 1), **changes)
    return node.attester.certify_key(claims.encode())


def flipped(octets: bytes, position: int) -> bytes:
    return octets[:position] + bytes([octets[position] ^ 1]) + octets[position + 1 :]


def test_every_changed_octet_is_refused(pool: TestPool, node: Node) -> None:
    """G6: of both blobs, wherever it is."""
    whole = attested(node)
    for field in ("private_key", "public_key"):
        octets = getattr(whole, field)
        for position in range(0, len(octets), 37):
            with pytest.raises(EvidenceRefused):
                verify(
                    dataclasses.replace(whole, **{field: flipped(octets, position)}),
                    pool.anchors,
                    datetime.now(UTC),
                )


def bad(pool: TestPool, other: TestPool, whole: KeyAttestation) -> dict[str, KeyAttestation]:
    """Return what is put together or said wrongly, by what is wrong with it."""
    replace, pem = dataclasses.replace, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    return {
        "another version": replace(whole, version="MRVL-1"),
        "no private half": replace(whole, private_key=b""),
        "no public half": replace(whole, public_key=b""),
        "halves exchanged": replace(whole, private_key=whole.public_key, public_key=whole.private_key),
        "one half twice": replace(whole, public_key=whole.private_key),
        "a half of another key": replace(
            whole, public_key=attested(pool.nodes[1], version_id=f"{2:032x}").public_key
        ),
        "a half of another partition": replace(whole, public_key=attested(pool.nodes[2]).public_key),
        "of another pool": attested(other.nodes[1]),
        "certificates of another pool": replace(
            whole, certificates_pem=other.nodes[1].attester.certificates_pem
        ),
        "no certificates": replace(whole, certificates_pem=b""),
        "certificates that are none": replace(whole, certificates_pem=pem),
        "huge": replace(whole, private_key=bytes(5000)),
        "a public half of a symmetric key": replace(
            attested(pool.nodes[1], **OCT), public_key=whole.public_key
        ),
        "the name of another partition": replace(
            whole, private_key=changed_claims(pool.nodes[1], partition_index=2)
        ),
        "the name of another pool": replace(
            whole, private_key=changed_claims(pool.nodes[1], pool_id="1" * 32)
        ),
        "exportable in one half only": replace(
            whole, private_key=changed_claims(pool.nodes[1], exportable=True)
        ),
        "another digest in one half": replace(
            whole, private_key=changed_claims(pool.nodes[1], public_key=bytes(32))
        ),
    }


def test_what_does_not_belong_together_is_refused(pool: TestPool, other_pool: TestPool, node: Node) -> None:
    whole = attested(node)
    verify(whole, pool.anchors, datetime.now(UTC))
    for what, wrong in bad(pool, other_pool, whole).items():
        try:
            verify(wrong, pool.anchors, datetime.now(UTC))
        except EvidenceRefused:
            continue
        pytest.fail(f"accepted: {what}")


def signed_by(pool: TestPool, inner: Signer, outer: Signer) -> KeyAttestation:
    """Return an attestation of an oct key whose certificates fit whoever signed it."""
    claims = KeyClaims.of(made(**OCT), Part.PRIVATE, POOL, 1).encode()
    chain = (inner.certificate, pool.anchors.platform_root, outer.certificate, pool.anchors.owner_root)
    pem = b"".join(entry.public_bytes(serialization.Encoding.PEM) for entry in chain)
    return KeyAttestation(pem, outer.token(inner.token(claims)), b"")


def test_both_roots_must_have_certified(pool: TestPool, node: Node) -> None:
    """G5: whoever has one signer's key alone, or the two in the wrong order, proves nothing."""
    verify(signed_by(pool, node.platform, node.owner), pool.anchors, datetime.now(UTC))
    forger_platform = signer(pool.owner_root, f"spiffe://{POOL}/platform/1")
    forger_owner = signer(pool.platform_root, f"spiffe://{POOL}/partition/1")
    for inner, outer in (
        (forger_platform, node.owner),
        (node.platform, forger_owner),
        (node.owner, node.platform),
        (node.owner, node.owner),
        (node.platform, node.platform),
        (node.platform, pool.nodes[2].owner),
        (pool.nodes[2].platform, node.owner),
        (pool.nodes[2].platform, pool.nodes[2].owner),
    ):
        with pytest.raises(EvidenceRefused):
            verify(signed_by(pool, inner, outer), pool.anchors, datetime.now(UTC))
    claims = KeyClaims.of(made(**OCT), Part.PRIVATE, POOL, 1).encode()
    for token in (node.owner.token(claims), node.platform.token(claims)):
        with pytest.raises(EvidenceRefused):
            verify(
                KeyAttestation(node.attester.certificates_pem, token, b""), pool.anchors, datetime.now(UTC)
            )
    swapped = TrustAnchors(pool.anchors.owner_root, pool.anchors.platform_root)
    with pytest.raises(EvidenceRefused):
        verify(attested(node), swapped, datetime.now(UTC))


def test_evidence_and_a_key_attestation_do_not_stand_for_each_other(pool: TestPool, node: Node) -> None:
    """G5: the same keys sign both, of different profiles."""
    evidence = node.attester.attest(b"n" * 16, bytes(32))
    whole = attested(node)
    inner = cbor2.loads(evidence.platform_token).value[2]
    with pytest.raises(EvidenceRefused):
        verify(
            dataclasses.replace(whole, private_key=node.attester.certify_key(inner)),
            pool.anchors,
            datetime.now(UTC),
        )
    claims = KeyClaims.of(made(), Part.PRIVATE, POOL, 1).encode()
    mixed = evidence_pb2.Evidence(
        platform_token=node.platform.token(claims), owner_token=node.owner.token(claims)
    )
    with pytest.raises(EvidenceRefused):
        pool.verifier.verify(mixed, Expected(b"n" * 16, bytes(32)))


def test_a_certificate_out_of_date_is_refused(pool: TestPool, node: Node) -> None:
    whole = attested(node)
    for moved in (-timedelta(days=365 * 100), timedelta(days=365 * 100)):
        with pytest.raises(EvidenceRefused):
            verify(whole, pool.anchors, datetime.now(UTC) + moved)


@pytest.mark.parametrize(
    ("label", "value"),
    [
        (1, "spiffe://pool/partition/1"),
        (1, None),
        (2, "keys/a"),
        (2, b"keys"),
        (265, "tag:mhsm-pool-simulator,2026:evidence/v1"),
        (-70101, "both"),
        (-70102, "RSA-HSM"),
        (-70103, "P-257"),
        (-70104, 0),
        (-70104, True),
        (-70105, b"short"),
        (-70106, 1),
        (-70107, "found"),
        (-70199, "more"),
    ],
)
def test_claims_of_another_kind_are_refused(label: int, value: Any) -> None:
    claims = cbor2.loads(KeyClaims.of(made(), Part.PRIVATE, POOL, 1).encode())
    with pytest.raises(ValueError, match=r"."):
        KeyClaims.decode(cbor2.dumps({**claims, label: value}, canonical=True))


def test_the_certificates_are_the_two_chains(pool: TestPool, node: Node) -> None:
    found = x509.load_pem_x509_certificates(node.attester.certificates_pem)
    assert found == [
        node.platform.certificate,
        pool.anchors.platform_root,
        node.owner.certificate,
        pool.anchors.owner_root,
    ]
    assert b"PRIVATE" not in node.attester.certificates_pem
