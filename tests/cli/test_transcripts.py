"""The command line as its users meet it: every transcript below golden/ is run and must come out the same.

docs/ceremonies.md is played from end to end on real pools, with every documented exit code (G4, G8).
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fabric_controller.cli import cli as mhsm_fabric
from hsm_pool.cli import output
from hsm_pool.cli.main import mhsm
from hsm_pool.cli.status_command import COLUMNS
from tests.cli.transcripts import GOLDEN, RULES, Mismatch, Story, normalised, parse
from tests.running_pool import ROOT

HEAD = "82888efbf76704b9"
TRANSCRIPTS = sorted(GOLDEN.glob("*.txt"))


@pytest.fixture(scope="session")
def thin_scripts() -> None:
    """Let scripts/setup do beforehand what it does at the first call of a thin script."""
    subprocess.run([ROOT / "scripts" / "setup"], check=True, capture_output=True, timeout=280)


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    made = Story(tmp_path)
    yield made
    made.end()


@pytest.mark.pool
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript(
    request: pytest.FixtureRequest, thin_scripts: None, story: Story, transcript: Path
) -> None:
    """Exit code, standard output and standard error of every command are those of the golden file."""
    update = bool(request.config.getoption("--update-golden"))
    played = story.play(transcript, update=update)
    if update:
        changed = played != transcript.read_text()
        transcript.write_text(played)
        pytest.skip(f"{transcript.name} is {'written anew' if changed else 'as it was'}; nothing was tested")


# -- the tests of the transcripts themselves ---------------------------------------------


def test_a_difference_is_shown_with_the_command_that_accepts_it(story: Story, tmp_path: Path) -> None:
    """Exit code, standard output and standard error: each is compared."""
    command = "$ cat; echo; echo out; echo err >&2; exit 3"
    right = ["# a story", command, "< typed", "| typed", "|", "| out", "! err", "= 3"]
    transcript = tmp_path / "story.txt"
    transcript.write_text("\n".join(right) + "\n")
    assert story.play(transcript, update=False) == transcript.read_text()
    for position in (3, 5, 6, 7):
        wrong = [*right]
        wrong[position] += "x" if position < 7 else "0"
        transcript.write_text("\n".join(wrong) + "\n")
        with pytest.raises(Mismatch) as raised:
            story.play(transcript, update=False)
        told = str(raised.value)
        assert f"-{wrong[position]}\n+{right[position]}" in told
        assert "story.txt:2: $ cat" in told
        assert "-k story --update-golden" in told
        assert transcript.read_text() == "\n".join(wrong) + "\n", "nothing is written without the option"
        assert story.play(transcript, update=True) == "\n".join(right) + "\n"


@pytest.mark.parametrize(
    ("text", "placeholder"),
    [
        ("request id 2c73aed7-fab9-45d8-a5f5-48ba01d9f460 (repeat", "request id <uuid> (repeat"),
        ("exchange key: bulge pistol belong shaped process safari width ceramic", "exchange key: <words>"),
        ("bulge pistol belong shaped process safari width apples", None),
        ("a sentence of no more than eight ordinary words", None),
        ("thumbprint GuohLySvMI-shCsdZPFY03dR1mIz0vmRGojROfiPbPs", "thumbprint <thumbprint>"),
        ("pool 9a3e12786ca473b9b67661e597cb75b4", "pool <id>"),
        ("until 2026-11-25T18:31:13.123Z", "until <time>"),
        ("3 keys in backup (12,345 bytes)", "3 keys in backup (<size> bytes)"),
        ("3 of 5 shares, epoch 7 is in force, exit code 4", None),
        (f"0  serving   827  14  {HEAD}  1  peer", "0  serving  <lease>  <sequence>  <head>  <starts>  peer"),
        ("0  provisioned  0  0  1  none", "0  provisioned  0  0  <starts>  none"),
        (f"2  drained   0  14  {HEAD}  2  peer", "2  drained  0  <sequence>  <head>  <starts>  peer"),
        ("partition  state  lease ms", None),
        ("next: mhsm security-domain submit-share --attempt a.json", None),
    ],
)  # fmt: skip
def test_only_what_varies_is_replaced(text: str, placeholder: str | None) -> None:
    assert normalised(text, Path("/nowhere")) == (placeholder or text)


def test_every_rule_is_used() -> None:
    """A placeholder that stands in no transcript hides something, or nothing."""
    written = "".join(path.read_text() for path in TRANSCRIPTS)
    for placeholder, _ in RULES:
        for shown in re.findall(r"<[^\\>]+>", placeholder):
            assert shown in written, placeholder
    for placeholder in ("<here>", "<project>", "<words>"):
        assert placeholder in written


# -- documents and code say the same ------------------------------------------------------


def section(title: str) -> str:
    """Return a section of docs/operations.md."""
    return (ROOT / "docs" / "operations.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def documented_codes() -> dict[int, str]:
    table = section("Exit codes")
    return {
        int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| ([^|]+?) \|", table, re.MULTILINE)
    }


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    """docs/operations.md, the help of mhsm and the constants of the commands name the same codes."""
    names = ("FAILED", "USAGE", "LOCKED", "QUORUM", "UNREACHABLE", "VERIFICATION", "UNKNOWN", "INTERRUPTED")
    constants = {0} | {getattr(output, name) for name in names}
    assert set(documented_codes()) == constants
    assert {int(code) for code in re.findall(r"\b(\d+) [a-z]", mhsm.epilog or "")} == constants


def test_every_exit_code_is_in_a_transcript() -> None:
    """Each documented code is seen, and none that is not documented."""
    seen = {
        int(line[2:])
        for path in TRANSCRIPTS
        for block in parse(path.read_text())
        for line in block.expected
        if line.startswith("= ")
    }
    assert seen == set(documented_codes())


def leaves(group: click.Group, prefix: str) -> set[str]:
    """Return the commands below a group."""
    found = set()
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        path = f"{prefix} {name}"
        found |= leaves(command, path) if isinstance(command, click.Group) else {path}
    return found


def test_every_ceremony_command_is_in_a_transcript() -> None:
    """Security domain, backups, ceremonies and officers: each command, and each --json that differs."""
    commands = [block.command for path in TRANSCRIPTS for block in parse(path.read_text())]
    wanted = {
        command
        for command in leaves(mhsm, "mhsm")
        if command.split()[1] in {"security-domain", "backup", "ceremony", "officers", "status", "up", "down"}
    } | {"mhsm key backup", "mhsm key restore"}
    for command in sorted(wanted):
        used = [line for line in commands if f"{command} " in f"{line} "]
        assert [line for line in used if "--json" not in line], f"{command} is in no transcript"
        assert [line for line in used if "--json" in line], f"{command} --json is in no transcript"


def test_every_suggested_command_exists() -> None:
    """What stands after "next:" is one whole command, with options and arguments that it takes."""
    suggested = {
        line.removeprefix("! next: ")
        for path in TRANSCRIPTS
        for block in parse(path.read_text())
        for line in block.expected
        if line.startswith("! next: ")
    }
    assert len(suggested) > 10
    for line in suggested:
        assert not re.search(r"[;,]| then ", line), f"one command a line, no words: {line}"
        name, *words = shlex.split(line)
        if name == "openssl":
            continue
        command: click.Command | None = {"mhsm": mhsm, "mhsm-fabric": mhsm_fabric}[name]
        while words and isinstance(command, click.Group):
            command = command.get_command(click.Context(command), words.pop(0))
        assert command is not None, line
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, line
        needed = [
            set(parameter.opts)
            for parameter in command.params
            if isinstance(parameter, click.Option) and parameter.required
        ]
        assert "--help" in words or all(options & set(words) for options in needed), line


def test_the_columns_of_the_status_are_documented() -> None:
    """docs/operations.md describes each column by the name that `mhsm status` prints, and its JSON field."""
    table = section("Reading the status")
    documented = {
        (name.strip(), fields.strip(" `"))
        for name, fields in re.findall(r"^\| ([^|`(]+?) \| (`[^|]+`) \|", table, re.MULTILINE)
    }
    assert {name for name, _ in documented} == {name for name, _ in COLUMNS}
    assert documented == set(COLUMNS)
