"""mhsm ceremony: running a written plan, and checking the transcript that it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from hsm_pool.ceremony_runner import transcript, verification
from hsm_pool.ceremony_runner.display import show_parameters, show_plan, show_step
from hsm_pool.ceremony_runner.interaction import (
    ABORT,
    CONTINUE,
    AnswersInteraction,
    Interaction,
    TerminalInteraction,
)
from hsm_pool.ceremony_runner.plan import (
    DATA_DIRECTORY,
    Parameter,
    Plan,
    PlanRefused,
    check_value,
    read_plan,
)
from hsm_pool.ceremony_runner.runner import Runner
from hsm_pool.ceremony_runner.transcript import COMPLETED, FAILED, IdentityRefused, Journal
from hsm_pool.ceremony_runner.verification import TranscriptRefused
from hsm_pool.cli import ceremony_progress, output
from hsm_pool.cli.files import refuse_existing, write_new
from hsm_pool.cli.output import data_directory_option, fail, failure_of, json_option, read_bounded, report
from hsm_pool.client import audit_calls
from hsm_pool.client.connection import Connection, NoConnection, load_connection
from hsm_pool.client.pool import Pool

ANSWERS_BYTES_MAX = 64 * 1024
_UNDER_WAY_SECONDS = 3.0
"""How long a partition may take to say, before and after, whether it is in a ceremony of its own."""
PLANS = Path(__file__).resolve().parent.parent / "ceremony_runner" / "plans"


@click.group("ceremony")
def ceremony_group() -> None:
    """Ceremonies by a written plan, with a signed transcript."""


@ceremony_group.command("list")
@json_option
def list_plans(as_json: bool) -> None:
    """List the plans that come with mhsm; copy and change one for other numbers of officers."""
    plans = {path: read_plan(path) for path in sorted(PLANS.glob("*.yaml"))}
    report(
        {
            "plans": [
                {
                    "name": path.stem,
                    "title": plan.title,
                    "steps": len(plan.steps),
                    "digest": plan.digest,
                    "words": plan.words,
                    "file": str(path),
                }
                for path, plan in plans.items()
            ]
        },
        as_json=as_json,
        text="\n".join(
            f"{path.stem:16} {plan.title} ({len(plan.steps)} steps)" for path, plan in plans.items()
        ),
        following="mhsm ceremony run activation --dry-run",
    )


@ceremony_group.command("run")
@click.argument("plan_name", metavar="PLAN")
@click.option("--output", "output_file", type=click.Path(path_type=Path), help="The transcript to write.")
@click.option("--dry-run", is_flag=True, help="Print every step; run nothing, write nothing.")
@click.option(
    "--answers",
    "answers_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Answers instead of people, JSON: {"parameters": {NAME: VALUE}, "confirm": ["continue", ...]}.',
)
@data_directory_option
@json_option
@click.pass_context
def run(
    context: click.Context,
    plan_name: str,
    output_file: Path | None,
    dry_run: bool,
    answers_file: Path | None,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Run the ceremony PLAN: a file, or the name of a plan that `mhsm ceremony list` shows.

    At a terminal a step that failed may be done again. Exit code 0: completed; 1: a step failed; 130:
    aborted. The transcript is written and signed by the pool's administrator in each of these cases.
    A security-domain ceremony that a step began and none finished stays open: it is named at the end.
    """
    try:
        plan = _find_plan(plan_name)
        answers = _read_answers(answers_file, plan) if answers_file else None
        if dry_run:
            _dry_run(plan, answers or {}, data_dir, as_json=as_json)
            return
        if output_file is None:
            raise click.UsageError("--output is needed, or --dry-run")
        context.exit(_run(plan, answers, output_file, data_dir, as_json=as_json))
    except PlanRefused as error:
        fail(f"{plan_name}: {error}", "mhsm ceremony run --help", output.USAGE)
    except IdentityRefused as error:
        fail(str(error), "--data-dir names the pool whose administrator signs")
    except NoConnection as error:
        raise failure_of(error) from None


