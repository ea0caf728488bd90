"""The helper that reads and changes the files of a live session, from inside its sandbox.

Theory of operation
===================

*With the session's own rights.* It is a process of the session's like any other: its uid, its Landlock domain, its
limits. So no path of hostile code's making is ever walked with rights that the code itself hasn't got. Whatever it is
tricked into, it does what the session's programs may do.

*Nowhere else.* All the same it leads only to the working directory: a path is opened one name at a time, each from its
directory's descriptor, never through a link, and never waiting (pipes and devices are refused by what they are).

*A request is small.* Files are read and written a piece at a time, through a handle, so many callers can have files
under way, and none waits for another's file. What is one piece is written in one request. Only a digest takes longer,
of DIGEST_BYTES at most.

*A file appears as a whole.* It is written under a name of its own beside its place, and renamed.

*The state file* of cells is read and written here, too, as the supervisor of runs does it between runs (workspace.py).

Wire format, on the channel, both ways: the lengths of a head and of a body (4 bytes each), the head as JSON, the body.
A request's head has `op`, its arguments and `id`, which the answer has, too. An answer has `error` (a word) where the
request failed. Names are text, in which bytes that aren't UTF-8 are lone surrogates.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat

from workspace import STATE_FILE, read_exactly, read_state, write_all, write_file

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    type Parts = list[str]

DIGEST_BYTES = 16 << 20
PIECE = 1 << 18
PAGE_DIGEST_BYTES = 64 << 20
MOST_HANDLES = 256
MOST_DEPTH = 200
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Refused(Exception):
    """A request can't be done; its text is the word that says why."""


