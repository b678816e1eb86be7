"""Files are written whole, under a lock, and never at the cost of a file that somebody else wrote.

A file or folder that nobody may write is left alone, also where the system would let us: as root, or because a rename
needs no permission of the file. A link is never replaced and never written through.
"""

import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

OWN = ".tengrad-triton-"  # how the names of our temporary files and locks begin
LIMIT = 1 << 30  # bytes of the largest file that is read: a run of a year has less
PROBE = 4096  # bytes


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It replaces ``path`` if the block succeeds, and is deleted if it fails.

    Raises `OSError` if something else than a file that we may write is at ``path``.
    """
    check_replaceable(path)
    temporary = path.with_name(f"{OWN}{secrets.token_hex(8)}.tmp")  # no file of the user's has this name
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Delete what a process that was killed while it wrote has left in a folder."""
    for file in folder.glob(f"{OWN}*.tmp"):
        file.unlink(missing_ok=True)


def is_own(name: str) -> bool:
    """Return whether a file is a temporary file or a lock of this library, by its name."""
    return name.startswith(OWN)


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """Return the content of a regular file, or of one that a link leads to.

    Raises `OSError` for anything else without opening it: a pipe waits for a writer, and a device may have no end. Also
    raises it for a file of more than ``limit`` bytes.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > limit:
        raise _error(errno.EFBIG, path)
    with path.open("rb") as file:
        return file.read(size)


def begins_with(path: Path, mark: bytes, within: int = 0) -> bool:
    """Return whether ``mark`` is the beginning of a regular file, or is found within its first bytes.

    Raises `OSError` if the path is anything else than a regular file.
    """
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(within or len(mark))
    return mark in head


def check_regular(path: Path) -> None:
    """Raise `OSError` if there is no regular file at ``path``, nor where a link at ``path`` leads."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise _error(errno.EINVAL, path, _kind(mode))


def check_replaceable(path: Path) -> None:
    """Raise `OSError` if there is something at ``path`` that is no file, or that nobody may write."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise _error(errno.EEXIST, path, _kind(mode))
    if not mode & 0o222:
        raise _error(errno.EACCES, path, "read-only file")
    if not os.access(path, os.W_OK):
        raise _error(errno.EACCES, path)


def check_writable(path: Path) -> None:
    """Raise `OSError` if a file cannot be written to ``path``, together with the folders that it lacks.

    Leaves nothing behind. What nobody can know before, such as a disk that becomes full, is raised by the write itself.
    """
    check_replaceable(path)
    folder, missing = path.absolute().parent, [path.name]
    while not os.path.lexists(folder):
        folder, missing = folder.parent, [folder.name, *missing]
    check_folder(folder)
    for name in missing:
        with suppress(FileNotFoundError):
            os.lstat(folder / name)  # raises if the name is too long for the file system


def check_folder(folder: Path) -> None:
    """Raise `OSError` if a folder cannot be written, with at least a few kilobytes."""
    mode = folder.stat().st_mode
    if not stat.S_ISDIR(mode):
        raise _error(errno.ENOTDIR, folder)
    if not mode & 0o222:
        raise _error(errno.EACCES, folder, "read-only folder")
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE))
    except OSError as error:
        raise _error(error.errno or errno.EIO, folder) from error


@contextmanager
def locked(folder: Path, name: str, timeout: float) -> Iterator[None]:
    """Hold a folder's lock of a name; raises `TimeoutError` if another process holds it for ``timeout`` seconds.

    The lock is an empty file, which stays: to delete a lock that another process waits for would give it to both.
    """
    check_lock(folder, name)
    with FileLock(_lock(folder, name), timeout=timeout):
        yield


def check_lock(folder: Path, name: str) -> None:
    """Raise `OSError` if something else than a lock has its name: locks are empty files."""
    file = _lock(folder, name)
    if os.path.lexists(file):
        status = os.lstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            raise _error(errno.EEXIST, file, f"{file.name} is no lock of this library")


def _lock(folder: Path, name: str) -> Path:
    return folder / f"{OWN}{name}.lock"


def reason(error: BaseException) -> str:
    """Return what went wrong, without the error's number and file."""
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


def _kind(mode: int) -> str:
    return "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "not a regular file"


def _error(number: int, path: Path, what: str = "") -> OSError:
    return OSError(number, what or os.strerror(number), str(path))
