"""What ceremonies refuse: officers, files of other domains, a second ceremony (G4, G8).

Each refusal has its reason and exit code, and neither the pool nor a ceremony under way is changed by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hsm_pool.errors import CeremonyState, InvalidField, ShareRefused
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import container, domain, submission
from security_domain import officers as officer_files
from security_domain.azure import document, transfer_key
from security_domain.azure import domain as azure_domain
from security_domain.azure import submission as azure_submission
from security_domain.azure.restore_blob import make_restore_blob
from security_domain.officers import save_private_key
from tests.refused_officers import refused_officers
from tests.running_pool import RunningPool, TestOfficer, changes, mhsm
from tests.store_access import StoreAccess

pytestmark = [pytest.mark.pool, pytest.mark.slow]

Ceremony = security_domain_pb2.Ceremony
FAILED, SHARE_REFUSED = 1, 4


@dataclass(frozen=True, slots=True)
class Desk:
    """A directory with three officers' files, and the commands that are run in it."""

    directory: Path
    pool: RunningPool
    officers: list[TestOfficer]

    def refused(self, code: int, said: str, following: str, *arguments: str) -> None:
        """Run a command that is refused with this exit code and these words, and writes no file."""
        before = sorted(self.directory.iterdir())
        ended = mhsm(*arguments, "--data-dir", str(self.pool.directory), check=False, cwd=self.directory)
        assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
        assert said in ended.stderr
        if following:
            assert re.search(f"^(next|hint): {re.escape(following)}", ended.stderr, re.MULTILINE)
        assert "Traceback" not in ended.stderr
        assert sorted(self.directory.iterdir()) == before

    def write(self, name: str, content: bytes) -> str:
        """Write a file; return its name."""
        (self.directory / name).write_bytes(content)
        return name

    def certificates(self, certificates_der: list[bytes]) -> list[str]:
        """Write certificates; return the options that name them."""
        names = [
            self.write(f"certificate-{number}.pem", officer_files.certificate_pem(der))
            for number, der in enumerate(certificates_der, start=1)
        ]
        return [part for name in names for part in ("--officer", name)]


@pytest.fixture
def desk(pool: RunningPool, officers: list[TestOfficer], tmp_path: Path) -> Desk:
    for number, officer in enumerate(officers, start=1):
        (tmp_path / f"{number}.key").write_bytes(save_private_key(officer.key))
        (tmp_path / f"{number}.crt").write_bytes(officer_files.certificate_pem(officer.certificate_der))
    return Desk(tmp_path, pool, officers)


@contextmanager
def unchanged(pool: RunningPool) -> Iterator[None]:
    """See that nothing of the pool, of its store and of a ceremony under way changes."""

    def seen() -> object:
        with StoreAccess(pool.connection) as store, pool.client("administrator") as client:
            header = store.dump()["header"]
            ceremonies = [client.get_ceremony(index) for index in range(3)]
            sequence = changes(client.partition_status(0))
        return header, ceremonies, sequence, pool.states()

    before = seen()
    yield
    assert seen() == before


# -- officers -----------------------------------------------------------------------------


def test_a_change_of_officers_refuses_officers_and_quorums(pool: RunningPool, desk: Desk) -> None:
    """G4, G8: as a field over RPC, with words and exit code 1 or 2 by command; no child is left."""
    with pool.client("administrator") as client, unchanged(pool):
        verbs: dict[str, Callable[[list[bytes], int, int], Ceremony]] = {
            "rotate-shares": client.rotate_shares,
            "new-generation": client.new_generation,
        }
        for verb, begin in verbs.items():
            for name, case in refused_officers(desk.officers).items():
                with pytest.raises(InvalidField) as refused:
                    begin(case.certificates_der, case.required, 1)
                assert refused.value.metadata["field"] == "officer_certificates_der", (verb, name)
                assert case.said in refused.value.message, (verb, name)
                assert client.get_ceremony(1) is None
                assert pool.ceremony_child(1) is None
    by_command = ("RSA-1024", "a key in two certificates", "two officers", "a quorum of more than there are")
    with unchanged(pool):
        for verb in verbs:
            for name in by_command:
                case = refused_officers(desk.officers)[name]
                options = [*desk.certificates(case.certificates_der), "--required", str(case.required)]
                said = "are of the same key" if name == "a key in two certificates" else case.said
                desk.refused(FAILED, said, "", "security-domain", verb, *options, "--output", "attempt")


