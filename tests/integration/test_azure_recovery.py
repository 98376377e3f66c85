"""Azure's file format on a real pool: download, one-workstation restore blob, upload (G4, G8)."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hsm_pool.errors import CeremonyState, InvalidField, ShareRefused
from mhsm.keys.v1 import keys_pb2
from mhsm.security_domain.v1 import security_domain_pb2
from security_domain import container, submission
from security_domain.azure import document, transfer_key
from security_domain.azure import submission as azure_submission
from security_domain.azure.restore_blob import make_restore_blob
from security_domain.encoding import canonical
from security_domain.officers import make_officer, parse_officer, save_private_key
from security_domain.secret import Secret
from tests.running_pool import RunningPool, TestOfficer, make_officers, mhsm

pytestmark = [pytest.mark.pool, pytest.mark.slow]

EC = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
DIGEST = bytes(32)


def blob_for(ceremony: security_domain_pb2.Ceremony, azure_file: bytes, officers: list[TestOfficer]) -> bytes:
    """Make a restore blob as one workstation with these officers' keys does."""
    pairs = [(officer.key, officer.certificate_der) for officer in officers]
    certificate = transfer_key.parse_transfer_key(ceremony.transfer_key)
    return make_restore_blob(document.parse(azure_file), pairs, certificate)


def activate(pool: RunningPool, officers: list[TestOfficer]) -> bytes:
    """Activate a pool; return its security domain in Azure's format."""
    certificates = [officer.certificate_der for officer in officers]
    with pool.client("administrator") as client:
        begun = client.download_security_domain(certificates, 2, partition=0)
        pool.file = begun.security_domain_file
        for officer in officers:
            client.submit_share(0, begun.attempt_id, pool.submission(officer, begun))
    pool.await_states(["SERVING"] * 3)
    return begun.azure_security_domain_file


def test_a_restore_blob_unlocks_and_recovers(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G4: a locked pool is unlocked, a new pool gets the domain and its file; bad blobs change nothing."""
    pool, other = make_pool(attended=True), make_pool(attended=True)
    azure_file, strange = activate(pool, officers), activate(other, officers)
    other.down()
    with pool.client() as user:
        user.create_key("kept", **EC)
    with pool.client("administrator") as client:
        proof = client.verify_security_domain(0)
        assert not proof.transfer_key
        with pytest.raises(CeremonyState):
            client.upload_restore_blob(0, proof.attempt_id, b"{}")
        client.cancel_ceremony(0, proof.attempt_id)
        pool.kill_everything()
        pool.await_states(["LOCKED"] * 3)
        earlier = client.init_recovery(0)
        stale = blob_for(earlier, azure_file, officers[:2])
        client.cancel_ceremony(0, earlier.attempt_id)
        begun = client.init_recovery(0)
        good = blob_for(begun, azure_file, officers[1:])
        foreign = blob_for(begun, strange, officers[1:])
        middle = len(good) // 2
        changed = good[:middle] + (b"B" if good[middle : middle + 1] == b"A" else b"A") + good[middle + 1 :]
        for bad in (b"", b"{}", b"x" * 1000, good[:-1], changed, stale, foreign):
            with pytest.raises(InvalidField):
                client.upload_restore_blob(0, begun.attempt_id, bad)
        assert pool.states() == ["LOCKED"] * 3
        assert client.upload_restore_blob(0, begun.attempt_id, good).complete
        pool.await_states(["SERVING"] * 3)
    with pool.client() as user:
        user.sign("keys/kept", "ES256", DIGEST)
    pool.down()

    found = make_pool(attended=True)
    with found.client("administrator") as client:
        begun = client.init_recovery(0)
        assert (begun.required, begun.security_domain_file) == (0, b"")
        with pytest.raises(ShareRefused):
            client.submit_share(0, begun.attempt_id, b"{}")
        complete = client.upload_restore_blob(0, begun.attempt_id, blob_for(begun, azure_file, officers[:2]))
        assert complete.complete
        assert complete.security_domain_file == pool.file, "our own file came along in the blob"
        found.await_states(["SERVING"] * 3)
        found.kill_everything()
        found.await_states(["LOCKED"] * 3)
        begun = client.init_recovery(1)
        for officer in officers[:2]:
            client.submit_share(1, begun.attempt_id, found.submission(officer, begun))
        found.await_states(["SERVING"] * 3)
    found.down()


def test_a_new_pool_takes_no_file_that_the_quorum_has_not_vouched_for(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G1, G4: with a changed file, or one of an earlier sharing, the officers could never unlock the pool."""
    pool, found = make_pool(attended=True), make_pool(attended=True)
    azure_file, first = activate(pool, officers), pool.file
    with pool.client("administrator") as client:
        begun = client.rotate_shares([officer.certificate_der for officer in officers], 2, 0)
        for officer in officers[:2]:
            after = client.submit_share(0, begun.attempt_id, pool.submission(officer, begun))
    pool.down()
    fields = json.loads(first)
    fields["payload"] = ("B" if fields["payload"][0] != "B" else "C") + fields["payload"][1:]
    changed = canonical(fields)
    with found.client("administrator") as client:
        for file in (changed, after.security_domain_file):
            begun = client.init_recovery(0, file)
            with pytest.raises(InvalidField, match="not the one that the quorum has opened"):
                client.upload_restore_blob(0, begun.attempt_id, blob_for(begun, azure_file, officers[:2]))
            assert found.states() == ["PROVISIONED"] * 3
            client.cancel_ceremony(0, begun.attempt_id)
        begun = client.init_recovery(0, first)
        blob = blob_for(begun, azure_file, officers[:2])
        assert client.upload_restore_blob(0, begun.attempt_id, blob).security_domain_file == first
    found.await_states(["SERVING"] * 3)
    found.down()


def test_a_rotation_makes_a_new_azure_file(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer]
) -> None:
    """G4: the new officers open the new document; the old one still opens the same domain."""
    pool = make_pool(attended=True)
    old_file, new = activate(pool, officers), make_officers(3)
    with pool.client("administrator") as client:
        begun = client.rotate_shares([officer.certificate_der for officer in new], 2, 0)
        for officer in officers[:2]:
            middle = client.submit_share(0, begun.attempt_id, pool.submission(officer, begun))
        for officer in new[:2]:
            client.submit_share(0, begun.attempt_id, pool.submission(officer, middle))
        assert container.parse(middle.security_domain_file).sharing == 2
        for file, quorum in ((middle.azure_security_domain_file, new[1:]), (old_file, officers[1:])):
            pool.kill_everything()
            pool.await_states(["LOCKED"] * 3)
            recovery = client.init_recovery(0)
            assert client.upload_restore_blob(
                0, recovery.attempt_id, blob_for(recovery, file, quorum)
            ).complete
            pool.await_states(["SERVING"] * 3)
    pool.down()


