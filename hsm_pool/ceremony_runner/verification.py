"""Verification of transcripts: offline, from the file alone and the authority's certificate.

Nothing of a transcript is believed before its signature holds, and nothing of it is a reason for a
traceback: whoever hands it over may have made it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from hsm_pool.ceremony_runner.plan import DATA_DIRECTORY, Plan, PlanRefused, Step, parse_plan
from hsm_pool.ceremony_runner.transcript import (
    ABORTED,
    COMPLETED,
    DONE,
    FAILED,
    FORMAT,
    REPEATS_MAX,
    SIGNATURE_ALGORITHM,
    TRANSCRIPT_BYTES_MAX,
    administrator_uri,
    sha256,
    uri_of,
)
from security_domain.encoding import canonical, decode, parse_object
from security_domain.errors import SecurityDomainError
from security_domain.fingerprints import words_of_digest

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_HEADER: dict[str, type] = {
    "format": str,
    "software": str,
    "pool_id": str,
    "plan": dict,
    "parameters": dict,
    "answers": str,
    "started": str,
    "certificate": str,
}
_DOCUMENT: dict[str, type] = {**_HEADER, "entries": list, "ended": str, "signature": str}
_PLAN: dict[str, type] = {"title": str, "digest": str, "words": str, "text": str}
_ENTRY: dict[str, type] = {
    "index": int,
    "previous_digest": str,
    "actor": str,
    "action": str,
    "command": list,
    "expected": str,
    "answer": str,
    "started": str,
    "ended": str,
    "exit_code": object,
    "stdout": str,
    "stdout_sha256": str,
    "stderr_sha256": str,
    "inputs": list,
    "outputs": list,
    "result": str,
    "reason": str,
}
_END: dict[str, type] = {
    "index": int,
    "previous_digest": str,
    "result": str,
    "reason": str,
    "audit_checkpoints": list,
}
_EVIDENCE: dict[str, type] = {"path": str, "sha256": str, "words": str}


class TranscriptRefused(Exception):
    """The transcript was changed, is unfinished, or does not say what it must; the message says why."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verified transcript says. Without a certificate authority the signer is only claimed."""

    document: dict[str, Any]
    plan: Plan
    result: str
    reason: str
    steps_done: int
    signer: str
    certificate_checked: bool

    def evidence(self) -> list[tuple[str, dict[str, str]]]:
        """Return (where, {path, sha256, words}) of each file in the record; the plan has no path."""
        plan = self.document["plan"]
        found = [("plan", {"path": "", "sha256": plan["digest"], "words": plan["words"]})]
        number = 1
        for entry in self.document["entries"][:-1]:
            for kind in ("inputs", "outputs"):
                found += [(f"step {number}, {kind[:-1]}", item) for item in entry[kind]]
            number += entry["result"] == DONE
        return found


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What the journal of a ceremony that never ended says. It is not signed."""

    title: str
    steps: int
    steps_done: int
    under_way: int | None
    """The step that had begun and has no entry."""


def read_journal(octets: bytes) -> Unfinished:
    """Return what a journal says; a torn last line is left out.

    Raises:
        TranscriptRefused: It is not a journal, or its chain is broken.
    """
    lines = octets.split(b"\n")[:-1]
    try:
        first = parse_object(lines[0], TRANSCRIPT_BYTES_MAX, {"header": dict})["header"]
        plan = _plan_of(first)
        previous, index, done, under_way = first, 0, 0, None
        for line in lines[1:]:
            if line.startswith(b'{"under_way"'):
                under_way = parse_object(line, TRANSCRIPT_BYTES_MAX, {"under_way": int})["under_way"]
                continue
            entry = parse_object(line, TRANSCRIPT_BYTES_MAX, {"entry": dict})["entry"]
            index += 1
            _check_link(entry, index, previous)
            previous, under_way = entry, None
            done += "actor" in entry and entry.get("result") == DONE
    except (SecurityDomainError, IndexError, KeyError):
        raise TranscriptRefused("not the journal of a ceremony, or changed") from None
    return Unfinished(plan.title, len(plan.steps), done, under_way)


def verify(octets: bytes, ca_pem: bytes | None = None) -> Verified:
    """Check a transcript: encoding, signature, chain, and that it follows its own plan.

    Args:
        octets: The file.
        ca_pem: Certificate of the pool's client authority. Without it the signature proves integrity
            under the embedded certificate only, which anybody could have made.

    Raises:
        TranscriptRefused: Anything is not as it must be.
    """
    try:
        document = parse_object(octets, TRANSCRIPT_BYTES_MAX, _DOCUMENT)
        signature = decode(document["signature"])
    except SecurityDomainError as error:
        raise TranscriptRefused(f"not a transcript, or changed: {error}") from None
    try:
        certificate = x509.load_pem_x509_certificate(document["certificate"].encode())
        key, signer = certificate.public_key(), uri_of(certificate)
    except Exception:  # noqa: BLE001 - parsers raise many kinds
        raise TranscriptRefused("the embedded certificate is not readable") from None
    if document["format"] != FORMAT:
        raise TranscriptRefused("the transcript has another format")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TranscriptRefused("the embedded certificate is not of a P-256 key")
    body = {name: value for name, value in document.items() if name != "signature"}
    try:
        key.verify(signature, canonical(body), SIGNATURE_ALGORITHM)
    except InvalidSignature:
        raise TranscriptRefused("the signature is not of this text and the embedded certificate") from None
    if signer != administrator_uri(document["pool_id"]):
        raise TranscriptRefused(f"signed by {signer!r:.200}, not by the administrator of the pool it names")
    if ca_pem is not None:
        _check_certificate(certificate, ca_pem, (document["started"], document["ended"]))
    plan = _plan_of(document)
    end = _check_entries(document, plan)
    done = sum(entry["result"] == DONE for entry in document["entries"][:-1])
    return Verified(document, plan, end["result"], end["reason"], done, signer, ca_pem is not None)


def _check_certificate(certificate: x509.Certificate, ca_pem: bytes, times: Sequence[str]) -> None:
    try:
        authority = x509.load_pem_x509_certificate(ca_pem)
        authority_is_ca, authority_usage = _constraints(authority)
        is_ca, usage = _constraints(certificate)
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, x509.ExtensionNotFound):
        raise TranscriptRefused("the certificate was not issued by this authority, or not readable") from None
    except InvalidSignature:
        raise TranscriptRefused("the certificate was not issued by this authority") from None
    if not authority_is_ca or is_ca:
        raise TranscriptRefused("the certificate was not issued by an authority to an identity")
    if not authority_usage.key_cert_sign or not usage.digital_signature:
        raise TranscriptRefused("a certificate's key is not meant for what it has signed")
    for text in times:  # as of the ceremony: a transcript is read years later
        for checked in (certificate, authority):
            if not checked.not_valid_before_utc <= _time(text) <= checked.not_valid_after_utc:
                raise TranscriptRefused("a certificate was not valid at the time of the ceremony")


def _constraints(certificate: x509.Certificate) -> tuple[bool, x509.KeyUsage]:
    """Return whether a certificate is an authority's, and what its key is for (RFC 5280, section 4.2.1).

    Raises:
        x509.ExtensionNotFound: It does not say: every authority and identity of a pool does.
    """
    extensions = certificate.extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
    return constraints.ca, extensions.get_extension_for_class(x509.KeyUsage).value


def _plan_of(header: Mapping[str, Any]) -> Plan:
    """Return the plan in a header, after checking that it is the one whose digest stands there."""
    told = _fields(header["plan"], _PLAN, "plan")
    try:
        plan = parse_plan(told["text"].encode())
    except (PlanRefused, ValueError):
        raise TranscriptRefused("the plan in the transcript is not a plan") from None
    if (plan.title, plan.digest, plan.words) != (told["title"], told["digest"], told["words"]):
        raise TranscriptRefused("the plan is not the one whose digest is in the transcript")
    return plan


def _check_entries(document: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Check the chain and that each entry is the plan's step; return the end entry."""
    parameters, entries = document["parameters"], document["entries"]
    names = {parameter.name for parameter in plan.parameters} | {DATA_DIRECTORY}
    if set(parameters) != names or not all(isinstance(value, str) for value in parameters.values()):
        raise TranscriptRefused("the parameters are not those of the plan")
    if not document["pool_id"].isprintable():  # it is shown, as part of the signer's name
        raise TranscriptRefused("the pool's name is not printable")
    if document["answers"] not in ("terminal", "file"):
        raise TranscriptRefused("it does not say who answered")
    for text in (document["started"], document["ended"]):
        _time(text)
    if not 2 <= len(entries) <= len(plan.steps) + REPEATS_MAX + 1:
        raise TranscriptRefused("entries are missing, or there are more than the plan has steps")
    previous: Mapping[str, Any] = {name: document[name] for name in _HEADER}
    try:
        steps = plan.filled(parameters)
    except PlanRefused as error:
        raise TranscriptRefused(str(error)) from None
    done, seen = 0, dict[str, str]()
    for index, value in enumerate(entries[:-1], start=1):
        entry = _fields(value, _ENTRY, f"entry {index}")
        _check_link(entry, index, previous)
        if done == len(steps):
            raise TranscriptRefused(f"entry {index} comes after the plan's last step")
        _check_step(entry, done + 1, steps[done])
        last = index == len(entries) - 1
        # A step that failed is followed by itself, done again, if people were there to ask.
        repeated = entry["result"] == FAILED and document["answers"] == "terminal"
        if entry["result"] != DONE and not last and not repeated:
            raise TranscriptRefused(f"entry {index} has no such result at this place")
        if entry["result"] == DONE:
            done += 1
            _check_files(entry, seen)
        previous = entry
    end = _fields(entries[-1], _END, "the end entry")
    _check_link(end, len(entries), previous)
    result = entries[-2]["result"]
    if end["result"] != (COMPLETED if result == DONE else result) or (result == DONE and done != len(steps)):
        raise TranscriptRefused("the end is not what the steps led to")
    # It is shown: whoever made the transcript must not steer the reader's terminal.
    if end["reason"] != entries[-2]["reason"] or not end["reason"].isprintable():
        raise TranscriptRefused("the end does not give the last step's reason")
    if not all(isinstance(text, str) for text in end["audit_checkpoints"]):
        raise TranscriptRefused("the end holds something else than checkpoints of audit logs")
    return end


