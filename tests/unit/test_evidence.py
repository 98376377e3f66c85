"""G3, G5: evidence is refused for every reason there is, and healing gives keys to nobody else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.enclave import evidence, healing
from hsm_pool.enclave.evidence import SECURITY_VERSION, Platform, measurement, report_data
from hsm_pool.enclave.healing import HealAttempt, HealGiver, certificate_key
from hsm_pool.errors import EvidenceRefused
from hsm_pool.provisioning.pki import Authority
from hsm_pool.store.replica import boot_time
from hsm_pool.store.sealing import PoolKeys
from mhsm.peer.v1 import peer_pb2

POOL = "0" * 32
DATA = report_data("heal/request", b"nonce")
_LABEL = b"mhsm/evidence/v1\x00"


def platform_of(root: Authority, index: int, pool_id: str = POOL) -> Platform:
    certificate, key = root.issue(f"spiffe://{pool_id}/platform/{index}", client=False)
    private = serialization.load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return Platform(
        private,
        x509.load_pem_x509_certificate(certificate),
        x509.load_pem_x509_certificate(root.certificate_pem),
    )


@pytest.fixture(scope="module")
def root() -> Authority:
    return Authority("platform root")


@pytest.fixture(scope="module")
def platforms(root: Authority) -> list[Platform]:
    return [platform_of(root, index) for index in range(3)]


def signed(platform: Platform, **changed: object) -> peer_pb2.Evidence:
    """Return evidence that a platform signed, with claims changed: what honest hardware would say."""
    claims = {
        "pool_id": POOL,
        "partition_index": 1,
        "incarnation": 4,
        "measurement": measurement(),
        "security_version": SECURITY_VERSION,
        "debug": False,
        "report_data": DATA,
    }
    octets = peer_pb2.EvidenceClaims(**{**claims, **changed}).SerializeToString(deterministic=True)  # type: ignore[arg-type]
    return peer_pb2.Evidence(
        claims=octets,
        signature=platform.key.sign(_LABEL + octets, ec.ECDSA(hashes.SHA256())),
        platform_certificate_der=platform.certificate.public_bytes(serialization.Encoding.DER),
    )


def test_evidence_verifies(platforms: list[Platform]) -> None:
    """Positive control: made by the product, and by this test's own signer."""
    made = platforms[1].attest(POOL, 1, 4, DATA)
    for one in (made, signed(platforms[1])):
        claims = platforms[0].verify(one, POOL, 1, DATA)
        assert (claims.partition_index, claims.incarnation) == (1, 4)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"pool_id": "1" * 32}, "another partition"),
        ({"partition_index": 2}, "another partition"),
        ({"measurement": bytes(48)}, "another distribution"),
        ({"measurement": b""}, "another distribution"),
        ({"security_version": SECURITY_VERSION - 1}, "older security version"),
        ({"debug": True}, "debugged"),
        ({"report_data": report_data("heal/request", b"other nonce")}, "not fresh"),
        ({"report_data": report_data("heal/response", b"nonce")}, "another purpose"),
        ({"report_data": b""}, "another purpose"),
    ],
    ids=str,
)
def test_a_claim_that_does_not_fit_is_refused(
    platforms: list[Platform], changed: dict[str, object], text: str
) -> None:
    """G5: signed by the right platform, and still refused."""
    with pytest.raises(EvidenceRefused, match=text):
        platforms[0].verify(signed(platforms[1], **changed), POOL, 1, DATA)


def test_a_newer_security_version_is_accepted(platforms: list[Platform]) -> None:
    """G5: the floor refuses older versions only."""
    newer = signed(platforms[1], security_version=SECURITY_VERSION + 1)
    assert platforms[0].verify(newer, POOL, 1, DATA).security_version == SECURITY_VERSION + 1


def test_another_platform_is_refused(platforms: list[Platform], root: Authority) -> None:
    """G5: another node's, another pool's of the same root, one of another root, one without a name."""
    for index in (0, 2):
        with pytest.raises(EvidenceRefused, match="another node"):
            platforms[0].verify(signed(platforms[index]), POOL, 1, DATA)
    with pytest.raises(EvidenceRefused, match="another node"):
        platforms[0].verify(signed(platform_of(root, 1, "1" * 32)), POOL, 1, DATA)
    with pytest.raises(EvidenceRefused, match="not signed by a platform"):
        platforms[0].verify(signed(platform_of(Authority("platform root"), 1)), POOL, 1, DATA)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = platforms[1].certificate
    with pytest.raises(EvidenceRefused, match="not signed by a platform"):  # the right name, another key
        platforms[0].verify(signed(Platform(key, certificate, platforms[1].root)), POOL, 1, DATA)


