"""Starts a newly admitted partition on empty data directories; the old ones are put aside.

The agent asks the other partitions whether a new incarnation of its own partition was
admitted (its word is trusted for nothing but that). What it begins it writes down first, so
that it goes on after kill -9. What the dead partition left behind lies beside the new
directories, for whoever wants to know why it died; of several the newest two are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware.slots import Slots
from hsm_pool.node_agent import ownership
from hsm_pool.node_agent.exit_notice import incarnation
from hsm_pool.node_agent.ownership import NodeUsers
from hsm_pool.settings import NodeSettings
from hsm_pool.store.state_file import write_atomically
from mhsm.node.v1 import node_pb2, node_pb2_grpc

_log = structlog.get_logger()
_KEPT_GENERATIONS = 2
"""What replaced partitions left behind: the newest, and the one before. A member's has 60 MB (G5)."""
_POLL_SECONDS = 1.0
_CALL_SECONDS = 1.0
_FILE = "admission.json"


@dataclass(frozen=True, slots=True)
class Admission:
    """An admission of this node's partition; number 0 stands for none."""

    number: int
    incarnation: int
    done: bool


def read(settings: NodeSettings) -> Admission:
    """Return the admission that was acted upon last."""
    path = Path(settings.data_directory) / _FILE
    if not path.exists():
        return Admission(0, 0, done=True)
    return Admission(**json.loads(path.read_text()))


def carry_out(settings: NodeSettings, admission: Admission, users: NodeUsers | None = None) -> None:
    """Put the data directories aside and make empty ones; may be repeated. The children do not run.

    The incarnation is carried over: the others take no renewal of a lower one.
    """
    _write(settings, admission)
    incarnation_file = Path(settings.incarnation_file)
    directories = [incarnation_file.parent]
    if settings.store_member:
        directories.append(Path(settings.store_member.data_directory))
    for directory in directories:
        aside = _aside(directory, admission)
        if directory.exists() and not aside.exists():
            directory.rename(aside)
        directory.mkdir(mode=0o700, exist_ok=True)
        if users:
            ownership.take(directory, users)
        _remove_older(directory, users)
    old = _aside(incarnation_file.parent, admission) / incarnation_file.name
    last = int(old.read_text()) if old.exists() else 0
    highest = max(last, incarnation(settings), admission.incarnation - 1)
    write_atomically(incarnation_file, str(highest).encode())
    if users:
        ownership.give_partition_directory(incarnation_file.parent, users)
    if settings.firmware:
        # What runs here may be why the old one died.
        with contextlib.suppress(FirmwareRefused):  # said before each start
            Slots(Path(settings.firmware.directory)).doubt()
    _write(settings, Admission(admission.number, admission.incarnation, done=True))


def _aside(directory: Path, admission: Admission) -> Path:
    return directory.with_name(f"{directory.name}.replaced-{admission.number}")


def _remove_older(directory: Path, users: NodeUsers | None) -> None:
    """Remove what lies beside a directory, but the newest generations; what cannot be removed stays."""
    numbers = [path.name.rpartition("-")[2] for path in directory.parent.glob(f"{directory.name}.replaced-*")]
    generations = sorted(int(number) for number in numbers if number.isdecimal())
    for number in generations[:-_KEPT_GENERATIONS]:
        old = directory.with_name(f"{directory.name}.replaced-{number}")
        try:
            if users:
                ownership.take_whole(old, users)
            shutil.rmtree(old)
        except OSError as error:
            _log.warning("not removed", directory=old.name, cause=error.strerror)
        except RecursionError:  # a child of the agent's may lay as many directories in each other as it likes
            _log.warning("not removed", directory=old.name, cause="too many directories in each other")


def _write(settings: NodeSettings, admission: Admission) -> None:
    fields = {"number": admission.number, "incarnation": admission.incarnation, "done": admission.done}
    write_atomically(Path(settings.data_directory) / _FILE, json.dumps(fields).encode())


class AdmissionWatch:
    """Asks the peers in a thread of its own; :meth:`close` joins it. ``reader`` is for a selector."""

    def __init__(self, settings: NodeSettings, known: int) -> None:
        identity = settings.identity
        self._endpoints = settings.peer_node_endpoints
        self._credentials = grpc.ssl_channel_credentials(
            root_certificates=Path(identity.ca_file).read_bytes(),
            private_key=Path(identity.key_file).read_bytes(),
            certificate_chain=Path(identity.certificate_file).read_bytes(),
        )
        self._known = known
        self._stopping = threading.Event()
        self.reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="admission", daemon=True)
        self._thread.start()

    def take(self) -> Admission | None:
        """Return a new admission, once; None when there is none."""
        try:
            octets = os.read(self.reader, 4096)
        except BlockingIOError:
            return None
        number, lowest = map(int, octets.split(b"\n")[-2].split())
        return Admission(number, lowest, done=False)

    def close(self) -> None:
        """End; a call under way is bounded."""
        self._stopping.set()
        self._thread.join()
        os.close(self.reader)
        os.close(self._writer)

    def _run(self) -> None:
        channels = [grpc.secure_channel(endpoint, self._credentials) for endpoint in self._endpoints]
        stubs = [node_pb2_grpc.NodeServiceStub(channel) for channel in channels]
        while not self._stopping.wait(_POLL_SECONDS):
            for stub in stubs:
                try:
                    reply = stub.GetAdmission(node_pb2.GetAdmissionRequest(), timeout=_CALL_SECONDS)
                except grpc.RpcError:
                    continue
                if reply.number > self._known:
                    self._known = reply.number
                    os.write(self._writer, f"{reply.number} {reply.incarnation}\n".encode())
        for channel in channels:
            channel.close()
