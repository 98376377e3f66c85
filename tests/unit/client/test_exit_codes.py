"""Protocol tests of the commands against scripted servers: exit codes, words, files.

The servers are no pool (see protocol_server.py); tests/cli runs the commands on a real one.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import uuid
from pathlib import Path

import click
import grpc
import pytest
from click.testing import CliRunner, Result

from hsm_pool import errors
from hsm_pool.cli import output
from hsm_pool.cli.main import mhsm
from hsm_pool.errors import BY_REASON, MHSMError
from tests.unit.client.protocol_server import Servers, fail_with, make, refuse

# The documented codes, by enumeration; all others are 1.
EXIT_CODES = {
    "NOT_ACTIVATED": 3,
    "SHARE_REFUSED": 4,
    "EVIDENCE_REFUSED": 6,
    "POOL_LOCKED": 3,
    "PARTITION_STARTING": 5,
    "PARTITION_DRAINED": 5,
    "PARTITION_QUARANTINED": 5,
    "NOT_FRESH": 5,
    "REQUEST_LOST": 5,
    "STORE_UNAVAILABLE": 5,
    "OVERLOADED": 5,
    "AUDIT_UNAVAILABLE": 5,
    "COMMIT_UNKNOWN": 7,
    "INTERNAL": 7,
}


def run(servers: Servers, *arguments: str, text: str | None = None) -> Result:
    """Run a command on the scripted servers; no command may end with a traceback."""
    servers.write_connection_file()
    result = CliRunner().invoke(mhsm, [*arguments, "--data-dir", str(servers.directory)], input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert len(result.stderr.splitlines()) <= 6
    return result


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_every_error_has_its_exit_code(reason: str) -> None:
    assert output.failure_of(make(BY_REASON[reason])).exit_code == EXIT_CODES.get(reason, 1)


@pytest.mark.parametrize("reason", ["KEY_EXISTS", "POOL_LOCKED", "NOT_FRESH", "COMMIT_UNKNOWN", "INTERNAL"])
def test_a_refused_command_ends_with_the_code_and_prints_no_result(servers: Servers, reason: str) -> None:
    servers.script(refuse(BY_REASON[reason]))
    ended = run(servers, "key", "create", "k", "--type", "oct", "--timeout", "1", "--json")
    assert sum(servers.count("CreateKey")) > 0
    assert ended.exit_code == EXIT_CODES.get(reason, 1)
    assert ended.stdout == ""
    assert ended.stderr.startswith("mhsm: ")


def test_the_request_id_to_repeat_with_is_shown_when_the_outcome_is_unknown(servers: Servers) -> None:
    """G1: an id that nobody has seen cannot be repeated."""
    servers.script(fail_with(grpc.StatusCode.UNAVAILABLE))
    create = ("key", "create", "k", "--type", "oct", "--timeout", "1")
    ended = run(servers, *create)
    sent = {r.request_id for p in servers.partitions for r in p.requests("CreateKey")}
    assert ended.exit_code == 7
    assert len(sent) == 1
    assert f"--request-id {sent.pop()}" in ended.stderr
    own = str(uuid.uuid4())
    assert f"--request-id {own}" in run(servers, *create, "--request-id", own).stderr
    reading = run(servers, "key", "show", "k", "--timeout", "1")
    assert reading.exit_code == 7
    assert "--request-id" not in reading.stderr, "a read has none"


def test_a_signature_that_does_not_verify_ends_with_6(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "signature").write_bytes(bytes(64))
    options = ("--file", str(tmp_path / "text"), "--signature", str(tmp_path / "signature"))
    assert run(servers, "crypto", "verify", "k", "--algorithm", "ES256", *options).exit_code == 6


def test_without_a_pool_a_command_ends_with_5(tmp_path: Path) -> None:
    for arguments in (("key", "list"), ("status",), ("status", "--json")):
        ended = CliRunner().invoke(mhsm, [*arguments, "--data-dir", str(tmp_path)])
        assert ended.exit_code == 5
        assert ended.stdout == ""
        assert "next: mhsm up" in ended.stderr


def test_status_of_partitions_that_serve_nothing_ends_with_5(servers: Servers) -> None:
    ended = run(servers, "status", "--json")
    assert ended.exit_code == 5
    assert len(json.loads(ended.stdout)["partitions"]) == 3


def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["mhsm", "interrupted"])
    with pytest.raises(SystemExit) as ended:
        output.main(click.Group(commands={"interrupted": interrupted}))
    assert ended.value.code == 130


_RESTORE_KEY = ("backup", "restore-key", "k", "--from")
_CREATE = ("backup", "create", "--output")


@pytest.mark.parametrize(
    ("arguments", "name", "content"),
    [
        *(
            (_RESTORE_KEY, "manifest.json", content)
            for content in (b"", b"{", b"{}", b"[]", b'{"parts":7}', b"\xff", b"[" * 100_000)
        ),
        *(
            (_CREATE, "started.json", content)
            for content in (
                b"",
                b"{",
                b"{}",
                b"[]",
                b'{"backup_id":"a"}',
                b'{"backup_id":1,"partition":0}',
                b'{"backup_id":"a","partition":"0"}',
                b'{"backup_id":"a","partition":3}',
                b'{"backup_id":"a","partition":-1}',
                b"[" * 100_000,
            )
        ),
    ],
)
def test_a_broken_file_of_a_backup_is_an_answer(
    servers: Servers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    name: str,
    content: bytes,
) -> None:
    """G8: one object with --json, before the pool is asked for anything; the place is as it was."""
    servers.write_connection_file()
    place = tmp_path / "place"
    place.mkdir()
    (place / name).write_bytes(content)
    command = ["mhsm", *arguments, str(place), "--data-dir", str(servers.directory), "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        output.main(mhsm)
    shown = capsys.readouterr()
    error = json.loads(shown.err)["error"]
    assert (ended.value.code, shown.out) == (1, "")
    assert (error["reason"], error["definite"]) == ("INVALID_FIELD", True)
    assert name in error["message"]
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {name: content}


def writers(directory: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return the commands that write a file, with the method that each calls first."""
    data = directory / "data"
    data.write_bytes(bytes(32))
    sealed = directory / "sealed.json"
    octets = base64.b64encode(bytes(16)).decode()
    fields = dict.fromkeys(("ciphertext", "initialization_vector", "authentication_tag"), octets)
    sealed.write_text(json.dumps({"key": "keys/k", "algorithm": "A256GCM", **fields}))
    file = ("--file", str(data))
    return {
        "sign": (("crypto", "sign", "k", "--algorithm", "ES256", *file), "Sign"),
        "encrypt": (("crypto", "encrypt", "k", "--algorithm", "A256GCM", *file), "GetKey"),
        "decrypt": (("crypto", "decrypt", "--file", str(sealed)), "Decrypt"),
        "wrap": (("crypto", "wrap", "k", "--algorithm", "A256KW", *file), "WrapKey"),
        "unwrap": (("crypto", "unwrap", "k", "--algorithm", "A256KW", *file), "UnwrapKey"),
        "random": (("crypto", "random", "8"), "GetRandomBytes"),
        "public-key": (("key", "public-key", "k"), "GetKey"),
    }


