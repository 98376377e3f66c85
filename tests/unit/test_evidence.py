"""G3, G5: evidence is refused for every reason there is, and healing gives keys to nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import cbor2
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hsm_pool import limits
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.enclave import admission, healing
from hsm_pool.enclave.claims import Claims, DebugStatus
from hsm_pool.enclave.evidence import Signer, debug_status, measurement, report_data
from hsm_pool.enclave.healing import HealAttempt, HealGiver
from hsm_pool.enclave.verifier import Expected, TrustAnchors, Verifier
from hsm_pool.errors import EvidenceRefused
from hsm_pool.firmware.image import SECURITY_VERSION
from hsm_pool.firmware.measurement import PACKAGES
from hsm_pool.provisioning.pki import Authority, private_key_pem
from hsm_pool.store.replica import boot_time
from hsm_pool.store.sealing import PoolKeys
from mhsm.evidence.v1 import evidence_pb2
from mhsm.peer.v1 import peer_pb2
from tests.unit.attested import BOOT_COUNT, POOL, Node, TestPool, claims_of, signer

NONCE = b"n" * 16
DATA = report_data("test", NONCE)
EXPECTED = Expected(NONCE, DATA, pool_id=POOL, partition_index=1)


@pytest.fixture(scope="module")
def attested(tmp_path_factory: pytest.TempPathFactory) -> TestPool:
    return TestPool(tmp_path_factory.mktemp("attested") / "pool")


@pytest.fixture(scope="module")
def other_pool(tmp_path_factory: pytest.TempPathFactory) -> TestPool:
    """Another customer's pool: other roots, the same software."""
    return TestPool(tmp_path_factory.mktemp("attested") / "other", "1" * 32)


@pytest.fixture
def node(attested: TestPool) -> Node:
    return attested.nodes[1]


@pytest.fixture
def good(node: Node) -> evidence_pb2.Evidence:
    return node.attester.attest(NONCE, DATA)


def refuses(pool: TestPool, one: evidence_pb2.Evidence, text: str, expected: Expected = EXPECTED) -> None:
    with pytest.raises(EvidenceRefused, match=text):
        pool.verifier.verify(one, expected)


def test_evidence_verifies(attested: TestPool, node: Node, good: evidence_pb2.Evidence) -> None:
    """Positive control: made by the product, and by this test's own signer."""
    for one in (good, node.changed(good)):
        claims = attested.verifier.verify(one, EXPECTED)
        assert (claims.partition_index, claims.boot_count) == (1, 4)
        assert claims.named()["dbgstat"] == "disabled-since-boot"


def test_a_token_is_what_the_standards_say(node: Node, good: evidence_pb2.Evidence) -> None:
    """Read without our code and without the package that made it: RFC 9052, 9360, 8392 and 9711."""
    for token, own in ((good.platform_token, node.platform), (good.owner_token, node.owner)):
        outer = cbor2.loads(token)
        assert outer.tag == 18
        protected, unprotected, payload, signature = outer.value
        certificate = own.certificate.public_bytes(serialization.Encoding.DER)
        assert (cbor2.loads(protected), unprotected) == ({1: -7, 33: certificate}, {})
        key = own.certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        half = len(signature) // 2
        r, s = (int.from_bytes(part, "big") for part in (signature[:half], signature[half:]))
        signed = cbor2.dumps(["Signature1", protected, b"", payload])
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
        claims = cbor2.loads(payload)
        assert claims[2] == f"spiffe://{POOL}/partition/1"
        assert (claims[10], claims[263], claims[267]) == (NONCE, 2, 4)
        assert (claims[256][0], len(claims[256])) == (1, 33)
        assert all(label > 0 or label < -65536 for label in claims)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"pool_id": "1" * 32}, "another partition than it names"),
        ({"partition_index": 2}, "another partition than it names"),
        ({"measurement": bytes(48)}, "mhsm.measurement"),
        ({"security_version": SECURITY_VERSION - 1}, "mhsm.security_version"),
        ({"product_id": 2}, "mhsm.product_id"),
        ({"debug_status": DebugStatus.ENABLED}, "dbgstat"),
        ({"debug_status": DebugStatus.DISABLED}, "dbgstat"),
        ({"nonce": b"m" * 16}, "not fresh"),
        ({"nonce": NONCE + b"n"}, "not fresh"),
        ({"report_data": report_data("other", NONCE)}, "another purpose"),
        ({"exchange_key": bytes(32)}, "another exchange key"),
        ({"expires_at": 1}, "expired"),
    ],
    ids=str,
)
def test_a_claim_that_does_not_fit_is_refused(
    attested: TestPool, node: Node, good: evidence_pb2.Evidence, changed: dict[str, object], text: str
) -> None:
    """G5: signed by the right keys, and still refused."""
    refuses(attested, node.changed(good, **changed), text)


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        (Expected(b"m" * 16, DATA), "not fresh"),
        (Expected(NONCE, report_data("other", NONCE)), "another purpose"),
        (Expected(NONCE, DATA, exchange_key=bytes(32)), "another exchange key"),
        (Expected(NONCE, DATA, peer_tls_key=b"other"), "channel"),
        (Expected(NONCE, DATA, pool_id="1" * 32), "another pool"),
        (Expected(NONCE, DATA, partition_index=0), "another partition"),
    ],
    ids=str,
)
def test_evidence_for_another_occasion_is_refused(
    attested: TestPool, good: evidence_pb2.Evidence, expected: Expected, text: str
) -> None:
    """G5: stale, for another purpose, for other keys, of somebody else (one's own included)."""
    refuses(attested, good, text, expected)


