"""Merkle tree of an append-only log and its proofs (RFC 6962 section 2.1, RFC 9162 section 2.1).

A tree remembers the roots of complete subtrees, so that roots and proofs cost O(log n).
``forget`` drops what only old proofs need: what is then left for appending is the
frontier, the roots of the complete subtrees that a size is made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

EMPTY_ROOT = hashlib.sha256(b"").digest()
HASH_BYTES = 32


class Forgotten(LookupError):
    """The tree does not remember a node that this root or proof needs."""


class ProofRefused(Exception):
    """A proof does not show what it is said to show."""


def leaf_hash(record: bytes) -> bytes:
    """Return the hash of a leaf."""
    return hashlib.sha256(b"\x00" + record).digest()


def _inner(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(count: int) -> int:
    """Return the largest power of two below count."""
    return 1 << ((count - 1).bit_length() - 1)


class Tree:
    """The tree of a log. Not thread-safe.

    Args:
        size: Leaves that were appended before.
        frontier: Roots of the complete subtrees that make up these leaves, the largest first.
    """

    def __init__(self, size: int = 0, frontier: Sequence[bytes] = ()) -> None:
        if len(frontier) != size.bit_count() or any(len(root) != HASH_BYTES for root in frontier):
            raise ValueError("the frontier does not fit the size")
        self.size = size
        levels = max(1, size.bit_length())
        # _levels[k] holds subtrees of 2**k leaves, from the number _firsts[k] on.
        self._levels: list[list[bytes]] = [[] for _ in range(levels)]
        self._firsts = [_first_remembered(size, level) for level in range(levels)]
        roots = list(frontier)
        for level in range(levels):
            if size >> level & 1:
                self._levels[level].append(roots.pop())

    def append(self, leaf: bytes) -> None:
        """Append a leaf hash."""
        node = leaf
        self._levels[0].append(node)
        self.size += 1
        level, count = 0, self.size
        while not count & 1:
            nodes = self._levels[level]
            node = _inner(nodes[-2], nodes[-1])
            level, count = level + 1, count >> 1
            if level == len(self._levels):
                self._levels.append([])
                self._firsts.append(0)
            self._levels[level].append(node)

    def root(self, size: int | None = None) -> bytes:
        """Return the root as of a size.

        Raises:
            Forgotten: The size lies in the part that was forgotten.
        """
        size = self._checked(size)
        return self._root(0, size) if size else EMPTY_ROOT

    def frontier(self, size: int | None = None) -> tuple[bytes, ...]:
        """Return the roots of the complete subtrees that a size is made of, the largest first."""
        size = self._checked(size)
        return tuple(
            self._node(level, (size >> level) - 1)
            for level in reversed(range(size.bit_length()))
            if size >> level & 1
        )

    def forget(self, size: int) -> None:
        """Drop what proofs about leaves before this size need, and nothing else does."""
        size = self._checked(size)
        for level, nodes in enumerate(self._levels):
            first = _first_remembered(size, level)
            if first > self._firsts[level]:
                del nodes[: first - self._firsts[level]]
                self._firsts[level] = first

    def inclusion_proof(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """Return the audit path of a leaf (RFC 6962, PATH(m, D[n])).

        Raises:
            Forgotten: A node of it was forgotten.
        """
        size = self._checked(size)
        if not 0 <= index < size:
            raise ValueError("no such leaf in a tree of this size")
        path: list[bytes] = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._root(middle, end))
                end = middle
            else:
                path.append(self._root(start, middle))
                start = middle
        return tuple(reversed(path))

    def consistency_proof(self, old_size: int, size: int | None = None) -> tuple[bytes, ...]:
        """Return the proof that the tree of old_size is a prefix (RFC 6962, PROOF(m, D[n])).

        Raises:
            Forgotten: A node of it was forgotten.
        """
        size = self._checked(size)
        if not 0 <= old_size <= size:
            raise ValueError("the older tree is the larger one")
        if old_size in {0, size}:
            return ()
        proof: list[bytes] = []
        start, end, whole = 0, size, True
        while old_size != end:
            middle = start + _split(end - start)
            if old_size <= middle:
                proof.append(self._root(middle, end))
                end = middle
            else:
                proof.append(self._root(start, middle))
                start, whole = middle, False
        if not whole:
            proof.append(self._root(start, end))
        return tuple(reversed(proof))

    def _checked(self, size: int | None) -> int:
        if size is None:
            return self.size
        if not 0 <= size <= self.size:
            raise ValueError("the tree is not that large")
        return size

    def _root(self, start: int, end: int) -> bytes:
        count = end - start
        if not count & (count - 1):
            level = count.bit_length() - 1
            return self._node(level, start >> level)
        middle = start + _split(count)
        return _inner(self._root(start, middle), self._root(middle, end))

    def _node(self, level: int, number: int) -> bytes:
        position = number - self._firsts[level]
        if position < 0:
            raise Forgotten
        return self._levels[level][position]


def _first_remembered(size: int, level: int) -> int:
    """Return the number of the first subtree of a level that a tree of this size must remember."""
    return (size >> level) - (size >> level & 1)


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that a leaf hash stands at an index of a tree (RFC 9162 section 2.1.3.2).

    Raises:
        ProofRefused: The proof does not show it.
    """
    if not 0 <= index < size:
        raise ProofRefused("no such leaf in a tree of this size")
    position, last, node = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise ProofRefused("the inclusion proof is too long")
        if position & 1 or position == last:
            node = _inner(sibling, node)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            node = _inner(node, sibling)
        position, last = position >> 1, last >> 1
    if last or node != root:
        raise ProofRefused("the record is not in the tree of this root")


def verify_consistency(
    old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]
) -> None:
    """Check that one tree is a prefix of another (RFC 9162 section 2.1.4.2).

    Raises:
        ProofRefused: The proof does not show it.
    """
    if not 0 <= old_size <= size:
        raise ProofRefused("the older tree is the larger one")
    if old_size in {0, size}:
        if proof or old_root != (EMPTY_ROOT if old_size == 0 else root):
            raise ProofRefused("two trees of the same size have different roots")
        return
    nodes = list(proof)
    if not old_size & (old_size - 1):
        nodes.insert(0, old_root)
    if not nodes:
        raise ProofRefused("the consistency proof is empty")
    position, last = old_size - 1, size - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    old_node = node = nodes[0]
    for sibling in nodes[1:]:
        if last == 0:
            raise ProofRefused("the consistency proof is too long")
        if position & 1 or position == last:
            old_node, node = _inner(sibling, old_node), _inner(sibling, node)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            node = _inner(node, sibling)
        position, last = position >> 1, last >> 1
    if last or old_node != old_root or node != root:
        raise ProofRefused("the newer tree does not continue the older one")
