"""Transcripts of the command line: parsed, run for real, normalised and compared.

A transcript is a text file below ``golden/``. It is input and expectation at once; what stands at the
beginning of a line says what the line is:

=========  ====================================================================================
``$ ``     a command, run by bash in the story's own directory, as an operator types it
``< ``     a line that the operator types while the command above runs (its standard input)
``| ``     a line of its standard output
``: ``     one line of JSON on its standard output, shown with indentation
``! ``     a line of its standard error
``= ``     its exit code
``% ``     what happens between the commands, one of ``ACTIONS``
other      a comment
=========  ====================================================================================

In that order: the two streams are not interleaved. What differs from run to run is replaced by the
placeholders of ``RULES``, and by nothing else; the runs of spaces inside a line are columns of a
table and become two.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shamir_mnemonic.wordlist import WORDLIST

from security_domain.officers import certificate_pem, save_private_key
from tests.running_pool import ROOT, RunningPool, make_officers

GOLDEN = Path(__file__).resolve().parent / "golden"
COMMAND_SECONDS_MAX = 150.0
_MHSM = "#!{python}\nfrom {module} import main\n\nmain()\n"
_EIGHT_WORDS = re.compile(r"\b[a-z]{3,8}(?: [a-z]{3,8}){7}\b")
_WORDS = frozenset(WORDLIST)

RULES: tuple[tuple[str, str], ...] = (
    # placeholder, what it stands for
    ("<uuid>", r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"),
    ("<SHA-256>", r"\b[0-9a-f]{64}\b"),
    ("<id>", r"\b[0-9a-f]{32}\b"),
    ("<head>", r"\b[0-9a-f]{16}\b"),
    ("<thumbprint>", r"(?<![\w-])[\w-]{43}(?![\w-])"),
    ("<time>", r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|\+00:00)"),
    ("store: etcd <version>", r"store: etcd .*"),
    ("localhost:<port>", r"\blocalhost:\d{4,5}\b"),
    (r"(<size> bytes)", r"\([\d,]+ bytes\)"),
    (r"(<process id>)", r"\(\d{2,}\)"),
    # At a deadline the client may notice first, or the partition.
    ("<the outcome is not known>", r"no answer \(deadline_exceeded\); the outcome is not known"),
    ("<the outcome is not known>", r"the mutation was sent and its outcome is not known yet"),
    (r"\1<reason>", r'("message": "<the outcome is not known>", "reason": )"[A-Z_]*"'),
    # A row of `mhsm status`: lease, sequence and starts; where the secrets are; etcd and the processes.
    (r"\1  <lease>  ", r"^(\d  [a-z]+)  [1-9]\d{2,3}  "),
    (r"\1  <sequence>  <head>  <starts>  ", r"^(\d  [a-z]+  (?:0|<lease>))  \d+  <head>  \d+  "),
    (r"\1  <starts>  none", r"^(\d  [a-z]+  0  0)  \d+  none"),
    (r"<secret memory>", r"\b(?:memfd_secret|mlock)\b"),
    (r"  <version>  <process ids>", r"  \d+\.\d+\.\d+  \d+ \d+ \d+$"),
    ("127.0.0.1:<port>", r"127\.0\.0\.1:\d+"),
    # What this machine's kernel offers.
    (r"hardened with <measures>", r"hardened with .*"),
    (r'"\1": <measures>', r'"((?:ceremony_child_|node_agent_)?hardening)": \[[^\]]*\]'),
    ("fabric controller: <sandbox>", r"fabric controller: (?:under|no) bubblewrap.*"),
    (r'"bubblewrap": <sandbox>', r'"bubblewrap": (?:true|false)'),
    (r'"bubblewrap_reason": <sandbox>', r'"bubblewrap_reason": "[^"]*"'),
    # On a busy machine a process may not come up at its first start.
    (r'"silent_seconds": <seconds>', r'"silent_seconds": (?:\d+|null)'),
    (r'"failures": <failures>', r'"failures": \{[^}]*\}'),
    # Who started the pool, and which users are free.
    ("users: <users>", r"users: .*"),
    (r'"users": <users>', r'"users": \{[^{}]*\{[^{}]*\}[^{}]*\}'),
    # Fields of JSON.
    (r'"\1": <\1>', r'"(lease_remaining_ms|applied_sequence|sequence|incarnation)": [^,}\n]+'),
    (r'"\1": <\1>', r'"(bytes|store_version|audit_records|audit_cosignatures)": [^,}\n]+'),
    (r'"\1": <process id>', r'"(node_agent|partition|store_member|process_id)": \d{2,}'),
)
"""What differs from run to run; the paths of the story (``<here>``) and of the project (``<project>``)
and eight words in a row of the SLIP-39 list (``<words>``) are replaced before."""

_COMPILED = [(re.compile(pattern, re.MULTILINE), placeholder) for placeholder, pattern in RULES]


def normalised(text: str, here: Path) -> str:
    """Return a text with placeholders for all that differs from run to run."""
    text = text.replace(str(here), "<here>").replace(str(ROOT), "<project>")
    lines = [
        line if line.startswith(": ") else re.sub(r"(?<=\S) {2,}", "  ", line.rstrip())
        for line in text.splitlines()
    ]
    text = _EIGHT_WORDS.sub(_words, "\n".join(lines))
    for pattern, placeholder in _COMPILED:
        text = pattern.sub(placeholder, text)
    return text


def _words(found: re.Match[str]) -> str:
    return "<words>" if _WORDS.issuperset(found[0].split()) else found[0]


@dataclass(slots=True)
class Block:
    """A command with what is expected of it; or one other line, without a command."""

    line: str
    number: int
    command: str = ""
    typed: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)


def parse(text: str) -> list[Block]:
    """Return the blocks of a transcript."""
    blocks: list[Block] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("$ "):
            blocks.append(Block(line, number, command=line[2:]))
        elif blocks and blocks[-1].command and line.startswith("< "):
            blocks[-1].typed.append(line[2:])
        elif blocks and blocks[-1].command and line[:2].strip() in {"|", ":", "!", "="}:
            blocks[-1].expected.append(line)
        else:
            blocks.append(Block(line, number))
    return blocks


class Mismatch(AssertionError):
    """A command printed something else than the transcript says."""


class Story:
    """One transcript in a directory of its own, with a home for the pool that its commands name."""

    def __init__(self, directory: Path) -> None:
        self.here = directory / "here"
        self.here.mkdir()
        self._pools: dict[Path, RunningPool] = {}
        programs = directory / "bin"
        programs.mkdir()
        for name, module in (("mhsm", "hsm_pool.cli.main"), ("mhsm-fabric", "fabric_controller.cli")):
            (programs / name).write_text(_MHSM.format(python=sys.executable, module=module))
            (programs / name).chmod(0o755)
        kept = {name: os.environ[name] for name in ("HOME", "PYTHONPATH", "LANG") if name in os.environ}
        self._environment = {
            **kept,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PROJECT": str(ROOT),
            "XDG_STATE_HOME": str(self.here / "state"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def play(self, transcript: Path, *, update: bool) -> str:
        """Run a transcript and return it with what the commands really did.

        Raises:
            Mismatch: Something else came out, unless it is to be updated.
        """
        played: list[str] = []
        for block in parse(transcript.read_text()):
            if block.line.startswith("% "):
                self._act(block.line[2:])
            if not block.command:
                played.append(block.line)
                continue
            actual = self.run(block.command, block.typed)
            if actual != block.expected and not update:
                raise Mismatch(difference(transcript, block, actual))
            played += [block.line, *(f"< {line}" for line in block.typed), *actual]
        return "\n".join(played) + "\n"

    def run(self, command: str, typed: list[str]) -> list[str]:
        """Run a command; return the lines of the transcript for what it did."""
        ended = subprocess.run(
            ["bash", "-c", command],
            input="".join(f"{line}\n" for line in typed),
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            check=False,
            cwd=self.here,
            env=self._environment,
        )
        lines = [
            line if line.startswith(": ") else f"| {line}".rstrip()
            for line in normalised(_expanded(ended.stdout), self.here).splitlines()
        ]
        lines += [f"! {line}".rstrip() for line in normalised(ended.stderr, self.here).splitlines()]
        return [*lines, f"= {ended.returncode}"]

    def end(self) -> None:
        """Stop the pools of the story."""
        for directory in (self.here / "state" / "mhsm", self.here / "NEW"):
            if (directory / "pool.json").exists():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.run(f"mhsm down --data-dir {directory}", [])

    # -- what happens between the commands ------------------------------------------------

    def _act(self, action: str) -> None:
        ACTIONS[action](self)

    def pool(self, directory: Path | None = None) -> RunningPool:
        """Return the pool of the story; started if it did not run when it was asked for first."""
        directory = directory or self.here / "state" / "mhsm"
        if directory not in self._pools:
            self._pools[directory] = RunningPool(directory)
        return self._pools[directory]

    def activate(self) -> None:
        """Start a pool and activate it; the files lie where the ceremony leaves them."""
        pool, officers = self.pool(), make_officers(3)
        folder = self.here / "officers"
        folder.mkdir()
        for number, officer in enumerate(officers, start=1):
            (folder / f"officer-{number}.crt").write_bytes(certificate_pem(officer.certificate_der))
            (folder / f"officer-{number}.key").write_bytes(save_private_key(officer.key))
        pool.activate(officers, 2)
        (self.here / "security-domain.json").write_bytes(pool.file)

    def signal(self, what: str, number: signal.Signals) -> None:
        """Send a signal to the same process of all partitions."""
        pool = self.pool()
        for index in range(3):
            pool.signal(index, what, number)


def _all_are(state: str, place: str = "state/mhsm") -> Callable[[Story], None]:
    return lambda story: story.pool(story.here / place).await_states([state] * 3)


ACTIONS: dict[str, Callable[[Story], Any]] = {
    "a pool is active, with three officers and a quorum of two": Story.activate,
    "all three partitions are killed at once": lambda story: story.pool().kill_everything(),
    "all three store members are paused": lambda story: story.signal("store_member", signal.SIGSTOP),
    "the store members go on": lambda story: story.signal("store_member", signal.SIGCONT),
    "all three partitions serve": _all_are("SERVING"),
    "all three partitions of NEW serve": _all_are("SERVING", "NEW"),
    "all three partitions are locked": _all_are("LOCKED"),
}
"""What a transcript may have happen between its commands."""


def difference(transcript: Path, block: Block, actual: list[str]) -> str:
    """Return what is to be read when a command does something else, with the command that accepts it."""
    lines = difflib.unified_diff(block.expected, actual, "golden", "actual", lineterm="", n=100)
    name = transcript.relative_to(ROOT) if transcript.is_relative_to(ROOT) else transcript
    again = f"pytest tests/cli/test_transcripts.py -k {transcript.stem} --update-golden"
    return "\n".join(
        [
            f"{name}:{block.number}: $ {block.command}",
            *lines,
            "",
            "If the new output is right, write it down, and look at `git diff` before you commit it:",
            f"  .venv/bin/python -m {again}",
        ]
    )


def _expanded(text: str) -> str:
    """Show each line that is a JSON object with indentation, marked by a colon."""
    lines: list[str] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            lines.append(line)
            continue
        lines += [f": {part}" for part in json.dumps(value, indent=1).splitlines()]
    return "\n".join(lines)
