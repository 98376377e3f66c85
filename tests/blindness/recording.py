"""The recording of what the controller received: made by :mod:`tests.blindness.recorder`, read here."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from hsm_pool.limits import ENCLAVE_MESSAGE_BYTES_MAX
from hsm_pool.net.enclave_guard import OutsideContract, check
from mhsm.enclave.v1 import enclave_pb2
from tests.blindness import recorder

SERVICE = enclave_pb2.DESCRIPTOR.services_by_name["EnclaveService"]
LOCAL_CODES = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"})
"""Codes that grpcio also makes by itself, with a text of its own; that text is scanned like everything."""

HEADERS = frozenset({"content-type", "grpc-accept-encoding", "grpc-encoding", "accept-encoding"})
"""What gRPC itself sends with a reply."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One thing that was received or sent; ``name`` is a metadata key, or the code of what ended."""

    kind: str
    method: str
    name: str
    octets: bytes


@contextlib.contextmanager
def recorded(directory: Path) -> Iterator[Path]:
    """Record every controller and operator's command that is started within; yields the recordings' place."""
    directory.mkdir(mode=0o755)  # the controller may be another user
    shutil.copy(recorder.__file__, directory / "sitecustomize.py")
    if os.geteuid() != 0:
        (directory / "readable").touch()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{directory}{os.pathsep}{before}" if before else str(directory)
    try:
        yield directory
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def collect(pool_directory: Path, directory: Path) -> None:
    """Move what the controllers of a pool recorded to the other recordings; one that runs goes on there."""
    for path in (pool_directory / "fabric").glob("recording-*"):
        path.rename(directory / path.name)


def files(directory: Path) -> list[Path]:
    """Return the recordings."""
    return sorted(directory.glob("recording-*"))


def frames(directory: Path) -> Iterator[Frame]:
    """Yield everything of all recordings; the last frame of a killed process may be cut, and is left out."""
    for path in files(directory):
        octets, position = path.read_bytes(), 0
        while (end := octets.find(b"\n", position)) >= 0:
            kind, method, name, length = octets[position:end].decode().split(" ")
            position = end + 1 + int(length) + 1
            if position <= len(octets):
                yield Frame(kind, method, name, octets[end + 1 : position - 1])


def verbs(directory: Path) -> Counter[str]:
    """Return how many replies of each method were received."""
    return Counter(frame.method.rpartition("/")[2] for frame in frames(directory) if frame.kind == "reply")


def refusals(directory: Path) -> Counter[str]:
    """Return how many refusals of each method were received, as "Drain FAILED_PRECONDITION"."""
    return Counter(
        f"{frame.method.rpartition('/')[2]} {frame.name}"
        for frame in frames(directory)
        if frame.kind == "details" and frame.name not in {"OK", *LOCAL_CODES}
    )


def problems(directory: Path) -> list[str]:
    """Name everything received that the contract has no place for: G5 without knowing any secret."""
    return sorted({problem for frame in frames(directory) for problem in _problems(frame)})


def _problems(frame: Frame) -> Iterator[str]:
    verb = frame.method.rpartition("/")[2]
    match frame.kind:
        case "details" if frame.octets and frame.name not in LOCAL_CODES:
            yield f"{verb}: a text in an error ({frame.name})"
        case "header" | "trailer" if frame.name not in HEADERS:
            yield f"{verb}: the {frame.kind} {frame.name}"
        case "reply" if not _within_contract(verb, frame.octets):
            yield f"{verb}: a reply outside of the contract"


def _within_contract(verb: str, octets: bytes) -> bool:
    message: Any = health_pb2.HealthCheckResponse()
    if verb in SERVICE.methods_by_name:
        message = getattr(enclave_pb2, SERVICE.methods_by_name[verb].output_type.name)()
    try:
        message.ParseFromString(octets)
        check(message)
    except (DecodeError, OutsideContract):
        return False
    return len(octets) <= ENCLAVE_MESSAGE_BYTES_MAX
