"""Transcripts: whatever is changed shows (G6), and every operation is on record (G7)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool.ceremony_runner import transcript
from hsm_pool.ceremony_runner.plan import parse_plan
from hsm_pool.ceremony_runner.transcript import Identity, Journal, sha256
from hsm_pool.ceremony_runner.verification import TranscriptRefused, read_journal, verify
from security_domain.encoding import canonical, encode
from tests.unit.ceremony_runner.rehearsal import (
    POOL_ID,
    THREE_STEPS,
    Administrator,
    entry_fields,
    made_transcript,
    make_administrator,
)


def resigned(document: dict[str, Any], identity: Identity) -> bytes:
    """Sign a document anew, chained anew, as only the holder of a key can."""
    chain(document, 1)
    return signed_as_it_is(document, identity)


def chain(document: dict[str, Any], first: int) -> None:
    """Chain the entries anew, from one of them (its index) to the last."""
    header = {*document} - {"entries", "ended", "signature"}
    previous: Any = {name: value for name, value in document.items() if name in header}
    for index, entry in enumerate(document["entries"], start=1):
        if index >= first:
            entry.update(index=index, previous_digest=sha256(canonical(previous)))
        previous = entry


def signed_as_it_is(document: dict[str, Any], identity: Identity) -> bytes:
    body = {name: value for name, value in document.items() if name != "signature"}
    signature = identity.key.sign(canonical(body), ec.ECDSA(hashes.SHA256()))
    return canonical({**body, "signature": encode(signature)})


def test_a_whole_transcript_verifies(signed: bytes, ca: bytes) -> None:
    verified = verify(signed, ca)
    assert (verified.result, verified.steps_done, verified.certificate_checked) == ("completed", 3, True)
    assert verified.signer == f"spiffe://{POOL_ID}/client/administrator"
    assert not verify(signed).certificate_checked


@given(st.data())
def test_any_changed_bit_is_refused(signed: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, len(signed) * 8 - 1))
    changed = bytearray(signed)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TranscriptRefused):
        verify(bytes(changed))


@given(st.data())
def test_a_cut_or_longer_file_is_refused(signed: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(signed) - 1))
    for changed in (signed[:length], signed + signed[length:]):
        with pytest.raises(TranscriptRefused):
            verify(changed)


@given(st.lists(st.integers(0, 3), max_size=6).filter(lambda order: order != [0, 1, 2, 3]), st.booleans())
def test_dropped_reordered_and_added_entries_are_refused(
    signed: bytes, administrator: Administrator, order: list[int], chained: bool
) -> None:
    """Even if the administrator himself chains and signs them anew: they do not follow the plan."""
    document = json.loads(signed)
    document["entries"] = [json.loads(json.dumps(document["entries"][index])) for index in order]
    changed = resigned(document, administrator.identity) if chained else canonical(document)
    with pytest.raises(TranscriptRefused):
        verify(changed)


def _another_plan(document: dict[str, Any]) -> None:
    document["plan"]["text"] = document["plan"]["text"].replace("All is well", "All is lost")


def _another_command(document: dict[str, Any]) -> None:
    document["entries"][1]["command"] = ["mhsm", "down"]


def _another_parameter(document: dict[str, Any]) -> None:
    document["parameters"]["place"] = "elsewhere"


def _another_exit_code(document: dict[str, Any]) -> None:
    document["entries"][1]["exit_code"] = 1


def _no_evidence(document: dict[str, Any]) -> None:
    document["entries"][2]["inputs"] = []


def _no_outputs(document: dict[str, Any]) -> None:
    document["entries"][1]["outputs"] = []


def _another_output(document: dict[str, Any]) -> None:
    document["entries"][1]["outputs"][0]["path"] = "elsewhere"


def _one_more_output(document: dict[str, Any]) -> None:
    document["entries"][0]["outputs"] = document["entries"][1]["outputs"]


def _another_printed_text(document: dict[str, Any]) -> None:
    document["entries"][1].update(stdout="nothing", stdout_sha256=sha256(b"nothing"))


def _checkpoints_that_are_no_texts(document: dict[str, Any]) -> None:
    document["entries"][-1]["audit_checkpoints"] = ["a checkpoint", {"size": 1}]


def _no_list_of_checkpoints(document: dict[str, Any]) -> None:
    document["entries"][-1]["audit_checkpoints"] = "a checkpoint"


def _not_confirmed(document: dict[str, Any]) -> None:
    document["entries"][0]["answer"] = "abort"


def _failed_in_the_middle(document: dict[str, Any]) -> None:
    document["entries"][0]["result"] = "failed"


def _another_end(document: dict[str, Any]) -> None:
    document["entries"][-1]["result"] = "aborted"


def _another_pool(document: dict[str, Any]) -> None:
    document["pool_id"] = "f" * 32


def _more_fields(document: dict[str, Any]) -> None:
    document["entries"][0]["note"] = "x"


def _no_time(document: dict[str, Any]) -> None:
    document["started"] = "yesterday"


def _terminal_codes(document: dict[str, Any]) -> None:
    document["entries"][2]["reason"] = document["entries"][3]["reason"] = "\x1b[2J"


def _terminal_codes_in_a_time(document: dict[str, Any]) -> None:
    document["ended"] = document["ended"].replace("T", "\x1b")


def _another_reason(document: dict[str, Any]) -> None:
    document["entries"][3]["reason"] = "all went well"


def _lone_surrogate(document: dict[str, Any]) -> None:
    document["plan"]["text"] = "\ud800"


@pytest.mark.parametrize(
    "change",
    [
        _another_plan,
        _another_command,
        _another_parameter,
        _another_exit_code,
        _no_evidence,
        _no_outputs,
        _another_output,
        _one_more_output,
        _another_printed_text,
        _checkpoints_that_are_no_texts,
        _no_list_of_checkpoints,
        _not_confirmed,
        _failed_in_the_middle,
        _another_end,
        _another_pool,
        _more_fields,
        _no_time,
        _terminal_codes,
        _terminal_codes_in_a_time,
        _another_reason,
        _lone_surrogate,
    ],
)
def test_a_signed_lie_about_the_plan_is_refused(
    signed: bytes, administrator: Administrator, change: Callable[[dict[str, Any]], None]
) -> None:
    document = json.loads(signed)
    assert verify(resigned(document, administrator.identity)).result == "completed"
    change(document)
    with pytest.raises(TranscriptRefused):
        verify(resigned(document, administrator.identity))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    "change", [{"previous_digest": "0" * 64}, {"previous_digest": ""}, {"index": 9}], ids=str
)
def test_each_entry_names_the_one_before_it(
    signed: bytes, administrator: Administrator, place: int, change: dict[str, Any]
) -> None:
    """G7: the end too; whoever signed it, and with all other links whole."""
    document = json.loads(signed)
    document["entries"][place].update(change)
    chain(document, place + 2)
    with pytest.raises(TranscriptRefused, match=f"entry {place + 1} does not follow"):
        verify(signed_as_it_is(document, administrator.identity))


def test_what_else_a_transcript_may_say(signed: bytes, administrator: Administrator) -> None:
    """Positive control: checkpoints, more output than was asked for, and more than is recorded as text."""
    document, identity = json.loads(signed), administrator.identity
    document["entries"][-1]["audit_checkpoints"] = ["a checkpoint", "another"]
    document["entries"][1].update(stdout="it is mhsm 1", stdout_sha256=sha256(b"it is mhsm 1"))
    assert verify(resigned(document, identity)).result == "completed"
    document["entries"][1].update(stdout="", stdout_sha256=sha256(b"more than fits, with mhsm in it"))
    assert verify(resigned(document, identity)).result == "completed"


def test_an_entry_that_is_no_object_is_refused(signed: bytes, administrator: Administrator) -> None:
    document = json.loads(signed)
    for entries in (["x"] * 4, [None] * 4, [[]] * 2, [], [{}] * 4):
        body = {**document, "entries": entries}
        del body["signature"]
        signature = administrator.identity.key.sign(canonical(body), ec.ECDSA(hashes.SHA256()))
        with pytest.raises(TranscriptRefused):
            verify(canonical({**body, "signature": encode(signature)}))


def test_only_the_administrator_under_the_authority_counts(
    administrator: Administrator, ca: bytes, tmp_path: Path
) -> None:
    impostor = make_administrator(tmp_path / "impostor")
    forged = made_transcript(tmp_path / "forged.json", impostor.identity)
    assert not verify(forged).certificate_checked, "without the authority only integrity is shown"
    with pytest.raises(TranscriptRefused, match="not issued by this authority"):
        verify(forged, ca)
    same_authority = made_transcript(
        tmp_path / "other.json", make_administrator(tmp_path / "second", administrator.authority).identity
    )
    assert verify(same_authority, ca).certificate_checked
    certificate, key = administrator.authority.issue(f"spiffe://{POOL_ID}/client/application")
    with pytest.raises(transcript.IdentityRefused):
        transcript.load_identity(certificate, key, POOL_ID)
    forged_role = Identity(
        transcript.x509.load_pem_x509_certificate(certificate),
        transcript.serialization.load_pem_private_key(key, None),  # type: ignore[arg-type]
    )
    with pytest.raises(TranscriptRefused, match="not by the administrator"):
        verify(made_transcript(tmp_path / "application.json", forged_role), ca)
    with pytest.raises(transcript.IdentityRefused, match="do not belong together"):
        transcript.load_identity(administrator.identity.certificate_pem.encode(), key, POOL_ID)


def test_the_certificate_must_have_been_valid_then(
    signed: bytes, administrator: Administrator, ca: bytes
) -> None:
    document = json.loads(signed)
    document["ended"] = "2099-01-01T00:00:00.000Z"
    late = resigned(document, administrator.identity)
    assert verify(late).result == "completed"
    with pytest.raises(TranscriptRefused, match="not valid at the time"):
        verify(late, ca)


@pytest.mark.parametrize(
    "ca_pem", [b"", b"x", b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----"]
)
def test_an_unreadable_authority_is_refused(signed: bytes, ca_pem: bytes) -> None:
    with pytest.raises(TranscriptRefused):
        verify(signed, ca_pem)


@pytest.mark.parametrize(("result", "answer"), [("failed", "continue"), ("aborted", "abort")])
def test_a_ceremony_that_did_not_complete_verifies_as_such(
    administrator: Administrator, tmp_path: Path, result: str, answer: str
) -> None:
    fields = {"result": result, "answer": answer, "exit_code": 9, "reason": "r"}
    octets = made_transcript(tmp_path / "t", administrator.identity, (1, 2), result, **fields)
    assert (verify(octets).result, verify(octets).steps_done) == (result, 1)
    called_complete = made_transcript(tmp_path / "u", administrator.identity, (1, 2), "completed", **fields)
    with pytest.raises(TranscriptRefused):
        verify(called_complete)
    too_short = made_transcript(tmp_path / "v", administrator.identity, (1, 2), "completed")
    with pytest.raises(TranscriptRefused):
        verify(too_short)


def _failed_before(document: dict[str, Any], *places: int) -> dict[str, Any]:
    """Return a document in which the steps at these places failed before they were done."""
    changed: dict[str, Any] = json.loads(json.dumps(document))
    changed["answers"] = "terminal"
    for place in sorted(places, reverse=True):
        failed = {**changed["entries"][place], "result": "failed", "reason": "r", "exit_code": 9}
        changed["entries"].insert(place, failed)
    return changed


def test_a_step_may_fail_before_it_is_done(signed: bytes, administrator: Administrator) -> None:
    """G7: at a terminal, each time on record; nothing else may come between a plan's steps."""
    document, identity = json.loads(signed), administrator.identity
    repeated = _failed_before(document, 1, 1, 2)
    verified = verify(resigned(repeated, identity))
    assert (verified.result, verified.steps_done) == ("completed", 3)
    files = ["step 2, output"] * 3 + ["step 3, input"] * 2
    assert [where for where, _ in verified.evidence()] == ["plan", *files]
    for refused in (
        {**repeated, "answers": "file"},  # nobody was there to ask
        _failed_before(document, *[1] * (transcript.REPEATS_MAX + 1)),
    ):
        with pytest.raises(TranscriptRefused):
            verify(resigned(refused, identity))
    skipped = _failed_before(document, 1)
    del skipped["entries"][2]  # failed, and never done
    aborted = _failed_before(document, 1)
    aborted["entries"][1]["result"] = "aborted"
    after = _failed_before(document)
    after["entries"].insert(3, {**after["entries"][2], "result": "failed", "reason": ""})
    for refused in (skipped, aborted, after):
        with pytest.raises(TranscriptRefused):
            verify(resigned(refused, identity))
    as_many = _failed_before(document, *[1] * transcript.REPEATS_MAX)
    assert verify(resigned(as_many, identity)).result == "completed"


