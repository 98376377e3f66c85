"""Filters of system calls for the pool's processes (G3, G5), by seccomp(2).

Deny-lists of what reads or changes other processes, or the kernel, and of what the process never
needs: they hold when code of its own was broken into. A denied call fails with EPERM. A node agent
and a partition may still start programs; a filter is inherited, so it holds for the store member,
the partition and the ceremony child, too, and the last two add their own. The library is
libseccomp, by package pyseccomp.

This file stands twice, the same, in hsm_pool.enclave and in fabric_controller: the controller
imports nothing of hsm_pool, and the partitions' measurement covers hsm_pool only.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

_UNKNOWN: Final = -1
"""__NR_SCMP_ERROR of libseccomp; other negative numbers are names that this architecture lacks."""

_OTHER_PROCESSES: Final = (
    "kcmp",
    "perf_event_open",
    "pidfd_getfd",
    "process_madvise",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "userfaultfd",
)
_ROUND_THE_FILTER: Final = ("io_uring_enter", "io_uring_register", "io_uring_setup")
_NAMESPACES_AND_MOUNTS: Final = (
    "chroot",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_by_handle_at",
    "open_tree",
    "pivot_root",
    "setns",
    "umount2",
    "unshare",
)
_KERNEL: Final = (
    "acct",
    "add_key",
    "bpf",
    "clock_adjtime",
    "clock_settime",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "init_module",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "personality",
    "quotactl",
    "reboot",
    "request_key",
    "settimeofday",
    "swapoff",
    "swapon",
    "syslog",
)
PARTITION: Final = (*_OTHER_PROCESSES, *_ROUND_THE_FILTER, *_NAMESPACES_AND_MOUNTS, *_KERNEL)
"""Denied to a partition."""

NODE_AGENT: Final = PARTITION
"""Denied to a node agent and all that it starts."""

FABRIC_CONTROLLER: Final = (*PARTITION, "accept", "accept4", "execve", "execveat", "listen")
"""Denied to the fabric controller: it calls, is not called, and starts no program."""

CEREMONY_CHILD: Final = (
    *PARTITION,
    "accept",
    "accept4",
    "bind",
    "connect",
    "execve",
    "execveat",
    "listen",
    "socket",
    "socketpair",
)
"""Denied to a ceremony child: it has its pipes, and reaches nothing else."""


class FilterUnavailable(Exception):
    """This kernel or machine has no such filter; none is in force."""


def deny(names: Iterable[str]) -> None:
    """Let these calls fail in all threads, from now on; it cannot be undone.

    A name that the library or the architecture does not know is left out.

    Raises:
        FilterUnavailable: Nothing is denied.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError):  # the second says that it does not find the library
        raise FilterUnavailable("libseccomp is not installed") from None
    try:
        calls = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        # Without it, the filter holds for the thread that loads it and its children only.
        calls.set_attr(pyseccomp.Attr.CTL_TSYNC, 1)
        # Calls of another architecture would pass by their numbers there.
        calls.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
        for name in names:
            number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
            if number != _UNKNOWN:
                calls.add_rule(pyseccomp.ERRNO(errno.EPERM), number)
        calls.load()
    except OSError as error:
        raise FilterUnavailable(f"it was refused ({errno.errorcode.get(error.errno or 0)})") from None
