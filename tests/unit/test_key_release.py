"""G3, G8: which keys are released, to whom, in which form; all refusals of an attestation look alike."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

from hsm_pool import errors, limits
from hsm_pool.core import key_release, lifecycle
from hsm_pool.core.commands import RotateKey, UpdateKeyVersion, UpdateRotationPolicy
from hsm_pool.core.model import (
    Curve,
    KeyReleasePolicy,
    KeyType,
    KeyVersionRecord,
    RotationPolicy,
    SealedMaterial,
)
from hsm_pool.core.state import State
from hsm_pool.crypto import key_transport
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.settings import AttestationAuthority, TokenIssuerSettings
from hsm_pool.store import codec
from hsm_pool.tokens.attestation import AttestationVerifier
from hsm_pool.tokens.attestation_authority import ISSUER_PATH
from hsm_pool.tokens.issuer import Issuer
from security_domain.encoding import decode, encode
from tests.unit.attested import TestPool
from tests.unit.provisioning.test_settings import _IDENTITY
from tests.unit.test_core import create, run

AUTHORITY = "https://attest.example"
NOW = 1_800_000_000.0


def policy(claim: str = "tee", value: Any = "good", *, immutable: bool = False) -> KeyReleasePolicy:
    conditions = [{"claim": claim, "equals": value}]
    document = {"version": "1.0.0", "anyOf": [{"authority": AUTHORITY, "allOf": conditions}]}
    return KeyReleasePolicy(json.dumps(document).encode(), immutable)


def newest(state: State, key_id: str = "a") -> KeyVersionRecord:
    return lifecycle.version_of(state, lifecycle.active_key(state, key_id))


# -- the core: which versions have a policy, and which ----------------------------------------


def test_an_exportable_key_has_a_policy_and_no_other_has_one() -> None:
    state = State()
    for refused in (
        {"exportable": True},
        {"release_policy": policy()},
        {"exportable": True, "release_policy": KeyReleasePolicy(b"{}")},
        {
            "exportable": True,
            "release_policy": policy(),
            "key_type": KeyType.AKP,
            "curve": Curve.NONE,
            "size_bits": 10_496,
        },
        {
            "exportable": True,
            "release_policy": KeyReleasePolicy(b" " * (limits.RELEASE_POLICY_BYTES_MAX + 1)),
        },
    ):
        with pytest.raises(errors.InvalidField):
            run(state, create("a", 1, **refused))
        assert state.names() == []
    run(state, create("a", 1, exportable=True, release_policy=policy()))
    assert key_release.check_exportable(newest(state)) == policy()
    run(state, create("b", 1))
    with pytest.raises(errors.OperationNotPermitted):
        key_release.check_exportable(newest(state, "b"))


def test_a_policy_is_replaced_until_it_is_immutable() -> None:
    """G8: after that nothing changes it, not even an update of something else."""
    state = State()
    run(state, create("a", 1, exportable=True, release_policy=policy()))
    run(state, UpdateKeyVersion(2, "a", release_policy=policy(value="better")))
    assert newest(state).release_policy == policy(value="better")
    with pytest.raises(errors.InvalidField):
        run(state, UpdateKeyVersion(2, "a", release_policy=KeyReleasePolicy(b"[]")))
    fixed = policy(value="better", immutable=True)
    run(state, UpdateKeyVersion(3, "a", release_policy=fixed))
    for other in (policy(), policy(value="better"), policy(immutable=True)):
        with pytest.raises(errors.ReleasePolicyImmutable):
            run(state, UpdateKeyVersion(4, "a", release_policy=other))
    run(state, UpdateKeyVersion(5, "a", enabled=False, release_policy=fixed))
    assert newest(state).release_policy == fixed
    run(state, create("b", 1))
    with pytest.raises(errors.InvalidField):
        run(state, UpdateKeyVersion(6, "b", release_policy=policy()))


def test_an_expired_version_is_still_released_and_a_disabled_one_is_not() -> None:
    """As Azure has it: decrypt, release, unwrap and verify are exempt from times, and from nothing else."""
    state = State()
    run(state, create("a", 1, exportable=True, release_policy=policy(), expires_ms=2))
    assert key_release.check_exportable(newest(state)) == policy()
    run(state, UpdateKeyVersion(2, "a", enabled=False))
    with pytest.raises(errors.KeyNotUsable):
        key_release.check_exportable(newest(state))


def test_a_rotated_key_keeps_exportable_and_policy_and_the_store_keeps_them() -> None:
    state = State()
    run(state, create("a", 1, exportable=True, release_policy=policy(immutable=True)))
    run(state, UpdateRotationPolicy(2, "a", RotationPolicy(time_after_create="P90D")))
    material = SealedMaterial(1, b"m" * 12, b"d" * 32)
    run(state, RotateKey(3, "a", f"{2:032x}", KeyType.EC, Curve.P256, 256, b"other", material))
    rotated = newest(state)
    assert rotated.exportable
    assert rotated.release_policy == policy(immutable=True)
    assert codec.decode(*codec.encode(rotated)) == rotated


def test_the_policy_decides_who_gets_the_key() -> None:
    key_release.check_target(policy(), AUTHORITY, {"tee": "good"})
    for authority, claims in (
        (AUTHORITY, {"tee": "bad"}),
        (AUTHORITY, {}),
        (AUTHORITY, {"tee": ["good"]}),
        (AUTHORITY + "/", {"tee": "good"}),
    ):
        with pytest.raises(errors.KeyReleaseRefused):
            key_release.check_target(policy(), authority, claims)


# -- the attestation token ---------------------------------------------------------------------

SIGNER = ECKey.generate_key("P-256", {"kid": "signer"})
ENVIRONMENT = rsa.generate_private_key(65_537, 2048)
PUBLIC = ENVIRONMENT.public_key().public_numbers()
JWK: dict[str, Any] = {
    "kty": "RSA",
    "kid": "mine",
    "use": "enc",
    "n": encode(PUBLIC.n.to_bytes(256, "big")),
    "e": "AQAB",
}
CLAIMS: dict[str, Any] = {
    "iss": AUTHORITY,
    "iat": NOW,
    "exp": NOW + 600,
    "tee": "good",
    "x-ms-runtime": {"keys": [JWK]},
}


def token(key: Any = SIGNER, algorithm: str = "ES256", key_id: str = "signer", **claims: Any) -> str:
    said = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not None}
    return jwt.encode({"alg": algorithm, "kid": key_id}, said, key, algorithms=[algorithm])


@pytest.fixture
def verifier(tmp_path: Path) -> AttestationVerifier:
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [SIGNER.as_dict(private=False)]}))
    authority = AttestationAuthority(AUTHORITY, str(tmp_path / "keys.json"), "")
    return AttestationVerifier([authority], lambda: NOW)


def with_keys(*keys: Any) -> dict[str, Any]:
    return {"x-ms-runtime": {"keys": list(keys)}}


@pytest.mark.parametrize(
    "key",
    [
        JWK,
        {**JWK, "use": None, "key_use": "enc"},
        {**JWK, "use": None, "key_ops": ["encrypt"]},
    ],
    ids=["use", "key_use", "key_ops"],
)
def test_a_good_token_names_authority_claims_and_key(verifier: AttestationVerifier, key: Any) -> None:
    target = verifier.verify(token(**with_keys({"kty": "EC"}, {**JWK, "use": "sig"}, key)))
    assert (target.authority, target.key_id, target.claims["tee"]) == (AUTHORITY, "mine", "good")
    assert target.public_key == ENVIRONMENT.public_key()


SMALL = {**JWK, "n": encode(b"\xc1" + b"\x01" * 127)}
BAD_TOKENS: dict[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "no token": lambda: "a.b.c",
    "too large": lambda: token(filler="x" * limits.TOKEN_BYTES_MAX),
    "another authority": lambda: token(iss=AUTHORITY + "/"),
    "no authority": lambda: token(iss=None),
    "an authority that is no text": lambda: token(iss=[AUTHORITY]),
    "signed by another": lambda: token(ECKey.generate_key("P-256")),
    "another algorithm": lambda: token(RSAKey.generate_key(2048), "RS256"),
    "an unknown key": lambda: token(key_id="other"),
    "expired": lambda: token(exp=NOW - limits.TOKEN_SKEW_SECONDS),
    "never expires": lambda: token(exp=None),
    "not valid yet": lambda: token(nbf=NOW + limits.TOKEN_SKEW_SECONDS + 1),
    "no runtime": lambda: token(**{"x-ms-runtime": None}),
    "a runtime that is no object": lambda: token(**{"x-ms-runtime": "keys"}),
    "no keys": lambda: token(**with_keys()),
    "keys that are none": lambda: token(**with_keys("key", 1)),
    "only a signing key": lambda: token(**with_keys({**JWK, "use": "sig"})),
    "a short key": lambda: token(**with_keys(SMALL)),
    "a huge key": lambda: token(**with_keys({**JWK, "n": encode(b"\xff" * 1024)})),
    "an even exponent": lambda: token(**with_keys({**JWK, "e": encode(b"\x02")})),
    "an exponent of one": lambda: token(**with_keys({**JWK, "e": encode(b"\x01")})),
    "a huge exponent": lambda: token(**with_keys({**JWK, "e": encode(b"\x01" * 64)})),
    "no modulus": lambda: token(**with_keys({**JWK, "n": None})),
    "a use that is a list": lambda: token(**with_keys({**JWK, "use": ["enc"]})),
    "tampered": lambda: token()[:-4] + "AAAA",
}


@pytest.mark.parametrize("what", BAD_TOKENS)
def test_every_bad_token_is_the_same_refusal(verifier: AttestationVerifier, what: str) -> None:
    """G8: whoever asks learns nothing of the cause."""
    with pytest.raises(errors.KeyReleaseRefused) as refused:
        verifier.verify(BAD_TOKENS[what]())
    assert refused.value.message == errors.KeyReleaseRefused().message
    assert refused.value.metadata == {}
    assert refused.value.__suppress_context__


def test_without_a_configured_authority_nobody_is_believed() -> None:
    with pytest.raises(errors.KeyReleaseRefused):
        AttestationVerifier([], lambda: NOW).verify(token())


def test_the_development_authority_and_the_token_issuer_do_not_stand_for_each_other(tmp_path: Path) -> None:
    issuer = Issuer(TokenIssuerSettings("0" * 32, "127.0.0.1:1", "https://127.0.0.1:1", "aud", _IDENTITY))
    authority, keys = "https://127.0.0.1:1" + ISSUER_PATH, tmp_path / "keys.json"
    keys.write_text(json.dumps(issuer.attestation.key_set()))
    verifier = AttestationVerifier([AttestationAuthority(authority, str(keys), "")])
    said = {"claims": {"tee": "good", "iss": "https://elsewhere", "exp": 1}, "keys": [JWK]}
    made = issuer.attestation.token(said)
    target = verifier.verify(made["attestation_token"])
    assert (target.authority, target.claims["exp"]) == (authority, made["exp"])
    with pytest.raises(errors.KeyReleaseRefused):
        verifier.verify(issuer.token("alice", [])["access_token"])
    for bad in ({}, {"claims": []}, {"claims": {}, "keys": {}}, {"claims": {}, "keys": [JWK] * 9}):
        with pytest.raises(ValueError, match="claims and keys"):
            issuer.attestation.token(bad)


# -- the form --------------------------------------------------------------------------------

HASHES = {
    "CKM_RSA_AES_KEY_WRAP": hashes.SHA1(),  # noqa: S303 - what the name says
    "RSA_AES_KEY_WRAP_256": hashes.SHA256(),
    "RSA_AES_KEY_WRAP_384": hashes.SHA384(),
}


def opened(algorithm: str, private: rsa.RSAPrivateKey, wrapped: bytes) -> bytes:
    """Return what PKCS #11 v3.0, 2.1.21 says is in it, without any of the product's code."""
    size, hashed = private.key_size // 8, HASHES[algorithm]
    one_time = private.decrypt(wrapped[:size], padding.OAEP(padding.MGF1(hashed), hashed, None))
    assert len(one_time) == 32
    return keywrap.aes_key_unwrap_with_padding(one_time, wrapped[size:])


