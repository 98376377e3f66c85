"""What every service needs of a call: its deadline, and errors of a stopping replica."""

from __future__ import annotations

import grpc

from hsm_pool import limits
from hsm_pool.partition.partition import Partition
from hsm_pool.store.replica import Stopped, boot_time
from hsm_pool.store.sealing import Tampered


def deadline(context: grpc.ServicerContext, seconds_max: float = limits.MUTATION_SECONDS_MAX) -> float:
    """Return when a call has to be answered, on the boot clock, at most seconds_max from now."""
    remaining = context.time_remaining()
    return boot_time() + (seconds_max if remaining is None else min(remaining, seconds_max))


class Translator:
    """Turns what a stopping or tampered store raises into the partition's typed refusal."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition

    def __call__(self, error: Exception) -> Exception:
        """Return the error to show."""
        if isinstance(error, Tampered):
            self._partition.quarantine(str(error))
            return self._partition.refusal()
        if isinstance(error, Stopped):
            return self._partition.refusal()
        return error
