"""SLIP-39 shares of a one-time wrapping key, with a commitment to each (G4).

The reference implementation (shamir-mnemonic) says of itself that it is not hardened
against side channels; shares are therefore handled in a short-lived process only. It
cannot say which of exactly t shares is wrong: the commitments can.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence

from shamir_mnemonic import constants
from shamir_mnemonic.shamir import EncryptedMasterSecret, decode_mnemonics, recover_ems, split_ems
from shamir_mnemonic.share import Share
from shamir_mnemonic.utils import MnemonicError

from security_domain.encoding import bind
from security_domain.errors import InvalidShare
from security_domain.secret import Secret

WRAPPING_KEY_BYTES = 32
WORDS = 33
_CHARACTERS_MAX = WORDS * 9
_EXPONENT = 0
"""The key is random, so stretching a passphrase (there is none) buys nothing."""


def split(key: Secret, required: int, total: int) -> list[str]:
    """Split a 32-byte key into mnemonics of 33 words, with fresh random coefficients."""
    if len(key) != WRAPPING_KEY_BYTES:
        raise InvalidShare("only a key of 32 bytes is split")
    identifier = int.from_bytes(os.urandom(2), "big") & ((1 << constants.ID_LENGTH_BITS) - 1)
    # Without a passphrase the "encrypted" master secret is what is split, directly.
    secret = EncryptedMasterSecret(identifier, True, _EXPONENT, key.reveal())
    (group,) = split_ems(1, [(required, total)], secret)
    return [share.mnemonic() for share in group]


def parse(mnemonic: str, required: int) -> Share:
    """Parse a mnemonic; everything is bounded before any costly work.

    Raises:
        InvalidShare: It is not a share of the kind that :func:`split` makes.
    """
    if len(mnemonic) > _CHARACTERS_MAX or len(mnemonic.split()) != WORDS:
        raise InvalidShare(f"a share has {WORDS} words")
    share = None
    # Suppressed, not chained: the library's errors quote words of the share.
    with contextlib.suppress(MnemonicError, ValueError):
        share = Share.from_mnemonic(mnemonic)
    if share is None:
        raise InvalidShare("the words of a share are mistyped or incomplete")
    fits = (
        share.iteration_exponent == _EXPONENT
        and share.extendable
        and (share.group_index, share.group_threshold, share.group_count) == (0, 1, 1)
        and share.member_threshold == required
        and len(share.value) == WRAPPING_KEY_BYTES
    )
    if not fits:
        raise InvalidShare("a share is of another kind of split")
    return share


def commitment(pool_id: str, generation: int, index: int, mnemonic: str) -> bytes:
    """Return SHA-256 over the share's words and where they belong; says nothing about a random share."""
    return hashlib.sha256(bind("mhsm-sd/commitment/v1", pool_id, generation, index, mnemonic)).digest()


def combine(mnemonics: Sequence[str], required: int) -> Secret:
    """Combine exactly the required number of shares.

    Raises:
        InvalidShare: They are too few, repeated or do not belong together.
    """
    for mnemonic in mnemonics:
        parse(mnemonic, required)
    if len(set(mnemonics)) != required or len(mnemonics) != required:
        raise InvalidShare(f"exactly {required} different shares are needed")
    with contextlib.suppress(MnemonicError, ValueError):
        return Secret(recover_ems(decode_mnemonics(mnemonics)).ciphertext)
    raise InvalidShare("the shares do not belong together")