@pytest.mark.parametrize("algorithm", HASHES)
@pytest.mark.parametrize("size", [16, 32, 121, 1217])
def test_only_the_environment_opens_what_was_wrapped_to_it(algorithm: str, size: int) -> None:
    """G3: another key does not, and no two wraps are alike."""
    secret = bytes(range(256)) * 5
    wrapped = key_transport.wrap(algorithm, ENVIRONMENT.public_key(), SecretBytes(secret[:size]))
    assert opened(algorithm, ENVIRONMENT, wrapped) == secret[:size]
    assert secret[:16] not in wrapped
    again = key_transport.wrap(algorithm, ENVIRONMENT.public_key(), SecretBytes(secret[:size]))
    assert again[:256] != wrapped[:256]
    assert again[256:] != wrapped[256:]
    for other in set(HASHES) - {algorithm}:
        with pytest.raises(ValueError, match="ecryption failed"):
            opened(other, ENVIRONMENT, wrapped)


def test_only_known_algorithms_wrap() -> None:
    assert tuple(HASHES) == key_transport.ENCRYPTION_ALGORITHMS
    for name in ("", "RSA_AES_KEY_WRAP_512", "ckm_rsa_aes_key_wrap", "A256KW"):
        with pytest.raises(errors.AlgorithmNotSupported):
            key_transport.check_encryption_algorithm(name)


def test_the_answer_is_a_jws_under_the_owners_root(tmp_path: Path) -> None:
    """Header as Azure's; the chain leads to the owner's root, and evidence is not signed alike."""
    pool = TestPool(tmp_path)
    header, payload, signature = pool.nodes[0].attester.certify_release(b'{"a":1}').split(".")
    named = json.loads(decode(header))
    assert set(named) == {"alg", "kid", "x5c", "x5t#S256"}
    leaf, root = (x509.load_der_x509_certificate(base64.b64decode(entry)) for entry in named["x5c"])
    assert root == pool.anchors.owner_root
    leaf.verify_directly_issued_by(root)
    assert decode(named["x5t#S256"]) == leaf.fingerprint(hashes.SHA256())
    octets, public = decode(signature), leaf.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    r, s = int.from_bytes(octets[:32], "big"), int.from_bytes(octets[32:], "big")
    digest = hashlib.sha256(f"{header}.{payload}".encode()).digest()
    public.verify(utils.encode_dss_signature(r, s), digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    assert decode(payload) == b'{"a":1}'
