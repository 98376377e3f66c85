"""G5, G8: the controller against partitions that misbehave, over real mutual TLS.

The partitions here are raw gRPC servers that answer chosen bytes: what a buggy or
hostile partition may send, which the real one cannot be made to.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fabric_controller.enclave_client import CALL_SECONDS, REPLY_REFUSED, EnclaveClient, EnclaveError
from fabric_controller.observe import Failure, Observation, State, Status, blank, observe
from fabric_controller.settings import parse
from fabric_controller.work import Verb
from mhsm.enclave.v1 import enclave_pb2

CANARY = "canary-of-a-partition"
Behaviour = Callable[[bytes, grpc.ServicerContext], bytes]


@dataclass(frozen=True)
class Authority:
    """A certificate authority made for one test run, with the identities it issued as PEM files."""

    directory: Path

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()


def _server_name(index: int) -> str:
    """Return the name of a partition's server, as the pool's own certificates have it."""
    return f"partition-{index}.test-pool"


def _authority(directory: Path, names: Sequence[str] = tuple(map(_server_name, range(9)))) -> Authority:
    ca_key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    for name in ("ca", "fabric", "partition"):
        key = ca_key if name == "ca" else ec.generate_private_key(ec.SECP256R1())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(name) for name in names]),
                critical=False,
            )
            .sign(ca_key, hashes.SHA256())
        )
        (directory / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private_bytes = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (directory / f"{name}.key").write_bytes(private_bytes)
    return Authority(directory)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return _authority(tmp_path_factory.mktemp("authority"))


def _settings_text(authority: Authority, ports: list[int], data_directory: Path) -> str:
    directory = authority.directory
    return json.dumps(
        {
            "pool_id": "test-pool",
            "partitions": [
                {"index": index, "enclave_endpoint": f"127.0.0.1:{port}"} for index, port in enumerate(ports)
            ],
            "identity": {
                "certificate_file": str(directory / "fabric.crt"),
                "key_file": str(directory / "fabric.key"),
                "ca_file": str(directory / "ca.crt"),
            },
            "data_directory": str(data_directory),
        }
    )


class Partitions:
    """Starts misbehaving partitions and stops them at the end of the test."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.released = threading.Event()
        self.health = b"\x08\x01"
        """What gRPC health answers: SERVING."""
        self._servers: list[grpc.Server] = []

    def start(self, behaviour: Behaviour, authority: Authority | None = None) -> int:
        """Start a partition that answers every verb with the behaviour; return its port."""
        own = authority or self.authority
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(behaviour)
        server = grpc.server(futures.ThreadPoolExecutor(2, "partition"))
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    "mhsm.enclave.v1.EnclaveService", dict.fromkeys(("GetStatus", "Drain", "Resume"), handler)
                ),
                grpc.method_handlers_generic_handler(
                    "grpc.health.v1.Health",
                    {"Check": grpc.unary_unary_rpc_method_handler(lambda _request, _context: self.health)},
                ),
            ]
        )
        port = server.add_secure_port(
            "127.0.0.1:0",
            grpc.ssl_server_credentials(
                [(own.read("partition.key"), own.read("partition.crt"))],
                root_certificates=self.authority.read("ca.crt"),
                require_client_auth=True,
            ),
        )
        server.start()
        self._servers.append(server)
        return port

    def silent(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        """Behave like a paused partition, until the test ends."""
        self.released.wait(60)
        return b""

    def stop(self) -> None:
        self.released.set()
        for server in self._servers:
            server.stop(None).wait(10)


@pytest.fixture
def partitions(authority: Authority) -> Iterator[Partitions]:
    started = Partitions(authority)
    yield started
    started.stop()


def _status_bytes(
    state: int = enclave_pb2.PARTITION_STATE_SERVING, serving_count: int = 1, *, replaced: bool = False
) -> bytes:
    return enclave_pb2.GetStatusResponse(
        state=state,  # type: ignore[arg-type]
        fresh=True,
        applied_sequence=2**64 - 1,
        serving_count=serving_count,
        replaced=replaced,
    ).SerializeToString()


def _unknown_field(length: int) -> bytes:
    # Field 15, length-delimited, one- or two-byte length (protobuf encoding specification).
    prefix = bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])
    return b"\x7a" + prefix + (CANARY.encode() * 100)[:length]


