"""G7: verify and partitions check every single signature: one that does not fit, one of somebody else."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hsm_pool.audit import files
from hsm_pool.audit.checkpoint import Note
from hsm_pool.errors import CheckpointRefused
from mhsm.peer.v1 import peer_pb2
from tests.unit.audit.logs import Honest, ThreeLogs, verify


def _broken(line: str) -> str:
    """Return a signature line with the same key and another signature."""
    head, _, encoded = line.rpartition(" ")
    octets = base64.b64decode(encoded)
    return f"{head} {base64.b64encode(octets[:-1] + bytes([octets[-1] ^ 1])).decode()}"


def _with_broken(text: str, number: int) -> str:
    """Return a note with one of its signatures broken."""
    note = Note.parse(text)
    lines = list(note.signatures)
    lines[number] = _broken(lines[number])
    return Note(note.checkpoint, tuple(lines)).text


def _in_checkpoints(pool: Path, key: str, change: Callable[[dict[str, object]], None]) -> None:
    """Change the newest line of a kind in the file of checkpoints of log 0."""
    path = files.listed(pool / "nodes/0/audit", files.CHECKPOINTS)[-1]
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(next(line for line in reversed(lines) if key in line))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _own(pool: Path) -> None:
    def change(line: dict[str, object]) -> None:
        line["checkpoint"] = _with_broken(str(line["checkpoint"]), 0)

    _in_checkpoints(pool, "checkpoint", change)


def _cosignature(pool: Path) -> None:
    def change(line: dict[str, object]) -> None:
        (first, *others) = line["cosignatures"]  # type: ignore[misc]
        line["cosignatures"] = [_broken(first), *others]

    _in_checkpoints(pool, "cosignatures", change)


def _noted(number: int) -> Callable[[Path], None]:
    def forge(pool: Path) -> None:
        path = pool / "nodes/1/audit" / files.PEERS
        document = json.loads(path.read_bytes())
        document["logs"][0]["checkpoint"] = _with_broken(document["logs"][0]["checkpoint"], number)
        path.write_text(json.dumps(document))

    return forge


FORGED = {
    "of a log": _own,
    "of a peer below it": _cosignature,
    "of a log that a witness noted": _noted(0),
    "of the witness below it": _noted(1),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_verify_checks_each_signature(honest: Honest, copied: Path, forge: Callable[[Path], None]) -> None:
    forge(copied)
    found = {finding.what for finding in verify(copied, honest.pool_id).findings}
    assert any("does not fit the checkpoint" in what for what in found), found


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[ThreeLogs]:
    three = ThreeLogs(tmp_path / "pool")
    three.checkpoint()
    yield three
    three.close()


def test_a_witness_cosigns_nothing_that_another_partition_signed_for_this_one(logs: ThreeLogs) -> None:
    """Its key is certified, and the checkpoint names the log of the one who asks."""
    last = Note.parse(_newest(logs)).checkpoint
    following = dataclasses.replace(last, number=last.number + 1, previous=last.digest)
    for index, refused in ((2, True), (0, False)):
        signer = logs.trails[index].signer
        request = peer_pb2.CosignRequest(
            checkpoint=signer.sign(following).text, signer=signer.public.message(), old_size=last.size
        )
        if refused:
            with pytest.raises(CheckpointRefused, match="of another partition"):
                logs.trails[1].witness.cosign(request, 0)
        else:
            assert logs.trails[1].witness.cosign(request, 0).cosignature


def test_a_noted_checkpoint_that_its_own_partition_cosigned_is_detected(logs: ThreeLogs) -> None:
    """It is what a witness would have to have made: nobody else has seen the log."""
    path = logs.log_directory(1) / files.PEERS
    document = json.loads(path.read_bytes())
    (entry,) = (entry for entry in document["logs"] if "/partition/0/" in entry["checkpoint"].split("\n")[0])
    note = Note.parse(entry["checkpoint"])
    own = logs.trails[0].signer.cosign(note.checkpoint)
    entry["checkpoint"] = Note(note.checkpoint, (note.signatures[0], own)).text
    path.write_text(json.dumps(document))
    found = {finding.what for finding in verify(logs.directory, logs.pool_id).findings}
    assert any("a partition has cosigned its own checkpoint" in what for what in found), found


def test_one_peer_does_not_cosign_for_both(logs: ThreeLogs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cosignatures are of two partitions."""
    trail = logs.trails[0]

    def always_the_same(_: int, request: peer_pb2.CosignRequest) -> peer_pb2.CosignResponse:
        signer = logs.trails[2].signer
        checkpoint = Note.parse(request.checkpoint).checkpoint
        return peer_pb2.CosignResponse(
            known_size=request.old_size, signer=signer.public.message(), cosignature=signer.cosign(checkpoint)
        )

    monkeypatch.setattr(trail, "_cosign_peer", always_the_same)
    logs.read(0)
    trail.step()
    newest = Note.parse(_newest(logs)).checkpoint.number
    (path,) = files.listed(logs.log_directory(0), files.CHECKPOINTS)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sum("cosignatures" in line and line["number"] == newest for line in lines) == 1


def _newest(logs: ThreeLogs) -> str:
    newest = logs.trails[0].history.newest
    assert newest
    return newest.text
