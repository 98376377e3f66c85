"""Deliberately broken builds: each takes one guarantee away, and names the tests that must notice.

A break is a replacement in a copied tree; shipped code has no switch that weakens it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BrokenBuild:
    """One break: the text ``old`` of a file, which must occur exactly once, becomes ``new``."""

    name: str
    guarantee: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BROKEN_BUILDS: tuple[BrokenBuild, ...] = (
    BrokenBuild(
        "a mutation is acknowledged before it is committed",
        "G1",
        "hsm_pool/store/committer.py",
        "        if self._settle(head, transaction):\n            for submission, reply in accepted:\n"
        "                submission.finish(transaction.sequence, reply)\n            return later\n",
        "        for submission, reply in accepted:\n            submission.finish(0, reply)\n"
        "        if self._settle(head, transaction):\n            return later\n",
        (
            "tests/integration/test_guarantees.py::test_nothing_is_acknowledged_without_a_majority_of_the_store",
        ),
    ),
    BrokenBuild(
        "an ambiguous commit is taken for committed",
        "G1",
        "hsm_pool/store/committer.py",
        "        committed = self._replica.transaction_at(transaction.sequence) == transaction.transaction_id\n",
        "        committed = True\n",
        ("tests/integration/test_guarantees.py::test_writers_on_all_partitions_lose_nothing_to_each_other",),
    ),
    BrokenBuild(
        "no freshness check",
        "G2",
        "hsm_pool/store/replica.py",
        "        return max(0.0, self._fresh_until - boot_time())\n",
        "        return limits.LEASE_SECONDS\n",
        (
            "tests/integration/test_guarantees.py::test_a_paused_partition_never_uses_a_key_under_its_old_state",
        ),
    ),
    BrokenBuild(
        "acknowledged before it is applied everywhere",
        "G2",
        "hsm_pool/core/freshness.py",
        "            if not shown and self._holds_on(hold) and now < hold.until:\n",
        "            if False:\n",
        (
            "tests/integration/test_guarantees.py::test_a_paused_partition_never_uses_a_key_under_its_old_state",
        ),
    ),
    BrokenBuild(
        "a share stands plain in the security-domain file",
        "G3",
        "security_domain/domain.py",
        "        token = wrap_to_officer(officer.public_key, officer.thumbprint, canonical(share))\n",
        "        wrap_to_officer(officer.public_key, officer.thumbprint, canonical(share))\n"
        "        token = mnemonic\n",
        ("tests/integration/test_guarantees.py::test_the_security_domain_file_holds_no_share",),
    ),
    BrokenBuild(
        "shares are not compared with their commitments",
        "G4",
        "security_domain/submission.py",
        "    if committed != entry.share_commitment:\n"
        '        raise ShareRefused("the share is not the one this officer was given", officer)\n',
        "    del committed\n",
        ("tests/integration/test_guarantees.py::test_a_forged_share_is_named",),
    ),
    BrokenBuild(
        "no floor of two serving partitions",
        "G5",
        "hsm_pool/core/lifecycle.py",
        "    if len(remaining) < 2:\n",
        "    if len(remaining) < 0:\n",
        ("tests/unit/test_core.py::test_two_drains_cannot_both_win",),
    ),
    BrokenBuild(
        "sealed records are not bound to their id",
        "G6",
        "hsm_pool/store/sealing.py",
        '    return _binding("mhsm/record/v1", pool_id, epoch, record_type, opaque_id, sequence, previous_digest)\n',
        "    del opaque_id\n"
        '    return _binding("mhsm/record/v1", pool_id, epoch, record_type, sequence, previous_digest)\n',
        ("tests/integration/test_guarantees.py::test_a_sealed_record_opens_under_its_own_id_only",),
    ),
    BrokenBuild(
        "the table is not compared with the chain",
        "G6",
        "hsm_pool/store/replica.py",
        "        if last.table_digest != table.root():\n",
        "        if False:\n",
        ("tests/integration/test_guarantees.py::test_a_record_put_back_while_the_pool_sleeps_is_noticed",),
    ),
    BrokenBuild(
        "a rolled-back store is accepted",
        "G6",
        "hsm_pool/store/follower.py",
        "        noted = self._state.read_head(self._replica.keys)\n",
        "        noted = None\n",
        ("tests/integration/test_guarantees.py::test_a_store_rolled_back_while_the_pool_sleeps_is_noticed",),
    ),
    BrokenBuild(
        "the text of an unhandled exception reaches the client",
        "G8",
        "hsm_pool/net/interceptors.py",
        '    return InternalError(f"internal error, correlation id {correlation_id}")\n',
        '    return InternalError(f"internal error {error}, correlation id {correlation_id}")\n',
        ("tests/integration/test_guarantees.py::test_an_unhandled_exception_shows_a_correlation_id_only",),
    ),
)