def test_changed_evidence_is_refused(platforms: list[Platform]) -> None:
    """G5, G8: any part, cut, changed or missing: a typed refusal."""
    good = platforms[1].attest(POOL, 1, 4, DATA)
    for field in ("claims", "signature", "platform_certificate_der"):
        value: bytes = getattr(good, field)
        for broken in (b"", value[:-1], value + b"x", value[:-1] + bytes([value[-1] ^ 1]), os.urandom(40)):
            changed = peer_pb2.Evidence()
            changed.CopyFrom(good)
            setattr(changed, field, broken)
            with pytest.raises(EvidenceRefused):
                platforms[0].verify(changed, POOL, 1, DATA)


def test_reflected_evidence_is_refused(platforms: list[Platform]) -> None:
    """G5: a partition's own evidence, sent back to it, is not its peer's."""
    own = platforms[0].attest(POOL, 0, 1, DATA)
    with pytest.raises(EvidenceRefused):
        platforms[0].verify(own, POOL, 1, DATA)


def test_report_data_is_unambiguous() -> None:
    """G5: no two lists of parts, and no two roles, have the same digest."""
    lists = [
        ("a", ()),
        ("a", (b"",)),
        ("a", (b"", b"")),
        ("a", (b"bc",)),
        ("a", (b"b", b"c")),
        ("ab", (b"c",)),
        ("b", (b"bc",)),
    ]
    assert len({report_data(role, *parts) for role, parts in lists}) == len(lists)


# -- healing ------------------------------------------------------------------------------


