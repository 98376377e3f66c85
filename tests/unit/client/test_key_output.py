"""How the commands show a key."""

from __future__ import annotations

import json

import pytest

from hsm_pool.cli.key_output import show_key
from mhsm.keys.v1 import keys_pb2

POLICY = {
    "version": "1.0.0",
    "anyOf": [{"authority": "https://a", "allOf": [{"claim": "svn\u001b[2J", "equals": 3}]}],
}
KEY = keys_pb2.Key(
    name="keys/k/versions/0",
    key_type=keys_pb2.KEY_TYPE_OCT,
    size_bits=256,
    attributes=keys_pb2.KeyAttributes(enabled=True, exportable=True),
    release_policy=keys_pb2.KeyReleasePolicy(data=json.dumps(POLICY, indent=2).encode()),
)


@pytest.mark.parametrize("as_json", [True, False])
def test_a_release_policy_can_be_read(capsys: pytest.CaptureFixture[str], *, as_json: bool) -> None:
    """Its owner sees to whom a key is released; what stands in it cannot steer his terminal."""
    show_key(KEY, {"as_json": as_json}, "", "mhsm key list")
    shown = capsys.readouterr().out
    if as_json:
        assert json.loads(shown)["release_policy"] == POLICY
    else:
        (line,) = [line for line in shown.splitlines() if "authority" in line]
        assert json.loads(line) == POLICY
    assert "\x1b" not in shown


def test_a_key_without_a_policy_shows_none(capsys: pytest.CaptureFixture[str]) -> None:
    plain = keys_pb2.Key(name="keys/k/versions/0", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=256)
    show_key(plain, {"as_json": True}, "", "mhsm key list")
    assert "release_policy" not in json.loads(capsys.readouterr().out)
