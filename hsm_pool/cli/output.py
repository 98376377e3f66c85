"""What every command shares: options, connection, output, exit codes.

Exit codes: 0 done · 1 failed · 2 usage · 3 not activated, or locked · 4 share refused, or quorum missing ·
5 unreachable · 6 a signature or evidence does not verify · 7 outcome unknown (repeat with the same
request id) · 130 interrupted. Results go to standard output, everything else to standard error: with --json
an error as one object in the last line, ``{"error": {"message", "reason", "definite", "exit_code", "next",
"hints"}}``, and ``"retry_seconds"`` where the pool says it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from hsm_pool.cli.suggestions import COMMAND, after_refusal, at_the_same_pool, say_next
from hsm_pool.client.connection import NoClient, NoConnection, default_data_directory
from hsm_pool.client.errors import PoolUnreachable, SignatureInvalid
from hsm_pool.client.pool import Pool
from hsm_pool.errors import (
    DOWNLOADED_OVER_REST,
    AlreadyActivated,
    AvailabilityError,
    CeremonyState,
    EvidenceRefused,
    InvalidField,
    MHSMError,
    NotActivated,
    Overloaded,
    PoolLocked,
    RestoreState,
    ShareRefused,
    Unauthenticated,
)
from hsm_pool.limits import TOKEN_BYTES_MAX
from security_domain.errors import (
    NO_OFFICER,
    OTHER_FORMAT,
    OTHER_SHARE,
    SUBMITTED_BEFORE,
    QuorumMissing,
    SecurityDomainError,
    SubmissionRefused,
)

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

FAILED, USAGE, LOCKED, QUORUM, UNREACHABLE, VERIFICATION, UNKNOWN, INTERRUPTED = 1, 2, 3, 4, 5, 6, 7, 130


_SHARE_REFUSED = "mhsm security-domain status\nthe officer named submits his own share, once"
_SHARE_REFUSED_BECAUSE = {
    SUBMITTED_BEFORE: "another officer submits his share",
    NO_OFFICER: "mhsm security-domain status\n"
    "when the old quorum of a change of officers is complete, the new officers use the new file\n"
    "mhsm security-domain fetch-file --output FILE",
    OTHER_FORMAT: "submit a share of the same file as the others, the pool's own or Azure's\n"
    "mhsm security-domain status",
    OTHER_SHARE: "the file may be one of before a change of officers: compare its words with the status\n"
    "mhsm security-domain status\nmhsm security-domain fetch-file --output FILE",
}
DOWNLOAD = (
    "mhsm security-domain download --required 2 --output security-domain.json "
    "--attempt-output activation.json --officer FILE --officer FILE --officer FILE"
)
"""How a pool is activated."""
_NOT_ACTIVATED = (
    f"mhsm security-domain status\n{DOWNLOAD}\nto recover a lost pool do not download: "
    "mhsm security-domain init-recovery --security-domain FILE --output attempt.json"
)
_STOP = "stop: find out who made it; docs/ceremonies.md"
_OTHER_MEASUREMENT = (
    "it runs another version than this machine: --firmware-repository, a copy that you have from the "
    f"publisher, or --policy\nif it is not published there, {_STOP}"
)
_ALWAYS: dict[type[Exception], tuple[str, int]] = {
    NoConnection: ("--data-dir names the pool\nmhsm up", UNREACHABLE),
    NoClient: ("mhsm client create --help", FAILED),
    PoolLocked: ("mhsm security-domain init-recovery --output attempt.json", LOCKED),
    QuorumMissing: ("mhsm security-domain submit-share --help", QUORUM),
    SubmissionRefused: ("each officer's own certificate and key, once", QUORUM),  # on this machine
    AlreadyActivated: ("mhsm status", FAILED),
    CeremonyState: ("mhsm security-domain status\nmhsm status", FAILED),
    RestoreState: ("mhsm backup status", FAILED),
    SignatureInvalid: ("", VERIFICATION),
    Unauthenticated: (
        "mhsm token --as NAME --output FILE\nthe development issuer has a new key after each start",
        FAILED,
    ),
}
"""Next step and exit code of errors that have the same in each case."""


POLL = "poll the download: GET /securitydomain/download/pending at any partition (docs/ceremonies.md)"
"""What follows a download over REST; no command of mhsm does it."""


class Failure(click.ClickException):
    """A failed command: what happened and what to do next."""

    reason = ""
    """Reason of the pool's error, as gRPC clients get it; "" for what this machine found."""
    definite = True
    """Whether nothing was done."""
    retry_seconds: float | None = None
    """After how long the pool wants the next try, if it says so."""

    def __init__(self, message: str, following: str = "", exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.following = at_the_same_pool(following)  # while the context of the command is there
        # click reads it from the instance, although it declares it for the class
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:  # noqa: ARG002
        """Print at most a few lines to standard error."""
        click.echo(f"mhsm: {self.message}", err=True)
        say_next(self.following)


def fail(message: str, following: str = "", exit_code: int = FAILED) -> NoReturn:
    """End the command."""
    raise Failure(message, following, exit_code)


def report(value: dict[str, Any], *, as_json: bool, text: str, following: str) -> None:
    """Print a result: one JSON object, or a line for people with the next command."""
    if as_json:
        click.echo(json.dumps(value))
        return
    click.echo(text)
    say_next(at_the_same_pool(following))


@contextmanager
def named(path: Path, following: str = "") -> Iterator[None]:
    """Have a refusal of a file's content name the file, and say what to do if nothing better is known."""
    try:
        yield
    except (SecurityDomainError, InvalidField) as error:
        refused = failure_of(error)
        told = Failure(f"{path}: {refused.message}", refused.following or following, refused.exit_code)
        told.reason = refused.reason
        raise told from None


def read_bounded(path: Path, bytes_max: int) -> bytes:
    """Return the content of a file that may hold so many bytes; a device has no size to ask for."""
    with path.open("rb") as stream:
        content = stream.read(bytes_max + 1)
    if len(content) > bytes_max:
        fail(f"{path} has more than {bytes_max} bytes", "")
    return content


def has_terminal() -> bool:
    """Return whether somebody can be asked for a passphrase, at standard input or /dev/tty."""
    if sys.stdin.isatty():
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def confirmed(question: str, following: str) -> bool:
    """Ask before something is destroyed; end the command where nobody can answer."""
    return _answer(lambda: click.confirm(question, err=True), following)


def confirmed_by_name(question: str, name: str, following: str) -> bool:
    """Have the name of what is destroyed for good typed; end the command where nobody can answer."""
    return _answer(lambda: str(click.prompt(question, err=True)), following) == name


def _answer(ask: Callable[[], T], following: str) -> T:
    try:
        return ask()
    except click.Abort:
        if sys.stdin.isatty():
            raise
        click.echo(err=True)
        fail("nobody answered: without a terminal use --yes; nothing was done", following, USAGE)


def request_id_option(function: F) -> F:
    """Add --request-id: made here if it is not given, so that a failure can name it."""
    return click.option(
        "--request-id",
        default=lambda: str(uuid.uuid4()),
        help="Repeat a request whose outcome is unknown.",
    )(function)


def data_directory_option(function: F) -> F:
    """Add --data-dir."""
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        default=default_data_directory,
        help="Data directory of the pool.",
    )(function)


