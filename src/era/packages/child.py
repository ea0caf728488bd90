"""Starts a tool, such as uv, npm or Python's compiler: a process that drops its privileges, then execs the tool.

Run as a script with a plan (a dict, marshalled by processes.py) on standard input; standard library only. As root it
gets a mount namespace of its own, in which the files that the tool needs lie below an open directory, since the tool's
uid can't walk into a closed data directory; then it becomes that uid. It dies with the service.
"""

import ctypes
import marshal
import os
import resource
import signal
import sys

_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2). Raises OSError."""
    texts = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    if _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def show(stage: str, binds: dict[str, str]) -> None:
    """Mount these files and directories (`binds`, by name) in the directory `stage`, for this process alone."""
    os.unshare(os.CLONE_NEWNS)
    mount("none", "/", None, _MS_REC | _MS_SLAVE)
    os.makedirs(stage, exist_ok=True)
    mount("tmpfs", stage, "tmpfs", 0, "mode=755,size=1m")
    for name, source in binds.items():
        target = f"{stage}/{name}"
        if os.path.isdir(source):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(source, target, None, _MS_BIND | _MS_REC)


def main() -> None:
    plan = marshal.load(sys.stdin.buffer)  # noqa: S302  from the service, and faster than importing json
    if plan["uid"] is not None:
        show(plan["stage"], plan["binds"])
        os.setgroups([])
        os.setresgid(plan["uid"], plan["uid"], plan["uid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != plan["parent"]:  # it died before that, perhaps before this had even begun
        os._exit(1)
    for name, value in plan["rlimits"].items():
        most = resource.getrlimit(getattr(resource, name))[1]
        bound = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(getattr(resource, name), (bound, bound))
    os.umask(0o022)
    os.chdir(plan["directory"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(3, 4096)
    os.execve(plan["command"][0], plan["command"], plan["environment"])


if __name__ == "__main__":
    main()