def _run(
    plan: Plan, answers: dict[str, Any] | None, output_file: Path, data_dir: Path, *, as_json: bool
) -> int:
    _refuse_taken(output_file)
    connection = load_connection(data_dir)
    files = connection.clients.get("administrator")
    if files is None:
        raise IdentityRefused("the connection file names no administrator")
    identity = transcript.load_identity(
        read_bounded(Path(files.certificate_file), transcript.PEM_BYTES_MAX),
        read_bounded(Path(files.key_file), transcript.PEM_BYTES_MAX),
        connection.pool_id,
    )
    console = Console(stderr=True)
    interaction: Interaction
    if answers is None:
        if not sys.stdin.isatty():
            raise click.UsageError("people confirm the steps at a terminal; without one use --answers")
        interaction = terminal = TerminalInteraction(console)
        values = {parameter.name: _ask(terminal, parameter) for parameter in plan.parameters}
    else:
        interaction = AnswersInteraction(answers["confirm"])
        values = _given(plan, answers["parameters"])
    values[DATA_DIRECTORY] = _data_directory(data_dir)
    missing = [parameter.name for parameter in plan.parameters if parameter.name not in values]
    if missing:
        raise PlanRefused(f"parameter {missing[0]} has no value")
    steps = plan.filled(values)
    header = transcript.make_header(
        plan,
        values,
        identity,
        connection.pool_id,
        f"mhsm-pool-simulator {metadata.version('mhsm-pool-simulator')}",
        "terminal" if answers is None else "file",
    )
    try:
        journal = Journal(output_file, header)
    except FileExistsError:
        _refuse_taken(output_file)
        raise

    def write(octets: bytes) -> None:
        write_new(output_file, octets)
        transcript.sync_directory(output_file.parent)

    before = _under_way(connection)
    outcome = Runner(plan, steps, console, interaction).run(
        journal, identity, write, lambda: audit_calls.newest_checkpoints(connection)
    )
    digest = transcript.sha256(outcome.transcript)
    left_open: list[int] = []
    if outcome.result != COMPLETED:
        left_open = [
            index for index, attempt in _under_way(connection).items() if before.get(index) != attempt
        ]
    following = [f"mhsm ceremony verify {output_file} --ca-file {connection.client_ca_file}"]
    for index in left_open:
        following += [
            "to finish it by hand, see what is missing:",
            "mhsm security-domain status",
            "to have its shares forgotten:",
            f"mhsm security-domain cancel --partition {index}",
        ]
    report(
        {
            "transcript": str(output_file),
            "result": outcome.result,
            "reason": outcome.reason,
            "steps_done": outcome.steps_done,
            "steps": len(steps),
            "digest": digest,
            "left_open": left_open,
        },
        as_json=as_json,
        text="\n".join(
            [
                f"{outcome.result}: {outcome.steps_done} of {len(steps)} steps; transcript {output_file}",
                *([outcome.reason] if outcome.reason else []),
                *(f"the pool's own ceremony is still open, at partition {index}" for index in left_open),
            ]
        ),
        following="\n".join(following),
    )
    return {COMPLETED: 0, FAILED: output.FAILED}.get(outcome.result, output.INTERRUPTED)


