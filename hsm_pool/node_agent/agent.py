"""The node agent: starts and restarts one partition and one store member, never sees a secret.

Both children die with the agent. Process ids are printed as JSON lines on standard
output whenever they change; the supervisor reads them.
"""

from __future__ import annotations

import json
import selectors
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from hsm_pool.enclave import hardening
from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware.slots import INSTALLED, Slots
from hsm_pool.node_agent import admission, ownership, store_member
from hsm_pool.node_agent.admission import AdmissionWatch
from hsm_pool.node_agent.exit_notice import ExitNotices, incarnation, partition_is_dead
from hsm_pool.node_agent.ownership import NodeUsers
from hsm_pool.node_agent.processes import Child, SignalPipe, next_wait_seconds
from hsm_pool.node_agent.store_disk import StoreDisk
from hsm_pool.settings import NodeSettings

_log = structlog.get_logger()
_PARTITION_BACKOFF_SECONDS = (0.05, 3.0)
_STORE_BACKOFF_SECONDS = (0.05, 3.0)
_PARTITION_STOP_SECONDS = 5.0
_STORE_STOP_SECONDS = 1.0
"""A member that stops with the others waits in vain to hand over its leadership; killing it loses nothing."""
_LOOP_SECONDS = 5.0
_JOINING_SECONDS = 0.2
_LOST_DISK_SECONDS = 5.0
START_SECONDS = 60.0
"""How long a new image may take until it serves or says what it waits for."""


def partition_command(settings: NodeSettings) -> list[str]:
    """Return the command of the partition's next start: the active image, or what is installed."""
    command = [sys.executable, "-m", "hsm_pool.partition", "--settings", settings.partition_settings_file]
    image = None
    if settings.firmware:
        try:
            image = Slots(Path(settings.firmware.directory)).starting()
        except FirmwareRefused as refused:
            _log.error("firmware", reason=refused.message)  # what is installed runs, if its peers admit it
    # An image's packages go before those that are installed; the libraries are the machine's.
    return ["env", f"PYTHONPATH={image}", *command] if image else command


def hangs(settings: NodeSettings, partition: Child) -> bool:
    """Return whether the partition runs, and its image should have served, or said what it waits for."""
    if not settings.firmware or not partition.process:
        return False
    if time.monotonic() - partition.started_at < START_SECONDS:
        return False
    try:
        return Slots(Path(settings.firmware.directory)).hangs()
    except FirmwareRefused:
        return False  # said when it was started


def active_version(settings: NodeSettings) -> int:
    """Return the firmware version that is started now."""
    try:
        return Slots(Path(settings.firmware.directory)).active().version if settings.firmware else INSTALLED
    except FirmwareRefused:
        return INSTALLED


def run(
    settings: NodeSettings,
    command: Callable[[], Sequence[str]],
    users: NodeUsers | None = None,
) -> None:
    """Run the node until SIGTERM. Call from the main thread.

    Args:
        settings: The node's settings.
        command: Returns the command of the partition process, asked before each start.
        users: What the children run as; None for this process's own user.
    """
    signals = SignalPipe()
    notices = ExitNotices(settings)
    logs = Path(settings.log_directory)
    partition = Child(
        "partition", (), logs, _PARTITION_BACKOFF_SECONDS, run_as=users.partition_runs_as if users else None
    )
    children = [partition]
    member: Child | None = None
    admitted = admission.read(settings)
    if not admitted.done:
        admission.carry_out(settings, admitted, users)
    if settings.store_member:
        member_runs_as = users.member_runs_as if users else None
        member = Child("store", (), logs, _STORE_BACKOFF_SECONDS, run_as=member_runs_as)
        children.insert(0, member)
    disk = StoreDisk(settings, admitted.number)
    version = INSTALLED
    watch = AdmissionWatch(settings, admitted.number)
    last = incarnation(settings)
    if last and partition_is_dead(settings):
        notices.send(last)
    with selectors.DefaultSelector() as selector:
        selector.register(signals.reader, selectors.EVENT_READ)
        selector.register(watch.reader, selectors.EVENT_READ)
        while not signals.stopping:
            changed = False
            new = watch.take()
            if new:
                _log.warning("admitted anew", number=new.number)
                _replace(settings, new, partition, member, users)
                disk.admit(new.number)
                changed = True
            disk.look()
            _end_what_hangs(settings, partition, version)
            for child in children:
                changed = child.settle() or changed
                if child.reap():
                    changed = True
                    _log_exit(child, version if child is partition else None)
                    # A partition that could not get its lock says nothing of the one that holds it.
                    # Read before the look at the lock: whoever starts after it is not meant.
                    last = incarnation(settings)
                    if child is partition and last and partition_is_dead(settings):
                        notices.send(last)
                if not child.due():
                    continue
                if child is partition and disk.joining:
                    # Not before the new member knows its id: whoever sees the new partition may
                    # replace it again, and the member would take the id of the next one.
                    child.start_at = time.monotonic() + _JOINING_SECONDS
                    continue
                changed = True
                if child is partition:
                    _prepare_partition(settings, users)
                    child.command = command()
                    version = active_version(settings)
                    child.start()
                else:
                    _start_store(settings, child, disk, users)
            if changed:
                _report(settings, partition, member, disk)
            selector.select(next_wait_seconds(children, _LOOP_SECONDS if disk.settled else _JOINING_SECONDS))
            signals.drain()
    partition.stop(_PARTITION_STOP_SECONDS)
    if member:
        member.stop(_STORE_STOP_SECONDS)
    watch.close()
    notices.close()


