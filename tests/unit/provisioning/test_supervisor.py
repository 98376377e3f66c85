"""What the supervisor takes from the output of a node agent, which is another user's process (G5)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool.provisioning.supervisor import processes_of


def line(**changes: Any) -> bytes:
    event = {
        "event": "processes",
        "index": 1,
        "hardening": ["no_core_files"],
        "process_ids": {"partition": 4711, "store_member": None},
        "failures": {"partition": 0, "store_member": 3},
    }
    return json.dumps({**event, **changes}).encode()


def test_what_an_agent_says_is_taken() -> None:
    process_ids, hardening, failures, lost = processes_of(line())
    assert not lost
    assert processes_of(line(store_disk_lost=True)).store_disk_lost
    assert not processes_of(line(store_disk_lost="yes")).store_disk_lost
    assert process_ids == {"partition": 4711, "store_member": None}
    assert hardening == ["no_core_files"]
    assert failures == {"partition": 0, "store_member": 3}


@pytest.mark.parametrize(
    "said",
    [
        *(b"", b"hello", b"[]", b"1", b"null", b"{}", b"\xff", b"[" * 100_000),
        *(line(event="x"), line(process_ids=[]), line(hardening=None), line(hardening=["x"] * 33)),
        *(line(process_ids={"partition": number}) for number in (0, 1, -1, True, "4711", 2**31, 1.5)),
        *(line(failures={"partition": 0, "store_member": n}) for n in (-1, True, "1", None, 2**31, 1.5)),
        line(failures=[]),
    ],
    ids=lambda said: said[:40].decode(errors="replace"),
)
def test_anything_else_is_one_error(said: bytes) -> None:
    with pytest.raises(ValueError):
        processes_of(said)


@given(said=st.binary(max_size=200))
def test_any_octets_are_one_error(said: bytes) -> None:
    with pytest.raises(ValueError):
        processes_of(said)
