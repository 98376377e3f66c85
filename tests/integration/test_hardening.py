"""G3, G5: what the processes of a real pool are hardened with, as status says and as it is from outside."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.fabric_access import mhsm_fabric
from tests.kernel import has_memfd_secret, needs_bubblewrap, needs_landlock, needs_root, needs_seccomp
from tests.running_pool import RunningPool, mhsm, until

pytestmark = pytest.mark.pool

FROM_THE_START = ["no_core_files", "not_dumpable", "no_new_privileges"]


def status(pool: RunningPool) -> dict:
    return json.loads(mhsm("status", "--data-dir", str(pool.directory), "--json").stdout)


def threads(process_id: int) -> list[dict[str, str]]:
    """Return the kernel's status of each thread of a process."""
    found = []
    for file in Path(f"/proc/{process_id}/task").glob("*/status"):
        pairs = (line.split(":", 1) for line in file.read_text().splitlines())
        found.append({name: value.strip() for name, value in pairs})
    return found


def test_status_says_what_partitions_are_hardened_with(pool: RunningPool) -> None:
    for row in status(pool)["partitions"]:
        assert row["hardening"][:3] == FROM_THE_START
        assert row["ceremony_child_hardening"] == []
        process_id = pool.process_id(row["index"], "partition")
        assert process_id
        assert {thread["NoNewPrivs"] for thread in threads(process_id)} == {"1"}
    until(lambda: status(pool)["fabric_controller"]["hardening"], 30, "the controller says it")
    text = mhsm("status", "--data-dir", str(pool.directory)).stdout
    for who in ("partition 0, 1, 2", "node agent 0, 1, 2", "fabric controller"):
        assert f"{who}: hardened with no core files, not dumpable, no new privileges" in text


def core_file_limits(process_id: int) -> list[str]:
    """Return the soft and the hard limit of core files, as the kernel has them."""
    lines = Path(f"/proc/{process_id}/limits").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Max core file size"))
    return line.split()[4:6]


def is_dumpable(process_id: int) -> bool:
    """Return whether what /proc keeps of a process belongs to its user: else to root (proc(5))."""
    user_id = int(threads(process_id)[0]["Uid"].split()[1])
    return user_id == Path(f"/proc/{process_id}/environ").stat().st_uid


def test_long_lived_secrets_lie_where_status_says(pool: RunningPool) -> None:
    """G3: in memfd_secret memory where the kernel has it, else in locked pages; as its own map shows."""
    kind = "memfd_secret" if has_memfd_secret() else "mlock"
    for row in status(pool)["partitions"]:
        assert row["secret_memory"] == kind
        process_id = row["process_ids"]["partition"]
        if kind == "mlock":
            assert threads(process_id)[0]["VmLck"] != "0 kB"
        elif os.geteuid() == 0:  # it is not dumpable: nobody else may even see its map
            assert "/secretmem" in Path(f"/proc/{process_id}/maps").read_text()


def test_controller_and_agents_write_no_core_files_and_are_not_dumpable(pool: RunningPool) -> None:
    """G3, G5: as they say in the status, and as the kernel has it; a store member is the control."""
    until(lambda: status(pool)["fabric_controller"]["hardening"], 30, "the controller says it")
    said, connection = status(pool), pool.connection
    hardened = [(connection.fabric_controller["process_id"], said["fabric_controller"]["hardening"])]
    for row in said["partitions"]:
        hardened.append((row["process_ids"]["node_agent"], row["node_agent_hardening"]))
        hardened.append((row["process_ids"]["partition"], row["hardening"]))
    assert len(hardened) == 7
    for process_id, measures in hardened:
        assert measures[:3] == FROM_THE_START
        assert core_file_limits(process_id) == ["0", "0"]
        assert {thread["NoNewPrivs"] for thread in threads(process_id)} == {"1"}
        if said["users"]["separated"] or os.geteuid():  # of root's own processes all belongs to root
            assert not is_dumpable(process_id), process_id
    store_member = connection.partitions[0].process_ids["store_member"]
    assert store_member
    assert core_file_limits(store_member) == ["0", "0"], "inherited from its node agent"
    assert is_dumpable(store_member), "nobody told it not to be"


