"""Officers with keys of 2048 bits: made once, because making RSA keys is slow."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.running_pool import TestOfficer
from tests.unit.security_domain.rehearsal import self_signed


@pytest.fixture(scope="session")
def ten() -> list[TestOfficer]:
    """Ten officers, made for this run."""
    keys = [rsa.generate_private_key(65537, 2048) for _ in range(10)]
    return [TestOfficer(self_signed(key, f"officer-{index}"), key) for index, key in enumerate(keys)]
