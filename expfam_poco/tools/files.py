"""Files that are either the old one or the new one, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

# What systems answer that cannot flush a folder to the disk, or do not let this user.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A new file beside `path` to write to, which takes its place when the block ends well, and else is removed.

    A link stays, and the file that it points to is replaced. That file's mode stays, too; a new file's is that of the
    umask. Before the renaming the file is flushed to the disk. One process writes to a path at a time.

    Args:
        path: where the file goes; its folder must exist.

    Yields:
        the file, open for writing and reading of bytes.

    Raises:
        OSError: it cannot be written, or `path` is something else than a file. What was there is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_aside(f"{folder}/notes") as file:
        ...         _ = file.write(b"done")
        ...     Path(folder, "notes").read_bytes(), len(os.listdir(folder))
        (b'done', 1)
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist; make it first", os.fspath(path))
    mode = _mode_of(target, path)
    _remove_stale(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    file = _Watched(_created(temporary, 0o666 if mode is None else mode, path))
    try:
        yield file
        file.flush()
        if mode is not None:
            os.chmod(temporary, mode)  # with what the umask has taken away
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            file.close()
        temporary.unlink(missing_ok=True)
        failure = file.failure or error
        if isinstance(failure, OSError):
            raise _sentence(failure, path) from error
        raise failure from None if failure is error else error
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _flush_folder(target.parent)


class _Watched:
    """A file that remembers why it could not be written: torch.save tells that by a RuntimeError of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, part: Any) -> int:
        try:
            return self._file.write(part)
        except BaseException as error:
            self.failure = self.failure or error
            raise


def _created(path: Path, mode: int, shown: str | os.PathLike[str]) -> BinaryIO:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    except OSError as error:
        raise _sentence(error, shown) from error
    return os.fdopen(handle, "w+b")


def _mode_of(target: Path, path: str | os.PathLike[str]) -> int | None:
    """The mode of the file that is there; None: there is none.

    Raises:
        OSError: what is there is no file, and replacing it would destroy it.
    """
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            number = errno.EISDIR if kind == "folder" else errno.EINVAL
            raise OSError(number, f"this is a {kind}, which is not replaced; give the path of a file", os.fspath(path))
    return stat.S_IMODE(mode)


def _sentence(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same kind of error, with what to do."""
    reason = error.strerror or str(error)
    advice = "make room or give another path; what was there before is as it was"
    return OSError(error.errno, f"cannot be written ({reason}): {advice}", os.fspath(path))


def _remove_stale(target: Path) -> None:
    """Remove what killed writers of this very file have left."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp")
    for entry in os.scandir(target.parent):
        if pattern.fullmatch(entry.name):
            Path(entry.path).unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a renaming last through a loss of power, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