def json_option(function: F) -> F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


def typed_errors(function: F) -> F:
    """Map the errors of a command to exit codes."""

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except BrokenPipeError:
            raise  # click ends quietly when nobody reads
        except (MHSMError, SecurityDomainError, NoConnection, NoClient, OSError) as error:
            raise failure_of(error, options.get("request_id"), options.get("name") or "NAME") from None

    return guarded  # type: ignore[return-value]


def common_options(function: F) -> F:
    """Add the options of a command that calls the pool, and map its errors to exit codes."""
    with_timeout = click.option(
        "--timeout", type=click.FloatRange(0.1, 600), default=None, help="Seconds a call may take."
    )(typed_errors(function))
    with_token = click.option(
        "--token-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        default=None,
        help="Bearer token to use in place of a client certificate.",
    )(with_timeout)
    return json_option(data_directory_option(with_token))


def caller_options(default: str) -> Callable[[F], F]:
    """Return a decorator that adds the common options, and --as: which client calls the pool.

    Args:
        default: The client that calls when nobody is named.
    """
    as_client = click.option(
        "--as",
        "client",
        metavar="NAME",
        default=default,
        show_default=True,
        help="Client whose certificate is used; mhsm client create makes more.",
    )

    def decorate(function: F) -> F:
        return as_client(common_options(function))

    return decorate