def test_a_newer_security_version_is_accepted(
    attested: TestPool, node: Node, good: evidence_pb2.Evidence
) -> None:
    """G5: the floor refuses older versions only."""
    newer = node.changed(good, security_version=SECURITY_VERSION + 1)
    assert attested.verifier.verify(newer, EXPECTED).security_version == SECURITY_VERSION + 1


def test_both_roots_must_have_certified(
    attested: TestPool, other_pool: TestPool, node: Node, good: evidence_pb2.Evidence
) -> None:
    """G5: a forged chain of either root is refused, however right everything else is."""
    claims = claims_of(good).encode()
    platform_uri, owner_uri = f"spiffe://{POOL}/platform/1", f"spiffe://{POOL}/partition/1"
    forged = Authority("owner root")
    cases = (
        (signer(other_pool.platform_root, platform_uri), node.owner, "platform's token"),
        (node.platform, signer(other_pool.owner_root, owner_uri), "owner's token"),
        (node.platform, signer(forged, owner_uri), "owner's token"),
        (node.owner, node.platform, "platform's token"),
        (node.platform, node.platform, "owner's token"),
        (node.owner, node.owner, "platform's token"),
    )
    for platform, owner, text in cases:
        made = evidence_pb2.Evidence(platform_token=platform.token(claims), owner_token=owner.token(claims))
        refuses(attested, made, text)
    for absent in ("platform_token", "owner_token"):
        one = evidence_pb2.Evidence()
        one.CopyFrom(good)
        one.ClearField(absent)  # type: ignore[arg-type]
        refuses(attested, one, "absent")


def test_a_key_signs_for_the_name_in_its_certificate_only(
    attested: TestPool, good: evidence_pb2.Evidence
) -> None:
    """G5: another node of the pool, another pool of the same vendor, a name that is none."""
    claims = claims_of(good).encode()
    right = (f"spiffe://{POOL}/platform/1", f"spiffe://{POOL}/partition/1")
    wrong = (
        (f"spiffe://{POOL}/platform/2", right[1]),
        (right[0], f"spiffe://{POOL}/partition/2"),
        (f"spiffe://{'1' * 32}/platform/1", right[1]),
        (right[0], f"spiffe://{POOL}/client/administrator"),
        (right[1], right[0]),
    )
    for platform_uri, owner_uri in wrong:
        made = evidence_pb2.Evidence(
            platform_token=signer(attested.platform_root, platform_uri).token(claims),
            owner_token=signer(attested.owner_root, owner_uri).token(claims),
        )
        refuses(attested, made, "another partition than it names")


