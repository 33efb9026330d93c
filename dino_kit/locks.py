"""A folder that one process holds at a time, by a lock that dies with the process.

The lock is a POSIX record lock. It belongs to the process alone: data workers, which live on for
seconds after their parent was killed, do not inherit it, as they would one of ``flock``. It has a
trap: it is given up when the process closes any descriptor of the file, so a process remembers
what it holds and does not open that file a second time.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dino_kit import distributed, log
from dino_kit.errors import UserError

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what some network folders answer
_held: set[Path] = set()


@contextmanager
def hold(folder: str | Path, doing: str, name: str = ".lock") -> Iterator[None]:
    """Hold ``folder`` for this process; what a killed process held is free at once.

    Processes whose locks have another ``name`` do not disturb each other. Where the file system
    knows no locks, as some network file systems, that is told and nothing is held.

    Raises:
        UserError: another process holds it, and which on which host; ``doing`` says in the
            sentence what that does.
    """
    path = Path(folder).resolve() / name
    if path in _held:
        raise UserError(_refusal(doing, folder, _own_name()))
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            _lock(handle)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0) if hasattr(os, "pread") else os.read(handle, 200)
            named = owner.decode("utf-8", "replace").strip()
            raise UserError(_refusal(doing, folder, named)) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            log.notice(
                f"{folder} lies on a file system without locks, so nothing keeps a second run "
                "from it; start only one at a time in it."
            )
        with suppress(OSError):  # a full disk is no reason not to read what is there
            os.ftruncate(handle, 0)
            os.write(handle, _own_name().encode())
        _held.add(path)
        yield
    finally:
        _held.discard(path)
        os.close(handle)


@contextmanager
def hold_by_main(folder: str | Path, doing: str, name: str = ".lock") -> Iterator[None]:
    """:func:`hold`, for all processes of a run, which have to call it; the folder is made.

    Raises:
        UserError: on all processes, where another run holds it.
        OSError: the main process cannot make the folder, or write to it; UserError on the others.
    """
    refusal = None
    with ExitStack() as held:
        if distributed.is_main():
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                held.enter_context(hold(folder, doing, name))
            except (UserError, OSError) as error:
                refusal = error
        distributed.follow_main(refusal)
        yield


def _own_name() -> str:
    return f"{os.getpid()} on {socket.gethostname()}"


def _refusal(doing: str, folder: str | Path, owner: str) -> str:
    return f"Another run{f', of process {owner},' if owner else ''} is {doing} in {folder}."


def _lock(handle: int) -> None:
    """Lock an open file until it is closed; raises BlockingIOError where another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows, where locked bytes cannot be read: one far behind the text
        import msvcrt

        os.lseek(handle, 1 << 20, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
    else:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # what POSIX allows a held lock to be told by, too
            raise BlockingIOError from error