CONFINED = """
import json, os, pathlib, socket, sys
from fabric_controller import settings
from fabric_controller.hardening import harden, in_force
directory, partition, client_port, enclave_port = sys.argv[1], *map(int, sys.argv[2:])
loaded = settings.load(pathlib.Path(directory, "fabric", "fabric.json"))
if os.environ["CONFINE"] == "yes":
    harden(loaded)
    assert "landlock" in in_force()
node = pathlib.Path(directory, "nodes", "0")
reached = {}
for name, reach in {
    "head": lambda: (node / "partition" / "head").read_bytes(),
    "sealing key": lambda: (node / "platform" / "sealing.key").read_bytes(),
    "nodes": lambda: list(node.iterdir()),
    "memory": lambda: open(f"/proc/{partition}/mem", "rb"),
    "signal": lambda: os.kill(partition, 0),
    "client plane": lambda: socket.create_connection(("127.0.0.1", client_port)).close(),
    "enclave interface": lambda: socket.create_connection(("127.0.0.1", enclave_port)).close(),
    "journal": lambda: open(pathlib.Path(directory, "fabric", "journal"), "ab").close(),
    "key": lambda: pathlib.Path(directory, "fabric", "controller.key").read_bytes(),
}.items():
    try:
        reach()
        reached[name] = True
    except PermissionError:
        reached[name] = False
print(json.dumps(reached))
"""
FORBIDDEN = ("head", "sealing key", "nodes", "memory", "signal", "client plane")
TAKEN = pwd.getpwnam("nobody").pw_uid
NEEDED = ("enclave interface", "journal", "key")


