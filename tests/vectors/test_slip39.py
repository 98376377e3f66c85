"""The official SLIP-39 vectors: 15 must combine, 30 must be refused.

They exercise the reference library with groups, thresholds and passphrases that this
project never makes; our own pre-checks are run over every share of them as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shamir_mnemonic.shamir import combine_mnemonics
from shamir_mnemonic.utils import MnemonicError

from security_domain import shares
from security_domain.errors import InvalidShare

PASSPHRASE = b"TREZOR"


def test_the_official_vectors(shared_vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All 45 vectors, and every share of them through our own parser: parsed or refused, never more."""
    vectors = json.loads((shared_vectors / "slip39" / "vectors.json").read_text())
    combined = refused = 0
    parsed = declined = 0
    for description, mnemonics, secret_hex, _ in vectors:
        for mnemonic in mnemonics:
            try:
                shares.parse(mnemonic, 2)
                parsed += 1
            except InvalidShare:
                declined += 1
        if secret_hex:
            assert combine_mnemonics(mnemonics, PASSPHRASE).hex() == secret_hex, description
            combined += 1
        else:
            with pytest.raises(MnemonicError):
                combine_mnemonics(mnemonics, PASSPHRASE)
            refused += 1
    with capsys.disabled():
        print(f"\nSLIP-39: {combined} combined, {refused} refused; own parser: {parsed} yes, {declined} no")
    assert (combined, refused) == (15, 30)