WRITERS = ("sign", "encrypt", "decrypt", "wrap", "unwrap", "random", "public-key")


@pytest.mark.parametrize("name", WRITERS)
def test_no_command_overwrites_a_file(servers: Servers, tmp_path: Path, name: str) -> None:
    arguments, method = writers(tmp_path)[name]
    existing = tmp_path / "existing"
    existing.write_text("mine")
    ended = run(servers, *arguments, "--output", str(existing))
    assert ended.exit_code == 1
    assert "not overwritten" in ended.stderr
    assert existing.read_text() == "mine"
    assert sum(servers.count(method)) == 0, "refused before any work is done"


@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_cannot_be_written_is_said_in_words(servers: Servers, tmp_path: Path, name: str) -> None:
    """G8: no traceback, nothing half-written."""
    arguments, method = writers(tmp_path)[name]
    before = sorted(tmp_path.iterdir())
    ended = run(servers, *arguments, "--output", str(tmp_path / "missing" / "file"))
    assert ended.exit_code == 1
    assert "cannot be written" in ended.stderr
    assert sum(servers.count(method)) == 0, "refused before any work is done"
    assert sorted(tmp_path.iterdir()) == before


def test_files_are_written_whole_and_for_the_owner_only(servers: Servers, tmp_path: Path) -> None:
    """G3: an unwrapped key is no one else's to read, whatever the umask."""
    (tmp_path / "wrapped").write_bytes(b"k" * 40)
    opened = tmp_path / "opened"
    unwrap = ("crypto", "unwrap", "k", "--algorithm", "A256KW", "--file", str(tmp_path / "wrapped"))
    umask = os.umask(0)
    try:
        assert run(servers, *unwrap, "--output", str(opened), "--json").exit_code == 0
    finally:
        os.umask(umask)
    assert opened.read_bytes() == b"k" * 40
    assert opened.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["opened", "wrapped"]