@needs_landlock
def test_the_controller_reaches_its_own_files_and_the_enclave_interface_only(pool: RunningPool) -> None:
    """G3, G5: what is confined as the controller is, as root, too; unconfined it is the positive control."""
    said = until(lambda: status(pool)["fabric_controller"]["hardening"], 30, "the controller says it")
    assert "landlock" in said
    entry = pool.connection.partitions[0]
    ports = [entry.endpoint.rpartition(":")[2], entry.enclave_endpoint.rpartition(":")[2]]
    reached = {}
    for confine in ("yes", "no"):
        completed = subprocess.run(
            [
                sys.executable,
                "-c",
                CONFINED,
                str(pool.directory),
                str(entry.process_ids["partition"]),
                *ports,
            ],
            env={**os.environ, "CONFINE": confine},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        reached[confine] = json.loads(completed.stdout)
    if os.getuid() == 0:
        assert reached["no"] == dict.fromkeys((*FORBIDDEN, *NEEDED), True)
    assert reached["yes"] == dict.fromkeys(FORBIDDEN, False) | dict.fromkeys(NEEDED, True)


CONFINED_IN_A_NODE = """
import json, os, pathlib, socket, subprocess, sys
from hsm_pool import settings
from hsm_pool.enclave import confinement
kind, directory, process_id, confine, *numbers = sys.argv[1:]
enclave_port, own_port, peer_port = map(int, numbers)
pool = pathlib.Path(directory)
node, other = pool / "nodes" / "0", pool / "nodes" / "1"
partition = settings.load(settings.PartitionSettings, node / "partition.json")
agent = settings.load(settings.NodeSettings, node / "node.json")
if confine == "yes":
    if kind == "partition":
        assert confinement.confine_partition(partition)
    else:
        assert confinement.confine_agent(agent, partition)
    assert confinement.in_force()

def bind(port):
    with socket.socket() as listening:
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            if isinstance(error, PermissionError):
                raise

def touch(path):
    path.write_bytes(b"")
    path.unlink()

reached = {}
for name, reach in {
    "another node": lambda: (other / "platform" / "sealing.key").read_bytes(),
    "controller": lambda: (pool / "fabric" / "controller.key").read_bytes(),
    "clients": lambda: (pool / "clients" / "administrator.key").read_bytes(),
    "accounts": lambda: open("/etc/shadow", "rb").close(),
    "new file": lambda: touch(pool / "nodes" / "new"),
    "settings": lambda: (node / "partition.json").open("ab").close(),
    "enclave interface": lambda: socket.create_connection(("127.0.0.1", enclave_port)).close(),
    "signal": lambda: os.kill(int(process_id), 0),
    "bind": lambda: bind(0),
    "store": lambda: list((node / "store").iterdir()),
    "own file": lambda: touch(node / "partition" / "new"),
    "own key": lambda: (node / "platform" / "sealing.key").read_bytes(),
    "own port": lambda: bind(own_port),
    "peer": lambda: socket.create_connection(("127.0.0.1", peer_port)).close(),
    "child": lambda: subprocess.run([sys.executable, "-c", "import hsm_pool.ceremony.child"], check=True),
}.items():
    try:
        reach()
        reached[name] = True
    except PermissionError:
        reached[name] = False
print(json.dumps(reached))
"""
CLOSED = (
    "another node",
    "controller",
    "clients",
    "accounts",
    "new file",
    "enclave interface",
    "signal",
    "bind",
)
OPEN = ("own file", "own key", "own port", "peer", "child")


@needs_landlock
@pytest.mark.parametrize(
    ("kind", "closed", "open_"),
    [
        ("partition", (*CLOSED, "settings", "store"), OPEN),
        ("node_agent", CLOSED, (*OPEN, "settings", "store")),
    ],
)
def test_a_node_reaches_its_own_files_and_ports_only(
    pool: RunningPool, kind: str, closed: tuple[str, ...], open_: tuple[str, ...]
) -> None:
    """G3: confined as a partition or an agent is, also as root; unconfined it is the positive control."""
    field = "hardening" if kind == "partition" else "node_agent_hardening"
    assert all("landlock" in row[field] for row in status(pool)["partitions"])
    own, peer = pool.connection.partitions[:2]
    ports = [
        endpoint.rpartition(":")[2] for endpoint in (own.enclave_endpoint, own.endpoint, peer.peer_endpoint)
    ]
    reached = {}
    for confine in ("yes", "no"):
        completed = subprocess.run(
            [
                *(sys.executable, "-c", CONFINED_IN_A_NODE, kind, str(pool.directory)),
                *(str(own.process_ids["node_agent"]), confine, *ports),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert completed.returncode == 0, completed.stderr
        reached[confine] = json.loads(completed.stdout)
    if os.getuid() == 0:
        assert reached["no"] == dict.fromkeys((*closed, *open_), True)
    assert reached["yes"] == dict.fromkeys(closed, False) | dict.fromkeys(open_, True)


@needs_seccomp
def test_a_filter_holds_for_every_thread_of_partitions_agents_and_controller(pool: RunningPool) -> None:
    """G3, G5: each has one of its own; a partition's is on top of that of its node agent."""
    until(lambda: status(pool)["fabric_controller"]["hardening"], 30, "the controller says it")
    said = status(pool)

    def filters(process_id: int, threads_min: int) -> int:
        found = threads(process_id)
        assert len(found) >= threads_min
        assert {thread["Seccomp"] for thread in found} == {"2"}
        (count,) = {int(thread["Seccomp_filters"]) for thread in found}
        return count

    outside = threads(os.getpid())[0]  # a container may have a filter for all its processes
    before = int(outside["Seccomp_filters"])
    for row in said["partitions"]:
        assert "system_call_filter" in row["hardening"]
        assert "system_call_filter" in row["node_agent_hardening"]
        process_ids = row["process_ids"]
        assert filters(process_ids["node_agent"], 1) == before + 1
        assert filters(process_ids["store_member"], 1) == before + 1
        assert filters(process_ids["partition"], 11) == before + 2
    assert "system_call_filter" in said["fabric_controller"]["hardening"]
    assert filters(pool.connection.fabric_controller["process_id"], 2) == before + 1


@needs_seccomp
@needs_landlock
def test_a_ceremony_child_is_hardened_too(pool: RunningPool) -> None:
    with pool.client("administrator") as client:
        begun = client.verify_security_domain(1)
        try:
            rows = status(pool)["partitions"]
            assert rows[1]["ceremony_child_hardening"][:3] == FROM_THE_START
            assert rows[1]["ceremony_child_hardening"][3:] == ["system_call_filter", "landlock"]
        finally:
            client.cancel_ceremony(1, begun.attempt_id)
        assert status(pool)["partitions"][1]["ceremony_child_hardening"] == []


LOOKING = """
import json, os, pathlib, sys
directory, *process_ids = sys.argv[1:]
readable, writable, signalled = [], [], []
for name in sys.stdin.read().split("\\0"):
    path = pathlib.Path(directory, name)
    try:
        list(path.iterdir()) if path.is_dir() else path.open("rb").close()
        readable.append(name)
    except PermissionError:
        pass
    if os.access(path, os.W_OK):
        writable.append(name)
for process_id in process_ids:
    try:
        os.kill(int(process_id), 0)
        signalled.append(int(process_id))
    except PermissionError:
        pass
print(json.dumps({"readable": readable, "writable": writable, "signalled": signalled}))
"""
PUBLIC = ["pki/*.crt", "policy/admission-policy.json"]
OF_PARTITION = [
    *(f"nodes/?/{name}*" for name in ("partition", "platform", "owner", "audit")),
    *(f"nodes/?/pki/{name}*" for name in ("client", "fabric", "node", "peer", "store-client")),
]
SEEN_BY = {
    "fabric_controller": ["fabric*", *PUBLIC],
    "partition": [*OF_PARTITION, *PUBLIC],
    "store_member": ["nodes/?/store*", "nodes/?/pki/store-server*", "nodes/?/pki/store-peer*", *PUBLIC],
    "node_agent": [
        *("nodes/?", "nodes/?/node.json", "nodes/?/store-member.json", "nodes/?/logs*", "nodes/?/pki/agent*"),
        *("nodes/?/partition/incarnation", "nodes/?/partition/lock", "nodes/?/partition.json", *PUBLIC),
    ],
}
"""Files and directories of a pool that each user may read at most; ``*`` matches any path."""
NEEDED_BY = {
    "fabric_controller": {"fabric/controller.key", "fabric/journal"},
    "partition": {"nodes/0/partition/head", "nodes/0/platform/sealing.key", "nodes/1/pki/peer.key"},
    "store_member": {"nodes/0/store/member", "nodes/0/pki/store-peer.key"},
    "node_agent": {"nodes/0/node.json", "nodes/0/partition/incarnation"},
}


@needs_root
def test_users_reach_only_what_is_theirs(pool: RunningPool) -> None:
    """G3, G5: every file of the pool, tried by every user; root, trying the same, is the positive control."""
    users = status(pool)["users"]
    assert users["separated"], users
    assert users["user_ids"]["supervisor"] == [0]
    connection = pool.connection
    process_ids = {
        "fabric_controller": connection.fabric_controller["process_id"],
        **connection.partitions[0].process_ids,
    }
    names = [
        str(path.relative_to(pool.directory))
        for path in pool.directory.rglob("*")
        if path.suffix not in {".new", ".tmp"}  # they come and go
    ]

    def look(user_id: int) -> dict[str, list]:
        # In the supervisor's mount namespace: from outside nobody else reaches the directory at all.
        number = str(user_id)
        become = ("setpriv", "--reuid", number, "--regid", number, "--clear-groups", "--inh-caps=-all", "--")
        completed = subprocess.run(
            [
                *("nsenter", "--target", str(connection.supervisor_process_id), "--mount", "--wd=/"),
                *(become if user_id else ()),
                *(sys.executable, "-c", LOOKING, str(pool.directory), *map(str, process_ids.values())),
            ],
            input="\0".join(names),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return json.loads(completed.stdout)

    everything = look(0)
    assert set(names) - set(everything["readable"]) == set()
    assert len(everything["signalled"]) == len(process_ids)
    for kind, allowed in SEEN_BY.items():
        (user_id,) = users["user_ids"][kind]
        seen = look(user_id)
        not_allowed = [
            name
            for name in (*seen["readable"], *seen["writable"])
            if not any(fnmatch(name, pattern) for pattern in allowed)
        ]
        assert not_allowed == [], kind
        assert NEEDED_BY[kind] <= set(seen["readable"]), kind
        assert seen["signalled"] == [process_ids[kind]], kind


@needs_root
def test_root_follows_no_link_that_the_controller_has_put_down(pool: RunningPool) -> None:
    """G3, G5: neither an operator's command nor the supervisor gives, cuts or writes what it points to."""
    fabric = pool.directory / "fabric"
    target = pool.directory / "clients" / "administrator.key"
    owner, content = target.stat().st_uid, target.read_bytes()

    def unharmed() -> bool:
        return target.stat().st_uid == owner and target.read_bytes() == content

    assert fabric.stat().st_uid != owner, "the controller's directory is its own"
    for name in ("journal", "status.json"):
        aside = fabric / f"{name}.aside"
        (fabric / name).rename(aside)
        (fabric / name).symlink_to(target)
        try:
            for command in ("status", "history", "halt"):
                mhsm_fabric(pool, command)
                assert unharmed(), (name, command)
            assert mhsm("status", "--data-dir", str(pool.directory), check=False).returncode == 0
        finally:
            (fabric / name).unlink()
            aside.rename(fabric / name)
    log = fabric / "fabric-controller.log"
    log.unlink()
    log.symlink_to(target.with_name("made-by-root"))
    killed = pool.connection.fabric_controller["process_id"]
    try:
        os.kill(killed, signal.SIGKILL)
        until(lambda: pool.connection.fabric_controller["process_id"] is None, 30, "the controller's end")
        pool.await_states(["SERVING"] * 3)
        assert not target.with_name("made-by-root").exists()
    finally:
        log.unlink()
    until(lambda: pool.connection.fabric_controller["process_id"], 60, "the controller's next start")


@needs_bubblewrap
def test_the_controller_sees_no_other_process_and_no_other_file(pool: RunningPool) -> None:
    """G5: its root directory, as the kernel has it; that of the supervisor is the positive control."""

    def seen(process_id: int) -> tuple[set[str], set[str]]:
        root = Path(f"/proc/{process_id}/root")
        files = {path.name for path in (root / str(pool.directory).lstrip("/")).iterdir()}
        return files, {path.name for path in (root / "proc").iterdir() if path.name.isdecimal()}

    said = status(pool)["fabric_controller"]
    assert (said["bubblewrap"], said["bubblewrap_reason"]) == (True, "")
    assert seen(pool.connection.fabric_controller["process_id"]) == ({"fabric"}, {"1"})
    files, process_ids = seen(pool.connection.supervisor_process_id)
    assert {"fabric", "nodes", "clients"} <= files
    assert len(process_ids) > 5


def test_status_says_why_users_and_controller_are_not_separated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented fallbacks: all run as the user who started the pool, without a sandbox."""
    directory, programs = tmp_path / "data", tmp_path / "programs"
    programs.mkdir()
    for name in ("env", "setpriv", "sh"):
        (programs / name).symlink_to(shutil.which(name) or name)
    etcd = shutil.which("etcd")
    assert etcd
    (programs / "etcd").symlink_to(etcd)
    monkeypatch.setenv("PATH", str(programs))
    if os.geteuid() == 0:
        option, why = ("--first-user-id", str(TAKEN)), f"user {TAKEN} is {pwd.getpwuid(TAKEN)[0]}"
    else:
        option, why = (), "not root"
    mhsm("up", *option, "--data-dir", str(directory))
    try:
        document = json.loads(mhsm("status", "--data-dir", str(directory), "--json", check=False).stdout)
        said, controller = document["users"], document["fabric_controller"]
        assert (controller["bubblewrap"], controller["bubblewrap_reason"]) == (
            False,
            "bwrap is not installed",
        )
        assert (said["separated"], said["reason"]) == (False, why)
        assert {user_id for found in said["user_ids"].values() for user_id in found} == {os.geteuid()}
        text = mhsm("status", "--data-dir", str(directory), check=False).stdout
        assert f"users: not separated: {why}" in text
        assert "fabric controller: no bubblewrap: bwrap is not installed" in text
    finally:
        mhsm("down", "--data-dir", str(directory))