@ceremony_group.command("verify")
@click.argument("transcript_file", metavar="TRANSCRIPT", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--ca-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Certificate of the pool's client authority, kept apart from the transcript.",
)
@click.option(
    "--file",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A file that must be one of the record: an input, an output or the plan.",
)
@json_option
def verify(transcript_file: Path, ca_file: Path | None, files: tuple[Path, ...], as_json: bool) -> None:
    """Check a transcript, offline: signature, chain, plan, and the digests of files.

    Exit code 0: what it says is what was signed, also of a ceremony that failed; 6: it is not.
    """
    journal = transcript.journal_path(transcript_file)
    if not transcript_file.exists() and journal.exists():
        _refuse_unfinished(journal)
    if transcript_file.name.endswith(transcript.JOURNAL_SUFFIX):
        _refuse_unfinished(transcript_file)
    ca_pem = read_bounded(ca_file, transcript.PEM_BYTES_MAX) if ca_file else None
    try:
        verified = verification.verify(read_bounded(transcript_file, transcript.TRANSCRIPT_BYTES_MAX), ca_pem)
    except TranscriptRefused as error:
        fail(f"{transcript_file}: {error}", "", output.VERIFICATION)
    found = [_match(path, verified) for path in files]
    document = verified.document
    authority = (
        "the certificate was issued by the authority given"
        if verified.certificate_checked
        else "no --ca-file: the signature only proves integrity under the embedded certificate"
    )
    lines = [
        f"verified: {verified.plan.title}",
        f"result:   {verified.result}, {verified.steps_done} of {len(verified.plan.steps)} steps"
        + (f" ({verified.reason})" if verified.reason else ""),
        f"time:     {document['started']} to {document['ended']}",
        f"plan:     {verified.plan.words}",
        f"signer:   {verified.signer}; {authority}",
    ]
    if document["answers"] == "file":
        lines.append("answers:  from a file; nobody confirmed the steps")
    lines += [f"file:     {path} is {where}" for path, where in found]
    report(
        {
            "verified": True,
            "result": verified.result,
            "reason": verified.reason,
            "steps_done": verified.steps_done,
            "steps": len(verified.plan.steps),
            "title": verified.plan.title,
            "plan_digest": verified.plan.digest,
            "started": document["started"],
            "ended": document["ended"],
            "answers": document["answers"],
            "signer": verified.signer,
            "certificate_checked": verified.certificate_checked,
            "files": [{"file": path, "evidence": where} for path, where in found],
        },
        as_json=as_json,
        text="\n".join(lines),
        following=""
        if verified.certificate_checked
        else f"mhsm ceremony verify {transcript_file} --ca-file CA",
    )


def _under_way(connection: Connection) -> dict[int, bytes]:
    """Return the attempt ids of security-domain ceremonies under way, of the partitions that answer."""
    with Pool(connection, "administrator", timeout_seconds=_UNDER_WAY_SECONDS) as pool:
        found = ceremony_progress.under_way(pool, range(len(connection.partitions)))
    return {index: entry.attempt_id for index, entry in found.items() if not isinstance(entry, str)}


def _match(path: Path, verified: verification.Verified) -> tuple[str, str]:
    """Return (path, which evidence of the record it is)."""
    seen = transcript.evidence(str(path))
    for where, recorded in verified.evidence():
        if (recorded["sha256"], recorded["words"]) == (seen["sha256"], seen["words"]):
            return str(path), where
    fail(f"{path} is no file of this record (SHA-256 {seen['sha256']})", "", output.VERIFICATION)


def _refuse_unfinished(journal: Path) -> None:
    try:
        unfinished = verification.read_journal(read_bounded(journal, transcript.TRANSCRIPT_BYTES_MAX))
    except TranscriptRefused as error:
        fail(f"{journal}: {error}", "", output.VERIFICATION)
    under_way = f"; step {unfinished.under_way} was under way" if unfinished.under_way else ""
    fail(
        f"{journal} is the journal of an unfinished ceremony ({unfinished.title}): "
        f"{unfinished.steps_done} of {unfinished.steps} steps done{under_way}; it is not signed",
        "keep it as evidence, and hold the ceremony again with another --output",
        output.VERIFICATION,
    )


def _refuse_taken(output_file: Path) -> None:
    refuse_existing(output_file)
    journal = transcript.journal_path(output_file)
    if journal.exists():
        fail(
            f"{journal} is there: a ceremony of this name is unfinished, or under way",
            f"mhsm ceremony verify {output_file}\nchoose another name and keep the journal",
        )