def test_the_right_certificate_with_another_key_is_refused(
    attested: TestPool, node: Node, good: evidence_pb2.Evidence
) -> None:
    """G5: whoever copies a certificate out of old evidence signs nothing with it."""
    thief = signer(Authority("own"), "spiffe://x/y")
    claims = claims_of(good).encode()
    for name, genuine, text in (("platform", node.platform, "platform's"), ("owner", node.owner, "owner's")):
        thief.certificate = genuine.certificate
        made = node.signed(claims)
        setattr(made, f"{name}_token", thief.token(claims))
        refuses(attested, made, text)


def test_claims_are_not_swapped_between_two_tokens(
    attested: TestPool, node: Node, good: evidence_pb2.Evidence
) -> None:
    """G5: two true tokens of two occasions are no evidence of either."""
    other = node.attester.attest(b"m" * 16, DATA)
    for platform, owner in ((good, other), (other, good)):
        mixed = evidence_pb2.Evidence(platform_token=platform.platform_token, owner_token=owner.owner_token)
        refuses(attested, mixed, "different claims")
    octets = cbor2.loads(good.platform_token)
    octets.value[2] = cbor2.loads(other.platform_token).value[2]
    moved = evidence_pb2.Evidence(
        platform_token=cbor2.dumps(octets, canonical=True), owner_token=other.owner_token
    )
    refuses(attested, moved, "platform's token")


def test_a_certificate_out_of_date_is_refused(attested: TestPool, good: evidence_pb2.Evidence) -> None:
    """G5: evidence ends with the certificates of its keys."""
    late = Verifier(attested.anchors, admission.load(None), lambda: datetime.now(UTC) + timedelta(days=900))
    with pytest.raises(EvidenceRefused, match="does not verify"):
        late.verify(good, EXPECTED)


def test_the_roots_are_not_exchanged(attested: TestPool, good: evidence_pb2.Evidence) -> None:
    """G5: what the owner certified is no platform, and the other way round."""
    exchanged = TrustAnchors(attested.anchors.owner_root, attested.anchors.platform_root)
    with pytest.raises(EvidenceRefused, match="platform's token"):
        Verifier(exchanged, admission.load(None)).verify(good, EXPECTED)


