"""The official SLIP-39 vectors: 15 must combine, 30 must be refused.

Most use groups, thresholds, lengths, exponents or the older salt that this project never
makes: those run through the reference library, for comparison, and our own code must refuse
them. Vector 45 (two of three, 256 bits, extendable, exponent 0) has the shape of our shares
and runs through our own code; its passphrase is undone by the library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shamir_mnemonic.shamir import EncryptedMasterSecret, combine_mnemonics
from shamir_mnemonic.share import Share
from shamir_mnemonic.utils import MnemonicError

from security_domain import shares
from security_domain.errors import InvalidShare

PASSPHRASE = b"TREZOR"
OUR_SHAPE = ["45. Extendable basic sharing 2-of-3 (256 bits)"]


@pytest.fixture
def vectors(shared_vectors: Path) -> list[Any]:
    return json.loads((shared_vectors / "slip39" / "vectors.json").read_text())


def test_the_library_agrees_with_the_official_vectors(vectors: list[Any]) -> None:
    combined = refused = 0
    for description, mnemonics, secret_hex, _ in vectors:
        if secret_hex:
            assert combine_mnemonics(mnemonics, PASSPHRASE).hex() == secret_hex, description
            combined += 1
        else:
            with pytest.raises(MnemonicError):
                combine_mnemonics(mnemonics, PASSPHRASE)
            refused += 1
    assert (combined, refused) == (15, 30)


def test_our_own_code_combines_its_own_shape_and_refuses_the_rest(
    vectors: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """G4: right or refused, for every vector and every quorum we could be told."""
    combined = []
    for description, mnemonics, secret_hex, _ in vectors:
        for required in range(1, 6):
            try:
                ciphertext = shares.combine(mnemonics, required).reveal()
            except InvalidShare:
                continue
            share = Share.from_mnemonic(mnemonics[0])
            encrypted = EncryptedMasterSecret(
                share.identifier, share.extendable, share.iteration_exponent, ciphertext
            )
            assert encrypted.decrypt(PASSPHRASE).hex() == secret_hex, description
            combined.append(description)
    with capsys.disabled():
        print(f"\nSLIP-39: own code combined {len(combined)} of {len(vectors)} vectors, refused the rest")
    assert combined == OUR_SHAPE