def _answer(reply: bytes) -> Behaviour:
    return lambda _request, _context: reply


def _refuse(_request: bytes, context: grpc.ServicerContext) -> bytes:
    context.set_trailing_metadata((("leak", CANARY),))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, CANARY)
    raise AssertionError


def _refuse_commands(request: bytes, context: grpc.ServicerContext) -> bytes:
    # A GetStatus is the only request without fields.
    return _refuse(request, context) if request else _status_bytes()


def _many_trailers(_request: bytes, context: grpc.ServicerContext) -> bytes:
    # About 5 KiB: over the bound, under the library's own.
    context.set_trailing_metadata(tuple((f"leak-{number}", CANARY * 20) for number in range(12)))
    return _status_bytes()


def _observe(partitions: Partitions, ports: list[int], tmp_path: Path) -> dict[int, Observation]:
    with EnclaveClient(parse(_settings_text(partitions.authority, ports, tmp_path))) as client:
        return client.get_status_of_all()


GOOD = Status(State.SERVING, True, 2**64 - 1, 1)

REPLIES: dict[str, tuple[Behaviour, Observation]] = {
    "contract": (_answer(_status_bytes()), GOOD),
    "replaced": (
        _answer(_status_bytes(enclave_pb2.PARTITION_STATE_DRAINED, replaced=True)),
        Status(State.REPLACED, True, 2**64 - 1, 1),
    ),
    "replaced, and serving": (_answer(_status_bytes(replaced=True)), GOOD),
    "unknown field": (_answer(_status_bytes() + _unknown_field(100)), GOOD),
    "too large": (_answer(_status_bytes() + _unknown_field(1000)), Failure("RESOURCE_EXHAUSTED")),
    "unknown enum number": (_answer(_status_bytes(state=99)), Failure(REPLY_REFUSED)),
    "unspecified state": (_answer(b""), Failure(REPLY_REFUSED)),
    "more serving than there are": (_answer(_status_bytes(serving_count=2)), Failure(REPLY_REFUSED)),
    "nonsense": (_answer(b"\xff\xff\xff"), Failure("INTERNAL")),
    "refusal with a text": (_refuse, Failure("FAILED_PRECONDITION")),
    "too much metadata": (_many_trailers, Failure("RESOURCE_EXHAUSTED")),
}


@pytest.mark.parametrize("name", REPLIES)
def test_g5_a_reply_is_a_status_or_a_code(name: str, partitions: Partitions, tmp_path: Path) -> None:
    behaviour, expected = REPLIES[name]
    assert _observe(partitions, [partitions.start(behaviour)], tmp_path) == {0: expected}


def test_g5_no_text_of_a_refusal_survives(partitions: Partitions, tmp_path: Path) -> None:
    port = partitions.start(_refuse)
    settings = parse(_settings_text(partitions.authority, [port], tmp_path))
    with EnclaveClient(settings) as client, pytest.raises(EnclaveError) as caught:
        client.command(Verb.DRAIN, 0, 1, 2)
    assert (caught.value.code, caught.value.outcome_open) == ("FAILED_PRECONDITION", False)
    assert caught.value.__context__ is None
    assert CANARY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("health", [b"", b"\x08\x02", b"\x08\x07", b"\xff", b"\x0a\x01x"])
def test_a_partition_serves_only_when_its_health_says_so(
    health: bytes, partitions: Partitions, tmp_path: Path
) -> None:
    """Status and gRPC health must agree; whatever is not SERVING is not healthy."""
    partitions.health = health
    observed = _observe(partitions, [partitions.start(_answer(_status_bytes()))], tmp_path)
    assert observed == {0: replace(GOOD, healthy=False)}
    assert not observe(blank([0]), observed)[0].partitions[0].serving