def test_changed_evidence_is_refused(attested: TestPool, good: evidence_pb2.Evidence) -> None:
    """G5, G8: any part, cut, changed or too large: a typed refusal."""
    for field in ("platform_token", "owner_token"):
        value: bytes = getattr(good, field)
        too_large = value + bytes(limits.EVIDENCE_TOKEN_BYTES_MAX)
        flipped = [value[:i] + bytes([value[i] ^ 1]) + value[i + 1 :] for i in range(0, len(value), 7)]
        for broken in (value[:-1], value + b"x", too_large, os.urandom(40), *flipped):
            changed = evidence_pb2.Evidence()
            changed.CopyFrom(good)
            setattr(changed, field, broken)
            refuses(attested, changed, "token")


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.binary(max_size=80) | st.text(max_size=20) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.integers() | st.text(max_size=5), inner, max_size=5)
        | st.builds(cbor2.CBORTag, st.integers(0, 300), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(junk=st.binary(max_size=300) | _JUNK.map(cbor2.dumps))
def test_junk_is_refused(attested: TestPool, node: Node, good: evidence_pb2.Evidence, junk: bytes) -> None:
    """G8: as a token, as its headers, and as claims under the right keys: one typed refusal each."""
    outer = cbor2.CBORTag(18, [junk, {}, claims_of(good).encode(), bytes(64)])
    for token in (junk, cbor2.dumps(outer, canonical=True)):
        made = evidence_pb2.Evidence(platform_token=token, owner_token=good.owner_token)
        refuses(attested, made, "platform's token")
    refuses(attested, node.signed(junk or b"\x00"), "not readable")


def _is_like(value: object, good: object) -> bool:
    """Whether a value may stand where the good one does: then it is for others to say whether it is true."""
    match good:
        case int():
            return type(value) is int and 0 <= value <= 2**53
        case str():
            return isinstance(value, str) and value != ""
        case bytes():
            return isinstance(value, bytes) and len(value) == len(good)
        case _:
            return isinstance(value, list) and len(value) == 1


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(label=st.integers(0, 16), value=_JUNK)
def test_a_claim_of_another_kind_is_refused(
    attested: TestPool, node: Node, good: evidence_pb2.Evidence, label: int, value: object
) -> None:
    """G8: each claim in turn is of another type, length or range, under the right keys."""
    claims = cbor2.loads(claims_of(good).encode())
    labels = sorted(claims)
    chosen = labels[label % len(labels)]
    assume(not _is_like(value, claims[chosen]))
    claims[chosen] = value
    octets = cbor2.dumps(claims, canonical=True)
    refuses(attested, node.signed(octets), "readable|fresh")


def test_claims_have_one_form(attested: TestPool, node: Node, good: evidence_pb2.Evidence) -> None:
    """G8: another order, an unknown or a doubled claim, trailing octets are refused."""
    octets = claims_of(good).encode()
    claims = cbor2.loads(octets)
    unordered = cbor2.dumps(dict(reversed(claims.items())))
    unknown = cbor2.dumps({**claims, 999: 1}, canonical=True)
    doubled = bytes([octets[0] + 1]) + octets[1:] + cbor2.dumps(10) + cbor2.dumps(NONCE)
    for form in (unordered, unknown, doubled, octets + b"\x00"):
        refuses(attested, node.signed(form), "not readable")
    assert Claims.decode(octets) == claims_of(good)


def test_a_key_of_another_curve_makes_no_evidence() -> None:
    """G5: ES256 and nothing else."""
    certificate, _ = Authority("root").issue("spiffe://x/y")
    with pytest.raises(ValueError, match="P-256"):
        Signer(certificate, private_key_pem(ec.generate_private_key(ec.SECP384R1())))


def test_a_debugger_shows(attested: TestPool) -> None:
    """G5: the kernel is asked: this test process is not hardened, so another one may attach to it."""
    assert debug_status() is DebugStatus.ENABLED


_TRACED = """
import ctypes, sys
from hsm_pool.enclave.evidence import debug_status
libc = ctypes.CDLL(None)
assert libc.prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE
if sys.argv[1] == "traced":
    assert libc.ptrace(0, 0, 0, 0) == 0  # PTRACE_TRACEME: by whoever started this
print(debug_status().text)
"""


@pytest.mark.parametrize(("how", "shown"), [("alone", "disabled-since-boot"), ("traced", "enabled")])
def test_a_debugger_that_is_attached_shows(how: str, shown: str) -> None:
    """G5: also in a process that nobody could attach to any more."""
    command = [sys.executable, "-c", _TRACED, how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == shown


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
    pool: TestPool

    def giver_of(self, index: int) -> HealGiver:
        return HealGiver(self.pool.nodes[index].attester, self.pool.verifier, POOL)

    def attempt_of(self, index: int) -> HealAttempt:
        node = self.pool.nodes[index]
        return HealAttempt(node.attester, self.pool.verifier, POOL, node.tls_key)

    def give(self, request: peer_pb2.HealRequest, **changed: object) -> peer_pb2.HealResponse:
        arguments = {"peer_index": 1, "peer_tls_key": self.tls_key, "keys": self.keys, "boot_count_min": 0}
        arguments |= changed
        return self.giver.give(request, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def session(attested: TestPool) -> Healing:
    nodes = attested.nodes
    return Healing(
        HealGiver(nodes[0].attester, attested.verifier, POOL),
        HealAttempt(nodes[1].attester, attested.verifier, POOL, nodes[1].tls_key),
        PoolKeys.generate(POOL, 1, SecretBytes(bytes(32))),
        nodes[1].tls_key,
        nodes[2].tls_key,
        attested,
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
    with pytest.raises(EvidenceRefused, match="channel"):
        session.give(request, peer_tls_key=session.other_tls_key)


def test_a_relay_with_another_hpke_key_gets_nothing(session: Healing) -> None:
    """G3: the evidence binds the key to which the answer is encrypted, and both nonces."""
    own = X25519PrivateKey.generate().public_key().public_bytes_raw()
    for field, value, text in (
        ("hpke_public_key", own, "another exchange key"),
        ("healing_nonce", os.urandom(32), "another purpose"),
    ):
        request = session.attempt.request(session.giver.begin())
        setattr(request, field, value)
        with pytest.raises(EvidenceRefused, match=text):
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
    for nonce in (b"", os.urandom(32), session.giver_of(0).begin()):
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
        {"debug_status": DebugStatus.ENABLED},
        {"measurement": bytes(48)},
        {"security_version": SECURITY_VERSION - 1},
        {"pool_id": "1" * 32},
    ]
    node = session.pool.nodes[1]
    for changed in changes:
        request = session.attempt.request(session.giver.begin())
        request.evidence.CopyFrom(node.changed(request.evidence, **changed))
        with pytest.raises(EvidenceRefused):
            session.give(request)


def test_a_floor_holds_whatever_the_policy_says(attested: TestPool, node: Node) -> None:
    """G5: an owner's policy that names an older security version does not bring it back."""
    good = node.attester.attest(NONCE, DATA)
    verifier = Verifier(attested.anchors, admission.load(None))
    verifier.verify(good, EXPECTED)
    verifier.replace_policy(admission.load(None), SECURITY_VERSION + 1)
    with pytest.raises(EvidenceRefused, match="below the pool's security version"):
        verifier.verify(good, EXPECTED)
    verifier.verify(node.changed(good, security_version=SECURITY_VERSION + 1), EXPECTED)


def test_an_earlier_start_than_was_seen_is_refused(session: Healing) -> None:
    """G5, G6: a partition whose disk was put back claims a lower boot count; the control is its own."""
    for seen in (0, 3, BOOT_COUNT):
        session.give(session.attempt.request(session.giver.begin()), boot_count_min=seen)
    with pytest.raises(EvidenceRefused, match="earlier start"):
        session.give(session.attempt.request(session.giver.begin()), boot_count_min=BOOT_COUNT + 1)


def test_a_giver_that_is_not_admitted_is_believed_nothing(session: Healing) -> None:
    """G5: the healing side judges the giver by the same policy."""
    node = session.pool.nodes[0]
    for changed in ({"debug_status": DebugStatus.ENABLED}, {"measurement": bytes(48)}, {"nonce": NONCE}):
        attempt = session.attempt_of(1)
        response = session.give(attempt.request(session.giver.begin()))
        response.evidence.CopyFrom(node.changed(response.evidence, **changed))
        with pytest.raises(EvidenceRefused):
            attempt.open(response, 0)


def test_an_answer_counts_from_the_asked_partition_only(session: Healing) -> None:
    """G6: keys of a stranger, reflected or changed answers, answers to another attempt are refused."""
    request = session.attempt.request(session.giver.begin())
    response = session.give(request)
    stranger = session.giver_of(2)
    reflected = peer_pb2.HealResponse(sealed_pool_keys=response.sealed_pool_keys, evidence=request.evidence)
    swapped = peer_pb2.HealResponse(
        sealed_pool_keys=response.sealed_pool_keys[:-1] + b"x", evidence=response.evidence
    )
    other = session.attempt_of(1)
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
    from_stranger = stranger.give(again, 1, session.tls_key, session.keys, 0)
    with pytest.raises(EvidenceRefused):
        session.attempt.open(from_stranger, 0)


def test_an_unusable_hpke_key_is_refused(session: Healing) -> None:
    """G8: a point of low order or of a wrong length, properly attested, is a typed refusal."""
    for public_key in (b"", bytes(32), b"x" * 31):
        request = session.attempt.request(session.giver.begin())
        request.hpke_public_key = public_key
        data = report_data("heal/request", request.nonce, request.healing_nonce, public_key, session.tls_key)
        request.evidence.CopyFrom(session.pool.nodes[1].attester.attest(request.nonce, data, public_key))
        with pytest.raises(EvidenceRefused, match="HPKE key"):
            session.give(request)


def test_the_measurement_covers_the_distribution() -> None:
    """G5: SHA-384, the same each time, over the packages that may hold a secret."""
    assert len(measurement()) == 48
    assert measurement() == measurement()
    assert {"hsm_pool", "security_domain", "mhsm"} <= set(PACKAGES)