@dataclass
class Healing:
    """One healing between partition 0, which holds the keys, and partition 1."""

    giver: HealGiver
    attempt: HealAttempt
    keys: PoolKeys
    tls_key: bytes
    other_tls_key: bytes
    platforms: list[Platform]

    def give(self, request: peer_pb2.HealRequest, **changed: object) -> peer_pb2.HealResponse:
        arguments = {"peer_index": 1, "peer_tls_key": self.tls_key, "keys": self.keys, **changed}
        return self.giver.give(request, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def session(platforms: list[Platform]) -> Healing:
    peers = Authority("peers")
    tls, other = (certificate_key(peers.issue(f"spiffe://{POOL}/partition/{index}")[0]) for index in (1, 2))
    return Healing(
        HealGiver(platforms[0], POOL, 0, 3),
        HealAttempt(platforms[1], POOL, 1, 4, tls),
        PoolKeys.generate(POOL, 1, SecretBytes(bytes(32))),
        tls,
        other,
        platforms,
    )


def test_healing_gives_the_keys_sealed(session: Healing) -> None:
    """G3, positive control: the keys arrive, and nothing of them is plain on the way."""
    request = session.attempt.request(session.giver.begin())
    response = session.give(request)
    exported = session.keys.export()
    assert session.attempt.open(response, 0).export().equals(exported)
    wire = response.SerializeToString() + request.SerializeToString()
    assert not any(exported.reveal()[i : i + 16] in wire for i in range(len(exported) - 16))


def test_a_relay_with_another_tls_key_gets_nothing(session: Healing) -> None:
    """G3: a request that is passed on through another TLS identity is refused."""
    request = session.attempt.request(session.giver.begin())
    with pytest.raises(EvidenceRefused, match="another purpose"):
        session.give(request, peer_tls_key=session.other_tls_key)


def test_a_relay_with_another_hpke_key_gets_nothing(session: Healing) -> None:
    """G3: the evidence binds the key to which the answer is encrypted, and both nonces."""
    own = X25519PrivateKey.generate().public_key().public_bytes_raw()
    for field, value in (("hpke_public_key", own), ("healing_nonce", os.urandom(32))):
        request = session.attempt.request(session.giver.begin())
        setattr(request, field, value)
        with pytest.raises(EvidenceRefused, match="another purpose"):
            session.give(request)


def test_a_nonce_is_good_for_one_healing(session: Healing) -> None:
    """G3: not for a second one, not after a refused one, and only if this giver made it."""
    request = session.attempt.request(session.giver.begin())
    session.give(request)
    with pytest.raises(EvidenceRefused, match="nonce"):
        session.give(request)
    refused = session.attempt.request(session.giver.begin())
    with pytest.raises(EvidenceRefused):
        session.give(refused, peer_index=2)
    with pytest.raises(EvidenceRefused, match="nonce"):
        session.give(refused)
    for nonce in (b"", os.urandom(32), HealGiver(session.platforms[0], POOL, 0, 3).begin()):
        with pytest.raises(EvidenceRefused, match="nonce"):
            session.give(session.attempt.request(nonce))


def test_nonces_are_few_and_do_not_last(session: Healing, monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: asking for nonces fills no memory; an old one is worth nothing."""
    first = session.giver.begin()
    for _ in range(100):
        newest = session.giver.begin()
    with pytest.raises(EvidenceRefused, match="nonce"):
        session.give(session.attempt.request(first))
    late = boot_time() + 11
    monkeypatch.setattr(healing, "boot_time", lambda: late)
    with pytest.raises(EvidenceRefused, match="too old"):
        session.give(session.attempt.request(newest))


def test_only_the_attested_partition_is_healed(session: Healing) -> None:
    """G5: another index, another pool, a debugged or older partition, another distribution."""
    with pytest.raises(EvidenceRefused):
        session.give(session.attempt.request(session.giver.begin()), peer_index=2)
    changes: list[dict[str, object]] = [
        {"debug": True},
        {"measurement": bytes(48)},
        {"security_version": SECURITY_VERSION - 1},
        {"pool_id": "1" * 32},
    ]
    for changed in changes:
        request = session.attempt.request(session.giver.begin())
        claims = peer_pb2.EvidenceClaims.FromString(request.evidence.claims)
        request.evidence.CopyFrom(signed(session.platforms[1], report_data=claims.report_data, **changed))
        with pytest.raises(EvidenceRefused):
            session.give(request)


def test_an_answer_counts_from_the_asked_partition_only(session: Healing) -> None:
    """G6: keys of a stranger, reflected or changed answers, answers to another attempt are refused."""
    request = session.attempt.request(session.giver.begin())
    response = session.give(request)
    stranger = HealGiver(session.platforms[2], POOL, 2, 1)
    reflected = peer_pb2.HealResponse(sealed_pool_keys=response.sealed_pool_keys, evidence=request.evidence)
    swapped = peer_pb2.HealResponse(
        sealed_pool_keys=response.sealed_pool_keys[:-1] + b"x", evidence=response.evidence
    )
    other = HealAttempt(session.platforms[1], POOL, 1, 4, session.tls_key)
    other.request(request.nonce)
    attempts: list[Callable[[], object]] = [
        lambda: session.attempt.open(response, 2),
        lambda: session.attempt.open(reflected, 0),
        lambda: session.attempt.open(reflected, 1),
        lambda: session.attempt.open(swapped, 0),
        lambda: session.attempt.open(peer_pb2.HealResponse(), 0),
        lambda: other.open(response, 0),
    ]
    for attempt in attempts:
        with pytest.raises(EvidenceRefused):
            attempt()
    again = session.attempt.request(stranger.begin())
    from_stranger = stranger.give(again, 1, session.tls_key, session.keys)
    with pytest.raises(EvidenceRefused):
        session.attempt.open(from_stranger, 0)


def test_an_unusable_hpke_key_is_refused(session: Healing) -> None:
    """G8: a point of low order or of a wrong length, properly attested, is a typed refusal."""
    for public_key in (b"", bytes(32), b"x" * 31):
        request = session.attempt.request(session.giver.begin())
        request.hpke_public_key = public_key
        data = report_data("heal/request", request.nonce, request.healing_nonce, public_key, session.tls_key)
        request.evidence.CopyFrom(session.platforms[1].attest(POOL, 1, 4, data))
        with pytest.raises(EvidenceRefused, match="HPKE key"):
            session.give(request)


def test_the_measurement_covers_the_distribution() -> None:
    """G5: SHA-384, the same each time, over the packages that may hold a secret."""
    assert len(measurement()) == 48
    assert measurement() == measurement()
    assert {"hsm_pool", "security_domain", "mhsm"} <= set(evidence._MEASURED_PACKAGES)
