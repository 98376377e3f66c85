"""The pool's admission policy: what evidence must say, in the grammar of Azure's release policies.

Unless a pool has one of its own, it admits what runs the very distribution of whoever verifies,
or a firmware image that the verifier's repository vouches for: same product, no older security
version than the pool's floor, no debugger.
"""

from __future__ import annotations

import json
from pathlib import Path

from hsm_pool import limits
from hsm_pool.core import release_policy
from hsm_pool.core.release_policy import ReleasePolicy
from hsm_pool.enclave.claims import DebugStatus
from hsm_pool.enclave.evidence import measurement
from hsm_pool.firmware.image import PRODUCT_ID
from hsm_pool.firmware.running import running

AUTHORITY = "urn:mhsm-pool-simulator:platform-and-owner"
"""Who vouches for claims under both roots of a pool; neither root alone is an authority."""


def default_document(
    security_version_floor: int | None = None, measurements: frozenset[bytes] = frozenset()
) -> str:
    """Return the policy of a pool that has none of its own, as JSON.

    Args:
        security_version_floor: The least that is admitted; by default that of whoever verifies.
        measurements: Of verified firmware images, which are admitted beside the own one.
    """
    floor = running().security_version if security_version_floor is None else security_version_floor
    admitted = [
        {"claim": "mhsm.measurement", "equals": value.hex()}
        for value in sorted({measurement(), *measurements})
    ]
    conditions = [
        {"claim": "mhsm.product_id", "equals": PRODUCT_ID},
        {"claim": "dbgstat", "equals": DebugStatus.DISABLED_SINCE_BOOT.text},
        {"claim": "mhsm.security_version", "greaterOrEquals": floor},
        admitted[0] if len(admitted) == 1 else {"anyOf": admitted},
    ]
    policy = {"version": "1.0.0", "anyOf": [{"authority": AUTHORITY, "allOf": conditions}]}
    return json.dumps(policy, indent=2)


def own_policy(path: Path) -> ReleasePolicy | None:
    """Read the policy that a pool has of its own; None if there is no such file.

    Raises:
        InvalidField: It is not a policy; equals and greaterOrEquals are known.
        OSError: The file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            document = stream.read(limits.RELEASE_POLICY_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    return release_policy.parse(document, release_policy.ADMISSION_OPERATORS)


def default_policy(
    security_version_floor: int | None = None, measurements: frozenset[bytes] = frozenset()
) -> ReleasePolicy:
    """Return :func:`default_document` as a policy."""
    document = default_document(security_version_floor, measurements)
    return release_policy.parse(document, release_policy.ADMISSION_OPERATORS)


def load(path: Path | None, measurements: frozenset[bytes] = frozenset()) -> ReleasePolicy:
    """Read a pool's admission policy; the default one, for these images, if there is no such file.

    Raises:
        InvalidField: It is not a policy.
        OSError: The file cannot be read.
    """
    return (own_policy(path) if path else None) or default_policy(measurements=measurements)
