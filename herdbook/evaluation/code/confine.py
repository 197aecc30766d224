"""Run one Python program where it can reach nothing. A script of its own, started by `sandbox.py`:
standard library alone, Linux alone.

What the program gets, by the kernel's namespaces (namespaces(7), pivot_root(2), mount_setattr(2)):

- files: Python's own and the system's libraries, read-only, and an empty /tmp in memory of a few
  megabytes; no home, no /proc, no /sys, no devices but null, zero and urandom;
- network: none, not even a loopback that is up; no sockets, pipes or shared memory of others;
- processes: its own alone; when its first one ends, or the caller does, the kernel ends them all;
- rights: nobody's, and no way to more (no_new_privs); on x86-64 and 64-bit ARM the calls that make
  namespaces, mount, trace or program the kernel are denied too (seccomp(2));
- limits (setrlimit(2)) of memory, processor time, file size, open files, processes.

argv[1] is JSON: root (an empty folder to mount on), paths (shown read-only), status (a file
descriptor: "ok", or why it cannot be), command, limits.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
NEWPID, NEWNET, NEWCGROUP = 0x20000000, 0x40000000, 0x2000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
#: these two have one number on every architecture but alpha
SYS_MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
READ_ONLY, NOSUID, NODEV = 1, 2, 4
NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

#: architecture → its mark in seccomp, the number of clone, and the numbers of what is denied: ptrace,
#: mount, umount2, pivot_root, chroot, unshare, setns, add_key, request_key, keyctl, bpf,
#: perf_event_open, userfaultfd, process_vm_readv, process_vm_writev, open_by_handle_at
DENIED = {
    "x86_64": (0xC000003E, 56, (101, 165, 166, 155, 161, 272, 308, 248, 249, 250, 321, 298, 323, 310,
                                311, 304)),
    "aarch64": (0xC00000B7, 220, (117, 40, 39, 41, 51, 97, 268, 217, 218, 219, 280, 241, 282, 270,
                                  271, 265)),
}  # fmt: skip
#: io_uring_setup, open_tree, move_mount, fsopen, fsconfig, fsmount, mount_setattr: alike everywhere
DENIED_ALIKE = (425, 428, 429, 430, 431, 432, 442)
CLONE3 = 435
#: the number of socket, and the families that are bound to a network namespace: unix, inet, inet6 (vsock
#: and others may reach a host)
SOCKET, FAMILIES = {"x86_64": 41, "aarch64": 198}, (1, 2, 10)
PR_SET_SECCOMP, SECCOMP_FILTER = 22, 2

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """A function of the C library; -1 raises."""
    if getattr(libc, name)(*arguments) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    call("mount", *texts, ctypes.c_ulong(flags), data.encode())


def restrict(path: str, attributes: int, deep: int = 0) -> None:
    """Set attributes of a mount, and of all below it."""
    change = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    where = ctypes.c_char_p(path.encode())
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, where, deep, change, ctypes.sizeof(change))


def show(path: str, root: str, attributes: int) -> None:
    """A file or folder at its own place under the new root."""
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(path, target, None, MS_BIND | MS_REC)
    restrict(target, attributes, AT_RECURSIVE)


def shut_in(root: str, paths: list[str], disk: int) -> None:
    """Into new namespaces, with a new root in memory. Root needs no user namespace to mount; it
    becomes nobody afterwards, in one, so that its processes are counted apart from others'."""
    spaces = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    privileged = os.geteuid() == 0
    if privileged:
        call("unshare", spaces)
    else:
        user, group = os.geteuid(), os.getegid()
        call("unshare", spaces | NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    os.umask(0o022)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1024,mode=755")
    for path in paths:
        show(path, root, READ_ONLY | NOSUID | NODEV)
    for path in DEVICES:
        show(path, root, NOSUID)
    os.makedirs(root + "/tmp", exist_ok=True)
    mount(
        "tmpfs",
        root + "/tmp",
        "tmpfs",
        MS_NOSUID | MS_NODEV,
        f"size={disk},nr_inodes=256,mode=1777",
    )
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    restrict("/", READ_ONLY)
    os.chdir("/tmp")
    if privileged:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("unshare", NEWUSER)


def limit(limits: dict[str, int]) -> None:
    for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC"):
        value = limits[name]
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Filter(ctypes.Structure):
    """struct sock_filter"""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class Filters(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_uint16), ("first", ctypes.POINTER(Filter)))


def deny_calls() -> None:
    """A seccomp filter, where the architecture is known; the namespaces hold without it."""
    if os.uname().machine not in DENIED:
        return
    mark, clone, numbers = DENIED[os.uname().machine]
    load, equal, over, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, missing = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    lines = [(load, 0, 0, 4), (equal, 1, 0, mark), (end, 0, 0, refuse), (load, 0, 0, 0)]
    lines += [(over, 0, 1, 1 << 30), (end, 0, 0, refuse)]  # the x32 calls of x86-64
    for number in (*numbers, *DENIED_ALIKE):
        lines += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    lines += [(equal, 0, 3 + len(FAMILIES), SOCKET[os.uname().machine]), (load, 0, 0, 16)]
    lines += [(equal, len(FAMILIES) - at, 0, one) for at, one in enumerate(FAMILIES)]
    lines += [(end, 0, 0, refuse), (end, 0, 0, allow)]
    # clone3 keeps its flags in memory, where a filter cannot look: without it clone is taken
    lines += [(equal, 0, 1, CLONE3), (end, 0, 0, missing), (equal, 1, 0, clone), (end, 0, 0, allow)]
    spaces = NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | NEWCGROUP
    lines += [(load, 0, 0, 16), (any_bit, 0, 1, spaces), (end, 0, 0, refuse), (end, 0, 0, allow)]
    program = (Filter * len(lines))(*(Filter(*line) for line in lines))
    call("prctl", PR_SET_SECCOMP, SECCOMP_FILTER, ctypes.byref(Filters(len(lines), program)), 0, 0)


def main() -> None:
    plan = json.loads(sys.argv[1])
    status: int = plan["status"]
    os.set_inheritable(status, False)
    try:
        shut_in(plan["root"], plan["paths"], plan["limits"]["disk"])
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        first = os.fork()
    except OSError as error:
        os.write(status, (error.strerror or str(error)).encode())
        os._exit(125)
    if first:  # the caller kills this one; its death is the others'
        os.closerange(0, 1024)
        os.waitpid(first, 0)
        os._exit(0)
    # The namespace's process 1, which nobody inside can kill or read: the program's end is all its
    # children's end.
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    call("prctl", PR_SET_DUMPABLE, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    program = os.fork()
    if program == 0:
        try:
            limit(plan["limits"])
            deny_calls()
            os.write(status, b"ok")
            os.execve(plan["command"][0], plan["command"], plan["environment"])
        except OSError as error:
            os.write(status, (error.strerror or str(error)).encode())
        os._exit(125)
    os.closerange(0, 1024)
    while os.wait()[0] != program:
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