def test_a_link_to_nowhere_is_not_followed(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    ended = run(servers, "crypto", "random", "8", "--output", str(tmp_path / "link"))
    assert ended.exit_code == 1
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("key", "import", "k"),
        ("crypto", "encrypt", "k", "--algorithm", "A256GCM", "--output", "OUT"),
        ("crypto", "decrypt", "--output", "OUT"),
        ("crypto", "wrap", "k", "--algorithm", "A256KW", "--output", "OUT"),
        ("crypto", "unwrap", "k", "--algorithm", "A256KW", "--output", "OUT"),
    ],
)
@pytest.mark.parametrize("endless", [False, True])
def test_a_file_without_end_is_refused(
    servers: Servers, tmp_path: Path, arguments: tuple[str, ...], endless: bool
) -> None:
    """G8: bounds on every input; a device has no size to look at."""
    big = tmp_path / "big"
    with big.open("wb") as stream:
        stream.truncate(8 * 1024 * 1024)
    words = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    ended = run(servers, *words, "--file", "/dev/zero" if endless else str(big))
    assert ended.exit_code == 1
    assert "bytes" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("algorithm", "exit_code"), [("ESfoo", 2), ("ES257", 2), ("HS256", 1), ("256", 2), ("", 2)]
)
def test_an_algorithm_that_is_none_is_an_answer(
    servers: Servers, tmp_path: Path, algorithm: str, exit_code: int
) -> None:
    """G8: what is none is wrong usage, what the pool refuses is its answer; never a traceback."""
    (tmp_path / "data").write_bytes(bytes(64))
    servers.script(refuse(errors.AlgorithmNotSupported))
    file = str(tmp_path / "data")
    verify = ("crypto", "verify", "k", "--algorithm", algorithm, "--file", file, "--signature", file)
    assert run(servers, *verify, "--der").exit_code == exit_code
    sign = ("crypto", "sign", "k", "--algorithm", algorithm, "--file", file, "--der")
    assert run(servers, *sign, "--output", str(tmp_path / "out")).exit_code == exit_code
    assert not (tmp_path / "out").exists()


def test_a_public_key_on_standard_output_is_one_object_with_json(servers: Servers) -> None:
    to_stdout = ("key", "public-key", "k", "--output", "-")
    pem = run(servers, *to_stdout).stdout
    assert pem.startswith("-----BEGIN PUBLIC KEY-----")
    shown = json.loads(run(servers, *to_stdout, "--json").stdout)
    assert shown == {"name": f"keys/k/versions/{'0' * 32}", "public_key": pem}


def test_imported_material_is_never_shown(servers: Servers, tmp_path: Path) -> None:
    """G3: neither when it works nor when it fails."""
    material = os.urandom(16).hex().encode()
    (tmp_path / "octets").write_bytes(material)
    imported = ("key", "import", "k", "--file", str(tmp_path / "octets"))
    for script, code in ((refuse(errors.KeyExists), 1), (lambda *_: None, 0)):
        servers.script(script)
        ended = run(servers, *imported)
        assert ended.exit_code == code
        assert material.decode() not in ended.output + ended.stderr
    sent = [request for p in servers.partitions for request in p.requests("ImportKey")]
    assert {request.material.octets for request in sent} == {material}


def test_purge_asks_for_the_name(servers: Servers) -> None:
    assert run(servers, "key", "purge", "k", text="other\n").exit_code == 1
    assert sum(servers.count("PurgeDeletedKey")) == 0
    assert run(servers, "key", "purge", "k", text="k\n").exit_code == 0
    assert sum(servers.count("PurgeDeletedKey")) == 1


def test_the_codes_of_the_table_are_those_of_the_errors() -> None:
    """A reason that is renamed or added shows up here."""
    unavailable = {kind.reason for kind in BY_REASON.values() if issubclass(kind, errors.AvailabilityError)}
    indefinite = {kind.reason for kind in BY_REASON.values() if not kind.definite}
    expected = (
        unavailable | indefinite | {"NOT_ACTIVATED", "POOL_LOCKED", "SHARE_REFUSED", "EVIDENCE_REFUSED"}
    )
    assert set(EXIT_CODES) == expected
    assert {reason for reason, code in EXIT_CODES.items() if code == 7} == indefinite
    assert all(issubclass(kind, MHSMError) for kind in BY_REASON.values())
