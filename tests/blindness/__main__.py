"""Prove that the fabric controller is blind: ``./scripts/prove-blind [--json] [--quick]``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.blindness import mutants
from tests.blindness.control import ControlFailed
from tests.blindness.proof import NothingProved, Proof, Result
from tests.blindness.tested import in_words
from tests.running_pool import ROOT
from tests.scan import Unreadable

_HITS_SHOWN = 20
NOT_COVERED = "docs/threat-model.md#what-the-proof-of-blindness-covers"


class _Progress:
    """Lines on standard error, with the seconds since the start."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._began = quiet, time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            print(f"[{self.seconds:6.1f} s] {text}", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began


def _summary(result: Result, mutants_caught: int, seconds: float, *, not_seen: bool) -> dict[str, Any]:
    caught_all = mutants_caught == len(mutants.MUTANTS)
    controlled = result.control_hits == 2 * result.forms > 0
    return {
        "ok": not result.hits and not result.problems and controlled and caught_all,
        "hits": result.hits,
        "positive_control_hits": result.control_hits,
        "mutants_caught": mutants_caught,
        "mutants": len(mutants.MUTANTS),
        "outside_contract": len(result.problems),
        "not_seen": [mutants.NOT_SEEN.name] if not_seen else [],
        "not_covered": NOT_COVERED,
        "tested": result.tested,
        "by_kind": _by_kind(result),
        "secrets": result.secrets,
        "forms": result.forms,
        "scanned_bytes": {
            place: sum(scanned.size_bytes for scanned in result.scanned if scanned.place == place)
            for place in dict.fromkeys(scanned.place for scanned in result.scanned)
        },
        "memory_scans": sum(scanned.place == "memory" for scanned in result.scanned),
        "numbers_divided": result.divisions,
        "recorded_replies": dict(sorted(result.verbs.items())),
        "seconds": round(seconds, 1),
    }


def _by_kind(result: Result) -> dict[str, dict[str, int]]:
    """Return secrets, forms and hits of each kind."""
    hits = result.hits_by_kind()
    return {
        kind: {"secrets": count, "forms": result.forms_by_kind[kind], "hits": hits[kind]}
        for kind, count in sorted(result.secrets_by_kind.items())
    }


def _report(result: Result) -> None:
    """Say what was tested and scanned, for people."""
    if result.tested:
        print("\n".join(in_words(result.tested)))
    print(
        f"{result.secrets} secrets in {result.forms} forms: raw, reversed, hex, base64 at three alignments,"
    )
    print("words, and numbers that divide an RSA modulus")
    for kind, counts in _by_kind(result).items():
        print(f"  {kind}".ljust(60), ", ".join(f"{count:>5} {what}" for what, count in counts.items()))
    for scanned in result.scanned:
        print(f"  {scanned.place} {scanned.moment}".ljust(60), f"{scanned.size_bytes:>12,} bytes", end="")
        print(f"{scanned.hits:>6} hits")
    replies = ", ".join(f"{verb} {count}" for verb, count in sorted(result.verbs.items()))
    print(f"replies received and recorded: {replies}")
    print(f"memory of the partitions, where keys belong: {result.partition}")
    for text in [*result.described_hits(), *result.problems][:_HITS_SHOWN]:
        print(f"FOUND: {text}")
    print(f"this is what one run shows; what it does not cover: {NOT_COVERED}")


def main() -> int:
    """Run the proof; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(prog="prove-blind", description="Prove that the controller is blind.")
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    parser.add_argument(
        "--quick", action="store_true", help="without patch, lost disk, proof of quorum and unlock"
    )
    arguments = parser.parse_args()
    os.environ["PATH"] = f"{os.environ['PATH']}{os.pathsep}{ROOT / '.etcd'}"
    progress = _Progress(quiet=arguments.json)
    result, caught, not_seen = Result(), 0, False
    with tempfile.TemporaryDirectory(prefix="mhsm-blind-") as temporary:
        proof = Proof(Path(temporary) / "proof", progress.say)
        try:
            result = proof.short(controlled=True) if arguments.quick else proof.full()
            caught, not_seen = mutants.hunt(progress.say)
        except KeyboardInterrupt:
            print("prove-blind: interrupted", file=sys.stderr)
            return 130
        except Unreadable as error:
            print(f"prove-blind: memory cannot be read, so nothing is proved: {error}", file=sys.stderr)
        except (NothingProved, ControlFailed, AssertionError, subprocess.SubprocessError) as error:
            print(f"prove-blind: {error}", file=sys.stderr)
    summary = _summary(result, caught, progress.seconds, not_seen=not_seen)
    if not arguments.json:
        _report(result)
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
