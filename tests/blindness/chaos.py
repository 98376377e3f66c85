"""What happens to the pool while the controller works: commands, patches, failovers, kills, ceremonies."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.blindness.planted import Ceremonies
from tests.canaries import use
from tests.fabric_access import mhsm_fabric
from tests.running_pool import ROOT, RunningPool, mhsm, until

VERSION = 1
UNPUBLISHED = 7
DEAD = 2


class Chaos:
    """One run. ``look`` is called at the moments at which the controller is to be looked at.

    Args:
        pool: Active and serving, with the imported keys.
        ceremonies: Its officers.
        look: Given the moment's name; the controller runs and is about to be killed, or has finished work.
        say: Progress.
        output: What every operator's command printed is appended to this file.
    """

    def __init__(
        self,
        pool: RunningPool,
        ceremonies: Ceremonies,
        look: Callable[[str], None],
        say: Callable[[str], None],
        output: Path,
    ) -> None:
        self._pool, self._ceremonies = pool, ceremonies
        self._look, self._say, self._output = look, say, output

    def short(self) -> None:
        """Refused and obeyed commands, a failover, a rolling restart, a killed controller."""
        self._drain_and_resume()
        self._fail_over()
        self._fabric("restart", "2")
        self._serving("restarted a partition by the controller")
        self._look("after drains, a failover and a restart")
        self._kill_controller()

    def full(self, firmware: Path) -> None:
        """All of it.

        Args:
            firmware: The repository, with an image of version 1 in it.
        """
        self.short()
        self._kill_partition(1)
        self._ceremonies.prove_quorum()
        self._say("two officers proved the quorum")
        self._patch(firmware)
        self._replace_lost_disk()
        self._lock_and_unlock()
        self._fabric("restart", "--all")
        self._serving("restarted all partitions one after the other")
        use(self._pool)
        self._look("at the end")

    # -- the parts -----------------------------------------------------------------------

    def _drain_and_resume(self) -> None:
        self._fabric("drain", "0")
        for other in ("1", "2"):
            self._fabric("drain", other, refused=True)
        self._fabric("resume", "0")
        # Those two were refused by the command itself. This one is sent: the partition refuses it.
        self._fabric("patch", str(UNPUBLISHED), refused=True)
        self._serving("drained and resumed a partition; what the floor of two forbids was refused")

    def _fail_over(self) -> None:
        self._fabric("failover")
        self._say("failed the housekeeping role over")

    def _kill_controller(self) -> None:
        killed = self._pool.connection.fabric_controller["process_id"]
        os.kill(killed, signal.SIGKILL)

        def back() -> bool:
            now = self._pool.connection.fabric_controller["process_id"]
            return bool(now and now != killed)

        until(back, 60, "a new controller")
        self._say("kill -9 of the controller")

    def _kill_partition(self, index: int) -> None:
        status = self._pool.status(index)
        incarnation = status.incarnation if status else 0
        self._pool.signal(index, "partition", signal.SIGKILL)
        until(
            lambda: (s := self._pool.status(index)) is not None and s.incarnation > incarnation,
            60,
            "a healed one",
        )
        self._serving("kill -9 of a partition, healed")
        use(self._pool)

    def _patch(self, firmware: Path) -> None:
        """Roll out an image; in the middle of it the controller is looked at and killed."""
        self._fabric("patch", str(VERSION), "--no-wait")
        until(lambda: VERSION in self._versions(), 180, "the first patched partition")
        self._look("in the middle of a patch")
        self._kill_controller()
        until(
            lambda: self._state() == "idle" and self._versions() == [VERSION] * 3, 240, "three patched ones"
        )
        self._serving(f"patched all partitions from {firmware.name}, the controller was killed meanwhile")
        use(self._pool)
        self._look("after the patch")

    def _replace_lost_disk(self) -> None:
        node = Path(self._pool.connection.partitions[DEAD].data_directory)
        (node / "partition" / "head").unlink()
        shutil.rmtree(node / "store" / "member")
        for part in ("store_member", "partition"):
            self._pool.signal(DEAD, part, signal.SIGKILL)
        self._pool.await_states(["SERVING", "SERVING", "QUARANTINED"])
        self._fabric("replace", str(DEAD))
        self._serving("replaced a partition that lost its disk")

    def _lock_and_unlock(self) -> None:
        self._pool.kill_everything()
        self._pool.await_states(["LOCKED"] * 3)
        self._ceremonies.unlock()
        self._serving("kill -9 of all partitions and agents; two officers unlocked the pool")

    # -- looking -------------------------------------------------------------------------

    def _serving(self, what: str) -> None:
        self._pool.await_states(["SERVING"] * 3, 120)
        self._say(what)

    def _fabric(self, *arguments: str, refused: bool = False) -> str:
        completed = mhsm_fabric(self._pool, *arguments)
        with self._output.open("a") as file:
            file.write(f"mhsm-fabric {' '.join(arguments)}\n{completed.stdout}{completed.stderr}")
        if bool(completed.returncode) != refused:
            raise AssertionError(
                f"mhsm-fabric {' '.join(arguments)}: {completed.returncode}\n{completed.stderr}"
            )
        return completed.stdout

    def _status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self._fabric("status", "--json"))
        return document

    def _state(self) -> str:
        return str(self._status()["work"]["state"])

    def _versions(self) -> list[int]:
        return [entry["firmware_version"] for entry in self._status()["partitions"]]


def publish_firmware(directory: Path) -> Path:
    """Make a firmware repository with an image of this tree in it; returns its path."""
    directory.mkdir()
    repository, keys, image = directory / "repository", directory / "keys", directory / "image.zip"
    mhsm("firmware", "new-repository", "--output", str(repository), "--keys-output", str(keys))
    mhsm(
        "firmware", "build", "--version", str(VERSION), "--security-version", "1",
        "--sources", str(ROOT), "--output", str(image),
    )  # fmt: skip
    mhsm("firmware", "publish", "--repository", str(repository), "--image", str(image), "--keys", str(keys))
    return repository
