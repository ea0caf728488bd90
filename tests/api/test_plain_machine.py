"""What differs from a plain machine: small programs run in a session and outside, as an ordinary user.

What `docs/languages.md` lists differs, and nothing else that is compared. A difference that is gone fails too, so that
the list stays true.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.api.plain_interpreter import PLAIN_ENVIRONMENT, python
from tests.conftest import MakeSession, Run
from tests.table import table

NOBODY = 65_534
DOCUMENT = Path(__file__).parents[2] / "docs" / "languages.md"

TRIED = """
def tried(function, *given, **more):
    try:
        function(*given, **more)
        return 'done'
    except OSError as error:
        import errno
        return errno.errorcode[error.errno]
"""
SAME = {
    "names of services": "import socket; print(socket.getservbyname('https'), socket.getservbyname('domain', 'udp'))",
    "numbers of services": "import socket; print(socket.getservbyport(22), socket.getservbyport(5432))",
    "names of protocols": "import socket; print([socket.getprotobyname(name) for name in ('icmp', 'tcp', 'udp')])",
    "files given away": """
import os
open('own', 'w').close()
print([tried(call, 'own', 0, 0) for call in (os.chown, os.lchown)], tried(os.chown, 'own', 12, -1),
      tried(os.chown, 'own', -1, 34), tried(os.chown, 'own', os.getuid(), os.getgid()), tried(os.chown, 'own', -1, -1))
""",
    "what an ordinary user may not": """
import os, time
print(tried(os.nice, -1), tried(time.clock_settime, 0, 1.0), tried(os.mknod, 'device', 0o020600, os.makedev(1, 3)),
      tried(os.chroot, '.'), tried(os.setpriority, os.PRIO_PROCESS, 0, -5), tried(os.sched_setscheduler, 0,
      os.SCHED_FIFO, os.sched_param(1)))
""",
    "kinds of files": """
import os, socket, stat
os.mkfifo('pipe'); os.symlink('pipe', 'link'); open('file', 'w').close(); os.link('file', 'again')
socket.socket(socket.AF_UNIX).bind('socket')
print({name: oct(stat.S_IFMT(os.lstat(name).st_mode)) for name in ('pipe', 'link', 'file', 'again', 'socket')})
print(os.stat('file').st_nlink, oct(os.stat('pipe').st_mode & 0o777))
""",
    "processes": """
import multiprocessing, os, signal, subprocess
print(subprocess.run('exit 3', shell=True).returncode, subprocess.run(['sh', '-c', 'kill -9 $$']).returncode)
with multiprocessing.get_context('fork').Pool(2) as pool: print(pool.map(abs, [-1, 2]), os.getpgid(0) == os.getpid())
print(tried(os.kill, 99999999, 0), signal.getsignal(signal.SIGTERM))
""",
    "sockets": """
import socket
server = socket.create_server(('127.0.0.1', 0)); client = socket.create_connection(server.getsockname())
client.send(b'x'); print(server.accept()[0].recv(1), socket.gethostbyname('localhost'), socket.has_dualstack_ipv6())
""",
    "text and time": "import locale, time; print(locale.getpreferredencoding(), time.tzname, time.timezone)",
    "the machine's size": "import os; print(os.cpu_count(), open('/proc/meminfo').readline())",
    "databases and archives": """
import sqlite3, zipfile, lzma, bz2, zlib, ssl
print(sqlite3.connect(':memory:').execute('select 1').fetchall(), zlib.crc32(b'a'), ssl.OPENSSL_VERSION)
""",
}  # fmt: skip
"""Programs that print the same inside and outside."""

DIFFERENT = {
    "Users": "import os; print(tried(os.setuid, 0))",
    "The user's name": "import os, pwd; print(pwd.getpwuid(os.getuid()).pw_name)",
    "Files of the system": "import os; print(tried(os.mkdir, '/usr/era-test'))",
    "`/etc`": "import os; print(sorted(os.listdir('/etc')))",
    "`/tmp` and `/dev/shm`": "import os; print(os.statvfs('/tmp').f_blocks * os.statvfs('/tmp').f_frsize)",
    "Devices": "import os; print(sorted(os.listdir('/dev')))",
    "Set-user-ID bits": "import os; open('own', 'w').close(); print(tried(os.chmod, 'own', 0o4755))",
    "Processes": "import os; print(sum(name.isdigit() for name in os.listdir('/proc')) < 10)",
    "Tracing": "import ctypes; print(ctypes.CDLL(None).ptrace(0, 0, 0, 0))",
    "Namespaces": "import os; print(tried(os.unshare, os.CLONE_NEWUTS | os.CLONE_NEWUSER))",
    "Kinds of sockets": "import socket; print(tried(socket.socket, socket.AF_PACKET, socket.SOCK_RAW))",
    "The host's name": "import socket; print(socket.gethostname())",
    "Open files and core dumps": "from resource import *; print(getrlimit(RLIMIT_NOFILE), getrlimit(RLIMIT_CORE))",
    "The size of a file": "from resource import *; print(getrlimit(RLIMIT_FSIZE))",
    "Limits of other processes": "import os, resource; print(tried(resource.prlimit, os.getpid(), resource.RLIMIT_AS))",
    "Python's prefix": "import sys; print(sys.prefix)",
}
"""Programs that print something else inside, by the words with which the document's list begins an entry."""


def inside(run: Run, where: str, code: str) -> str:
    answer = run(where, TRIED + code)
    return str(answer["stdout"]) + re.sub(r"(?s).*\n(?=\w+:)", "", str(answer["stderr"]))


def outside(directory: Path, code: str) -> str:
    """What a program prints on this machine, run by an ordinary user."""
    (directory / "main.py").write_text(TRIED + code)
    user = NOBODY if os.geteuid() == 0 else None
    if user is not None:
        os.chown(directory, user, user)
    done = subprocess.run(
        [python(), "main.py"], cwd=directory, env=PLAIN_ENVIRONMENT, user=user, group=user,
        extra_groups=None if user is None else [], capture_output=True, text=True, start_new_session=True, timeout=60,
    )  # fmt: skip
    return done.stdout + re.sub(r"(?s).*\n(?=\w+:)", "", done.stderr)


@table("name", SAME)
def test_it_is_as_on_a_plain_machine(session: MakeSession, run: Run, host_directory: Path, name: str) -> None:
    where = session(isolation="bubblewrap")
    assert inside(run, where, SAME[name]) == outside(host_directory, SAME[name])


@table("name", DIFFERENT)
def test_what_differs_is_listed(session: MakeSession, run: Run, host_directory: Path, name: str) -> None:
    where = session(isolation="bubblewrap")
    assert inside(run, where, DIFFERENT[name]) != outside(host_directory, DIFFERENT[name])
    section = DOCUMENT.read_text().partition("\n## What differs from a plain machine\n")[2].partition("\n## ")[0]
    assert f"- **{name}**" in section


def test_nothing_is_listed_that_is_not_compared() -> None:
    section = DOCUMENT.read_text().partition("\n## What differs from a plain machine\n")[2].partition("\n## ")[0]
    assert re.findall(r"(?m)^- \*\*(.*?)\*\*", section) == list(DIFFERENT)
