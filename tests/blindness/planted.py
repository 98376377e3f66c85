"""The secrets of the proof: planted where that is possible, learnt with a quorum's keys where it is not."""

from __future__ import annotations

import os
import secrets
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from mhsm.keys.v1 import keys_pb2
from security_domain.azure import document
from security_domain.officers import make_officer, save_private_key
from tests.canaries import (
    every_form,
    import_and_use,
    learn_secrets,
    learn_tls_keys,
)
from tests.factors import ORDERS, form
from tests.running_pool import RunningPool, TestOfficer, mhsm
from tests.scan import Piece, Scanner

REQUIRED = 2
_SUBMIT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Keyholder:
    """An officer whose key file is encrypted under a passphrase."""

    officer: TestOfficer
    key_file: Path
    passphrase: str

    @property
    def numbers(self) -> rsa.RSAPrivateNumbers:
        """The private key's numbers."""
        return self.officer.key.private_numbers()


def make_keyholders(directory: Path) -> list[Keyholder]:
    """Make three officers and their files."""
    directory.mkdir(mode=0o700)
    made = []
    for number in range(1, 4):
        certificate, key = make_officer(f"officer-{number}")
        passphrase = secrets.token_urlsafe(24)
        file = directory / f"officer-{number}.key"
        file.write_bytes(save_private_key(key, passphrase.encode()))
        der = x509.load_pem_x509_certificate(certificate).public_bytes(serialization.Encoding.DER)
        made.append(Keyholder(TestOfficer(der, key), file, passphrase))
    return made


