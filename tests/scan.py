"""Looks for secrets in files and in the memory of processes (G3).

A secret is looked for raw and reversed (which is also how OpenSSL keeps large numbers), in
hexadecimal, in base64 at its three alignments, and as words. A part of a secret is a
hit too: a freed buffer is often overwritten at its start only. Of RSA keys the public
modulus is enough: a number that divides it is a hit, so keys that nobody exported are
looked for as well.
"""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shamir_mnemonic.share import Share

from tests.factors import Factors

RUN_BYTES = 16
"""So many successive octets of a secret are a hit."""

WORD_RUN_CHARACTERS = 24
"""So many successive characters of a mnemonic are a hit: three words at least."""

_CAP_SYS_PTRACE = 19
"""Number of the capability (linux/capability.h)."""

_CHUNK_BYTES = 8 * 1024 * 1024
_OVERLAP_BYTES = 4096
_SEPARATORS = (" ", "\n", ",", '","', '", "', "', '")


@dataclass(frozen=True, slots=True)
class Needle:
    """One encoding of one secret; ``run`` successive bytes of it are a hit."""

    secret: str
    encoding: str
    pattern: bytes
    run: int


Piece = tuple[str, str, bytes]
"""A secret's name, the name of an encoding, and the octets."""


class Unreadable(Exception):
    """The kernel does not let this user read a process's memory; the text says why."""


def may_trace() -> bool:
    """Whether the kernel gives this process the right to read any other one (CAP_SYS_PTRACE)."""
    status = Path("/proc/self/status").read_text()
    (effective,) = (line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_PTRACE & 1)


