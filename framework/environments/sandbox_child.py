"""The inside of the sandbox: a standalone script that locks itself in and becomes the program to run.

sandbox.py starts it as ``python -I sandbox_child.py '<json>'``. It takes new user, mount, process, network, IPC and
host-name namespaces, builds a root of its own from read-only binds of the interpreter and the system's libraries and a
small tmpfs on ``/tmp``, gives up every capability, limits itself, and executes the interpreter. Whatever it cannot do
ends it with status 97 and a reason on stderr: it never runs the program in a weaker sandbox.

It imports the standard library only and nothing of this package.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH, PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 2, 1, 38
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534
REFUSED = 97

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Ends the process when a system call failed."""
    if result != 0:
        refuse(f"{what}: {os.strerror(ctypes.get_errno())}")


def refuse(reason: str) -> None:
    """Says why no sandbox can be had and ends with :data:`REFUSED`."""
    os.write(2, f"sandbox refused: {reason}\n".encode())
    os._exit(REFUSED)


def enter_namespaces() -> None:
    """Forks; the child goes on in new namespaces, the parent ends with the child's status.

    This user, and nobody if this user is root, are mapped to themselves. Only a process outside may map two users.
    """
    uid, gid = os.geteuid(), os.getegid()
    wait_for_child, child_ready = os.pipe()
    wait_for_maps, maps_ready = os.pipe()
    child = os.fork()
    if child:
        os.close(child_ready)
        if os.read(wait_for_child, 1):
            extra = f"\n{NOBODY} {NOBODY} 1" if uid == 0 else ""
            if uid != 0:
                write(f"/proc/{child}/setgroups", "deny")
            write(f"/proc/{child}/uid_map", f"{uid} {uid} 1{extra}")
            write(f"/proc/{child}/gid_map", f"{gid} {gid} 1{extra}")
            os.write(maps_ready, b"x")
        end_like(child)
    os.close(maps_ready)
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    check(libc.unshare(flags), "new namespaces (user, mount, pid, net)")
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of credentials clears it
    os.write(child_ready, b"x")
    if not os.read(wait_for_maps, 1):
        os._exit(REFUSED)  # the parent has said why


def end_like(child: int) -> None:
    """Waits for a child and ends with its status, 128 + n for signal n."""
    _, status = os.waitpid(child, 0)
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def write(path: str, text: str) -> None:
    """Writes a file of /proc in one call."""
    descriptor = os.open(path, os.O_WRONLY)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    result = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    check(result, f"mounting {target}")


def build_root(readable: list[str], tmp_bytes: int) -> None:
    """A root of read-only binds and an empty ``/tmp``; the old root is gone afterwards."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    root = "/tmp"  # covered in this namespace only
    mount("sandbox", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in readable:
        bind(path, root + path)
    for name in ("null", "zero", "urandom"):
        bind(f"/dev/{name}", f"{root}/dev/{name}", remount=0)
    Path(root, "tmp").mkdir(exist_ok=True)
    mount("sandbox", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={tmp_bytes}")
    os.chdir(root)
    check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "leaving the old root")
    os.chdir("/tmp")


def bind(source: str, target: str, remount: int = MS_RDONLY | MS_NOSUID) -> None:
    """Binds a file or folder, links kept as links."""
    origin, place = Path(source), Path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    if origin.is_symlink():
        place.symlink_to(origin.readlink())
        return
    if origin.is_dir():
        place.mkdir(exist_ok=True)
    else:
        place.touch()
    mount(source, target, "", MS_BIND)
    if remount:
        # A user namespace may not drop the flags that the source is mounted with.
        kept = os.statvfs(source).f_flag & (MS_NODEV | 8)
        mount("none", target, "", MS_BIND | MS_REMOUNT | remount | kept)


def limit(limits: dict[str, int]) -> None:
    """Resource limits, soft and hard, by the names of the resource module."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def run(plan: dict[str, Any]) -> None:
    """Locks this process in and executes the program; never returns."""
    enter_namespaces()
    child = os.fork()  # the first process of the new process namespace; when it ends, all others in it are killed
    if child:
        end_like(child)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    build_root(plan["readable"], plan["tmp_bytes"])
    os.setsid()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    limit(plan["limits"])
    os.execve(plan["argv"][0], plan["argv"], {"HOME": "/tmp", "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"})


if __name__ == "__main__":
    try:
        run(json.loads(sys.argv[1]))
    except (OSError, ValueError, KeyError) as failure:
        refuse(f"{type(failure).__name__}: {failure}")