def _find_plan(name: str) -> Plan:
    path = Path(name)
    built_in = PLANS / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file() and path.name == name and built_in.is_file():
        path = built_in
    if not path.is_file():
        raise PlanRefused("no such file, and no plan of this name (mhsm ceremony list)")
    return read_plan(path)


def _data_directory(data_dir: Path) -> str:
    return check_value(Parameter(DATA_DIRECTORY, "", "path", None), str(data_dir.absolute()))


def _ask(terminal: TerminalInteraction, parameter: Parameter) -> str:
    """Ask for a parameter until its value is acceptable."""
    default = f" [{parameter.default}]" if parameter.default is not None else ""
    while True:
        answer = terminal.line(f"{parameter.prompt}{default}: ")
        if answer is None:
            raise click.Abort
        try:
            return check_value(parameter, answer.strip() or parameter.default or "")
        except PlanRefused as error:
            click.echo(str(error), err=True)


def _given(plan: Plan, values: Mapping[str, str]) -> dict[str, str]:
    """Return the values of the parameters that have one: given, or by default."""
    given: dict[str, str] = {}
    for parameter in plan.parameters:
        value = values.get(parameter.name, parameter.default)
        if value is not None:
            given[parameter.name] = check_value(parameter, value)
    return given


def _read_answers(path: Path, plan: Plan) -> dict[str, Any]:
    """Return {"parameters": {name: text}, "confirm": [words]}: one a step, or up to an abort."""
    try:
        content = json.loads(read_bounded(path, ANSWERS_BYTES_MAX))
    except (ValueError, RecursionError):
        fail(f"{path} is not JSON", "mhsm ceremony run --help", output.USAGE)
    if not isinstance(content, dict) or not content.keys() <= {"parameters", "confirm"}:
        fail(f"{path} may have parameters and confirm only", "", output.USAGE)
    parameters, confirm = content.get("parameters", {}), content.get("confirm", [])
    names = {parameter.name for parameter in plan.parameters}
    if not isinstance(parameters, dict) or not parameters.keys() <= names:
        fail(f"{path}: parameters must be an object with names of the plan's parameters", "", output.USAGE)
    if not all(isinstance(value, str | int) and not isinstance(value, bool) for value in parameters.values()):
        fail(f"{path}: a parameter's value is text or a whole number", "", output.USAGE)
    if not isinstance(confirm, list) or not all(answer in (CONTINUE, ABORT) for answer in confirm):
        fail(f'{path}: confirm must be a list of "{CONTINUE}" and "{ABORT}"', "", output.USAGE)
    whole = len(confirm) == len(plan.steps) or (ABORT in confirm and len(confirm) <= len(plan.steps))
    if "confirm" in content and not whole:
        fail(f"{path}: confirm must have one answer for each of {len(plan.steps)} steps", "", output.USAGE)
    return {"parameters": {name: str(value) for name, value in parameters.items()}, "confirm": confirm}


def _dry_run(plan: Plan, answers: Mapping[str, Any], data_dir: Path, *, as_json: bool) -> None:
    """Print the steps; a parameter without a value stays as its placeholder."""
    values = _given(plan, answers.get("parameters", {}))
    values[DATA_DIRECTORY] = _data_directory(data_dir)
    steps = plan.filled(values)
    console = Console(stderr=as_json)
    show_plan(console, plan)
    show_parameters(console, plan, values)
    for number, step in enumerate(steps, start=1):
        show_step(console, number, len(steps), step)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "dry_run": True,
                    "result": "",
                    "transcript": None,
                    "steps_done": 0,
                    "steps": len(steps),
                    "plan_digest": plan.digest,
                    "parameters": [
                        {
                            "name": parameter.name,
                            "prompt": parameter.prompt,
                            "kind": parameter.kind,
                            "default": parameter.default,
                            "value": values.get(parameter.name),
                        }
                        for parameter in plan.parameters
                    ],
                    "commands": [list(step.command) for step in steps],
                }
            )
        )
