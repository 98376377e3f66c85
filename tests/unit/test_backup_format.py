"""The format of backups: what is changed, cut, mixed or of another domain is refused (G3, G6, G8)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool.backup import bundle, contents
from hsm_pool.backup.bundle import Domain, Sealer, Snapshot
from hsm_pool.core.model import Curve, KeyRecord, KeyType, KeyVersionRecord
from hsm_pool.core.restore import BATCH_RECORDS
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import BackupRefused
from hsm_pool.store.sealing import PoolKeys, open_material, seal_material
from mhsm.record.v1 import record_pb2
from security_domain.encoding import canonical
from tests.running_pool import ROOT

KEY = SecretBytes(os.urandom(32))
DOMAIN = Domain("d" * 32, 1)


def keys_of(domain: Domain, key: SecretBytes) -> bundle.KeyOf:
    """Return the backup keys of a pool that has one, of one generation."""
    return {domain.generation: key}.get


KEYS = keys_of(DOMAIN, KEY)
SNAPSHOT = Snapshot("p" * 32, 7, b"h" * 32, 3)


def made(parts: list[bytes], domain: Domain = DOMAIN, key: SecretBytes = KEY) -> tuple[bytes, list[bytes]]:
    """Return (manifest, sealed parts) of a backup."""
    sealer = Sealer("b" * 32, domain, key)
    sealed = [sealer.content_key.seal(index, part) for index, part in enumerate(parts)]
    return canonical(sealer.manifest(SNAPSHOT, [bundle.part_digest(part) for part in sealed])), sealed


def opened(
    manifest: bytes, index: int, part: bytes, domain: Domain = DOMAIN, key: SecretBytes = KEY
) -> bytes:
    return bundle.open_part(
        bundle.open_manifest(manifest, domain.pool_id, keys_of(domain, key)), index, part
    ).reveal()


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=6))
def test_what_was_sealed_comes_back(parts: list[bytes]) -> None:
    manifest, sealed = made(parts)
    assert [opened(manifest, index, part) for index, part in enumerate(sealed)] == parts


MANIFEST, (FIRST, SECOND) = made([b"first part", b"second part"])


@given(st.data())
def test_a_changed_manifest_is_refused(data: st.DataObject) -> None:
    """G6: any field, also with a form that parses; there is one error for all."""
    fields: dict[str, Any] = json.loads(MANIFEST)
    name = data.draw(st.sampled_from(sorted(fields)))
    old = fields[name]
    if isinstance(old, int):
        fields[name] = old + data.draw(st.integers(1, 1000))
    elif isinstance(old, list):
        fields[name] = data.draw(st.sampled_from([old[::-1], old[:1], old + old[:1], [1, None]]))
    else:
        fields[name] = data.draw(st.sampled_from([old[:-1], old + "A", old.swapcase(), "", "0" * len(old)]))
    if fields[name] == old:
        return
    with pytest.raises(BackupRefused):
        bundle.open_manifest(canonical(fields), DOMAIN.pool_id, KEYS)


@given(st.binary(max_size=400) | st.integers(0, len(MANIFEST) - 1))
def test_junk_is_refused(junk: bytes | int) -> None:
    with pytest.raises(BackupRefused):
        bundle.open_manifest(MANIFEST[:junk] if isinstance(junk, int) else junk, DOMAIN.pool_id, KEYS)


def test_parts_are_bound_to_backup_and_place() -> None:
    """G6: swapped, of another backup, out of range, changed."""
    other, (foreign, _) = made([b"first part", b"second part"])
    assert opened(MANIFEST, 0, FIRST) == opened(other, 0, foreign)
    for index, part in (
        (1, FIRST),
        (0, SECOND),
        (0, foreign),
        (2, FIRST),
        (-1, SECOND),
        (0, FIRST[:-1]),
        (0, b""),
    ):
        with pytest.raises(BackupRefused):
            opened(MANIFEST, index, part)


@pytest.mark.parametrize("domain", [Domain("e" * 32, 1), Domain("d" * 32, 2)])
def test_another_domain_or_generation_is_refused(domain: Domain) -> None:
    """G4: even with the same key."""
    with pytest.raises(BackupRefused):
        bundle.open_manifest(MANIFEST, domain.pool_id, keys_of(domain, KEY))
    with pytest.raises(BackupRefused):
        bundle.open_manifest(MANIFEST, DOMAIN.pool_id, keys_of(DOMAIN, SecretBytes(os.urandom(32))))


def test_the_public_key_alone_makes_no_manifest() -> None:
    """G6: whoever knows only the public key cannot forge: the MAC needs the private one."""
    forged = json.loads(MANIFEST)
    forged["keys"] = 4
    for mac in (forged["mac"], "", "A" * 43):
        with pytest.raises(BackupRefused):
            bundle.open_manifest(canonical({**forged, "mac": mac}), DOMAIN.pool_id, KEYS)


def test_a_key_backup_is_no_full_backup() -> None:
    single = bundle.seal_key_backup(DOMAIN, KEY, SNAPSHOT, b"one key")
    assert bundle.open_key_backup(single, DOMAIN.pool_id, KEYS).reveal() == b"one key"
    fields = json.loads(single)
    content = fields.pop("content")
    with pytest.raises(BackupRefused):
        bundle.open_manifest(canonical(fields), DOMAIN.pool_id, KEYS)
    with pytest.raises(BackupRefused):
        bundle.open_key_backup(canonical({**json.loads(MANIFEST), "content": content}), DOMAIN.pool_id, KEYS)
    for position in range(0, len(single), 7):
        changed = single[:position] + bytes([single[position] ^ 1]) + single[position + 1 :]
        with pytest.raises(BackupRefused):
            bundle.open_key_backup(changed, DOMAIN.pool_id, KEYS)


def stored(keys: PoolKeys, key_id: str, versions: int, material: bytes) -> contents.StoredKey:
    """Return a key whose versions all hold the same material."""
    ids = tuple(f"{number:032x}" for number in range(versions))
    records = tuple(
        KeyVersionRecord(
            key_id,
            version_id,
            KeyType.OCT,
            Curve.NONE,
            256,
            b"",
            (),
            True,
            1,
            2,
            3,
            4,
            False,
            {"a": "b"},
            seal_material(keys, key_id, version_id, KeyType.OCT, Curve.NONE, 256, SecretBytes(material)),
        )
        for version_id in ids
    )
    return contents.StoredKey(KeyRecord(key_id, ids, 5, 6), records)


def test_material_moves_from_pool_to_pool() -> None:
    """G3: records come back equal but for their seal; the material opens under the new pool's keys."""
    here, there = (PoolKeys.generate(pool * 32, 1, KEY) for pool in "ab")
    keys = [stored(here, f"k{number}", number + 1, bytes([number]) * 32) for number in range(3)]
    moved = contents.put_back(there, contents.take(here, keys))
    assert [entry.key for entry in moved] == [entry.key for entry in keys]
    for number, entry in enumerate(moved):
        for version in entry.versions:
            opened_material = open_material(
                there,
                version.key_id,
                version.version_id,
                KeyType.OCT,
                Curve.NONE,
                256,
                version.sealed_material,
            )
            assert opened_material.reveal() == bytes([number]) * 32
    for junk in (b"\xff" * 9, contents.take(here, keys).reveal()[:-3]):
        with pytest.raises(BackupRefused):
            contents.put_back(there, SecretBytes(junk))


