"""Verification of audit logs without the pool: on a partition's disk or in an export (G7).

The records of each log are hashed once, in order. On the way every checkpoint must have
the root of its size: those of the log itself, those that the other partitions witnessed,
and those of anchors kept elsewhere (backups, ceremony records). Equal roots at growing
sizes are what a consistency proof would show, for all checkpoints at once.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509

from hsm_pool.audit import files, lost_logs
from hsm_pool.audit.checkpoint import (
    FIRST_PREVIOUS,
    Checkpoint,
    CheckpointInvalid,
    Note,
    SignerKey,
    origin,
    signer_of,
)
from hsm_pool.audit.comparison import Comparison
from hsm_pool.audit.cosignatures import Cosignatures
from hsm_pool.audit.files import Unreadable
from hsm_pool.audit.lost_logs import Anchor, LostLog
from hsm_pool.audit.mutations import Mutations
from hsm_pool.audit.retention import Claims
from hsm_pool.audit.signers import Signers
from hsm_pool.audit.tree import Tree, leaf_hash
from hsm_pool.audit.witness import read_peers
from hsm_pool.core.membership import PARTITIONS

_OWN = "the log"
"""Source of a log's own checkpoints."""

Progress = Callable[[int], None]
"""Takes the number of octets that were hashed since the last call."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that an honest log does not show."""

    partition: int
    what: str


@dataclass(slots=True)
class LogReport:
    """What was verified of one log."""

    partition: int
    directory: str
    log_id: str = ""
    first_record: int = 0
    first_checkpoint: int = 1
    records: int = 0
    checkpoints: int = 0
    cosigned: int = 0
    """Checkpoints with at least one cosignature."""
    covered: int = 0
    """Records that the log's own checkpoints cover: what follows is not yet protected."""
    sequences: tuple[int, int] = (0, 0)
    """First and last sequence of the chain whose mutations are on record."""