def _check_link(entry: Mapping[str, Any], index: int, previous: Mapping[str, Any]) -> None:
    if entry.get("index") != index or entry.get("previous_digest") != sha256(canonical(previous)):
        raise TranscriptRefused(f"entry {index} does not follow the one before: dropped, added or changed")


def _check_step(entry: Mapping[str, Any], number: int, step: Step) -> None:
    where = f"entry {entry['index']}"
    told = (entry["actor"], entry["action"], entry["command"], entry["expected"])
    if told != (step.actor, step.action, list(step.command), step.expected):
        raise TranscriptRefused(f"{where} is not step {number} of the plan")
    if entry["result"] not in (DONE, FAILED, ABORTED):
        raise TranscriptRefused(f"{where} has no such result")
    for text in (entry["started"], entry["ended"]):
        _time(text)
    paths = {}
    for kind in ("inputs", "outputs"):
        items = [_fields(item, _EVIDENCE, f"{where}: {kind}") for item in entry[kind]]
        paths[kind] = tuple(item["path"] for item in items)
        if not all(map(_is_evidence, items)):
            raise TranscriptRefused(f"{where}: {kind} without a digest and its words")
    if entry["result"] != DONE:
        return
    if (paths["inputs"], paths["outputs"]) != (step.inputs, step.outputs):
        raise TranscriptRefused(f"{where}: its files are not those of the plan")
    if entry["exit_code"] != (step.exit_code if step.command else None) or entry["answer"] != "continue":
        raise TranscriptRefused(f"{where} is called done with another exit code or answer")
    whole = sha256(entry["stdout"].encode("utf-8", "surrogatepass")) == entry["stdout_sha256"]
    if whole and step.expected_output not in entry["stdout"]:
        raise TranscriptRefused(f"{where} is called done without the expected output")


