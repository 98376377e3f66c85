"""One step of the controller's loop."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from fabric_controller.controller import last_said, make_logger, running_controller, take_step
from fabric_controller.enclave_client import EnclaveClient, EnclaveError
from fabric_controller.journal import Journal
from fabric_controller.observe import State, Status, blank, observe
from fabric_controller.work import RollOut, goal_entry


class Unreachable:
    """Nobody is there; only what the journal says of it is looked at."""

    def command(self, *_: object) -> State:
        raise EnclaveError("UNAVAILABLE")


def test_after_an_operators_command_the_pool_is_looked_at_again(tmp_path: Path) -> None:
    """What he has just drained still served when it was looked at; it must not pass for the controller's."""
    serving = Status(State.SERVING, True, 1, 3, 1)
    picture = observe(blank(range(3)), dict.fromkeys(range(3), serving))[0]
    client = cast(EnclaveClient, Unreachable())
    with closing(Journal(tmp_path, range(3))) as journal:
        with journal.exclusive():
            journal.append(goal_entry(RollOut((1,), {1: 1})))
            journal.append(
                {"kind": "command", "counter": 5, "verb": "DRAIN", "partition": 1, "by": "operator"}
            )
        assert not take_step(journal, client, picture, 4, make_logger())
        assert journal.refresh().drained == {1}
        assert take_step(journal, client, picture, 5, make_logger())
        assert [entry["by"] for entry in journal.history()[1:] if "by" in entry] == ["operator", "controller"]


def test_a_status_file_that_is_none_is_not_followed(tmp_path: Path) -> None:
    """G5: its reader may be root, its writer is not."""
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "status.json"
    elsewhere.write_text('{"controller": {}}')
    path.write_text('{"controller": {}}')
    assert last_said(tmp_path) == {"controller": {}}
    path.unlink()
    path.symlink_to(elsewhere)
    assert last_said(tmp_path) == {}
    path.unlink()
    os.mkfifo(path)
    assert last_said(tmp_path) == {}


@pytest.mark.parametrize(
    "said",
    [
        {"time": "\x1b]0;owned\x07"},
        {"controller": {"hardening": ["\x1b[2J"]}},
        {"work": {"reason": "\x1b[1;1Hall is well"}},
        {"\x1b[2J": 1},
    ],
)
def test_a_status_file_that_steers_a_terminal_is_none(tmp_path: Path, said: dict[str, object]) -> None:
    """G5: an operator has it shown."""
    (tmp_path / "status.json").write_text(json.dumps(said))
    assert last_said(tmp_path) == {}


@pytest.mark.parametrize("hardening", [[1], 1, None, {"a": 1}, "seccomp"])
def test_what_the_controller_says_of_itself_has_its_shape(tmp_path: Path, hardening: object) -> None:
    said = {"controller": {"user_id": "root", "hardening": hardening}, "time": "now"}
    (tmp_path / "status.json").write_text(json.dumps(said))
    told = running_controller(tmp_path)
    assert told is not None
    assert (told["user_id"], told["hardening"], told["alive"]) == (None, [], True)
