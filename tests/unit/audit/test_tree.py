"""G7: the Merkle tree is the one of RFC 6962, and its proofs show what they say and nothing else."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsm_pool.audit.tree import (
    EMPTY_ROOT,
    Forgotten,
    ProofRefused,
    Tree,
    leaf_hash,
    verify_consistency,
    verify_inclusion,
)

# The leaves and roots that implementations of RFC 6962 share as test vectors
# (certificate-transparency, "testdata" of the reference Merkle tree).
_LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def _tree(leaves: list[bytes]) -> Tree:
    tree = Tree()
    for leaf in leaves:
        tree.append(leaf_hash(leaf))
    return tree


def _naive_root(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962 section 2.1, word by word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + _naive_root(leaves[:split]) + _naive_root(leaves[split:])).digest()


def _numbered(count: int) -> list[bytes]:
    return [str(number).encode() for number in range(count)]


def test_roots_are_those_of_the_published_vectors() -> None:
    tree = _tree(_LEAVES)
    assert [tree.root(size).hex() for size in range(9)] == _ROOTS
    assert Tree().root() == EMPTY_ROOT


def test_proofs_are_those_of_the_published_vectors() -> None:
    tree = _tree(_LEAVES)
    path = [node.hex() for node in tree.inclusion_proof(0, 8)]
    assert path == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]
    proof = [node.hex() for node in tree.consistency_proof(6, 8)]
    assert proof == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 200), st.data())
def test_every_proof_verifies_and_a_changed_one_does_not(count: int, data: st.DataObject) -> None:
    leaves = _numbered(count)
    tree = _tree(leaves)
    size = data.draw(st.integers(0, count))
    root = tree.root(size)
    assert root == _naive_root(leaves[:size])
    old_size = data.draw(st.integers(0, size))
    old_root = tree.root(old_size)
    proof = tree.consistency_proof(old_size, size)
    verify_consistency(old_size, old_root, size, root, proof)
    if old_size:
        with pytest.raises(ProofRefused):
            verify_consistency(old_size, bytes(32), size, root, proof)
        with pytest.raises(ProofRefused):
            verify_consistency(old_size, old_root, size, bytes(32), proof)
        with pytest.raises(ProofRefused):
            verify_consistency(old_size, old_root, size, root, (*proof, bytes(32)))
    if size:
        index = data.draw(st.integers(0, size - 1))
        path = tree.inclusion_proof(index, size)
        verify_inclusion(leaf_hash(leaves[index]), index, size, path, root)
        with pytest.raises(ProofRefused):
            verify_inclusion(leaf_hash(b"another"), index, size, path, root)
        if path:
            with pytest.raises(ProofRefused):
                verify_inclusion(leaf_hash(leaves[index]), index, size, path[1:], root)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 150), st.integers(0, 150), st.data())
def test_a_tree_goes_on_from_its_frontier(before: int, after: int, data: st.DataObject) -> None:
    """Rotation: the frontier is all that later roots need of earlier records."""
    leaves = _numbered(before + after)
    whole = _tree(leaves)
    resumed = Tree(before, whole.frontier(before))
    for leaf in leaves[before:]:
        resumed.append(leaf_hash(leaf))
    assert resumed.root() == whole.root()
    if after:
        index = data.draw(st.integers(before, before + after - 1))
        assert resumed.inclusion_proof(index) == whole.inclusion_proof(index)
    whole.forget(before)
    assert whole.root() == resumed.root()
    assert whole.frontier() == resumed.frontier()
    assert whole.consistency_proof(before) == resumed.consistency_proof(before)


def test_what_was_forgotten_is_not_invented() -> None:
    tree = _tree(_numbered(64))
    tree.forget(33)
    with pytest.raises(Forgotten):
        tree.inclusion_proof(3)
    with pytest.raises(Forgotten):
        tree.root(20)
    assert sum(len(level) for level in tree._levels) < 70