def test_the_commands_of_the_one_workstation_way(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], tmp_path: Path
) -> None:
    """docs/ceremonies.md by commands: download --azure-output, init-recovery, restore-blob, upload."""
    pool = make_pool(attended=True)
    at = ("--data-dir", str(pool.directory))
    certificates: list[str] = []
    pairs: list[str] = []
    for number, officer in enumerate(officers):
        pem = x509.load_der_x509_certificate(officer.certificate_der).public_bytes(Encoding.PEM)
        (tmp_path / f"{number}.crt").write_bytes(pem)
        (tmp_path / f"{number}.key").write_bytes(save_private_key(officer.key))
        certificates += ["--officer", str(tmp_path / f"{number}.crt")]
        pairs += ["--officer", str(tmp_path / f"{number}.crt"), str(tmp_path / f"{number}.key")]
    plan = mhsm("security-domain", "plan", "--required", "3", *certificates)
    assert "every officer is needed" in plan.stdout
    file, azure, attempt = tmp_path / "sd.json", tmp_path / "azure.json", tmp_path / "a1.json"
    mhsm(
        "security-domain", "download", "--required", "2", "--output", str(file), "--azure-output", str(azure),
        "--attempt-output", str(attempt), *certificates, *at,
    )  # fmt: skip
    share = ("security-domain", "submit-share", "--attempt", str(attempt), "--security-domain", str(file))
    for number in range(3):
        mhsm(*share, "--officer-key", str(tmp_path / f"{number}.key"), *at)
    pool.await_states(["SERVING"] * 3)
    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    recovery, exchange, blob = tmp_path / "a2.json", tmp_path / "exchange.pem", tmp_path / "blob.json"
    mhsm(
        "security-domain", "init-recovery", "--output", str(recovery),
        "--exchange-certificate-output", str(exchange), *at,
    )  # fmt: skip
    make = (
        "security-domain",
        "restore-blob",
        "--azure-file",
        str(azure),
        *at,
        "--attempt",
    )
    changed = json.loads(recovery.read_text())
    stranger = x509.load_pem_x509_certificate(make_officer("stranger")[0]).public_bytes(Encoding.DER)
    changed["exchange_certificate"] = base64.b64encode(stranger).decode()
    (tmp_path / "changed").write_text(json.dumps(changed))
    refused = mhsm(*make, str(tmp_path / "changed"), "--output", str(blob), *pairs[3:], check=False)
    assert (refused.returncode, blob.exists()) == (6, False), "another certificate than the attested one"
    make = (*make, str(recovery))
    few = mhsm(*make, "--output", str(blob), *pairs[:3], check=False)
    assert few.returncode == 4, few.stderr
    assert not blob.exists()
    made = mhsm(*make, "--output", str(blob), *pairs[3:])
    assert "warning: a quorum of officers' keys meets on this machine" in made.stderr
    assert mhsm(*make, "--output", str(blob), *pairs, check=False).returncode == 1, "never overwritten"
    upload = ("security-domain", "upload", "--attempt", str(recovery), "--restore-blob")
    assert mhsm(*upload, str(azure), *at, check=False).returncode == 1
    assert "unlocked" in mhsm(*upload, str(blob), *at).stdout
    pool.await_states(["SERVING"] * 3)
    assert mhsm(*upload, str(blob), *at, check=False).returncode == 1, "the attempt is over"
    pool.down()