# -- a second ceremony --------------------------------------------------------------------


def test_a_ceremony_under_way_at_another_partition_is_named(pool: RunningPool, desk: Desk) -> None:
    """G8: every verb that begins one says which ceremony is where; that one goes on."""
    good = desk.certificates([officer.certificate_der for officer in desk.officers])
    new = (*good, "--required", "2")
    with pool.client("administrator") as client:
        begun = client.verify_security_domain(2)
        client.submit_share(2, begun.attempt_id, pool.submission(desk.officers[0], begun))
        with unchanged(pool):
            for verb in (
                ("verify", "--output", "attempt"),
                ("rotate-shares", *new, "--output", "attempt"),
                ("new-generation", *new, "--output", "attempt"),
                ("init-recovery", "--output", "attempt"),
                ("download", *new, "--output", "file", "--attempt-output", "attempt"),
                ("rotate-kek",),
            ):
                for partition in ("0", "1"):
                    desk.refused(
                        FAILED,
                        "a ceremony (verification) is under way at partition 2",
                        "mhsm security-domain status",
                        "security-domain",
                        *verb,
                        "--partition",
                        partition,
                    )
            # Its own partition refuses by itself, whoever asks.
            with pytest.raises(CeremonyState, match="under way at this partition"):
                client.verify_security_domain(2)
            desk.refused(
                FAILED,
                "a ceremony (verification) is under way at partition 2",
                "mhsm security-domain cancel --partition 2",
                *("security-domain", "verify", "--output", "attempt", "--partition", "2"),
            )
        done = client.submit_share(2, begun.attempt_id, pool.submission(desk.officers[1], begun))
        assert done.complete, "the ceremony that was there has not noticed"


# -- files of others ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """A domain of the very same officers that is not the one in force, in both formats."""

    file: bytes
    azure_file: bytes


def foreign_files(pool: RunningPool, officers: list[TestOfficer]) -> dict[str, ForeignFile]:
    """Return a domain of another pool, and one of another generation of this pool."""
    own = container.parse(pool.file)
    identities = {
        "another pool": ("f" * 32, own.generation),
        "another generation": (own.pool_id, own.generation + 1),
    }
    certificates = [officer.certificate_der for officer in officers]
    made = {}
    for name, (pool_id, generation) in identities.items():
        new = domain.create(pool_id, generation, certificates, 2)
        made[name] = ForeignFile(new.file, azure_domain.make(new.core, new.file, certificates, 2))
    return made


def in_azure_format(file: bytes, officer: TestOfficer, begun: Ceremony, told: bytes) -> bytes:
    """Return an officer's submission of a share in a document of Azure's format."""
    name = security_domain_pb2.CeremonyPurpose.Name(begun.purpose)
    purpose = name.removeprefix("CEREMONY_PURPOSE_").lower()
    return azure_submission.make_submission(
        document.parse(file),
        officer.key,
        officer.certificate_der,
        begun.attempt_id,
        begun.exchange_public_key,
        purpose,
        told,
    )


