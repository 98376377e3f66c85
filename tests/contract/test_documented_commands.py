"""Commands and options that the pages name exist: a reader types what he reads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from fabric_controller.cli import cli as mhsm_fabric
from hsm_pool.cli.main import mhsm
from tests.running_pool import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(r"^(?:\.venv/bin/)?(mhsm|mhsm-fabric) (.*)", re.DOTALL)
_FENCED = re.compile(r"^\s*```sh\n(.*?)^\s*```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
OF_OTHERS = {"--quick", "--full", "--numprocesses", "--quota-backend-bytes"}
"""Options of scripts/test, pytest and etcd."""
_OPTION = re.compile(r"--[a-z][a-z-]*")


def commands(page: Path) -> list[str]:
    """Return the lines of a page's shell blocks and its inline code, as one line each."""
    text = page.read_text()
    blocks = [line for block in _FENCED.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    inline = _INLINE.findall(re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [" ".join(found.split()) for found in (*blocks, *inline)]


def unknown(line: str) -> list[str]:
    """Return the options of a documented command that it does not have; none for what is no command."""
    found = _COMMAND.match(line)
    if not found or found[2] == "...":
        return []
    words = shlex.split(found[2].replace("`", ""), comments=True)
    command: click.Command | None = {"mhsm": mhsm, "mhsm-fabric": mhsm_fabric}[found[1]]
    while words and isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words.pop(0))
    if command is None:
        return [line]
    known = {"--help"} | {name for parameter in command.params for name in parameter.opts}
    known |= {name for parameter in command.params for name in parameter.secondary_opts}
    return [word for word in words if _OPTION.fullmatch(word) and word not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_and_options_exist(page: Path) -> None:
    assert {line: wrong for line in commands(page) if (wrong := unknown(line))} == {}


def every_option(command: click.Command) -> set[str]:
    """Return the options of a command and of all below it."""
    found = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            below = command.get_command(click.Context(command), name)
            assert below
            found |= every_option(below)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_option_that_is_named_alone_is_one_of_some_command(page: Path) -> None:
    known = every_option(mhsm) | every_option(mhsm_fabric)
    alone = {o for line in commands(page) if line.startswith("--") for o in _OPTION.findall(line)}
    assert alone - known - OF_OTHERS == set()