def test_officers_submit_shares_of_azures_format_one_by_one(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], tmp_path: Path
) -> None:
    """G4: a proof, an unlock, a change of officers and a recovery from the document alone, by commands.

    Shares of the two formats do not go together; a false one is refused and names its officer.
    """
    pool = make_pool(attended=True)
    azure = tmp_path / "azure.json"
    azure.write_bytes(activate(pool, officers))
    own = tmp_path / "own.json"
    own.write_bytes(pool.file)
    for number, officer in enumerate(officers):
        pem = x509.load_der_x509_certificate(officer.certificate_der).public_bytes(Encoding.PEM)
        (tmp_path / f"{number}.crt").write_bytes(pem)
        (tmp_path / f"{number}.key").write_bytes(save_private_key(officer.key))

    def begin(verb: str, name: str, *options: str, of: RunningPool = pool) -> Path:
        attempt = tmp_path / name
        mhsm(
            "security-domain", verb, "--output", str(attempt), *options, "--data-dir", str(of.directory)
        )  # fmt: skip
        return attempt

    def submit(attempt: Path, number: int, file: Path = azure, of: RunningPool = pool) -> Any:
        certificate = ("--officer-certificate", str(tmp_path / f"{number}.crt")) if file == azure else ()
        return mhsm(
            "security-domain", "submit-share", "--attempt", str(attempt), "--security-domain", str(file),
            "--officer-key", str(tmp_path / f"{number}.key"), *certificate,
            "--data-dir", str(of.directory), check=False,
        )  # fmt: skip

    proof = begin("verify", "proof.json")
    assert "1 of 2 shares" in submit(proof, 0).stdout
    mixed = submit(proof, 1, own)
    assert (mixed.returncode, "the other format" in mixed.stderr) == (4, True)
    again = submit(proof, 0)
    assert (again.returncode, "submitted before" in again.stderr) == (4, True)
    assert "a quorum can open the security domain" in submit(proof, 2).stdout

    new = make_officers(3)
    with pool.client("administrator") as client:
        begun = client.rotate_shares([officer.certificate_der for officer in new], 2, 1)
        detail = submission.officers_digest(begun.new_officers, 2)
        parsed = document.parse(azure.read_bytes())
        agreed = (begun.attempt_id, begun.exchange_public_key, submission.SHARE_ROTATION, detail)
        context = azure_submission.Context(*agreed, document_digest=parsed.digest)
        for officer in officers[:2]:
            forged = azure_submission.seal_submission(
                context, officer.certificate_der, officer.key, Secret(bytes(64))
            )
            with pytest.raises(ShareRefused) as refused:
                client.submit_share(1, begun.attempt_id, forged)
            assert refused.value.metadata["officer"] == parse_officer(officer.certificate_der).thumbprint
            good = azure_submission.make_submission(parsed, officer.key, officer.certificate_der, *agreed)
            middle = client.submit_share(1, begun.attempt_id, good)
        assert container.parse(middle.security_domain_file).sharing == 2
        with pytest.raises(ShareRefused):
            client.submit_share(1, begun.attempt_id, good)
        client.cancel_ceremony(1, begun.attempt_id)

    pool.kill_everything()
    pool.await_states(["LOCKED"] * 3)
    attempt = begin("init-recovery", "unlock.json")
    assert submit(attempt, 1).returncode == 0
    assert "unlocked" in submit(attempt, 2).stdout
    pool.await_states(["SERVING"] * 3)
    pool.down()

    found = make_pool(attended=True)
    attempt = begin("init-recovery", "recovery.json", "--security-domain", str(azure), of=found)
    refused_own = submit(attempt, 0, own, of=found)
    assert refused_own.returncode != 0, "the attempt knows the document only"
    assert submit(attempt, 0, of=found).returncode == 0
    assert submit(attempt, 1, of=found).returncode == 0
    found.await_states(["SERVING"] * 3)
    with found.client("administrator") as client:
        assert client.verify_security_domain(0).security_domain_file == own.read_bytes()
    found.down()
