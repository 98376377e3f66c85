"""The mhsm command, killed with SIGKILL at one of its steps: ``python -m tests.killed_command N ARGUMENTS``.

A step is what somebody else could see: just before and just after each call to the pool, and just
before a file is opened for writing, gets a name or loses it. The command itself is not changed; its
steps are counted from outside, by an audit hook of the interpreter and around grpcio's calls. With a
number that is never reached the command runs to its end.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from grpc import _channel

_FILE_EVENTS = {"os.link", "os.remove", "os.rename", "os.mkdir"}


class _Steps:
    def __init__(self, last: int) -> None:
        self.left = last

    def pass_one(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _watch(steps: _Steps) -> None:
    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS or (event == "open" and _writes(arguments)):
            steps.pass_one()

    sys.addaudithook(heard)
    kind = _channel._UnaryUnaryMultiCallable
    call = kind.__call__

    def stepped(self: Any, *arguments: Any, **options: Any) -> Any:
        steps.pass_one()
        response = call(self, *arguments, **options)
        steps.pass_one()
        return response

    kind.__call__ = stepped


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, _mode, flags = arguments
    # Descriptors and devices are not files of the user.
    return (
        isinstance(path, str | os.PathLike | bytes)
        and not os.fspath(path).startswith("/dev/")  # type: ignore[arg-type]
        and bool(flags & (os.O_WRONLY | os.O_RDWR))
    )


def main() -> None:
    """Run the command."""
    from hsm_pool.cli.main import main as mhsm  # imported before the count begins

    steps = _Steps(int(sys.argv[1]))
    sys.argv = ["mhsm", *sys.argv[2:]]
    _watch(steps)
    mhsm()


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main()