@dataclass(slots=True)
class Planted:
    """Everything that is looked for."""

    secrets: dict[str, bytes] = field(default_factory=dict)
    mnemonics: dict[str, str] = field(default_factory=dict)
    factors: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Moduli by name, with a known factor."""
    generated: dict[str, int] = field(default_factory=dict)
    """Moduli of keys that the pool made: nobody knows their factors."""

    def scanner(self) -> Scanner:
        """Return a scanner for all of it."""
        moduli = {name: modulus for name, (modulus, _) in self.factors.items()}
        return Scanner(self.secrets, self.mnemonics, {**moduli, **self.generated})

    def pieces(self) -> list[Piece]:
        """Return everything in every form, for the positive control."""
        found = every_form(self.secrets, self.mnemonics)
        for name, (modulus, factor) in self.factors.items():
            size = modulus.bit_length() // 16
            found += [(name, form(order), factor.to_bytes(size, order)) for order in ORDERS]
        return found


class Ceremonies:
    """Ceremonies as operators and officers hold them: by the mhsm command, with passphrases."""

    def __init__(self, pool: RunningPool, keyholders: list[Keyholder], directory: Path) -> None:
        self._pool, self._keyholders, self._directory = pool, keyholders, directory
        self.file = directory / "security-domain.json"
        self.azure_file = b""
        self._attempts = 0

    def activate(self) -> None:
        """Make the security domain; every officer proves his share."""
        attempt = self._new_attempt()
        certificates: list[str] = []
        for number, keyholder in enumerate(self._keyholders):
            path = self._directory / f"officer-{number}.der.crt"
            certificate = x509.load_der_x509_certificate(keyholder.officer.certificate_der)
            path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
            certificates += ["--officer", str(path)]
        azure = self._directory / "security-domain-azure.json"
        self._security_domain(
            "download", "--required", str(REQUIRED), "--output", str(self.file), "--azure-output", str(azure),
            "--attempt-output", str(attempt), *certificates,
        )  # fmt: skip
        self.azure_file = azure.read_bytes()
        self._submit(attempt, self._keyholders)
        self._pool.officers = [keyholder.officer for keyholder in self._keyholders]
        self._pool.file = self.file.read_bytes()
        self._pool.await_states(["SERVING"] * 3)

    def prove_quorum(self) -> None:
        """Two officers prove that they can open the domain; nothing changes."""
        attempt = self._new_attempt()
        self._security_domain("verify", "--output", str(attempt))
        self._submit(attempt, self._keyholders[:REQUIRED])

    def unlock(self) -> None:
        """Two officers unlock the locked pool."""
        attempt = self._new_attempt()
        self._security_domain("init-recovery", "--output", str(attempt))
        self._submit(attempt, self._keyholders[1:])
        self._pool.await_states(["SERVING"] * 3)

    def _new_attempt(self) -> Path:
        self._attempts += 1
        return self._directory / f"attempt-{self._attempts}.json"

    def _security_domain(self, *arguments: str) -> None:
        mhsm("security-domain", *arguments, "--data-dir", str(self._pool.directory))

    def _submit(self, attempt: Path, keyholders: list[Keyholder]) -> None:
        for keyholder in keyholders:
            command = [
                sys.executable, "-m", "hsm_pool.cli", "security-domain", "submit-share", "--attempt",
                str(attempt), "--security-domain", str(self.file), "--officer-key", str(keyholder.key_file),
                "--data-dir", str(self._pool.directory),
            ]  # fmt: skip
            _at_a_terminal([*command, "--yes"], keyholder.passphrase)


def _at_a_terminal(command: list[str], passphrase: str) -> None:
    """Run a command that asks for a passphrase, which it does at a terminal only."""
    terminal, theirs = os.openpty()
    try:
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        shown, deadline = b"", time.monotonic() + _SUBMIT_SECONDS
        answered = False
        while select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                octets = os.read(terminal, 4096)
            except OSError:  # it has ended, and with it the terminal's other side
                break
            shown += octets
            # What is typed before the question is thrown away.
            if not answered and b"passphrase: " in shown:
                os.write(terminal, passphrase.encode() + b"\n")
                answered = True
        if process.wait(timeout=_SUBMIT_SECONDS):
            raise AssertionError(f"an officer's share was not taken: {shown.decode(errors='replace')}")
    finally:
        os.close(terminal)


def plant(pool: RunningPool, keyholders: list[Keyholder], ceremonies: Ceremonies) -> Planted:
    """Activate the pool, import keys into it, change its KEK, and learn everything it has to hide."""
    ceremonies.activate()
    imported = import_and_use(pool)
    planted = Planted(dict(imported))
    p, q = (int.from_bytes(imported[f"RSA {name}"]) for name in "pq")
    planted.factors["RSA modulus"] = (p * q, p)
    with pool.client() as client:
        made = client.create_key("made-rsa", key_type=keys_pb2.KEY_TYPE_RSA, size_bits=2048)
        client.sign("keys/made-rsa", "RS256", os.urandom(32))
    public = serialization.load_der_public_key(made.public_key_der)
    assert isinstance(public, rsa.RSAPublicKey)
    planted.generated["RSA modulus of a key that the pool made"] = public.public_numbers().n
    with pool.client("administrator") as client:
        client.rotate_key_encryption_key(0)
    learnt, planted.mnemonics = learn_secrets(pool, pool.officers)
    planted.secrets |= learnt
    azure = document.parse(ceremonies.azure_file)
    for number, (keyholder, share) in enumerate(zip(keyholders, azure.shares, strict=True), start=1):
        opened = document.open_share(azure, keyholder.officer.key, share.thumbprint)
        planted.secrets[f"share {number} of Azure's format"] = opened.reveal()
        numbers = keyholder.numbers
        size = numbers.public_numbers.n.bit_length() // 8
        planted.secrets |= {
            f"passphrase of officer {number}": keyholder.passphrase.encode(),
            f"officer {number} p": numbers.p.to_bytes(size // 2, "big"),
            f"officer {number} q": numbers.q.to_bytes(size // 2, "big"),
            f"officer {number} d": numbers.d.to_bytes(size, "big"),
        }
        planted.factors[f"modulus of officer {number}"] = (numbers.public_numbers.n, numbers.p)
    planted.secrets |= learn_tls_keys(pool.directory)
    return planted