def connect(common: dict[str, Any], client: str = "") -> Pool:
    """Connect to the pool of the common options, with the token they name or as a client.

    Args:
        common: The options.
        client: Who calls; "" for the one of --as.
    """
    file = common["token_file"]
    token = read_bounded(file, TOKEN_BYTES_MAX).decode(errors="replace").strip() if file else None
    caller = client or common["client"]
    return Pool.connect(common["data_dir"], caller, token=token, timeout_seconds=common["timeout"])


def failure_of(error: Exception, request_id: str | None = None, key: str = "NAME") -> Failure:
    """Return the failure, exit code and next step of an error.

    Args:
        error: A typed error of the pool or the security domain, or of the machine's files.
        request_id: Of the mutation that failed, if it was one.
        key: The key that the command was about, if it was.
    """
    failure = _failure_of(error, request_id, key)
    if isinstance(error, MHSMError):
        failure.reason, failure.definite = error.reason, error.definite
    if isinstance(error, Overloaded):
        failure.retry_seconds = error.retry_seconds
    return failure


def _failure_of(error: Exception, request_id: str | None, key: str) -> Failure:
    text = error.message if isinstance(error, MHSMError) else str(error)
    repeat = f"repeat with --request-id {request_id}" if request_id else "repeat the command"
    always = next((_ALWAYS[kind] for kind in _ALWAYS if isinstance(error, kind)), None)
    if always:
        return Failure(text, *always)
    match error:
        case NotActivated():
            polled = DOWNLOADED_OVER_REST in text
            return Failure(text, POLL if polled else _NOT_ACTIVATED, LOCKED)
        case ShareRefused():
            because = (hint for why, hint in _SHARE_REFUSED_BECAUSE.items() if why in text)
            return Failure(text, next(because, _SHARE_REFUSED), QUORUM)
        case EvidenceRefused():
            following = _OTHER_MEASUREMENT if "mhsm.measurement" in text else _STOP
            return Failure(text, following, VERIFICATION)
        case MHSMError(definite=False):
            return Failure(text, f"mhsm status\n{repeat}", UNKNOWN)
        case Overloaded():
            later = f"come back in {error.retry_seconds:g} s, or give a longer --timeout"
            return Failure(text, later, UNREACHABLE)
        case PoolUnreachable() | AvailabilityError():
            return Failure(text, "mhsm status", UNREACHABLE)
        case OSError():
            said = error.strerror or text
            return Failure(f"{error.filename}: {said}" if error.filename else said)
        case MHSMError():
            return Failure(text, after_refusal(error, key))
        case _:
            return Failure(text)


def _open_closed_streams() -> None:
    """Open /dev/null for each standard stream that is closed: no file that is opened may take its place."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


def _show(error: click.ClickException) -> None:
    """Print what happened; every command takes --json, so it is looked for before anything is parsed."""
    if "--json" not in sys.argv[1:]:
        error.show()
        return
    failure = error if isinstance(error, Failure) else Failure(error.format_message(), "", error.exit_code)
    told = {
        "message": failure.message,
        "reason": failure.reason,
        "definite": failure.definite,
        "exit_code": failure.exit_code,
        "next": [line for line in failure.following.splitlines() if COMMAND.match(line)],
        "hints": [line for line in failure.following.splitlines() if not COMMAND.match(line)],
    }
    if failure.retry_seconds is not None:
        told["retry_seconds"] = failure.retry_seconds
    click.echo(json.dumps({"error": told}), err=True)


def main(group: click.Group) -> NoReturn:
    """Run a group; Ctrl-C ends with 130."""
    _open_closed_streams()
    try:
        code = group.main(prog_name="mhsm", standalone_mode=False)
    except click.exceptions.Exit as finished:
        sys.exit(finished.exit_code)
    except click.Abort:
        _show(Failure("interrupted", "", INTERRUPTED))
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        _show(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(FAILED)  # nobody reads
    except OSError as error:
        failed = failure_of(error)
        _show(failed)
        sys.exit(failed.exit_code)
    # Outside its standalone mode click returns the code of Context.exit().
    sys.exit(code if isinstance(code, int) else 0)