def test_silent_partitions_cost_one_deadline_together(partitions: Partitions, tmp_path: Path) -> None:
    ports = [partitions.start(partitions.silent) for _ in range(3)]
    started = time.monotonic()
    observations = _observe(partitions, ports, tmp_path)
    assert time.monotonic() - started < CALL_SECONDS + 1.5
    assert observations == dict.fromkeys(range(3), Failure("DEADLINE_EXCEEDED"))


def test_a_look_leaves_no_thread_to_be_dropped_at_the_end_of_a_command(
    partitions: Partitions, tmp_path: Path
) -> None:
    """A daemon thread of gRPC that is dropped while it holds a call's lock keeps a command from ending."""
    asked = threading.Event()

    def silent(request: bytes, context: grpc.ServicerContext) -> bytes:
        asked.set()
        return partitions.silent(request, context)

    settings = parse(_settings_text(partitions.authority, [partitions.start(silent)], tmp_path))
    before = set(threading.enumerate())
    with EnclaveClient(settings) as client, futures.ThreadPoolExecutor(1) as threads:
        look = threads.submit(client.get_status_of_all)
        assert asked.wait(30)
        begun = set(threading.enumerate()) - before
        dropped = [thread.name for thread in begun if thread.daemon and "partition" not in thread.name]
        assert dropped == []
        assert look.result(30) == {0: Failure("DEADLINE_EXCEEDED")}


