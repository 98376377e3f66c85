"""What the commands say of a ceremony: how far it is, what it has done, and who is next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from hsm_pool.cli.attempts import purpose, stage
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError
from mhsm.security_domain.v1 import security_domain_pb2

ATTEMPT_FILE, DOMAIN_FILE, OFFICER_KEY = "ATTEMPT.json", "SECURITY-DOMAIN.json", "OFFICER.key"
"""Placeholders of files whose names are not known where a command is suggested."""
_DONE = {
    security_domain_pb2.CEREMONY_PURPOSE_ACTIVATION: "the pool is active",
    security_domain_pb2.CEREMONY_PURPOSE_RECOVERY: "the pool is unlocked",
    security_domain_pb2.CEREMONY_PURPOSE_VERIFICATION: "a quorum can open the security domain",
    security_domain_pb2.CEREMONY_PURPOSE_SHARE_ROTATION: "the new file is in force",
    security_domain_pb2.CEREMONY_PURPOSE_NEW_GENERATION: "the new generation is in force",
}


def under_way(
    pool: Pool, partitions: Iterable[int] = range(3)
) -> dict[int, security_domain_pb2.Ceremony | str]:
    """Return the ceremonies of partitions, by index; in place of one, why a partition did not say."""
    found: dict[int, security_domain_pb2.Ceremony | str] = {}
    for index in partitions:
        try:
            ceremony = pool.get_ceremony(index)
        except MHSMError as error:
            found[index] = error.message
            continue
        if ceremony:
            found[index] = ceremony
    return found


def progress(ceremony: security_domain_pb2.Ceremony) -> str:
    """Return purpose, stage and count of a ceremony under way."""
    parts = [purpose(ceremony).replace("_", " ")]
    if stage(ceremony):
        parts.append(f"stage: {stage(ceremony)}")
    if ceremony.required:
        parts.append(f"{ceremony.accepted} of {ceremony.required} shares")
    else:
        parts.append("waits for a restore blob")
    return ", ".join(parts)


def following(ceremony: security_domain_pb2.Ceremony) -> str:
    """Return the next step of a ceremony under way, for somebody who has no file at hand."""
    if not ceremony.required:
        return "mhsm security-domain restore-blob --help\nmhsm security-domain upload --help"
    if ceremony.new_file and not ceremony.accepted and purpose(ceremony) != "activation":
        return fetch_file(ceremony.partition_index)
    return submit_share()


def fetch_file(partition: int) -> str:
    """Return the step from a new file to its officers."""
    return f"mhsm security-domain fetch-file --partition {partition} --output FILE"


def submit_share(
    attempt: Path | str = ATTEMPT_FILE, domain_file: Path | str = DOMAIN_FILE, key: Path | str = OFFICER_KEY
) -> str:
    """Return an officer's step; in capitals what is not known here."""
    return (
        f"mhsm security-domain submit-share --attempt {shlex.quote(str(attempt))} "
        f"--security-domain {shlex.quote(str(domain_file))} --officer-key {shlex.quote(str(key))}"
    )


def officer_key(certificates: Sequence[Path]) -> Path | str:
    """Return the key that lies beside the first certificate, if one does."""
    beside = certificates[0].with_suffix(".key")
    return beside if beside.is_file() else OFFICER_KEY


def download_command(certificates: Iterable[Path], required: int) -> str:
    """Return the command that makes a security domain for officers."""
    return (
        f"mhsm security-domain download --required {required} --output security-domain.json "
        "--attempt-output activation.json "
        + " ".join(f"--officer {shlex.quote(str(path))}" for path in certificates)
    )


def done(ceremony: security_domain_pb2.Ceremony) -> str:
    """Return what a complete ceremony has done."""
    if ceremony.new_pool:
        return "the pool is in the recovered security domain, and empty"
    return _DONE.get(ceremony.purpose, "")


def after(ceremony: security_domain_pb2.Ceremony) -> str:
    """Return what to do after a complete ceremony."""
    if ceremony.new_pool:
        return "mhsm backup restore --from BACKUP"
    if ceremony.purpose == security_domain_pb2.CEREMONY_PURPOSE_NEW_GENERATION:
        return "backups of before are of the old generation\nmhsm backup create --output DIRECTORY"
    return "mhsm status"
