"""Signals that ask a run to end, put off until the step is done and saved.

A process that is told to stop in the middle of a step would lose what it has computed since the
last checkpoint, and one of several that stops by itself leaves the others waiting for it. So while
a run trains, a signal is only noted. All processes learn of it by the collective that ends a step,
all take part in saving, and then the signal does in each of them what it would have done before: an
interruption from the keyboard raises ``KeyboardInterrupt``, a handler of the launcher's asks the
cluster to queue the job again, and what would have ended the process ends the command with the
status 128 + the signal's number.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from dino_kit import log
from dino_kit.errors import Interrupted

# What a step is asked to end with: nothing, a checkpoint, or one of the signals, by its place after
# these. Of several requests, of one process or of several, the largest is met.
NOTHING, SAVE = 0, 1
_NAMES = ("SIGTERM", "SIGUSR2", "SIGINT")  # of some of them a platform may have none
_SIGNALS = tuple(getattr(signal, name, None) for name in _NAMES)

_SECONDS_TO_NEXT_TRY = 60.0  # after a checkpoint that could not be written


class Interruption:
    """What this process asks the others for at the end of a step.

    Args:
        save_every_minutes: time after which a checkpoint is asked for; 0 for never.
    """

    def __init__(self, save_every_minutes: float = 0.0):
        self._seconds = 60.0 * save_every_minutes
        self._saved_at = time.monotonic()
        self._failed = False
        self._before: dict[int, Any] = {}  # what each signal did
        self._received: set[int] = set()

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Within, signals wait for the end of a step; what is left of them is met at the end."""
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in filter(None, _SIGNALS):
                handler = signal.getsignal(number)
                # What is ignored stays so, and a handler that Python did not set cannot be called.
                if handler not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        for number in sorted(self._received, key=_SIGNALS.index, reverse=True):
            self._act(number, self._before[number])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._received:
            signal.signal(number, self._before[number])  # asked twice: at once, then
            self._act(number, self._before[number])
        self._received.add(number)
        if number == signal.SIGINT:
            with suppress(RuntimeError):  # the signal came in the middle of another line
                log.notice("The step is finished and saved first; once more, and it stops at once.")

    def request(self) -> int:
        """What this process asks for: :data:`NOTHING`, :data:`SAVE`, or more for a signal."""
        received = [place for place, number in enumerate(_SIGNALS) if number in self._received]
        if received:
            return SAVE + 1 + received[-1]
        every = _SECONDS_TO_NEXT_TRY if self._failed else self._seconds
        due = every and time.monotonic() - self._saved_at >= every
        return SAVE if due else NOTHING

    def saved(self, done: bool = True) -> None:
        """A checkpoint was written just now; or it could not be, and is soon to be tried again."""
        self._saved_at = time.monotonic()
        self._failed = not done

    def answer(self, request: int) -> None:
        """Do what all agreed on, after the checkpoint that every request asks for.

        Returns where there is nothing else to do.

        Raises:
            Interrupted, KeyboardInterrupt, SystemExit: the run is to end.
        """
        if request > SAVE:
            number = _SIGNALS[request - SAVE - 1]
            self._received.discard(number)
            self._act(number, self._before.get(number, signal.SIG_DFL))

    @staticmethod
    def _act(number: int, handler: Any) -> None:
        if callable(handler):
            handler(number, None)
        else:
            raise Interrupted(number)
