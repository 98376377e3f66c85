"""G7: a proof's file shows what it says under the owner's root alone, and nothing else is taken for one."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from click.testing import CliRunner, Result
from hypothesis import strategies as st

from hsm_pool.audit import query
from hsm_pool.audit.checkpoint import Note
from hsm_pool.audit.proof import Consistency, Inclusion, Proof
from hsm_pool.audit.tree import ProofRefused
from hsm_pool.cli.main import mhsm
from tests.unit.audit.logs import ThreeLogs, owner_root

OLD, INDEX = 1, 3
"""Partition whose log is proved, and the record."""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> ThreeLogs:
    three = ThreeLogs(tmp_path_factory.mktemp("proof") / "pool")
    for _ in range(3):
        three.read(OLD, 5)
        three.checkpoint()
    three.close()
    return three


@pytest.fixture(scope="module")
def old(logs: ThreeLogs) -> Note:
    """A checkpoint that somebody kept."""
    (path,) = logs.log_directory(OLD).glob("checkpoints-*")
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return Note.parse(next(line["checkpoint"] for line in lines if "checkpoint" in line))


@pytest.fixture(scope="module")
def inclusion(logs: ThreeLogs) -> Proof:
    note, signers = _newest(logs)
    record = dict(query.records_from(logs.log_directory(OLD), 0))[INDEX].decode()
    path = logs.trails[OLD].log.inclusion_proof(INDEX, note.checkpoint.size)
    return Proof(note, signers, Inclusion(INDEX, record, path))


@pytest.fixture(scope="module")
def consistency(logs: ThreeLogs, old: Note) -> Proof:
    note, signers = _newest(logs)
    size, root = old.checkpoint.size, old.checkpoint.root
    path = logs.trails[OLD].log.consistency_proof(size, note.checkpoint.size)
    return Proof(note, signers, Consistency(size, root, path))


def _newest(logs: ThreeLogs) -> tuple[Note, Any]:
    note, signers = logs.trails[OLD].history.newest_and_signers()
    assert note
    assert len(signers) == len(note.signatures) == 3
    return note, tuple(signers)


def run(file: Path, pool: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(
        mhsm, ["audit", "verify-proof", str(file), "--data-dir", str(pool), *arguments]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_proof_of_a_record_needs_its_file_and_the_root(
    logs: ThreeLogs, inclusion: Proof, tmp_path: Path
) -> None:
    file = tmp_path / "proof.json"
    file.write_bytes(inclusion.render())
    shown = json.loads(run(file, logs.directory, "--json").stdout)
    assert shown["ok"]
    assert (shown["partition"], shown["index"]) == (OLD, INDEX)
    assert json.loads(shown["record"])["operationName"] == "KeyGet"
    assert [entry["partition"] for entry in shown["cosigned"]] == [0, 2]
    root = str(logs.directory / "nodes/0/owner/root.crt")
    elsewhere = run(file, tmp_path / "no pool", "--owner-root", root)
    assert elsewhere.exit_code == 0
    assert inclusion.shown.document()["record"] in elsewhere.stdout
    assert run(file, tmp_path / "no pool").exit_code == 1


def test_a_proof_of_consistency_begins_with_the_checkpoint_that_was_kept(
    logs: ThreeLogs, consistency: Proof, old: Note, tmp_path: Path
) -> None:
    file, kept = tmp_path / "proof.json", tmp_path / "kept"
    file.write_bytes(consistency.render())
    kept.write_text(old.text)
    assert run(file, logs.directory, "--old-checkpoint", str(kept)).exit_code == 0
    unkept = run(file, logs.directory)
    assert unkept.exit_code == 0
    assert base64.b64encode(old.checkpoint.root).decode() in unkept.stderr
    other = dataclasses.replace(old.checkpoint, root=bytes(32))
    kept.write_text(Note(other, old.signatures).text)
    assert run(file, logs.directory, "--old-checkpoint", str(kept)).exit_code == 6
    kept.write_text(consistency.note.text)
    assert run(file, logs.directory, "--old-checkpoint", str(kept)).exit_code == 1


def test_a_record_does_not_begin_with_a_checkpoint(
    logs: ThreeLogs, inclusion: Proof, old: Note, tmp_path: Path
) -> None:
    file, kept = tmp_path / "proof.json", tmp_path / "kept"
    file.write_bytes(inclusion.render())
    kept.write_text(old.text)
    assert run(file, logs.directory, "--old-checkpoint", str(kept)).exit_code == 2


def test_no_byte_of_a_proof_can_be_changed(
    logs: ThreeLogs, inclusion: Proof, consistency: Proof, seed: int
) -> None:
    """It is refused, or shows the same: a signature may have another form, never another meaning."""
    root = owner_root(logs.directory)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=1000)
    @hypothesis.given(st.data())
    def change(data: st.DataObject) -> None:
        proof = data.draw(st.sampled_from((inclusion, consistency)))
        octets = bytearray(proof.render())
        place = data.draw(st.integers(0, len(octets) - 1))
        octets[place] ^= data.draw(st.integers(1, 255))
        try:
            changed = Proof.parse(bytes(octets))
            cosigned = changed.verify(root)
        except ProofRefused:
            return
        assert (changed.note.checkpoint, changed.shown) == (proof.note.checkpoint, proof.shown)
        assert cosigned == proof.verify(root)

    change()


def _forms(proof: Proof) -> dict[str, bytes]:
    octets = proof.render()
    head, _, tail = octets.partition(b'"format"')
    return {
        "cut": octets[:-2],
        "more after it": octets + b" ",
        "an entry twice": head + b'"checkpoint": "another", "format"' + tail,
        "other white space": json.dumps(json.loads(octets), sort_keys=True).encode(),
        "other encoding": octets.decode().encode("utf-16"),
        "nested deeply": b"[" * 100_000,
        "a list": b"[]",
        "a number": b"1",
        "too large": b" " * 300_000 + octets,
        "nothing": b"",
    }


@pytest.mark.parametrize(
    "form",
    [
        "cut",
        "more after it",
        "an entry twice",
        "other white space",
        "other encoding",
        "nested deeply",
        "a list",
        "a number",
        "too large",
        "nothing",
    ],
)
def test_a_proof_has_one_form(inclusion: Proof, form: str) -> None:
    with pytest.raises(ProofRefused, match="no proof of an audit log"):
        Proof.parse(_forms(inclusion)[form])


def test_what_a_proof_does_not_show_is_refused(logs: ThreeLogs, inclusion: Proof, consistency: Proof) -> None:
    root = owner_root(logs.directory)
    assert isinstance(inclusion.shown, Inclusion)
    assert isinstance(consistency.shown, Consistency)
    rewritten = inclusion.shown.record.replace("one", "two")
    other: Inclusion | Consistency = dataclasses.replace(inclusion.shown, index=INDEX + 1)
    changed: Inclusion | Consistency = dataclasses.replace(inclusion.shown, record=rewritten)
    other_root: Inclusion | Consistency = dataclasses.replace(consistency.shown, old_root=bytes(32))
    from_nothing = Consistency(0, bytes(32), ())
    for shown in (other, changed, other_root, from_nothing):
        proof = dataclasses.replace(inclusion, shown=shown)
        with pytest.raises(ProofRefused):
            Proof.parse(proof.render()).verify(root)


def test_a_checkpoint_that_no_other_partition_cosigned_proves_nothing(
    logs: ThreeLogs, inclusion: Proof
) -> None:
    """Whoever has one partition could show each reader another log."""
    note = inclusion.note
    alone = dataclasses.replace(inclusion, note=Note(note.checkpoint, note.signatures[:1]))
    with pytest.raises(ProofRefused, match="no other partition"):
        alone.verify(owner_root(logs.directory))
    own = logs.trails[OLD].signer.cosign(note.checkpoint)
    itself = dataclasses.replace(inclusion, note=Note(note.checkpoint, (note.signatures[0], own)))
    with pytest.raises(ProofRefused, match="its own checkpoint"):
        itself.verify(owner_root(logs.directory))


def test_a_proof_of_another_pool_is_refused(logs: ThreeLogs, inclusion: Proof, tmp_path: Path) -> None:
    """It is whole, but for another owner: anybody can make a pool."""
    another = ThreeLogs(tmp_path / "another")
    another.close()
    with pytest.raises(ProofRefused):
        inclusion.verify(owner_root(another.directory))
    file = tmp_path / "proof.json"
    file.write_bytes(inclusion.render())
    refused = run(file, another.directory)
    assert refused.exit_code == 6
    assert "--owner-root" in refused.stderr


def test_a_checkpoint_has_its_signers_after_a_restart_and_in_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsm_pool.audit.history._FILE_BYTES", 3000)
    three = ThreeLogs(tmp_path / "pool")
    for _ in range(6):
        three.read(OLD)
        three.checkpoint()
        _newest(three)
    three.restart(OLD)
    three.read(OLD)
    three.checkpoint()
    _newest(three)
    three.close()
    assert len(list(three.log_directory(OLD).glob("checkpoints-*"))) > 1