def test_a_journal_is_never_taken_for_a_transcript(administrator: Administrator, tmp_path: Path) -> None:
    """Cut anywhere, it says what is in it or is refused; it never verifies (G7)."""
    plan, values = parse_plan(THREE_STEPS), {"place": "here", "data_directory": "/pool"}
    header = transcript.make_header(plan, values, administrator.identity, POOL_ID, "test", "file")
    journal = Journal(tmp_path / "t.json", header)
    with pytest.raises(FileExistsError):
        Journal(tmp_path / "t.json", header)
    first = journal.path.read_bytes()
    journal.append(entry_fields(plan, 1, values))
    journal.begin(2)
    octets = journal.path.read_bytes()
    assert journal.path.stat().st_mode & 0o777 == 0o600
    seen = read_journal(octets)
    assert (seen.title, seen.steps, seen.steps_done, seen.under_way) == ("Three steps", 3, 1, 2)
    for length in range(0, len(octets), 7):
        with pytest.raises(TranscriptRefused):
            verify(octets[:length])
        if length < len(first):
            with pytest.raises(TranscriptRefused):
                read_journal(octets[:length])
        else:
            assert read_journal(octets[:length]).steps_done <= 1
    with pytest.raises(TranscriptRefused):
        read_journal(octets.replace(b'"answer":"continue"', b'"answer":"abort"', 1) + b'{"entry":{}}\n')
    journal.remove()


def test_evidence_is_of_regular_bounded_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "missing", tmp_path, Path("/dev/null")):
        with pytest.raises(OSError):
            transcript.evidence(str(path))
    (tmp_path / "file").write_bytes(b"abcd")
    assert transcript.evidence(str(tmp_path / "file"))["sha256"] == sha256(b"abcd")
    monkeypatch.setattr(transcript, "EVIDENCE_BYTES_MAX", 3)
    with pytest.raises(OSError, match="more than 3 bytes"):
        transcript.evidence(str(tmp_path / "file"))
