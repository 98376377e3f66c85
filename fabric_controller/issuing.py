"""Sends one command: into the journal first, then to the partition, then its result."""

from __future__ import annotations

import time
from typing import Final

from fabric_controller.enclave_client import EnclaveClient, EnclaveError
from fabric_controller.journal import Journal
from fabric_controller.observe import State
from fabric_controller.work import OK, Issuer, Verb

VALID_MS: Final = 15_000
"""How long a command is valid: a little longer than its call may take."""


def issue(
    journal: Journal,
    client: EnclaveClient,
    verb: Verb,
    partition: int,
    issuer: Issuer,
    argument: int | None = None,
) -> State:
    """Send a command; the caller holds the journal. Killed at any point, it leaves no doubt.

    The counter is on disk before it is sent, so it is never used twice. It is at least the
    clock, so a controller that lost its journal is obeyed, too.

    Raises:
        EnclaveError: Refused or not answered; that is in the journal.
        OSError: The journal cannot be written; nothing was sent.
    """
    now_ms = time.time_ns() // 1_000_000
    counter = max(journal.work.counter + 1, now_ms)
    command = {
        "kind": "command",
        "counter": counter,
        "verb": verb.value,
        "partition": partition,
        "by": issuer.value,
    }
    if argument is not None:
        command["argument"] = argument
    journal.append(command)
    try:
        state = client.command(verb, partition, counter, now_ms + VALID_MS, argument)
    except EnclaveError as error:
        journal.append({"kind": "result", "counter": counter, "code": error.code})
        raise
    journal.append({"kind": "result", "counter": counter, "code": OK})
    return state
