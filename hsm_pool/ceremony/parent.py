"""How a partition drives its ceremony child: bounded in time, one command at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

from hsm_pool.audit.record import note
from hsm_pool.ceremony.frames import read_frame, write_frame
from hsm_pool.errors import CeremonyState, InvalidField, MHSMError, ShareRefused
from mhsm.ceremony.v1 import ceremony_pb2

_ANSWER_SECONDS = 60.0
_THUMBPRINT = re.compile(r"[0-9A-Za-z_-]{43}")


class CeremonyChild:
    """A running child. Use as a context manager, or :meth:`close` it: it never outlives its use."""

    def __init__(self) -> None:
        kept = {
            name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH") if name in os.environ
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hsm_pool.ceremony.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=kept,
            close_fds=True,
        )
        self._lock = threading.Lock()

    @property
    def process_id(self) -> int:
        """Process id, for tests that kill it."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child still runs."""
        return self._process.poll() is None

    def ask(self, request: ceremony_pb2.CeremonyRequest) -> ceremony_pb2.CeremonyResponse:
        """Send a command and return its result.

        Raises:
            MHSMError: The command was refused, or the child died or took too long.
        """
        assert self._process.stdin
        assert self._process.stdout
        with self._lock:
            timer = threading.Timer(_ANSWER_SECONDS, self._process.kill)
            timer.start()
            try:
                write_frame(self._process.stdin, request)
                response = read_frame(self._process.stdout, ceremony_pb2.CeremonyResponse)
            except (OSError, ValueError):
                response = None
            finally:
                timer.cancel()
                timer.join()
        if response is None:
            self.close()
            raise CeremonyState("the ceremony child ended before it answered; start the ceremony again")
        if response.WhichOneof("result") == "refusal":
            raise refused(response.refusal)
        return response

    def close(self) -> None:
        """End the child and forget everything it held."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                try:
                    stream.close()
                except OSError:  # unflushed input of a dead child
                    continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def refused(refusal: ceremony_pb2.Refusal) -> MHSMError:
    """Return the typed error of a child's refusal."""
    if refusal.kind == "InvalidOfficers":
        return InvalidField(refusal.message, field="officer_certificates_der")
    if refusal.kind in {"ShareRefused", "SubmissionRefused"}:
        # Of a stranger's submission the name is his own word: only what looks like a thumbprint is noted.
        if _THUMBPRINT.fullmatch(refusal.officer):
            note(officer=refusal.officer)
        return ShareRefused(refusal.message, officer=refusal.officer)
    return CeremonyState(refusal.message)