@dataclass(slots=True)
class Report:
    """What was verified, and what is wrong."""

    logs: list[LogReport] = field(default_factory=list)
    anchors: int = 0
    """Checkpoints kept elsewhere that were compared with the records."""
    anchors_before: int = 0
    """Such that could not be: they are of before the oldest record that is kept."""
    findings: list[Finding] = field(default_factory=list)
    beyond: set[str] = field(default_factory=set)
    """Who holds checkpoints of more records than there are."""
    lost: list[LostLog] = field(default_factory=list)
    """Logs that are gone; whose loss is not known is a finding, too."""
    repeated_names: dict[str, int] = field(default_factory=dict)
    """Names of several certified keys, and how many: a partition whose disk was lost counts anew."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


class Verifier:
    """Verifies the logs of one pool.

    Args:
        pool_id: Of the pool.
        root: Root certificate of the pool's owner.
        progress: Told how far it is.
    """

    def __init__(self, pool_id: str, root: x509.Certificate, progress: Progress = lambda _: None) -> None:
        self._pool_id, self._progress = pool_id, progress
        self._report = Report()
        self._signers = Signers(pool_id, root)
        self._refused: dict[tuple[int, str], None] = {}
        """Partition in whose files a signer stands, and why it is not believed."""
        self._mutations = Mutations(self._find)
        self._cosignatures = Cosignatures()
        self._claims = Claims()
        self._present: dict[int, str | None] = {}
        """Origin of the log that each partition has; None while it could not be read."""

    def verify(
        self,
        directories: dict[int, Path],
        kept: Iterable[tuple[str, str]] = (),
        known_lost: Collection[str] = (),
    ) -> Report:
        """Verify logs against themselves, each other and anchors.

        Args:
            directories: The log's directory of each partition of the pool; one that is missing is a finding.
            kept: (text of a note, where it was kept) of anchors.
            known_lost: Ids of logs whose loss the operator knows of: they are no finding.
        """
        for partition, directory in sorted(directories.items()):
            self._collect_signers(partition, directory)
        if self._refused and not self._signers.any():
            # Otherwise each signature would be a finding.
            _, why = next(iter(self._refused))
            self._find(
                -1,
                f"{why}; nor is any other signer certified under this root. It is of another owner, "
                f"or everything is forged; nothing else was verified",
            )
            return self._report
        for partition, why in self._refused:
            self._find(partition, why)
        anchors = [*self._witnessed(directories), *self._kept(kept)]
        for partition in range(PARTITIONS):
            mine = [anchor for anchor in anchors if anchor.checkpoint.partition == partition]
            if partition in directories:
                self._log(partition, directories[partition], mine)
            elif not mine:
                self._find(partition, "there is no log")
        self._report.lost = lost_logs.find(anchors, self._present, known_lost)
        for lost in self._report.lost:
            if not lost.known:
                self._find(lost.checkpoint.partition, lost.what)
        self._removals()
        self._forgotten(directories)
        self._report.repeated_names = self._signers.repeated_names()
        self._mutations.compare_spans(log.sequences for log in self._report.logs)
        return self._report

    def _find(self, partition: int, what: str) -> None:
        # Parts of it stand in files of anybody, and go to a terminal.
        shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in what)
        self._report.findings.append(Finding(partition, shown))

    # -- what others kept ----------------------------------------------------------------

    def _collect_signers(self, partition: int, directory: Path) -> None:
        documents: list[dict[str, str]] = []
        try:
            for path in files.listed(directory, files.CHECKPOINTS):
                lines = [line for line in files.read_lines(path) if line.startswith(b'{"signer"')]
                documents.extend(files.parse(line, path.name)["signer"] for line in lines)
            for name in (files.PEERS, files.PEERS_AFTER):
                if (directory / name).exists():
                    documents.extend(
                        key for entry in read_peers(directory / name) for key in entry["signers"]
                    )
        except (Unreadable, OSError, KeyError, TypeError) as error:
            self._find(partition, str(error))
        for document in documents:
            try:
                self._signers.trust(SignerKey.from_document(document))
            except CheckpointInvalid as error:
                self._refused[partition, str(error)] = None

    def _witnessed(self, directories: dict[int, Path]) -> list[Anchor]:
        return [
            Anchor(checkpoint, f"partition {witness}")
            for witness, directory in sorted(directories.items())
            for checkpoint in self._seen(witness, directory / files.PEERS)
        ]

    def _seen(self, witness: int, path: Path) -> list[Checkpoint]:
        """Return what a partition says it has seen of the others' logs."""
        found: list[Checkpoint] = []
        if not path.exists():
            return found
        try:
            for entry in read_peers(path):
                note = Note.parse(entry["checkpoint"])
                self._signers.check_note(note, note.checkpoint.partition)
                found.append(note.checkpoint)
        except (Unreadable, CheckpointInvalid, OSError) as error:
            self._find(witness, f"{path.name}: {error}")
        return found

    def _forgotten(self, directories: dict[int, Path]) -> None:
        """Compare what the witnesses know with what they cosigned, now that the logs were read."""
        for witness, directory in sorted(directories.items()):
            path = directory / files.PEERS_AFTER
            known = self._seen(witness, path if path.exists() else directory / files.PEERS)
            for what in self._cosignatures.forgotten(witness, known):
                self._find(witness, what)

    def _kept(self, kept: Iterable[tuple[str, str]]) -> list[Anchor]:
        found: list[Anchor] = []
        for text, source in kept:
            try:
                # Whoever keeps an anchor vouches for it: the keys may have gone with the log.
                found.append(Anchor(Note.parse(text).checkpoint, source))
            except CheckpointInvalid as error:
                self._find(-1, f"{source}: {error}")
        return found

    # -- one log -------------------------------------------------------------------------

    def _log(self, partition: int, directory: Path, anchors: list[Anchor]) -> None:
        report = LogReport(partition, str(directory))
        self._report.logs.append(report)
        paths = files.listed(directory, files.RECORDS) if directory.is_dir() else []
        if not paths:
            if not anchors:
                self._find(partition, "there is no log")
            return
        self._present[partition] = None
        comparison = Comparison()
        try:
            header = files.read_header(paths[0])
            report.log_id, report.first_record = header.log_id, header.first
            name = origin(self._pool_id, partition, header.log_id)
            self._present[partition] = name
            checkpoints = self._checkpoints(report, directory, name)
            mine = [anchor for anchor in anchors if anchor.checkpoint.origin == name]
            self._missing(partition, checkpoints, mine)
            roots = [Anchor(checkpoint, _OWN) for checkpoint in checkpoints] + mine
            self._records(report, paths, roots, comparison)
        except (Unreadable, OSError) as error:
            self._find(partition, str(error))
        for what in comparison.findings():
            self._find(partition, what)
        self._report.beyond |= comparison.sources_beyond()

    def _checkpoints(self, report: LogReport, directory: Path, name: str) -> list[Checkpoint]:
        """Check the chain of checkpoints and return them."""
        found: list[Checkpoint] = []
        cosigned: set[int] = set()
        for path in files.listed(directory, files.CHECKPOINTS):
            for line in files.read_lines(path):
                try:
                    self._checkpoint_line(
                        files.parse(line, path.name), name, report.partition, found, cosigned
                    )
                except (CheckpointInvalid, Unreadable, KeyError, TypeError) as error:
                    self._find(report.partition, f"{path.name}: {error}")
        report.checkpoints, report.cosigned = len(found), len(cosigned)
        if found:
            report.first_checkpoint = found[0].number
        else:
            self._find(report.partition, "there is no checkpoint")
        return found

    def _missing(self, partition: int, checkpoints: list[Checkpoint], anchors: list[Anchor]) -> None:
        """Check that the log shows every checkpoint that somebody else kept, the removed ones aside."""
        shown = {checkpoint.number: checkpoint for checkpoint in checkpoints}
        first = min(shown, default=1)
        for anchor in anchors:
            number = anchor.checkpoint.number
            if number not in shown and number >= first:
                self._find(partition, f"checkpoint {number}, which {anchor.source} holds, was dropped")
            elif number in shown and shown[number] != anchor.checkpoint:
                self._find(partition, f"{anchor.source} holds another checkpoint {number}")

    def _checkpoint_line(
        self,
        value: dict[str, Any],
        name: str,
        partition: int,
        found: list[Checkpoint],
        cosigned: set[int],
    ) -> None:
        if "checkpoint" in value:
            note = Note.parse(value["checkpoint"])
            checkpoint = note.checkpoint
            if checkpoint.origin != name:
                raise CheckpointInvalid(f"checkpoint {checkpoint.number} is of another log")
            if found:
                checkpoint.check_follows(found[-1])
            elif checkpoint.number == 1 and checkpoint.previous != FIRST_PREVIOUS:
                raise CheckpointInvalid("the first checkpoint names one before it")
            found.append(checkpoint)
            self._signers.check_note(note, partition)
            self._cosignatures.signed(partition, self._signers.of_line(note.signatures[0]))
        elif "cosignatures" in value:
            if not found or value["number"] != found[-1].number:
                raise CheckpointInvalid("a cosignature stands at the wrong checkpoint")
            self._check_cosignatures(found[-1], value["cosignatures"], partition)
            cosigned.add(found[-1].number)
        elif "signer" in value:
            # A log that is still written has more of them now than when the keys were collected.
            self._signers.trust(SignerKey.from_document(value["signer"]))
        else:
            raise CheckpointInvalid("a line is neither checkpoint nor cosignature nor signer")

    def _check_cosignatures(self, checkpoint: Checkpoint, lines: Any, partition: int) -> None:
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise CheckpointInvalid("a cosignature is no line of text")
        for line in lines:
            if signer_of(line).startswith(f"{self._pool_id}/partition/{partition}/"):
                raise CheckpointInvalid("a partition has cosigned its own checkpoint")
            key = self._signers.of_line(line)
            key.verify_cosignature(checkpoint, line)
            self._cosignatures.cosigned(checkpoint, key)

    def _records(
        self, report: LogReport, paths: list[Path], roots: list[Anchor], comparison: Comparison
    ) -> None:
        """Hash all records and compare the roots on the way."""
        partition = report.partition
        first = files.read_header(paths[0])
        tree = Tree(first.first, first.frontier)
        pending = sorted(roots, key=lambda anchor: anchor.checkpoint.size)
        # What lies before the oldest record that is kept can no more be compared.
        position = bisect.bisect_left(pending, first.first, key=lambda anchor: anchor.checkpoint.size)
        self._report.anchors_before += _elsewhere(pending[:position])
        begin = position
        mutations = self._mutations.of_log(partition, first.sequence)
        position = _compare(tree, pending, position, comparison)
        covered_sequence = first.sequence
        for path in paths:
            header = files.read_header(path)
            if header.log_id != first.log_id or header.first != tree.size:
                self._find(partition, f"{path.name}: records before it are missing, or it is of another log")
                return
            if header.frontier != tree.frontier():
                self._find(partition, f"{path.name}: its header names other records before it")
            for record in files.read_lines(path, skip_header=True):
                tree.append(leaf_hash(record))
                self._progress(len(record) + 1)
                sequence = mutations.take(record, tree.size)
                if sequence:
                    self._claims.take(partition, record, sequence, tree.size)
                elif not record.startswith(b'{"'):
                    self._find(partition, f"record {tree.size - 1} is not a record")
                before = position
                position = _compare(tree, pending, before, comparison)
                if _OWN in (anchor.source for anchor in pending[before:position]):
                    covered_sequence = mutations.span[1]
            tree.forget(tree.size)
        for anchor in pending[position:]:
            comparison.beyond(anchor, tree.size)
        compared = pending[begin:position]
        self._report.anchors += _elsewhere(compared)
        report.covered = max((own.checkpoint.size for own in compared if own.source == _OWN), default=0)
        report.records = tree.size - first.first
        mutations.end(report.covered)
        report.sequences = mutations.span
        self._claims.cover(partition, report.covered, covered_sequence)

    def _removals(self) -> None:
        """Find what was removed without a word of it in the logs, now that all were read."""
        for log in self._report.logs:
            kept = self._claims.kept_from(log.partition, log.log_id)
            if log.first_record > kept.first_record:
                what = f"records {kept.first_record} to {log.first_record - 1} were removed"
                self._find(log.partition, what)
            if log.first_checkpoint > kept.first_checkpoint:
                what = f"checkpoints {kept.first_checkpoint} to {log.first_checkpoint - 1} were removed"
                self._find(log.partition, what)


def _compare(tree: Tree, pending: list[Anchor], position: int, comparison: Comparison) -> int:
    """Compare every root that is due at this size; return how many were."""
    while position < len(pending) and pending[position].checkpoint.size == tree.size:
        comparison.compare(pending[position], tree.root())
        position += 1
    return position


def _elsewhere(anchors: list[Anchor]) -> int:
    """Return how many of them somebody else kept."""
    return sum(anchor.source != _OWN for anchor in anchors)