def _end_what_hangs(settings: NodeSettings, partition: Child, version: int) -> None:
    if hangs(settings, partition):
        _log.error("hangs", name=partition.name, firmware_version=version, seconds=START_SECONDS)
        partition.kill()


def _log_exit(child: Child, version: int | None) -> None:
    """Log how a child exited, and of which firmware a partition was."""
    firmware = {} if version is None else {"firmware_version": version}
    _log.warning("exited", name=child.name, exit_code=child.exit_code, **firmware)


def _replace(
    settings: NodeSettings,
    new: admission.Admission,
    partition: Child,
    member: Child | None,
    users: NodeUsers | None,
) -> None:
    """End both children and have them start on empty directories."""
    partition.stop(_PARTITION_STOP_SECONDS)
    if member and settings.store_member:
        member.stop(_STORE_STOP_SECONDS)
    admission.carry_out(settings, new, users)
    for child in (member, partition):
        if child:
            child.start_at = time.monotonic()


def _start_store(settings: NodeSettings, member: Child, disk: StoreDisk, users: NodeUsers | None) -> None:
    """Have the member start on a directory of its own; its disk may have been lost meanwhile."""
    if settings.store_member is None:
        return
    directory = Path(settings.store_member.data_directory)
    member.start_at = time.monotonic() + _LOST_DISK_SECONDS
    try:
        ownership.make_missing(directory, 0o700, None)
        if users:
            ownership.give_store_directory(directory, users)
    except OSError as error:  # it may have laid a link there
        _log.error("the store member's directory is none", cause=error.strerror)
        return
    # Of one that is lost only a replacement helps, and that has it start anew.
    if disk.may_start():
        member.command = store_member.command(settings.store_member, joining=disk.joining)
        member.start()


def _prepare_partition(settings: NodeSettings, users: NodeUsers | None) -> None:
    """Have the partition start, and say what it misses, when its disk was lost meanwhile."""
    directory = Path(settings.incarnation_file).parent
    if ownership.make_missing(directory, 0o700, None) and users:
        ownership.give_partition_directory(directory, users)
    user = users.partition if users else None
    ownership.make_missing(directory.with_name("audit"), 0o700, user)
    if settings.firmware:
        # The agent counts the starts of an image there.
        ownership.make_missing(Path(settings.firmware.directory), 0o2770 if users else 0o700, user)


def _report(settings: NodeSettings, partition: Child, member: Child | None, disk: StoreDisk) -> None:
    event = {
        "event": "processes",
        "index": settings.index,
        "hardening": [measure.name.lower() for measure in hardening.in_force()],
        "process_ids": {
            "partition": partition.process_id,
            "store_member": member.process_id if member else None,
        },
        "failures": {
            "partition": partition.failures,
            "store_member": member.failures if member else 0,
        },
        "store_disk_lost": disk.lost,
    }
    print(json.dumps(event), flush=True)
