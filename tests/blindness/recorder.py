"""Records what the fabric controller receives on its enclave channels. Never part of the product.

The proof puts a copy of this file on the controller's path as ``sitecustomize``, which
Python loads before anything else. It stands between grpcio and the shipped code, in the
controller's own process: a relay in between would see TLS only. Of every call it writes down
the octets of the request and the reply before they are parsed, all headers and trailers, the code
and the text of an error, and hands everything on unchanged. In all other processes it does nothing.

Where a file named ``readable`` lies beside it, the controller becomes dumpable again with its first
call: whoever runs the proof without being root reads its memory otherwise not.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_DUMPABLE = 4


def _directory() -> Path:
    """Return where to write: a controller reaches its own directory only, a command this one."""
    arguments = sys.orig_argv
    if "serve" in arguments and "--settings" in arguments:
        return Path(arguments[arguments.index("--settings") + 1]).parent
    return Path(__file__).resolve().parent


class Recorder:
    """One file a process: frames of ``kind method name length`` and as many octets."""

    def __init__(self) -> None:
        # Under bubblewrap each controller is process 1.
        path = _directory() / f"recording-{os.getpid()}-{time.time_ns()}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._readable = Path(__file__).with_name("readable").exists()

    def note(self, kind: str, method: str, name: str, octets: bytes) -> None:
        """Append one frame; appends of several threads do not mix."""
        head = f"{kind} {method} {name or '-'} {len(octets)}\n".encode()
        os.write(self._descriptor, head + octets + b"\n")

    def ended(self, method: str, call: Any) -> None:
        """Note what a finished call leaves besides its reply."""
        if self._readable:
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
        self.note("details", method, call.code().name, (call.details() or "").encode())
        for kind, pairs in (("header", call.initial_metadata()), ("trailer", call.trailing_metadata())):
            for key, value in pairs or ():
                self.note(kind, method, key, value.encode() if isinstance(value, str) else value)


class RecordedCallable:
    """A unary method of a stub; only what the controller uses of it."""

    def __init__(self, inner: Any, method: str, recorder: Recorder) -> None:
        self._inner, self._method, self._recorder = inner, method, recorder

    def __call__(self, request: Any, timeout: float) -> Any:
        """Call, and wait for the reply."""
        import grpc

        self._recorder.note("request", self._method, "", request.SerializeToString())
        try:
            reply, call = self._inner.with_call(request, timeout=timeout)
        except grpc.RpcError as error:
            self._recorder.ended(self._method, error)
            raise
        self._recorder.ended(self._method, call)
        return reply


def install() -> None:
    """Have every secure channel of this process recorded."""
    import grpc

    recorder = Recorder()
    make_channel = grpc.secure_channel

    def secure_channel(*arguments: Any, **named: Any) -> Any:
        channel = make_channel(*arguments, **named)
        unary_unary = channel.unary_unary

        def recorded(method: str, request_serializer: Any, response_deserializer: Any, **more: Any) -> Any:
            def parse(octets: bytes) -> Any:
                recorder.note("reply", method, "", octets)
                return response_deserializer(octets)

            return RecordedCallable(unary_unary(method, request_serializer, parse, **more), method, recorder)

        channel.unary_unary = recorded
        return channel

    grpc.secure_channel = secure_channel


if __name__ == "sitecustomize" and sys.orig_argv[1:3] == ["-m", "fabric_controller"]:
    install()