def test_g5_a_partition_of_another_authority_is_not_heard(partitions: Partitions, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    port = partitions.start(_answer(_status_bytes()), _authority(stranger))
    assert _observe(partitions, [port], tmp_path) == {0: Failure("UNAVAILABLE")}


def test_g5_a_partition_at_the_place_of_another_is_not_heard(
    partitions: Partitions, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Endpoints that were exchanged in the settings: a command would reach another than it is for."""
    own = _authority(tmp_path_factory.mktemp("second"), [_server_name(1)])
    partitions.authority = own
    ports = [partitions.start(_answer(_status_bytes())) for _ in range(2)]
    assert _observe(partitions, ports, tmp_path) == {0: Failure("UNAVAILABLE"), 1: GOOD}
    settings = parse(_settings_text(own, ports, tmp_path))
    with EnclaveClient(settings) as client, pytest.raises(EnclaveError) as caught:
        client.command(Verb.DRAIN, 0, 1, 2)
    assert caught.value.code == "UNAVAILABLE"


def _fabric(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fabric_controller", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _data_directory(partitions: Partitions, ports: list[int], tmp_path: Path) -> Path:
    directory = tmp_path / "pool" / "fabric"
    directory.mkdir(parents=True)
    text = _settings_text(partitions.authority, ports, tmp_path / "state")
    (directory / "fabric.json").write_text(text)
    return tmp_path / "pool"


def test_commands(partitions: Partitions, tmp_path: Path) -> None:
    state = enclave_pb2.DrainResponse(state=enclave_pb2.PARTITION_STATE_DRAINED).SerializeToString()
    ports = [partitions.start(_answer(_status_bytes())), partitions.start(_refuse)]
    # A port that nobody listens on: bound once, then given back.
    gone = grpc.server(futures.ThreadPoolExecutor(1))
    ports.append(gone.add_insecure_port("127.0.0.1:0"))
    gone.stop(None).wait(10)
    ports.append(partitions.start(_answer(state)))
    ports += [partitions.start(_answer(_status_bytes())), partitions.start(_refuse_commands)]
    place = ("--data-dir", str(_data_directory(partitions, ports, tmp_path)))

    looked = _fabric("status", "--json", *place)
    assert looked.returncode == 0
    document = json.loads(looked.stdout)
    assert (document["format_version"], document["pool_id"], document["serving_count"]) == (3, "test-pool", 3)
    failures = [entry["failure"] for entry in document["partitions"]]
    assert failures == [None, "FAILED_PRECONDITION", "UNAVAILABLE", None, None, None]

    drained = _fabric("drain", "3", *place)
    assert (drained.returncode, drained.stdout) == (0, "partition 3: DRAINED\n")
    assert "next: mhsm-fabric resume 3" in drained.stderr
    refused = _fabric("drain", "5", *place)
    assert (refused.returncode, "(FAILED_PRECONDITION)" in refused.stderr) == (1, True)
    assert CANARY not in refused.stdout + refused.stderr
    assert "next: mhsm-fabric status" in refused.stderr
    assert [_fabric("resume", index, *place).returncode for index in "12"] == [5, 5]
    assert _fabric("drain", "7", *place).returncode == 2
    assert _fabric("status", "--settings", "x", *place).returncode == 2
    missing = _fabric("status", "--settings", str(tmp_path / "none.json"))
    assert missing.returncode == 5
    assert "the pool does not run\nnext: mhsm up" in missing.stderr
    for result in (refused, missing):
        assert "Traceback" not in result.stderr


def _seen(state: int, firmware_version: int = 3) -> Behaviour:
    reply = enclave_pb2.GetStatusResponse(
        state=state,  # type: ignore[arg-type]
        fresh=state == enclave_pb2.PARTITION_STATE_SERVING,
        serving_count=2,
        incarnation=4,
        firmware_version=firmware_version,
    )
    return _answer(reply.SerializeToString())


def test_a_pool_with_one_partition_out(partitions: Partitions, tmp_path: Path) -> None:
    """Commands and dry runs end alike, say why, and write nothing down."""
    drained, serving = enclave_pb2.PARTITION_STATE_DRAINED, enclave_pb2.PARTITION_STATE_SERVING
    ports = [partitions.start(_seen(state)) for state in (serving, drained, serving)]
    pool = _data_directory(partitions, ports, tmp_path)
    place = ("--data-dir", str(pool))
    looked = _fabric("status", *place)
    assert (looked.returncode, "firmware" in looked.stdout) == (0, True)

    def ends(*command: str) -> tuple[int, str, str]:
        """Return exit code, message and what is suggested first."""
        ended = _fabric(*command, *place)
        message, suggested, *_ = *ended.stderr.splitlines(), "", ""
        return ended.returncode, message, suggested.removesuffix(f" --data-dir {pool}")

    resumed_first = "next: mhsm-fabric resume 1"
    for option in ((), ("--dry-run",)):
        code, message, suggested = ends("drain", "2", *option)
        assert (code, suggested) == (1, resumed_first)
        assert message.endswith("fewer than two others serve: partition 1 is DRAINED")
        code, message, suggested = ends("patch", "2", *option)
        assert (code, message) == (
            1,
            "error: partition 0 runs version 3, and no partition takes older firmware",
        )
        code, message, suggested = ends("replace", "1", *option)
        assert ("answers and is DRAINED" in message, code) == (True, 0 if option else 2)
    for command in (("restart", "0"), ("patch", "4")):
        code, message, suggested = ends(*command, "--dry-run")
        assert (code, suggested) == (1, resumed_first)
        assert "it would wait" in message
    steps = json.loads(_fabric("restart", "1", "--dry-run", "--json", *place).stdout)["steps"]
    assert steps == ["restart 1", "resume 1"]
    assert _fabric("history", *place).stdout == ""

    assert _fabric("patch", "4", "--no-wait", *place).returncode == 0
    assert "something else: patch to version 4" in ends("restart", "1")[1]
    looked = _fabric("status", *place)
    assert "work: patch to version 4, running, 0 of 3 done: partition 0 cannot be out while" in looked.stdout
    assert _fabric("halt", *place).returncode == 0
    planned = _fabric("restart", "1", "--dry-run", *place)
    assert planned.stderr.startswith("the halted patch to version 4 would be dropped\n")
    begun = _fabric("restart", "1", "--no-wait", *place)
    assert begun.stderr.startswith("the halted patch to version 4 is dropped\n")


def test_a_command_is_in_the_journal_before_it_arrives(partitions: Partitions, tmp_path: Path) -> None:
    """Killed at any point, the controller never uses a counter twice."""
    seen: list[bytes] = []

    def partition(request: bytes, _context: grpc.ServicerContext) -> bytes:
        if request:
            seen.append((tmp_path / "state" / "journal").read_bytes())
        return _status_bytes()

    ports = [partitions.start(partition) for _ in range(3)]
    assert (
        _fabric("drain", "1", "--data-dir", str(_data_directory(partitions, ports, tmp_path))).returncode == 0
    )
    (journal,) = seen
    assert (b'"verb":"DRAIN"' in journal, b'"kind":"result"' in journal) == (True, False)


def test_a_controller_that_hangs_shows(partitions: Partitions, tmp_path: Path) -> None:
    ports = [partitions.start(_answer(_status_bytes())) for _ in range(3)]
    place = ("--data-dir", str(_data_directory(partitions, ports, tmp_path)))
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "status.json"
    said = {"time": "2026-01-01T00:00:00.000+00:00", "controller": {"process_id": 1, "user_id": 0}}
    path.write_text(json.dumps(said))
    shown = json.loads(_fabric("status", "--json", *place).stdout)["controller"]
    assert shown == {"user_id": 0, "hardening": [], "alive": True, "last_seen": said["time"]}
    os.utime(path, (0, 0))
    looked = _fabric("status", *place)
    assert f"controller: does not run, or hangs (last heard of {said['time']})" in looked.stdout
    assert "next: mhsm up" in looked.stderr
    assert json.loads(_fabric("status", "--json", *place).stdout)["controller"]["alive"] is False


def test_a_damaged_journal_does_not_hide_the_partitions(partitions: Partitions, tmp_path: Path) -> None:
    ports = [partitions.start(_answer(_status_bytes())) for _ in range(2)]
    place = ("--data-dir", str(_data_directory(partitions, ports, tmp_path)))
    begun = _fabric("restart", "1", "--no-wait", *place)
    assert begun.returncode == 0, begun.stderr
    journal = tmp_path / "state" / "journal"
    text = journal.read_bytes().partition(b" ")[2].rstrip().replace(b'"partitions":[1]', b'"partitions":[7]')
    journal.write_bytes(f"{zlib.crc32(text):08x} ".encode() + text + b"\n")
    looked = _fabric("status", "--json", *place)
    assert looked.returncode == 1
    document = json.loads(looked.stdout)
    assert (document["serving_count"], document["work"]["state"]) == (2, "unknown")
    assert "evidence" in json.loads(looked.stderr)["error"]["hints"][0]
    served = _fabric("serve", *place)
    assert (served.returncode, "Traceback" in served.stderr) == (1, False)


def test_status_fails_when_nobody_answers(partitions: Partitions, tmp_path: Path) -> None:
    gone = grpc.server(futures.ThreadPoolExecutor(1))
    port = gone.add_insecure_port("127.0.0.1:0")
    gone.stop(None).wait(10)
    looked = _fabric("status", "--data-dir", str(_data_directory(partitions, [port], tmp_path)))
    assert looked.returncode == 5
    assert "UNAVAILABLE" in looked.stdout


def test_serve_until_sigterm(partitions: Partitions, tmp_path: Path) -> None:
    ports = [partitions.start(_answer(_status_bytes())), partitions.start(_refuse)]
    place = ("--data-dir", str(_data_directory(partitions, ports, tmp_path)))
    with subprocess.Popen(
        [sys.executable, "-m", "fabric_controller", "serve", *place], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(json.loads(line))
                if lines[-1].get("partition", "") is None:
                    break
            second = _fabric("serve", *place)
            assert second.returncode == 1
            assert "another controller" in second.stderr
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(10) == 0
        finally:
            process.kill()
    lines.extend(json.loads(line) for line in rest.splitlines())
    assert [lines[0]["event"], lines[-1]["event"]] == ["started", "ended"]
    changes = {
        (line["partition"], line["what"]): line["after"] for line in lines if line["event"] == "changed"
    }
    assert changes[0, "state"] == "SERVING"
    assert changes[1, "failure"] == "FAILED_PRECONDITION"
    assert CANARY not in json.dumps(lines)
    path = tmp_path / "state" / "status.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["serving_count"] == 1
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "controller.lock",
        "journal",
        "status.json",
    ]
