"""G3: which keys wrap for attested environments, that they do nothing else, and with which algorithms."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hsm_pool import errors
from hsm_pool.core import key_release, key_use, secure_wrap
from hsm_pool.core.commands import RotateKey, UpdateKeyVersion, UpdateRotationPolicy
from hsm_pool.core.model import Curve, KeyOperation, KeyReleasePolicy, KeyType, RotationPolicy, SealedMaterial
from hsm_pool.core.state import State
from hsm_pool.crypto import algorithms, operations
from hsm_pool.crypto.key_generation import generate
from hsm_pool.crypto.loaded_keys import load
from hsm_pool.net.secure_wrap import SecureWraps
from hsm_pool.settings import AttestationAuthority
from hsm_pool.store import codec
from hsm_pool.tokens.attestation import AttestationVerifier
from mhsm.crypto.v1 import crypto_pb2
from tests.unit.attested import TestPool
from tests.unit.served import Served, called_by
from tests.unit.test_core import create, run
from tests.unit.test_key_release import AUTHORITY, NOW, SIGNER, newest, policy, token

WRAP, UNWRAP = KeyOperation.SECURE_WRAP_KEY, KeyOperation.SECURE_UNWRAP_KEY
BOTH = (WRAP, UNWRAP)
SIZES = {KeyType.RSA: 2048, KeyType.EC: 0, KeyType.OCT: 256, KeyType.AKP: 9_472}
OTHERS = tuple(operation for operation in KeyOperation if operation not in BOTH)


def secure(*, policy_: KeyReleasePolicy | None = None, **fields: object) -> object:
    """Return a command that makes a key which wraps securely."""
    said = {"key_operations": BOTH, "release_policy": policy_ or policy(), **fields}
    return create("a", 1, **said)


@pytest.mark.parametrize("other", OTHERS, ids=lambda o: o.name)
@pytest.mark.parametrize("one", BOTH, ids=lambda o: o.name)
def test_a_key_that_wraps_securely_does_nothing_else(one: KeyOperation, other: KeyOperation) -> None:
    """G3: with an unwrap or a decrypt it would give what it wraps to whoever calls, without attestation."""
    state = State()
    with pytest.raises(errors.InvalidField):
        run(state, secure(key_operations=(other, one)))
    assert state.names() == []
    run(state, secure())
    for changed in ((other,), (other, one), (other, *BOTH)):
        with pytest.raises(errors.InvalidField):
            run(state, UpdateKeyVersion(2, "a", key_operations=changed))
    assert newest(state).key_operations == BOTH


def test_no_other_key_becomes_one() -> None:
    """G3: what was unwrapped with it before is known."""
    state = State()
    run(state, create("a", 1, exportable=True, release_policy=policy()))
    run(state, create("b", 1))
    for key_id in ("a", "b"):
        for operation_set in (BOTH, (WRAP,), (UNWRAP,)):
            with pytest.raises(errors.InvalidField):
                run(state, UpdateKeyVersion(2, key_id, key_operations=operation_set))


def test_it_has_a_policy_and_is_not_exportable() -> None:
    state = State()
    for refused in (
        {"release_policy": None},
        {"exportable": True},
        {"exportable": True, "release_policy": None},
        {"release_policy": KeyReleasePolicy(b"{}")},
    ):
        for operation_set in (BOTH, (WRAP,), (UNWRAP,)):
            with pytest.raises(errors.InvalidField):
                run(state, secure(key_operations=operation_set, **refused))
    assert state.names() == []
    run(state, secure())
    assert secure_wrap.policy_of(newest(state)) == policy()
    with pytest.raises(errors.OperationNotPermitted):
        key_release.check_exportable(newest(state))


def test_its_policy_is_replaced_until_it_is_immutable() -> None:
    state = State()
    run(state, secure())
    run(state, UpdateKeyVersion(2, "a", release_policy=policy(value="better", immutable=True)))
    with pytest.raises(errors.ReleasePolicyImmutable):
        run(state, UpdateKeyVersion(3, "a", release_policy=policy()))
    run(state, UpdateKeyVersion(4, "a", key_operations=(UNWRAP,)))
    assert newest(state).release_policy == policy(value="better", immutable=True)


def test_a_rotated_one_wraps_securely_under_the_same_policy_and_the_store_keeps_it() -> None:
    state = State()
    run(state, secure())
    run(state, UpdateRotationPolicy(2, "a", RotationPolicy(time_after_create="P90D")))
    material = SealedMaterial(1, b"m" * 12, b"d" * 32)
    run(state, RotateKey(3, "a", f"{2:032x}", KeyType.EC, Curve.P256, 256, b"other", material))
    rotated = newest(state)
    assert (rotated.key_operations, rotated.release_policy) == (BOTH, policy())
    assert codec.decode(*codec.encode(rotated)) == rotated


def test_an_expired_one_still_unwraps_and_a_disabled_one_does_nothing() -> None:
    state = State()
    run(state, secure(expires_ms=2))
    key_use.check_use(newest(state), UNWRAP, 3)
    with pytest.raises(errors.KeyNotUsable):
        key_use.check_use(newest(state), WRAP, 3)
    run(state, UpdateKeyVersion(2, newest(state).key_id, enabled=False))
    for operation in (UNWRAP, WRAP):
        with pytest.raises(errors.KeyNotUsable):
            key_use.check_use(newest(state), operation, 1)
    for operation in OTHERS:
        with pytest.raises(errors.OperationNotPermitted):
            key_use.check_use(newest(state), operation, 1)


def test_no_key_wraps_securely_by_default() -> None:
    for key_type in KeyType:
        assert not secure_wrap.wraps_securely(algorithms.default_key_operations(key_type, SIZES[key_type]))
    for key_type, fits in (
        (KeyType.RSA, True),
        (KeyType.OCT, True),
        (KeyType.EC, False),
        (KeyType.AKP, False),
    ):
        if fits:
            algorithms.check_key_operations(key_type, SIZES[key_type], BOTH)
        else:
            with pytest.raises(errors.InvalidField):
                algorithms.check_key_operations(key_type, SIZES[key_type], BOTH)


@pytest.mark.parametrize("name", algorithms.names(WRAP))
def test_each_algorithm_gives_back_the_new_key(name: str) -> None:
    """The wrapped key is as long as the scheme says: RFC 3394 and 5649 add 8 octets to a key of 32."""
    algorithm = algorithms.named(name)
    size = 2048 if algorithm.key_type is KeyType.RSA else algorithm.size_bits or 256
    material = generate(algorithm.key_type, Curve.NONE, size)
    key = load(material.key_type, material.material)
    new = os.urandom(secure_wrap.WRAPPED_KEY_BYTES)
    wrapped = operations.wrap_key(key, algorithm, new)
    assert len(wrapped) == (256 if algorithm.key_type is KeyType.RSA else 40)
    assert operations.unwrap_key(key, algorithm, wrapped) == new
    with pytest.raises(errors.DecryptionFailed):
        operations.unwrap_key(key, algorithm, wrapped[:-1] + bytes([wrapped[-1] ^ 1]))


@pytest.mark.parametrize("size", [16, 24, 32, 40, 64])
def test_nothing_but_a_new_keys_length_comes_back(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G3: what the scheme wraps has 32 octets; another secret under the same key is not handed out by it."""
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [SIGNER.as_dict(private=False)]}))
    authority = AttestationAuthority(AUTHORITY, str(tmp_path / "keys.json"), "")
    served, attester = Served(), TestPool(tmp_path).nodes[0].attester
    served.give("client/somebody", "Crypto User", "/")
    made = generate(KeyType.OCT, Curve.NONE, 256)
    served.hold("a", made, BOTH, policy())
    partition: Any = SimpleNamespace(serving=lambda: served.serving, attester=attester)
    wraps = SecureWraps(partition, AttestationVerifier([authority], lambda: NOW))
    called_by(monkeypatch, "client/somebody", "/mhsm.crypto.v1.CryptoService/SecureUnwrapKey")
    key = load(made.key_type, made.material)
    request = crypto_pb2.SecureUnwrapKeyRequest(
        name="keys/a",
        algorithm="A256KW",
        wrapped_key=operations.wrap_key(key, algorithms.named("A256KW"), os.urandom(size)),
        target_attestation_token=token(),
    )
    if size == secure_wrap.WRAPPED_KEY_BYTES:
        assert wraps.unwrap(request, served.until).value
    else:
        with pytest.raises(errors.DecryptionFailed):
            wraps.unwrap(request, served.until)
