"""What the person at the terminal sees: lines, notices, progress and tables.

Only the main process speaks. Where the output is no terminal (a log file, a cluster's job) a
progress bar would fill it with control characters, so plain lines are written instead, at most
one every ten seconds.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from dino_kit import distributed

_SECONDS_BETWEEN_PLAIN_LINES = 10.0
_WIDEST_PARAGRAPH = 100
_noticed: set[str] = set()


def say(text: str) -> None:
    """One line on standard output."""
    if distributed.is_main():
        _print(text, sys.stdout)


def paragraph(text: str) -> None:
    """Prose on standard output, broken between words where the terminal, or a page, is full."""
    if distributed.is_main():
        width = min(shutil.get_terminal_size().columns, _WIDEST_PARAGRAPH)
        say(textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False))


def notice(text: str) -> None:
    """One line on standard error, marked as a notice; the same text only once per process."""
    if distributed.is_main() and text not in _noticed:
        _noticed.add(text)
        _print(f"notice: {text}", sys.stderr)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, under its title if that is not empty: a column of text, then columns of numbers."""
    if not distributed.is_main():
        return
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        justify = "left" if place == 0 else "right"
        # A name that is wider than the terminal allows goes on in the next line, and is not cut.
        drawn.add_column(_writable(column, sys.stdout), justify=justify, overflow="fold")
    for row in rows:
        drawn.add_row(*(_writable(cell, sys.stdout) for cell in row))
    _console().print(drawn)


def duration(seconds: float) -> str:
    """``3725`` → ``1:02:05``; ``65`` → ``1:05``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@contextmanager
def progress(
    total: int | None, description: str, start: int = 0
) -> Iterator[Callable[..., None]]:
    """Show how far a loop of ``total`` rounds is, from round ``start`` on; not without a description.

    Where nobody knows how many rounds there will be, ``total`` is None.

    Yields ``advance(rounds=1, text="")``; ``text`` (loss, rate …) stands until the next one.
    """
    if not description or not distributed.is_main():
        yield lambda rounds=1, text="": None
    elif _console().is_terminal:
        with _bar(total, description, start) as advance:
            yield advance
    else:
        yield _PlainProgress(total, description, start)


@contextmanager
def _bar(total: int | None, description: str, start: int) -> Iterator[Callable[..., None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(), refresh_per_second=4) as shown:
        task = shown.add_task(description, total=total, completed=start, text="")

        def advance(rounds: int = 1, text: str = "") -> None:
            shown.update(task, advance=rounds, **({"text": text} if text else {}))

        yield advance


class _PlainProgress:
    def __init__(self, total: int | None, description: str, start: int):
        self.total, self.description, self.done, self.start = total, description, start, start
        self.text = ""
        self.began = self.spoke = time.monotonic()

    def __call__(self, rounds: int = 1, text: str = "") -> None:
        self.done += rounds
        self.text = text or self.text
        now = time.monotonic()
        goes_on = self.total is None or self.done < self.total
        if goes_on and now - self.spoke < _SECONDS_BETWEEN_PLAIN_LINES:
            return
        self.spoke = now
        if self.total is None:
            say(f"{self.description} {self.done:,}")
            return
        left = (now - self.began) / max(self.done - self.start, 1) * (self.total - self.done)
        parts = (f"{self.description} {self.done}/{self.total}", self.text,
                 f"{duration(left)} left" if self.done < self.total
                 else f"took {duration(now - self.began)}")
        say("  ".join(part for part in parts if part))


def _print(text: str, file: TextIO) -> None:
    print(_writable(text, file), file=file, flush=True)


def _writable(text: str, file: TextIO) -> str:
    # The name of a file need not be valid text, nor be writable in the terminal's encoding.
    encoding = file.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _console():
    # Made anew each time: tests and callers may have replaced sys.stdout since.
    from rich.console import Console

    # Names of files are shown as they are, also where they hold [brackets] or :words:.
    return Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
