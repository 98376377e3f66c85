"""G3: which users a pool's processes run as, and when they are not separated."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from hsm_pool.node_agent.ownership import CAPABILITIES
from hsm_pool.provisioning import users
from hsm_pool.provisioning.users import FIRST_USER_ID, NotSeparated, Users, separate
from tests.kernel import needs_root


def test_five_users_one_after_the_other() -> None:
    made = Users.beginning_at(FIRST_USER_ID)
    numbers = [getattr(made, name) for name in Users.__slots__]
    assert numbers == list(range(FIRST_USER_ID, FIRST_USER_ID + 5))
    assert made.node.partition == made.partition != made.node.node_agent


def test_only_an_agent_keeps_anything_of_root() -> None:
    """What it needs to start and end its children, and no right to read or to trace."""
    made = Users.beginning_at(FIRST_USER_ID)
    assert made.agent_runs_as.capabilities == CAPABILITIES == ("chown", "kill", "setgid", "setuid")
    for other in (made.node.partition_runs_as, made.node.member_runs_as):
        assert other.capabilities == ()
        assert "-all" in other.options()


def test_not_root_is_not_separated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotSeparated, match="not root"):
        separate(tmp_path, FIRST_USER_ID, "", [])


@needs_root
def test_a_root_that_may_not_change_users_is_not_separated(tmp_path: Path) -> None:
    """As in many containers; with its capabilities the same root gets further: the control."""
    separating = (
        "import sys, pathlib; from hsm_pool.provisioning import users;"
        "users._assign = lambda *_: None; users.open_passage = lambda _: None;"
        f"users.separate(pathlib.Path(sys.argv[1]), {FIRST_USER_ID}, '', [])"
    )
    ended = {}
    for bounding in ("-setuid", "+setuid"):
        ended[bounding] = subprocess.run(
            ["setpriv", "--bounding-set", bounding, "--", sys.executable, "-c", separating, str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    assert "NotSeparated: root may not start processes of other users here" in ended["-setuid"].stderr
    assert ended["+setuid"].returncode == 0, ended["+setuid"].stderr


@pytest.mark.parametrize("before", range(5))
def test_a_number_that_is_taken_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """Any of the five; the files stay whose they are."""
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(users, "_assign", lambda *_: pytest.fail("it was not refused"))
    with pytest.raises(NotSeparated, match=f"user {nobody.pw_uid} is nobody"):
        separate(tmp_path, nobody.pw_uid - before, "", [])