def native(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def is_draft(name: str) -> bool:
    """Whether a file of this name is a new one that hasn't got its place yet."""
    return len(name) == 29 and name.startswith(".era-") and not name[5:].strip("0123456789abcdef")


def portable(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class Files:
    """The working directory, and the files that are open for callers."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.workspace = os.getcwd()
        self.handles: dict[int, int] = {}
        self.drafts: dict[int, tuple[int, bytes]] = {}
        """By handle: the directory that a new file will be in, and its present name."""

        self.next = 0

    # -- requests: each returns the head and the body of its answer ----------------------------------------------

    def stat(self, path: Parts) -> tuple[dict[str, Any], bytes]:
        with Parent(self.root, path) as parent:
            return self.entry(parent.fd, parent.name, digest=True), b""

    def list(self, after: Parts, prefix: Parts, limit: int, directories: bool) -> tuple[dict[str, Any], bytes]:
        """A page of the files of the whole tree, with the totals of all."""
        found: list[dict[str, Any]] = []
        count = total = 0
        behind, room = list(map(native, after)), PAGE_DIGEST_BYTES
        for path, parent, name in self.walk(self.root, []):
            try:
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            except OSError:
                continue  # it is gone by now
            kind = _kind(status.st_mode)
            if kind == "other":
                continue
            if kind != "dir":
                count += 1
                total += status.st_size
            elif not directories:
                continue
            if len(found) < limit and _begins(path, prefix) and list(map(native, path)) > behind:
                wanted = kind == "file" and status.st_size <= room
                try:
                    found.append({"path": path, **self.entry(parent, name, digest=wanted)})
                except (OSError, Refused):
                    continue
                room -= status.st_size if wanted else 0
        return {"count": count, "bytes": total}, json.dumps(found).encode()

    def open(self, path: Parts) -> tuple[dict[str, Any], bytes]:
        """Open a file for reading; the answer has a handle."""
        self.check_room()
        with Parent(self.root, path) as parent:
            fd = _opened(parent.fd, parent.name)
        try:
            status = os.fstat(fd)
            head = {**_shown(status), "etag": self.digest(fd, status)}
        except BaseException:
            os.close(fd)
            raise
        return {**head, "handle": self.add(fd)}, b""

    def read(self, handle: int, at: int, size: int) -> tuple[dict[str, Any], bytes]:
        return {}, os.pread(self.handles[handle], min(size, PIECE), at)

    def close(self, handle: int) -> tuple[dict[str, Any], bytes]:
        """Close a handle. A new file that didn't get its place is gone."""
        os.close(self.handles.pop(handle))
        if (draft := self.drafts.pop(handle, None)) is not None:
            directory, name = draft
            try:
                os.unlink(name, dir_fd=directory)
            except OSError:
                pass
            os.close(directory)
        return {}, b""

    def create(self, path: Parts) -> tuple[dict[str, Any], bytes]:
        """Begin a new file, which will be at `path`. Directories on the way are made."""
        self.check_room()  # before there is a file that nobody would remove
        with Parent(self.root, path, make=True) as parent:
            try:
                kind = os.stat(parent.name, dir_fd=parent.fd, follow_symlinks=False).st_mode
                if not stat.S_ISREG(kind):
                    raise Refused(_kind(kind))
            except FileNotFoundError:
                pass
            name = b".era-%s" % os.urandom(12).hex().encode()
            directory = os.dup(parent.fd)
            try:
                fd = os.open(name, _NEW, 0o600, dir_fd=directory)
            except BaseException:
                os.close(directory)
                raise
            handle = self.add(fd)
            self.drafts[handle] = (directory, name)
        return {"handle": handle}, b""

    def write(self, handle: int, at: int, body: bytes) -> tuple[dict[str, Any], bytes]:
        written = 0
        while written < len(body):
            written += os.pwrite(self.handles[handle], body[written:], at + written)
        return {}, b""

    def place(self, handle: int, name: str, mode: int | None, mtime_ns: int) -> tuple[dict[str, Any], bytes]:
        """Give a new file its place, and end its handle. What is there keeps its mode where none is given."""
        fd, (directory, draft) = self.handles[handle], self.drafts[handle]
        target = native(name)
        try:
            before = os.stat(target, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISREG(before.st_mode):
                raise Refused(_kind(before.st_mode))
            kept = stat.S_IMODE(before.st_mode) & 0o777
        except FileNotFoundError:
            kept = 0o644
        os.fchmod(fd, kept if mode is None else mode)
        os.utime(fd, ns=(mtime_ns, mtime_ns))
        os.rename(draft, target, src_dir_fd=directory, dst_dir_fd=directory)
        self.drafts.pop(handle)
        os.close(directory)
        status = os.fstat(fd)
        self.handles.pop(handle)
        os.close(fd)
        return _shown(status), b""

    def put(self, path: Parts, mode: int | None, mtime_ns: int, body: bytes) -> tuple[dict[str, Any], bytes]:
        """A whole new file in one request."""
        handle = self.create(path)[0]["handle"]
        try:
            self.write(handle, 0, body)
            return self.place(handle, path[-1], mode, mtime_ns)
        except BaseException:
            self.close(handle)
            raise

    def mkdir(self, path: Parts, mode: int | None) -> tuple[dict[str, Any], bytes]:
        with Parent(self.root, path, make=True) as parent:
            try:
                os.mkdir(parent.name, 0o755, dir_fd=parent.fd)
            except FileExistsError:
                kind = os.stat(parent.name, dir_fd=parent.fd, follow_symlinks=False).st_mode
                if not stat.S_ISDIR(kind):
                    raise Refused(_kind(kind)) from None
                return {"created": False}, b""
            if mode is not None:
                fd = os.open(parent.name, DIRECTORY, dir_fd=parent.fd)
                try:
                    os.fchmod(fd, mode)
                finally:
                    os.close(fd)
        return {"created": True}, b""

    def move(self, source: Parts, target: Parts, replace: bool) -> tuple[dict[str, Any], bytes]:
        with Parent(self.root, source) as old:
            kind = os.stat(old.name, dir_fd=old.fd, follow_symlinks=False).st_mode
            if source == target:
                return {}, b""
            with Parent(self.root, target, make=True) as new:
                try:
                    there = os.stat(new.name, dir_fd=new.fd, follow_symlinks=False).st_mode
                    if not replace or stat.S_ISDIR(there) or stat.S_ISDIR(kind):
                        raise Refused("exists")
                except FileNotFoundError:
                    pass
                os.rename(old.name, new.name, src_dir_fd=old.fd, dst_dir_fd=new.fd)
        return {}, b""

    def delete(self, path: Parts, recursive: bool) -> tuple[dict[str, Any], bytes]:
        with Parent(self.root, path) as parent:
            kind = os.stat(parent.name, dir_fd=parent.fd, follow_symlinks=False).st_mode
            if stat.S_ISDIR(kind) and not recursive:
                raise Refused("dir")
            _remove(parent.fd, parent.name, 0)
        return {}, b""

    def read_state(self, limit: int) -> tuple[dict[str, Any], bytes]:
        """The state file, or why it can't be used, as the end of a sentence."""
        content, problem = read_state(limit)
        return {"problem": problem, "missing": content is None}, content or b""

    def write_state(self, body: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            os.chmod(self.workspace, 0o755)  # by its path: "." can't be found once a program has closed it to itself
            write_file(STATE_FILE, body)
        except OSError as problem:
            return {"problem": f"can't be written: {problem.strerror}"}, b""
        return {}, b""

    # -- what they share ------------------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Raises Refused where another handle would be too many."""
        if len(self.handles) >= MOST_HANDLES:
            raise Refused("busy")

    def add(self, fd: int) -> int:
        self.next += 1
        self.handles[self.next] = fd
        return self.next

    def entry(self, parent: int, name: bytes, *, digest: bool) -> dict[str, Any]:
        """What is known of one entry."""
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        shown = _shown(status)
        if stat.S_ISLNK(status.st_mode):
            return {**shown, "link": portable(os.readlink(name, dir_fd=parent))}
        if not digest or not stat.S_ISREG(status.st_mode):
            return shown
        try:
            fd = _opened(parent, name)
        except PermissionError:
            return shown
        try:
            return {**shown, "etag": self.digest(fd, status)}
        finally:
            os.close(fd)

    def digest(self, fd: int, status: os.stat_result) -> str | None:
        """The digest of a file's content, None for one that is large."""
        if status.st_size > DIGEST_BYTES:
            return None
        hasher, at = hashlib.sha256(), 0
        while at < status.st_size and (piece := os.pread(fd, min(PIECE, status.st_size - at), at)):
            hasher.update(piece)
            at += len(piece)
        return hasher.hexdigest()

    def walk(self, fd: int, path: Parts) -> Iterator[tuple[Parts, int, bytes]]:
        """Every name below a directory, in order, with the descriptor of the directory it is in."""
        if len(path) > MOST_DEPTH:
            return
        try:
            with os.scandir(fd) as entries:
                names = sorted((os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError:
            return
        drafts = {draft for _, draft in self.drafts.values()}
        for name, is_directory in names:
            if (not path and name == native(STATE_FILE)) or name in drafts:
                continue
            here = [*path, portable(name)]
            yield here, fd, name
            if not is_directory:
                continue
            try:
                child = os.open(name, DIRECTORY | os.O_NONBLOCK, dir_fd=fd)
            except OSError:
                continue  # it isn't one any more, or is closed to us
            try:
                yield from self.walk(child, here)
            finally:
                os.close(child)


class Parent:
    """The directory that a path's last name is in, open within the block. Raises Refused, OSError."""

    def __init__(self, root: int, path: Parts, *, make: bool = False) -> None:
        *directories, name = map(native, path)
        if not name or any(
            each in (b"", b".", b"..") or b"/" in each or b"\0" in each for each in (*directories, name)
        ):
            raise Refused("path")
        self.name = name
        self.fd = os.dup(root)
        for each in directories:
            try:
                child = self._opened(each, make=make)
            except BaseException:
                os.close(self.fd)
                raise
            os.close(self.fd)
            self.fd = child

    def _opened(self, name: bytes, *, make: bool) -> int:
        try:
            return os.open(name, DIRECTORY, dir_fd=self.fd)
        except FileNotFoundError:
            if not make:
                raise
            try:
                os.mkdir(name, 0o755, dir_fd=self.fd)
            except FileExistsError:
                pass
            return os.open(name, DIRECTORY, dir_fd=self.fd)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            kind = os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode
            raise Refused(_kind(kind)) from None

    def __enter__(self) -> Parent:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def _opened(parent: int, name: bytes) -> int:
    """Open a regular file for reading. Raises Refused for anything else."""
    kind = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    if not stat.S_ISREG(kind):
        raise Refused(_kind(kind))
    fd = os.open(name, _FILE, dir_fd=parent)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Refused("other")
    return fd


def _shown(status: os.stat_result) -> dict[str, Any]:
    return {
        "type": _kind(status.st_mode),
        "size": status.st_size if not stat.S_ISDIR(status.st_mode) else 0,
        "mode": stat.S_IMODE(status.st_mode) & 0o777,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "dir"
    return "link" if stat.S_ISLNK(mode) else "other"


def _begins(path: Parts, prefix: Parts) -> bool:
    """Whether a path begins with a prefix, whose last part may be the beginning of a name."""
    *whole, last = prefix or [""]
    return path[: len(whole)] == whole and len(path) > len(whole) and path[len(whole)].startswith(last)


def _remove(parent: int, name: bytes, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise Refused("depth")
    try:
        os.unlink(name, dir_fd=parent)
        return
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
    fd = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        for child in map(os.fsencode, os.listdir(fd)):
            _remove(fd, child, depth + 1)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def serve(channel: int) -> None:
    """Answer requests until the host hangs up."""
    files = Files(os.open(".", DIRECTORY))
    os.umask(0o022)
    while True:
        lengths = read_exactly(channel, 8)
        if lengths is None:
            return
        head = read_exactly(channel, int.from_bytes(lengths[:4], "big"))
        body = read_exactly(channel, int.from_bytes(lengths[4:], "big"))
        if head is None or body is None:
            return
        request = json.loads(head)
        number, op = request.pop("id"), request.pop("op")
        if op in ("write", "put", "write_state"):
            request["body"] = body
        try:
            answer, content = getattr(files, op)(**request)
        except Refused as refused:
            answer, content = {"error": str(refused)}, b""
        except OSError as problem:
            answer, content = {"error": errno.errorcode.get(problem.errno or 0, "EIO")}, b""
        text = json.dumps({**answer, "id": number}).encode()
        write_all(channel, len(text).to_bytes(4, "big") + len(content).to_bytes(4, "big") + text + content)
