"""One run of the proof: a real attended pool, planted secrets, chaos, and a look everywhere (G3, G5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.blindness import control, recording
from tests.blindness.chaos import Chaos, publish_firmware
from tests.blindness.places import Scanned, scan_files, scan_memory
from tests.blindness.planted import Ceremonies, Planted, make_keyholders, plant
from tests.blindness.tested import by_kind, facts, kind_of
from tests.running_pool import RunningPool
from tests.scan import Scanner, Unreadable

SHORT_VERBS = frozenset({"GetStatus", "Drain", "Resume", "Relinquish", "Restart"})
FULL_VERBS = SHORT_VERBS | {"StageFirmware", "ActivateFirmware", "Heal"}


class NothingProved(Exception):
    """The run did not do what its result would claim."""


@dataclass(slots=True)
class Result:
    """What a run has found."""

    scanned: list[Scanned] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What the controller received beside the contract."""
    verbs: Counter[str] = field(default_factory=Counter)
    secrets: int = 0
    forms: int = 0
    divisions: int = 0
    control_hits: int = 0
    partition: str = ""
    """What was found in the partitions' memory, as a control."""
    tested: dict[str, Any] = field(default_factory=dict)
    """As :func:`tests.blindness.tested.facts`."""
    secrets_by_kind: Counter[str] = field(default_factory=Counter)
    forms_by_kind: Counter[str] = field(default_factory=Counter)

    @property
    def hits(self) -> int:
        """Occurrences of secrets, in all places."""
        return sum(place.hits for place in self.scanned)

    def hits_by_kind(self) -> Counter[str]:
        """Return the hits by kind of secret, in all places."""
        found = sum((place.found for place in self.scanned), Counter())
        return sum((Counter({kind_of(hit): count}) for hit, count in found.items()), Counter())

    def described_hits(self) -> list[str]:
        """Return each secret that was found, with its form and place."""
        return [f"{place.place} {place.moment}: {hit}" for place in self.scanned for hit in place.found]


class Proof:
    """A proof in a directory of its own, which must not exist. Each is run once.

    Args:
        directory: Where pool, recordings and officers are.
        say: Progress.
    """

    def __init__(self, directory: Path, say: Callable[[str], None]) -> None:
        self._directory, self._say = directory, say
        self._result = Result()
        directory.mkdir(mode=0o700)

    def short(self, *, controlled: bool = False) -> Result:
        """Run with commands, a failover, a restart and kills only.

        Args:
            controlled: Run the positive control, too.

        Raises:
            Unreadable: The kernel does not let this user read the controller's memory.
            ControlFailed: The scanner misses what is there.
            NothingProved: The controller did not receive what it should have been tried with.
        """
        return self._run(None, controlled=controlled)

    def full(self) -> Result:
        """Run with a patch, a lost disk, ceremonies and an unlock besides; raises as :meth:`short`."""
        return self._run(publish_firmware(self._directory / "firmware"), controlled=True)

    def _run(self, firmware: Path | None, *, controlled: bool) -> Result:
        options = ("--firmware-repository", str(firmware)) if firmware else ()
        with recording.recorded(self._directory / "recordings") as recordings:
            pool = RunningPool(self._directory / "pool", options=options)
            try:
                self._say("an attended pool runs; what the controller receives is recorded")
                self._prove(pool, firmware, recordings, controlled=controlled)
            finally:
                pool.down()
        return self._result

    def _prove(self, pool: RunningPool, firmware: Path | None, recordings: Path, *, controlled: bool) -> None:
        result, output = self._result, self._directory / "output.txt"
        keyholders = make_keyholders(self._directory / "officers")
        ceremonies = Ceremonies(pool, keyholders, self._directory / "officers")
        planted = plant(pool, keyholders, ceremonies)
        scanner = planted.scanner()
        result.secrets, result.forms = len(scanner.names), len(planted.pieces())
        result.tested = facts(pool)
        result.secrets_by_kind = by_kind(scanner.names)
        result.forms_by_kind = by_kind(name for name, _, _ in planted.pieces())
        self._say(f"planted and learnt {result.secrets} secrets, looked for in {result.forms} forms")

        def look(moment: str) -> None:
            result.scanned.append(scan_memory(pool, scanner, moment))
            self._say(f"scanned the controller's memory {moment}: {result.scanned[-1].hits} hits")

        look("after the secrets were planted")
        chaos = Chaos(pool, ceremonies, look, self._say, output)
        if firmware:
            chaos.full(firmware)
        else:
            chaos.short()
        recording.collect(pool.directory, recordings)
        result.scanned += scan_files(pool, scanner, recordings, output)
        result.problems = recording.problems(recordings)
        result.verbs = recording.verbs(recordings)
        wanted = FULL_VERBS if firmware else SHORT_VERBS
        if not wanted <= set(result.verbs):
            raise NothingProved(f"the controller received no reply of {wanted - set(result.verbs)}")
        # A text in a refusal shows only where something is refused.
        if not recording.refusals(recordings):
            raise NothingProved("the controller received no refusal")
        result.divisions = scanner.factors.divisions
        self._say(
            f"scanned files, logs and {result.verbs.total()} recorded replies: {result.hits} hits in all"
        )
        if controlled:
            self._control(pool, planted)

    def _control(self, pool: RunningPool, planted: Planted) -> None:
        scanner, result = planted.scanner(), self._result
        result.control_hits = control.control_process(planted, scanner)
        result.control_hits += control.control_file(planted, scanner, self._directory / "control")
        self._say(f"positive control: {result.control_hits} of {2 * result.forms} planted forms found")
        try:
            found = control.partition_memory(pool, Scanner(planted.secrets, planted.mnemonics))
            result.partition = f"{sum(found.values())} occurrences of {len(found)} forms of imported keys"
        except Unreadable as error:
            result.partition = f"not readable: {error}"
        self._say(f"memory of the partitions, where keys belong: {result.partition}")
