"""Lines that are written down one by one, and wait in memory while the disk is full.

A run does not end because a line of its log cannot be written, but neither may it lose one: what
waits is tried again with each next line, and before a checkpoint is written that would make the
steps before it history.
"""

from __future__ import annotations

import os
from pathlib import Path

from dino_kit import log


class Journal:
    """Appends lines to ``path``, each whole or not at all."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._waiting = b""

    def append(self, line: str) -> None:
        """Write ``line``, and what waits before it; where that fails it waits, and is told."""
        self._waiting += line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._write()
        except OSError as error:
            log.notice(
                f"{self.path} could not be written to ({error.strerror}); the lines wait, and are "
                "tried again with the next."
            )

    def flush(self) -> None:
        """Bring all lines to the disk.

        Raises:
            OSError: the place cannot be written to, or is full.
        """
        self._write()
        if self.path.exists():
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())

    def _write(self) -> None:
        if self._waiting:
            append_whole(self.path, self._waiting)
            self._waiting = b""


def append_whole(path: str | Path, data: bytes) -> None:
    """Append ``data`` to a file, or leave it as it was.

    Raises:
        OSError: the place cannot be written to, or is full.
    """
    with open(path, "ab", buffering=0) as file:
        before, written = file.seek(0, os.SEEK_END), 0
        try:
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            # A part of a line would become one with the next; what others appended since stays.
            if file.seek(0, os.SEEK_END) == before + written:
                file.truncate(before)
            raise
