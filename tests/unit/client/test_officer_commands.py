"""What the officers' commands refuse by themselves: exit codes and words, without a pool (G3, G4, G8)."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from hsm_pool.cli.evidence_files import encode
from hsm_pool.cli.main import mhsm
from hsm_pool.enclave.evidence import exchange_key_report_data
from security_domain import domain
from security_domain.azure import domain as azure_domain
from security_domain.fingerprints import words
from security_domain.officers import certificate_pem, save_private_key
from tests.running_pool import TestOfficer, make_officers
from tests.unit.attested import TestPool
from tests.unit.client.protocol_server import Servers

OTHER_POOL = "f" * 32


@dataclass(frozen=True, slots=True)
class Desk:
    """A directory with an attempt, roots, domain files and four officers' files; the last has no share."""

    directory: Path
    officers: list[TestOfficer]

    def options(self, *arguments: str) -> list[str]:
        roots = ("--platform-root", "platform.crt", "--owner-root", "owner.crt")
        return [*arguments, "--attempt", "attempt", *roots]

    def share(self, *arguments: str) -> Result:
        return CliRunner().invoke(mhsm, ["security-domain", *self.options("submit-share", *arguments)])


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    officers = make_officers(4)
    certificates = [officer.certificate_der for officer in officers[:3]]
    pool = TestPool(tmp_path / "pool", OTHER_POOL)
    for generation in (1, 2):
        new = domain.create("p", generation, certificates, 2)
        (tmp_path / f"domain-{generation}").write_bytes(new.file)
        azure = azure_domain.make(new.core, new.file, certificates, 2)
        (tmp_path / f"azure-{generation}").write_bytes(azure)
    (tmp_path / "platform.crt").write_bytes(pool.platform_root.certificate_pem)
    (tmp_path / "owner.crt").write_bytes(pool.owner_root.certificate_pem)
    for number, officer in enumerate(officers, start=1):
        (tmp_path / f"{number}.key").write_bytes(save_private_key(officer.key))
        (tmp_path / f"{number}.crt").write_bytes(certificate_pem(officer.certificate_der))
    encryption = serialization.BestAvailableEncryption(b"passphrase")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (tmp_path / "encrypted.key").write_bytes(officers[0].key.private_bytes(*form, encryption))
    attempt_id, exchange_key = bytes(16), X25519PrivateKey.generate().public_key().public_bytes_raw()
    certificate = officers[3].certificate_der
    data = exchange_key_report_data(attempt_id, exchange_key, certificate)
    attempt = {
        "purpose": "new_generation",
        "partition": 0,
        "pool_id": "p",
        "generation": 1,
        "attempt_id": base64.b64encode(attempt_id).decode(),
        "exchange_public_key": base64.b64encode(exchange_key).decode(),
        "new_officers": [],
        "new_required": 0,
        "exchange_certificate": base64.b64encode(certificate).decode(),
        "evidence": encode(pool.nodes[0].attester.attest(attempt_id, data, exchange_key)),
    }
    (tmp_path / "attempt").write_text(json.dumps(attempt))
    return Desk(tmp_path, officers)


def test_a_new_generation_is_agreed_to_with_its_officers(desk: Desk) -> None:
    """G4: the words of each officer of the new file, and the quorum, stand before the share."""
    made = desk.share("--security-domain", "domain-1", "--officer-key", "1.key", "--output", "submission")
    assert made.exit_code == 0, made.output
    assert "given for: new generation, to any 2 of these officers" in made.stderr
    for officer in desk.officers[:3]:
        assert words(officer.certificate_der) in made.stderr
    assert words(desk.officers[3].certificate_der) not in made.stderr.split("this share is")[1]


def test_an_encrypted_key_without_a_terminal_is_wrong_usage(desk: Desk) -> None:
    """No raw warning of Python, no passphrase read from where it would be seen."""
    files = ("--security-domain", "domain-1", "--officer-key", "encrypted.key", "--output", "submission")
    ended = subprocess.run(
        [sys.executable, "-m", "hsm_pool.cli", "security-domain", *desk.options("submit-share", *files)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert "mhsm: encrypted.key is encrypted, and there is no terminal" in ended.stderr
    assert "hint: run the command at a terminal" in ended.stderr
    assert "Warning" not in ended.stderr
    assert not (desk.directory / "submission").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("domain-2", "1.key"), "domain-2 is of another pool or generation than this attempt"),
        (("domain-1", "4.key"), "domain-1 has no share for 4.key"),
        (("azure-1", "1.key", "4.crt"), "azure-1 has no share for 4.crt (officer "),
        (("azure-1", "1.key", "2.crt"), "2.crt is not the certificate of 1.key"),
    ],
)
def test_a_wrong_file_or_officer_ends_with_4(desk: Desk, files: tuple[str, ...], said: str) -> None:
    names = ("--security-domain", "--officer-key", "--officer-certificate")
    options = [part for pair in zip(names, files, strict=False) for part in pair]
    ended = desk.share(*options, "--output", "submission")
    assert (ended.exit_code, said in ended.stderr) == (4, True), ended.stderr
    assert not (desk.directory / "submission").exists()


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (("1.crt", "1.key", "4.crt", "4.key"), "azure-1 has no share for 4.crt (officer "),
        (("1.crt", "1.key", "2.crt", "3.key"), "azure-1, 2.crt: the key is not that of the certificate"),
        (("1.crt", "1.key", "1.crt", "1.key"), "azure-1, 1.crt: this officer stands twice"),
    ],
)
def test_a_restore_blob_of_wrong_officers_ends_with_4(desk: Desk, pairs: tuple[str, ...], said: str) -> None:
    officers = [*("--officer", *pairs[:2]), *("--officer", *pairs[2:])]
    options = desk.options("restore-blob", "--azure-file", "azure-1", *officers, "--output", "blob")
    ended = CliRunner().invoke(mhsm, ["security-domain", *options])
    assert (ended.exit_code, said in ended.stderr) == (4, True), ended.stderr
    assert not (desk.directory / "blob").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("cancel",),
        ("upload", "--restore-blob", "azure-1"),
        ("submit-share", "--submission", "azure-1"),
    ],
)
def test_an_attempt_of_another_pool_is_told_from_one_that_has_ended(
    desk: Desk, servers: Servers, arguments: tuple[str, ...]
) -> None:
    servers.write_connection_file()
    at = ("--attempt", "attempt", "--data-dir", str(servers.directory))
    ended = CliRunner().invoke(mhsm, ["security-domain", *arguments, *at])
    assert ended.exit_code == 1
    said = f"attempt says pool {OTHER_POOL}, {servers.directory} is of pool {'0' * 32}: --data-dir?"
    assert said in ended.stderr
    assert not any(partition.calls for partition in servers.partitions), "nobody was asked"