def encodings(octets: bytes, run: int = RUN_BYTES) -> Iterator[tuple[str, bytes, int]]:
    """Yield (name, encoded octets, length of a run that is a hit)."""
    yield "raw", octets, run
    yield "reversed", octets[::-1], run
    yield "hex", octets.hex().encode(), 2 * run
    yield "HEX", octets.hex().upper().encode(), 2 * run
    for alignment in range(3):
        # Only the characters that depend on nothing but the secret.
        padded = bytes(alignment) + octets
        whole = padded[: len(padded) // 3 * 3]
        skipped = (0, 2, 3)[alignment]
        for name, encode in (("base64", base64.b64encode), ("base64url", base64.urlsafe_b64encode)):
            yield f"{name}+{alignment}", encode(whole)[skipped:], 4 * run // 3 - 3


def mnemonic_encodings(mnemonic: str) -> Iterator[tuple[str, bytes, int]]:
    """Yield the same of a mnemonic: its words, lists of its words, and their encodings."""
    words = mnemonic.split()
    for separator in _SEPARATORS:
        yield f"words {separator!r}", separator.join(words).encode(), WORD_RUN_CHARACTERS
    for name, text, run in encodings(mnemonic.encode(), WORD_RUN_CHARACTERS):
        if name != "raw":
            yield f"words {name}", text, run


class Scanner:
    """Finds secrets in octets.

    Every occurrence of 15 bytes or more covers at least one aligned word of 8 bytes, so one
    pass over the aligned words decides, however many needles there are.

    Args:
        secrets: Octets by name (16 bytes or more each).
        mnemonics: Share mnemonics by name; the share's value is looked for as well.
        moduli: RSA moduli by name, whose factors are looked for (:class:`tests.factors.Factors`).
    """

    def __init__(
        self,
        secrets: Mapping[str, bytes],
        mnemonics: Mapping[str, str] | None = None,
        moduli: Mapping[str, int] | None = None,
    ) -> None:
        self.factors = Factors(moduli or {})
        self.needles: list[Needle] = []
        octets = dict(secrets)
        for name, mnemonic in (mnemonics or {}).items():
            octets[f"{name} value"] = Share.from_mnemonic(mnemonic).value
            for encoding, text, run in mnemonic_encodings(mnemonic):
                self.needles.append(Needle(name, encoding, text, run))
        for name, value in octets.items():
            if len(value) < RUN_BYTES:
                raise ValueError(f"{name} is too short to be told from chance")
            for encoding, pattern, run in encodings(value):
                self.needles.append(Needle(name, encoding, pattern, run))
        self._words: dict[int, list[tuple[Needle, int]]] = {}
        for needle in self.needles:
            for offset in range(len(needle.pattern) - 7):
                word = int.from_bytes(needle.pattern[offset : offset + 8], "little")
                self._words.setdefault(word, []).append((needle, offset))
        self._known = frozenset(self._words)

    @property
    def names(self) -> set[str]:
        """Names of everything that is looked for."""
        return {needle.secret for needle in self.needles} | set(self.factors.moduli)

    def scan(self, octets: bytes) -> Counter[str]:
        """Return how often each (secret, encoding) occurs, as "name (encoding)"."""
        found = Counter(f"{needle.secret} ({needle.encoding})" for needle, _ in self._occurrences(octets))
        return found + self.factors.scan(octets)

    def _occurrences(self, octets: bytes) -> set[tuple[Needle, int]]:
        padded = octets + bytes(-len(octets) % 8)
        found: set[tuple[Needle, int]] = set()
        for word in self._known.intersection(memoryview(padded).cast("Q")):
            pattern = word.to_bytes(8, "little")
            position = padded.find(pattern)
            while position >= 0:
                for needle, offset in self._words[word]:
                    start = _run_start(padded, position, needle, offset)
                    if start is not None:
                        found.add((needle, start))
                position = padded.find(pattern, position + 1)
        return found

    def scan_file(self, path: Path) -> Counter[str]:
        """Scan a file's bytes."""
        return self.scan(path.read_bytes())

    def scan_process(self, process_id: int) -> tuple[Counter[str], int]:
        """Scan a process: its arguments, its environment and its readable memory.

        Pages of libraries that it cannot have changed are left out. Secret memory
        (memfd_secret) is not readable by anybody, which is its purpose.

        Returns:
            (occurrences, bytes of memory that were read).

        Raises:
            Unreadable: The kernel refuses.
        """
        found: Counter[str] = Counter()
        size = 0
        try:
            for name in ("cmdline", "environ"):
                found += self.scan(Path(f"/proc/{process_id}/{name}").read_bytes())
            for chunk in _memory(process_id):
                found += self.scan(chunk)
                size += len(chunk)
        except PermissionError as error:
            dumpable = Path(f"/proc/{process_id}/mem").stat().st_uid == os.getuid()
            why = "the kernel's ptrace policy" if dumpable else "the process is not dumpable"
            raise Unreadable(f"{why}: {error.strerror}") from None
        return found, size


def _run_start(octets: bytes, position: int, needle: Needle, offset: int) -> int | None:
    """Return where the run around a word starts, None when it is too short to be a hit."""
    pattern = needle.pattern
    left, right = 0, 8
    while left < min(offset, position) and octets[position - left - 1] == pattern[offset - left - 1]:
        left += 1
    room = min(len(pattern) - offset, len(octets) - position)
    while right < room and octets[position + right] == pattern[offset + right]:
        right += 1
    return position - left if left + right >= min(needle.run, len(pattern)) else None


def _memory(process_id: int) -> Iterator[bytes]:
    """Yield a process's readable memory in overlapping chunks."""
    with Path(f"/proc/{process_id}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{process_id}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            access, path = fields[1], fields[5] if len(fields) > 5 else ""
            in_file = path.startswith("/") and not path.endswith(" (deleted)")
            library = in_file and access[1] != "w" and access[3] == "p"
            if access[0] != "r" or path in {"[vvar]", "[vsyscall]", "[vdso]"} or library:
                continue
            start, end = (int(part, 16) for part in fields[0].split("-"))
            if in_file and access[3] == "s":  # etcd maps much more than its file has
                end = min(end, start + max(0, Path(path).stat().st_size - int(fields[2], 16)))
            yield from _region(memory.fileno(), start, end)


def _region(descriptor: int, start: int, end: int) -> Iterator[bytes]:
    position, tail = start, b""
    while position < end:
        try:
            chunk = os.pread(descriptor, min(_CHUNK_BYTES, end - position), position)
        except (OSError, OverflowError) as error:
            if isinstance(error, PermissionError):
                raise
            return  # secret memory, or unmapped meanwhile
        if not chunk:
            return
        yield tail + chunk
        tail = chunk[-_OVERLAP_BYTES:]
        position += len(chunk)


def files_under(directory: Path, excluded: Iterable[Path] = ()) -> list[Path]:
    """Return all regular files under a directory, symbolic links not followed."""
    left_out = set(excluded)
    return [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.is_symlink() and path not in left_out
    ]
