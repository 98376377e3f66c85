"""G5: an image that does not come to serve is given up, also one that only hangs, and the log says so."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hsm_pool import settings as settings_module
from hsm_pool.firmware.slots import INSTALLED, STARTS_MAX, Slots
from hsm_pool.node_agent import agent
from hsm_pool.node_agent.processes import Child
from hsm_pool.provisioning.layout import NewPool, provision
from hsm_pool.settings import NodeSettings
from tests.unit.firmware.test_repository import Publisher
from tests.unit.node_agent.running_agent import SECONDS_MAX, Lines

AGENT = """
import sys
from hsm_pool.node_agent import __main__, agent
agent.START_SECONDS, agent._LOOP_SECONDS, agent._PARTITION_BACKOFF_SECONDS = 1.0, 0.1, (0.05, 0.05)
sys.argv = ["node_agent", "--settings", sys.argv[1]]
sys.exit(__main__.main())
"""
"""The agent's own program, in a hurry."""
HANGS = "import time\ntime.sleep(120)\n"
ENDS = "import sys\nsys.exit(3)\n"


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node of a pool with a firmware repository, whose store member is a script that only lives."""
    (tmp_path / "publisher").mkdir()
    publisher = Publisher(tmp_path / "publisher")
    member = tmp_path / "member"
    member.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(120)\n")
    member.chmod(0o700)
    made = NewPool(
        attended=True,
        recoverable_days=90,
        etcd_binary=str(member),
        firmware_repository=publisher.directory,
    )
    provision(tmp_path / "data", made)
    return tmp_path / "data" / "nodes" / "0"


def image(node: Path, version: int, program: str) -> None:
    """Put an image there whose partition is a program of the test; nobody measures it here."""
    package = node / "firmware" / "images" / str(version) / "hsm_pool" / "partition"
    package.mkdir(parents=True)
    for directory in (package.parent, package):
        (directory / "__init__.py").write_text("")
    (package / "__main__.py").write_text(program)


@pytest.mark.parametrize(("program", "exit_code"), [(ENDS, 3), (HANGS, -9)], ids=["ends", "hangs"])
def test_an_image_that_does_not_serve_is_given_up(node: Path, program: str, exit_code: int) -> None:
    """Three times, and the one before is started in its place; each exit is in the agent's log."""
    image(node, 7, program)
    slots = Slots(node / "firmware")
    slots.activate(7, bytes(48))
    reader, writer = os.pipe()
    command = [sys.executable, "-c", AGENT, str(node / "node.json")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writer) as process:
        os.close(writer)
        try:
            lines, seen = Lines(reader), []
            deadline = time.monotonic() + SECONDS_MAX
            while not seen or seen[-1]["event"] != "firmware given up":
                assert time.monotonic() < deadline, "it is not given up"
                seen.append(json.loads(lines.next()))
        finally:
            process.kill()
            os.close(reader)
            process.wait()
            # The agent may have been about to start the one before: too early a child to die with it.
            for found in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if str(node).encode() in found.read_bytes():
                        os.kill(int(found.parent.name), signal.SIGKILL)
    exits = [event for event in seen if event["event"] == "exited" and event["name"] == "partition"]
    assert [(event["exit_code"], event["firmware_version"]) for event in exits] == [
        (exit_code, 7)
    ] * STARTS_MAX
    assert len([event for event in seen if event["event"] == "hangs"]) == STARTS_MAX * (program is HANGS)
    last = seen[-1]
    assert (last["version"], last["starts"], last["back_to"]) == (7, STARTS_MAX, INSTALLED)
    assert (slots.active().version, slots.active().failed) == (INSTALLED, 7)


def test_only_what_had_time_to_serve_or_to_say_that_it_waits_hangs(node: Path) -> None:
    """A locked or drained partition, or one without a store, is left alone however long that takes."""
    settings = settings_module.load(NodeSettings, node / "node.json")
    image(node, 7, HANGS)
    slots = Slots(node / "firmware")
    child = Child("partition", [sys.executable, "-c", HANGS], None, (0.05, 3.0))
    slots.activate(7, bytes(48))
    assert not agent.hangs(settings, child), "it does not run"
    child.start()
    try:
        slots.starting()
        assert not agent.hangs(settings, child), "it is still starting"
        child.started_at -= agent.START_SECONDS
        assert agent.hangs(settings, child)
        slots.note_waiting()
        assert not agent.hangs(settings, child)
        slots.starting()
        assert agent.hangs(settings, child)
        slots.confirm(7)
        assert not agent.hangs(settings, child)
    finally:
        child.kill()
