"""G3, G6: what is sealed opens in its own place only, and shows little more than that it exists."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsm_pool.core.model import Curve, KeyType, SealedMaterial, key_name
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.store.sealing import (
    PoolKeys,
    Tampered,
    open_material,
    open_record,
    seal_material,
    seal_record,
)
from mhsm.record.v1 import record_pb2

POOL = "0" * 32
OTHER_POOL = "1" * 32
BODY = b"the body of a record"


def keys_of(pool_id: str, secret: SecretBytes) -> PoolKeys:
    return PoolKeys(pool_id, secret)


@pytest.fixture(scope="module")
def secret() -> SecretBytes:
    """Pool keys with two epochs, the second one in force."""
    message = record_pb2.PoolKeysSecret(
        key_encryption_keys={1: os.urandom(32), 2: os.urandom(32)},
        name_key=os.urandom(32),
        epoch=2,
        backup_private_keys={1: os.urandom(32)},
    )
    return SecretBytes(message.SerializeToString())


@pytest.fixture(scope="module")
def keys(secret: SecretBytes) -> PoolKeys:
    return keys_of(POOL, secret)


@dataclass(frozen=True)
class Place:
    """Where a record stands, as far as its envelope and its key in the store say."""

    opaque_id: bytes
    record_type: int = record_pb2.RECORD_TYPE_KEY
    sequence: int = 7
    previous_digest: bytes = b"p" * 32
    epoch: int = 2


HERE = Place(b"i" * 32)
ELSEWHERE = {
    "opaque id": replace(HERE, opaque_id=b"j" * 32),
    "a part of the opaque id": replace(HERE, opaque_id=b"i" * 31 + b"j"),
    "record type": replace(HERE, record_type=record_pb2.RECORD_TYPE_KEY_VERSION),
    "sequence": replace(HERE, sequence=8),
    "previous digest": replace(HERE, previous_digest=b"q" * 32),
    "epoch": replace(HERE, epoch=1),
    "unknown epoch": replace(HERE, epoch=3),
    "fields that run into each other": replace(HERE, opaque_id=b"i" * 31, previous_digest=b"i" + b"p" * 32),
}


def moved(value: bytes, place: Place) -> bytes:
    """Return a sealed record whose envelope says that it belongs elsewhere."""
    envelope = record_pb2.Envelope.FromString(value)
    envelope.record_type = record_pb2.RecordType.ValueType(place.record_type)
    envelope.sequence, envelope.previous_digest = place.sequence, place.previous_digest
    envelope.epoch = place.epoch
    return envelope.SerializeToString(deterministic=True)


def seal(keys: PoolKeys, place: Place, body: bytes = BODY) -> bytes:
    opaque_id, sequence, previous_digest = place.opaque_id, place.sequence, place.previous_digest
    return seal_record(keys, place.epoch, place.record_type, opaque_id, sequence, previous_digest, body)


def test_a_record_opens_where_it_was_sealed(keys: PoolKeys) -> None:
    """G6, positive control: unchanged, and rewritten by the same helper to its own place."""
    value = seal(keys, HERE)
    assert open_record(keys, HERE.opaque_id, value) == (HERE.record_type, HERE.sequence, BODY)
    assert open_record(keys, HERE.opaque_id, moved(value, HERE)) == (HERE.record_type, HERE.sequence, BODY)


@pytest.mark.parametrize("place", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_a_record_does_not_open_elsewhere(keys: PoolKeys, place: Place) -> None:
    """G6: swapped, replayed, spliced or renamed, each alone is noticed."""
    with pytest.raises(Tampered):
        open_record(keys, place.opaque_id, moved(seal(keys, HERE), place))


def test_a_record_does_not_open_in_another_pool(keys: PoolKeys, secret: SecretBytes) -> None:
    """G6: not even in a pool that has the same keys."""
    value = seal(keys, HERE)
    assert open_record(keys_of(POOL, secret), HERE.opaque_id, value)[2] == BODY
    with pytest.raises(Tampered):
        open_record(keys_of(OTHER_POOL, secret), HERE.opaque_id, value)
    with pytest.raises(Tampered):
        open_record(PoolKeys.generate(POOL, 1, SecretBytes(bytes(32))), HERE.opaque_id, value)


def test_no_record_of_a_table_opens_under_anothers_id(keys: PoolKeys) -> None:
    """G6: the swap matrix of a few records of one transaction."""
    ids = [keys.opaque_id(key_name(f"key-{number}")) for number in range(6)]
    values = [seal(keys, replace(HERE, opaque_id=opaque_id)) for opaque_id in ids]
    for row, opaque_id in enumerate(ids):
        for column, value in enumerate(values):
            if row == column:
                assert open_record(keys, opaque_id, value)[2] == BODY
            else:
                with pytest.raises(Tampered):
                    open_record(keys, opaque_id, value)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_byte_is_noticed(keys: PoolKeys, data: st.DataObject) -> None:
    """G6: whatever byte of a record is changed, it is Tampered: never another body, never another error."""
    value = seal(keys, HERE)
    position = data.draw(st.integers(0, len(value) - 1))
    change = data.draw(st.integers(1, 255))
    changed = value[:position] + bytes([value[position] ^ change]) + value[position + 1 :]
    with pytest.raises(Tampered):
        open_record(keys, HERE.opaque_id, changed)


@given(value=st.binary(max_size=600))
@settings(max_examples=200, deadline=None)
def test_what_is_no_record_is_noticed(keys: PoolKeys, value: bytes) -> None:
    """G6, G8: any octets are Tampered, never another error."""
    with pytest.raises(Tampered):
        open_record(keys, HERE.opaque_id, value)


def test_sealing_twice_shows_nothing_in_common(keys: PoolKeys) -> None:
    """G3: the same record sealed twice shares no nonce and no ciphertext."""
    first, second = (record_pb2.Envelope.FromString(seal(keys, HERE)) for _ in range(2))
    assert first.nonce != second.nonce
    assert first.ciphertext[:16] != second.ciphertext[:16]
    assert BODY not in seal(keys, HERE)


def test_sizes_are_padded_to_buckets(keys: PoolKeys) -> None:
    """G3: the store learns the bucket of a record, not its size; what was padded comes back exactly."""
    buckets = (256, 512, 1024, 2048, 4096, 8192, 12288)
    sizes = set()
    for length in (0, 1, 251, 252, 253, 508, 509, 1020, 2044, 4092, 4093, 8188, 8189, 12284):
        body = os.urandom(length)
        value = seal(keys, HERE, body)
        padded = len(record_pb2.Envelope.FromString(value).ciphertext) - 16
        assert padded == min(bucket for bucket in buckets if bucket >= length + 4)
        assert open_record(keys, HERE.opaque_id, value)[2] == body
        sizes.add(padded)
    assert sizes == set(buckets)


# -- key material -------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """The key version that material belongs to."""

    key_id: str = "key"
    version_id: str = "a" * 32
    key_type: KeyType = KeyType.EC
    curve: Curve = Curve.P256
    size_bits: int = 256


OTHER_VERSIONS = {
    "key": Version(key_id="kez"),
    "version": Version(version_id="a" * 31 + "b"),
    "type": Version(key_type=KeyType.OCT),
    "curve": Version(curve=Curve.P256K),
    "size": Version(size_bits=384),
    "fields that run into each other": Version(key_id="keya", version_id="a" * 31),
}
MATERIAL = b"private material of a key version"


def seal_for(keys: PoolKeys, version: Version) -> SealedMaterial:
    return seal_material(
        keys,
        version.key_id,
        version.version_id,
        version.key_type,
        version.curve,
        version.size_bits,
        SecretBytes(MATERIAL),
    )


def open_for(keys: PoolKeys, version: Version, sealed: SealedMaterial) -> bytes:
    return open_material(
        keys,
        version.key_id,
        version.version_id,
        version.key_type,
        version.curve,
        version.size_bits,
        sealed,
    ).reveal()


def test_material_opens_for_its_own_version(keys: PoolKeys) -> None:
    """G6, positive control."""
    sealed = seal_for(keys, Version())
    assert sealed.epoch == 2
    assert MATERIAL not in sealed.ciphertext
    assert open_for(keys, Version(), sealed) == MATERIAL


@pytest.mark.parametrize("version", OTHER_VERSIONS.values(), ids=OTHER_VERSIONS.keys())
def test_material_does_not_open_for_another_version(keys: PoolKeys, version: Version) -> None:
    """G6: material that was moved between versions inside authentic records does not open."""
    with pytest.raises(Tampered):
        open_for(keys, version, seal_for(keys, Version()))


def test_material_is_bound_to_pool_and_epoch_and_unchanged(keys: PoolKeys, secret: SecretBytes) -> None:
    """G6: another pool with the same keys, another epoch, another nonce, another octet."""
    sealed = seal_for(keys, Version())
    with pytest.raises(Tampered):
        open_for(keys_of(OTHER_POOL, secret), Version(), sealed)
    for other in (
        replace(sealed, epoch=1),
        replace(sealed, epoch=3),
        replace(sealed, nonce=os.urandom(12)),
        replace(sealed, nonce=b""),
        replace(sealed, ciphertext=b""),
        replace(sealed, ciphertext=sealed.ciphertext[:-1]),
        replace(sealed, ciphertext=bytes([sealed.ciphertext[0] ^ 1]) + sealed.ciphertext[1:]),
    ):
        with pytest.raises(Tampered):
            open_for(keys, Version(), other)


def test_a_record_and_material_are_sealed_under_different_keys(keys: PoolKeys) -> None:
    """G6: what is sealed as a record cannot be taken for material."""
    envelope = record_pb2.Envelope.FromString(seal(keys, HERE))
    with pytest.raises(Tampered):
        open_for(keys, Version(), SealedMaterial(2, envelope.nonce, envelope.ciphertext))


# -- the pool's keys ----------------------------------------------------------------------


def test_opaque_ids_are_unambiguous_and_keyed(keys: PoolKeys) -> None:
    """G3: names are not to be guessed from ids without the key, and no two names share one."""
    names = [("key", "a"), ("key", "b"), ("version", "a"), ("version", "a", "b"), ("request", "a"), ("pool",)]
    ids = {keys.opaque_id(name) for name in names}
    assert len(ids) == len(names)
    assert ids.isdisjoint(
        {PoolKeys.generate(POOL, 1, SecretBytes(bytes(32))).opaque_id(name) for name in names}
    )


def test_pool_keys_come_back_from_their_export_and_do_not_show(keys: PoolKeys) -> None:
    """G3: export is the only way out; repr and pickle are none."""
    again = PoolKeys(POOL, keys.export())
    assert open_record(again, HERE.opaque_id, seal(keys, HERE))[2] == BODY
    assert again.mac(2, b"l", b"d") == keys.mac(2, b"l", b"d") != keys.mac(1, b"l", b"d")
    message = record_pb2.PoolKeysSecret.FromString(keys.export().reveal())
    shown = repr(keys) + str(keys) + repr(keys.export())
    assert message.name_key.hex() not in shown
    backup_key = again.backup_private_key(1)
    assert backup_key is not None
    assert message.backup_private_keys[1] == backup_key.reveal()
    assert again.backup_private_key(2) is None
    assert "redacted" in shown
    with pytest.raises(TypeError):
        pickle.dumps(keys)


@pytest.mark.parametrize("field", ["name_key", "backup_private_keys", "epoch", "key_encryption_keys"])
def test_malformed_pool_keys_are_refused(field: str, secret: SecretBytes) -> None:
    """G8: keys of a wrong length, and an epoch in force without a key."""
    message = record_pb2.PoolKeysSecret.FromString(secret.reveal())
    match field:
        case "epoch":
            message.epoch = 9
        case "backup_private_keys":
            message.backup_private_keys[1] = b"short"
        case "key_encryption_keys":
            message.key_encryption_keys[2] = b"short"
        case _:
            setattr(message, field, b"short")
    with pytest.raises(ValueError, match=r"pool key|backup key|epoch"):
        PoolKeys(POOL, SecretBytes(message.SerializeToString()))


def test_keys_are_added_to_those_that_are_there(keys: PoolKeys) -> None:
    """G1: what was sealed under an epoch still opens, also if the other set has another key of it."""
    here, there = PoolKeys(POOL, keys.export()), keys.with_epoch(3)
    own = record_pb2.PoolKeysSecret.FromString(there.export().reveal())
    own.key_encryption_keys[2] = os.urandom(32)
    here.take(PoolKeys(POOL, SecretBytes(own.SerializeToString())))
    assert here.epoch == 2, "the chain says which one is in force"
    assert open_record(here, HERE.opaque_id, seal(keys, HERE))[2] == BODY
    assert here.mac(3, b"l", b"d") == there.mac(3, b"l", b"d")
    assert not keys.holds(3)


def test_the_backup_key_of_a_generation_that_was_begun_again_is_the_newer_one(keys: PoolKeys) -> None:
    """G1: what the first beginning left behind would open no backup of the domain that came in force."""
    here = PoolKeys(POOL, keys.export())
    first, second = (SecretBytes(os.urandom(32)) for _ in range(2))
    for epoch, key in ((3, first), (4, second)):
        here.take(here.with_epoch(epoch, 2, key))
    newest = here.backup_private_key(2)
    assert newest
    assert newest.equals(second)
    earlier, before = here.backup_private_key(1), keys.backup_private_key(1)
    assert earlier
    assert before
    assert earlier.equals(before), "backups of the generation before stay readable"