@pytest.mark.parametrize("change", ["order", "fewer", "more", "other key", "none", "materials", "nothing"])
def test_a_key_and_its_versions_belong_together(change: str) -> None:
    """G2, G8: whoever made the part; a key that names other versions than it has could not be served."""
    keys = PoolKeys.generate("a" * 32, 1, KEY)
    plaintext = contents.take(keys, [stored(keys, "k", 3, b"m" * 32)])
    message = record_pb2.BackupPart.FromString(plaintext.reveal())
    (entry,) = message.keys
    names = list(entry.key.version_ids)
    match change:
        case "order":
            entry.key.version_ids[:] = names[::-1]
        case "fewer":
            entry.key.version_ids[:] = names[:-1]
        case "more":
            entry.key.version_ids[:] = [*names, "f" * 32]
        case "other key":
            entry.versions[1].key_id = "other"
        case "none":
            entry.key.version_ids[:] = []
            del entry.versions[:], entry.materials[:]
        case "materials":
            del entry.materials[-1]
    changed = SecretBytes(message.SerializeToString())
    if change == "nothing":
        assert contents.put_back(keys, changed)[0].records[0] == KeyRecord("k", tuple(names), 5, 6)
    else:
        with pytest.raises(BackupRefused):
            contents.put_back(keys, changed)


def test_parts_and_batches_hold_everything_once() -> None:
    keys = PoolKeys.generate("a" * 32, 1, KEY)
    big = [stored(keys, f"k{number:04d}", 1 + number % 3, b"m" * 32) for number in range(400)]
    parts = contents.into_parts(big)
    assert [entry for part in parts for entry in part] == big
    assert len(parts) > 1
    batches = contents.into_batches(big)
    assert [record for batch in batches for record in batch] == [r for entry in big for r in entry.records]
    assert max(map(len, batches)) <= BATCH_RECORDS
    assert contents.into_parts([]) == [()]
    assert contents.into_batches([]) == [()]


def test_the_format_page_names_what_the_code_does() -> None:
    page = (Path(ROOT) / "hsm_pool/backup/FORMAT.md").read_text()
    assert set(re.findall(r"`([a-z_]+)`(?=[ ,|])", page)) >= set(json.loads(MANIFEST))
