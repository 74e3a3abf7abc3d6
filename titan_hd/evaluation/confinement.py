"""What shuts a process in: namespaces, a root of its own, limits, and no privileges. Plain system calls, Linux only.

The order of a confined run, which `supervisor.py` follows:

1. `unshare_everything` in a process that then forks: its child is number 1 of a new pid namespace, and sees no network,
   no other process and, after step 2, no other file.
2. `enter_empty_root` there: the new root holds the standard library of Python and the system's shared libraries,
   read-only, /dev/null, /dev/zero, /dev/urandom, and an empty /tmp in memory. There is no /proc.
3. `set_limits`, and in the process of the program `drop_privileges`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import sysconfig
from pathlib import Path
from typing import Any

_CLONE_NEWNS = 0x00020000
_CLONE_NEWCGROUP = 0x02000000
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
_KEYCTL_JOIN_SESSION_KEYRING = 1
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_CAPABILITY_VERSION_3 = 0x20080522

OUTSIDE_NOBODY = 65534  # the user that the program is, where the evaluation itself runs as root
INSIDE_NOBODY = 1  # that user's number inside

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    """A function of the C library that returns -1 with errno.

    Raises:
        OSError: it did.
    """
    if getattr(_libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def die_with_parent() -> None:
    """The kernel kills this process (SIGKILL) when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Descendants whose parent ended become children of this process, so that it can wait for all of them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
    """No process without CAP_SYS_PTRACE may trace this one or read its memory."""
    _prctl(_PR_SET_DUMPABLE, 0)


def unshare_everything() -> None:
    """New user, mount, pid (for children), network, IPC, host name and cgroup namespaces.

    Raises:
        OSError: the kernel refuses.
    """
    _call(
        "unshare",
        _CLONE_NEWUSER
        | _CLONE_NEWNS
        | _CLONE_NEWPID
        | _CLONE_NEWNET
        | _CLONE_NEWIPC
        | _CLONE_NEWUTS
        | _CLONE_NEWCGROUP,
    )


def map_users(pid: int) -> bool:
    """Say which users there are in the user namespace of process `pid`: 0 is this process's own user and, where it is
    root, INSIDE_NOBODY is another user of the machine, without rights. Returns whether that second user is there.

    Raises:
        OSError: the kernel refuses.
    """
    own_user, own_group = os.geteuid(), os.getegid()
    if own_user == 0:
        with contextlib.suppress(OSError):  # in a container that has no such user, or root without CAP_SETUID
            for kind in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{kind}").write_text(f"0 0 1\n{INSIDE_NOBODY} {OUTSIDE_NOBODY} 1\n")
            return True
    Path(f"/proc/{pid}/setgroups").write_text("deny")
    Path(f"/proc/{pid}/uid_map").write_text(f"0 {own_user} 1\n")
    Path(f"/proc/{pid}/gid_map").write_text(f"0 {own_group} 1\n")
    return False


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    try:
        _call("mount", *encoded, ctypes.c_ulong(flags), data.encode())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({target})") from None


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def _make_read_only(target: str) -> None:
    """The mount and those below it; on kernels before 5.12 the mount alone."""
    attributes = _MountAttributes(attr_set=_MOUNT_ATTR_RDONLY)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    try:
        _call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, ctypes.byref(attributes), size)
    except OSError:
        kept = os.statvfs(target).f_flag & (_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)  # may not be taken away
        _mount("none", target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | kept)


def library_folders() -> list[str]:
    """What Python needs for `import`: its standard library, and the shared libraries of its modules in C."""
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store"]
    return sorted({folder for folder in [*standard, *system] if os.path.isdir(folder)})


def enter_empty_root(disk_bytes: int) -> None:
    """Replace what this process sees as / ; called in mount and user namespaces of its own. Ends in the empty /tmp.

    disk_bytes: what all files in /tmp may hold together; they lie in memory.

    Raises:
        OSError: the kernel refuses.
    """
    # No namespaces inside these, which would give the program rights in them, and no System V memory, which no limit of
    # a process counts.
    for setting in ("user/max_user_namespaces", "kernel/shmmni"):
        with contextlib.suppress(OSError):  # /proc/sys is read-only in some containers; each is one lock of several
            Path(f"/proc/sys/{setting}").write_text("0")
    folders = {folder: os.path.realpath(folder) for folder in library_folders()}
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    _call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    for folder, real in folders.items():
        os.makedirs(folder, exist_ok=True)
        if not os.listdir(folder):  # else a folder above it has brought it
            _mount(f"/old{real}", folder, None, _MS_BIND | _MS_REC)
            _make_read_only(folder)
    os.makedirs("/dev")
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        Path(device).touch()
        _mount(f"/old{device}", device, None, _MS_BIND)
    os.mkdir("/tmp")
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={disk_bytes},nr_inodes=1000,mode=777")
    _call("umount2", b"/old", _MNT_DETACH)
    os.rmdir("/old")
    _mount("none", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir("/tmp")


def set_limits(seconds: float, memory: int, file_bytes: int, open_files: int) -> None:
    """rlimits of this process and of all that it starts; `seconds` and `memory` (bytes) hold for each process."""
    limits = {
        resource.RLIMIT_CPU: max(1, round(seconds)),
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, limit in limits.items():
        _set_limit(kind, limit)


def limit_processes(count: int) -> None:
    """Processes and threads of this user at the same time; Linux counts those in this user namespace alone from 5.14
    on, and before that all of the user's. Root is not limited."""
    _set_limit(resource.RLIMIT_NPROC, count)


def _set_limit(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def drop_privileges(become_nobody: bool) -> None:
    """No capabilities, now or by any program that is started later; none of the user's keys in the kernel; another user
    where there is one."""
    if number := _SYS_KEYCTL.get(os.uname().machine):
        _libc.syscall(number, _KEYCTL_JOIN_SESSION_KEYRING, None)  # fails only where there are no keyrings
    for capability in range(64):
        with contextlib.suppress(OSError):  # the kernel knows fewer than 64
            _prctl(_PR_CAPBSET_DROP, capability)
    if become_nobody:
        os.setgroups([])
        os.setresgid(INSIDE_NOBODY, INSIDE_NOBODY, INSIDE_NOBODY)
        os.setresuid(INSIDE_NOBODY, INSIDE_NOBODY, INSIDE_NOBODY)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
