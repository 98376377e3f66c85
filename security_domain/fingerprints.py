"""Digests in words, so that people in a room can compare what their machines show."""

from __future__ import annotations

import hashlib

from shamir_mnemonic.wordlist import WORDLIST

WORDS = 8
_BITS_PER_WORD = 10


def words(octets: bytes) -> str:
    """Return the first 80 bits of SHA-256 as eight words of the SLIP-39 list.

    Enough against an accident and against anybody who must hit a given fingerprint; what is
    verified by a machine uses the whole digest.

    Args:
        octets: What is to be compared.

    Returns:
        Eight words, separated by spaces.
    """
    return words_of_digest(hashlib.sha256(octets).digest())


def words_of_digest(digest: bytes) -> str:
    """Return the words of octets of which only the SHA-256 is known, such as a certificate's thumbprint."""
    number = int.from_bytes(digest, "big") >> (256 - WORDS * _BITS_PER_WORD)
    mask = (1 << _BITS_PER_WORD) - 1
    shifts = range((WORDS - 1) * _BITS_PER_WORD, -1, -_BITS_PER_WORD)
    return " ".join(WORDLIST[number >> shift & mask] for shift in shifts)
