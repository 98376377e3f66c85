"""The pool's admission policy: what evidence must say, in the grammar of Azure's release policies.

Unless a pool has one of its own, it admits what runs the very distribution of whoever
verifies: same measurement, same product, no older security version, no debugger.
"""

from __future__ import annotations

import json
from pathlib import Path

from hsm_pool import limits
from hsm_pool.core import release_policy
from hsm_pool.core.release_policy import ReleasePolicy
from hsm_pool.enclave.claims import DebugStatus
from hsm_pool.enclave.evidence import PRODUCT_ID, SECURITY_VERSION, measurement

AUTHORITY = "urn:mhsm-pool-simulator:platform-and-owner"
"""Who vouches for claims under both roots of a pool; neither root alone is an authority."""


def default_document() -> str:
    """Return the policy of a pool that has none of its own, as JSON."""
    conditions = [
        {"claim": "mhsm.product_id", "equals": PRODUCT_ID},
        {"claim": "dbgstat", "equals": DebugStatus.DISABLED_SINCE_BOOT.text},
        {"claim": "mhsm.security_version", "greaterOrEquals": SECURITY_VERSION},
        {"claim": "mhsm.measurement", "equals": measurement().hex()},
    ]
    policy = {"version": "1.0.0", "anyOf": [{"authority": AUTHORITY, "allOf": conditions}]}
    return json.dumps(policy, indent=2)


def load(path: Path | None) -> ReleasePolicy:
    """Read a pool's admission policy; the default one if there is no such file.

    Raises:
        InvalidField: It is not a policy; equals and greaterOrEquals are known.
        OSError: The file cannot be read.
    """
    document: bytes | str = default_document()
    if path is not None and path.exists():
        with path.open("rb") as stream:
            document = stream.read(limits.RELEASE_POLICY_BYTES_MAX + 1)
    return release_policy.parse(document, release_policy.ADMISSION_OPERATORS)