@pytest.mark.parametrize("verb", ["verify", "rotate-shares"])
def test_a_file_of_another_domain_opens_no_ceremony(pool: RunningPool, desk: Desk, verb: str) -> None:
    """G4: of another pool or generation, in either format, by RPC and command; the right file works."""
    officers = desk.officers
    new = desk.certificates([officer.certificate_der for officer in officers])
    options = (*new, "--required", "2") if verb == "rotate-shares" else ()
    at = ("--data-dir", str(pool.directory))
    mhsm("security-domain", verb, *options, "--output", "attempt", *at, cwd=desk.directory)
    share = ("security-domain", "submit-share", "--attempt", "attempt")
    with pool.client("administrator") as client:
        begun = client.get_ceremony(0)
        assert begun is not None
        detail = submission.officers_digest(begun.new_officers, 2) if options else b""
        for foreign in foreign_files(pool, officers).values():
            told = Ceremony()
            told.CopyFrom(begun)
            told.security_domain_file = foreign.file
            with unchanged(pool):
                made = pool.submission(officers[0], told)
                with pytest.raises(ShareRefused, match="for another pool or generation"):
                    client.submit_share(0, begun.attempt_id, made)
                made_azure = in_azure_format(foreign.azure_file, officers[0], begun, detail)
                with pytest.raises(ShareRefused, match="for another security-domain document"):
                    client.submit_share(0, begun.attempt_id, made_azure)
                desk.write("foreign", foreign.file)
                desk.write("foreign-azure", foreign.azure_file)
                desk.write("made", made)
                desk.refused(
                    SHARE_REFUSED,
                    "foreign is of another pool or generation than this attempt; 1.key was not opened",
                    "mhsm security-domain fetch-file --partition 0 --output FILE",
                    *(*share, "--security-domain", "foreign", "--officer-key", "1.key"),
                )
                desk.refused(
                    SHARE_REFUSED,
                    "for another security-domain document",
                    "mhsm security-domain status",
                    *(*share, "--security-domain", "foreign-azure", "--officer-key", "1.key"),
                    *("--officer-certificate", "1.crt"),
                )
                desk.refused(
                    SHARE_REFUSED,
                    "for another pool or generation",
                    "mhsm security-domain status",
                    *(*share, "--submission", "made"),
                )
        accepted = client.submit_share(0, begun.attempt_id, pool.submission(officers[0], begun))
        assert accepted.accepted == 1
        client.cancel_ceremony(0, begun.attempt_id)


def test_a_restore_blob_of_another_domain_unlocks_nothing(pool: RunningPool, desk: Desk) -> None:
    """G4: of another pool or generation: the pool stays locked, and the right blob unlocks it."""
    officers, said = desk.officers, "the payload is of another pool or generation"
    with pool.client("administrator") as client:
        proof = client.verify_security_domain(0)
        client.cancel_ceremony(0, proof.attempt_id)
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    at = ("--data-dir", str(pool.directory))
    mhsm("security-domain", "init-recovery", "--output", "attempt", *at, cwd=desk.directory)
    with pool.client("administrator", timeout_seconds=30.0) as client:
        begun = client.get_ceremony(0)
        assert begun is not None
        for foreign in foreign_files(pool, officers).values():
            with unchanged(pool):
                foreign_blob = blob(foreign.azure_file, officers, begun)
                with pytest.raises(InvalidField, match=said) as refused:
                    client.upload_restore_blob(0, begun.attempt_id, foreign_blob)
                assert refused.value.metadata["field"] == "restore_blob"
                desk.write("blob", foreign_blob)
                desk.refused(
                    FAILED,
                    f"blob: {said}",
                    "",
                    *("security-domain", "upload", "--attempt", "attempt", "--restore-blob", "blob"),
                )
                with pytest.raises(InvalidField):
                    client.init_recovery(1, foreign.file)
        right = blob(proof.azure_security_domain_file, officers, begun)
        assert client.upload_restore_blob(0, begun.attempt_id, right).complete
    pool.await_states(["SERVING"] * 3)


def blob(azure_file: bytes, officers: list[TestOfficer], begun: Ceremony) -> bytes:
    """Return a restore blob for a ceremony."""
    pairs = [(officer.key, officer.certificate_der) for officer in officers[:2]]
    certificate = transfer_key.parse_transfer_key(begun.transfer_key)
    return make_restore_blob(document.parse(azure_file), pairs, certificate)