def _check_files(entry: Mapping[str, Any], seen: dict[str, str]) -> None:
    """Check that a step that is done began with the files that the steps before it have left.

    Args:
        entry: Of the step.
        seen: Digests of the files so far, by path; those of this entry are added.
    """
    for item in entry["inputs"]:
        if seen.setdefault(item["path"], item["sha256"]) != item["sha256"]:
            raise TranscriptRefused(
                f"entry {entry['index']}: {item['path']!r:.200} is another file than before"
            )
    seen.update({item["path"]: item["sha256"] for item in entry["outputs"]})


def _is_evidence(item: Mapping[str, Any]) -> bool:
    """Return whether the words, which people compare, are those of the digest."""
    digest = item["sha256"]
    return bool(_DIGEST.fullmatch(digest)) and item["words"] == words_of_digest(bytes.fromhex(digest))


def _fields(value: object, fields: Mapping[str, type], where: str) -> dict[str, Any]:
    """Check an object with exactly these fields of these types; unlike the domain's files, in any script."""
    if not isinstance(value, dict) or set(value) != set(fields):
        raise TranscriptRefused(f"{where}: fields are missing or unknown")
    for name, kind in fields.items():
        if not isinstance(value[name], kind) or (kind is int and isinstance(value[name], bool)):
            raise TranscriptRefused(f"{where}: {name} is not of the right type")
    return value


def _time(text: str) -> datetime:
    moment = None
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(text) if text.isprintable() else None
    if moment is None or moment.utcoffset() is None:
        raise TranscriptRefused("a time is not readable")
    return moment
