"""Which of several processes has stopped, and where: told by the others, within a time limit.

A collective that one process does not come to fails on the others, without a word on who is missing
or why. So each process says where it is, and has a thread that answers for it, even while it hangs.
Whoever meets trouble calls the roll, over the store through which the processes found each other:
one that hangs is known by its answer, one that has died by its silence, one that has stopped by the
reason it left. A process that has been called and does not come to an end shows where its threads
are and ends itself.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from dino_kit import distributed
from dino_kit.errors import Interrupted, RunFailed

_SECONDS_TO_ANSWER = 4.0
_SECONDS_TO_LEAVE = 10.0  # after the roll was called
_POLL = 0.5
_TROUBLE = "trouble"


class RollCall:
    """What this process says of itself, and hears of the others.

    Args:
        seconds: how long a process may be at one place before it counts as hanging.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._place, self._since = "starting", time.monotonic()
        self._over = threading.Event()

    def at(self, place: str) -> None:
        """Say where this process is from now on."""
        self._place, self._since = place, time.monotonic()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, a failure of the processes to come together is told in a sentence.

        Raises:
            RunFailed: another process has died, hangs or has stopped.
        """
        if distributed.world_size() == 1:
            yield
            return
        self.at("starting")
        threading.Thread(target=self._answer_and_watch, daemon=True).start()
        try:
            yield
        except Interrupted:  # which all have agreed on
            raise
        except Exception as error:
            if not distributed.is_failure(error):
                self._leave(f"has stopped: {error}")
                raise
            found = self._find_out()
            self._leave(f"has stopped: {found}")
            raise RunFailed(
                f"{found} The same command goes on from the newest checkpoint."
            ) from error
        finally:
            self._over.set()

    def _where(self) -> str:
        return f"has been {self._place} for {time.monotonic() - self._since:.0f} seconds"

    def _answer_and_watch(self) -> None:
        store, called, answered = _store(), 0.0, False
        while not self._over.wait(_POLL):
            if store is not None and not answered:
                with suppress(Exception):  # the process that hosts the store may be gone
                    if store.check([_TROUBLE]):
                        store.set(_answer(distributed.rank()), self._where())
                        called, answered = time.monotonic(), True
            late = time.monotonic() - self._since > self.seconds + _SECONDS_TO_LEAVE
            if late or answered and time.monotonic() - called > _SECONDS_TO_LEAVE:
                self._end()

    def _end(self) -> None:
        """Show where this process hangs, and end it: nothing else can reach its main thread."""
        sys.stderr.write(
            f"dino-kit: stopped: process {distributed.rank()} (of {distributed.world_size()}) "
            f"{self._where()} and is ended. Its threads are here:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        os._exit(1)

    def _find_out(self) -> str:
        """Call the roll; who is missing, in a sentence."""
        others = [r for r in range(distributed.world_size()) if r != distributed.rank()]
        count, answers = distributed.world_size(), dict.fromkeys(others, "")
        try:
            store = _store()
            store.set(_TROUBLE, "yes")
            store.set(_answer(distributed.rank()), self._where())
            _wait(store, [_answer(rank) for rank in others])
            for rank in others:
                for key in (_answer(rank), _left(rank)):  # the reason it left counts for more
                    if store.check([key]):
                        answers[rank] = store.get(key).decode()
        except (AttributeError, RuntimeError):  # with its host, process 0, the store has gone
            return self._told_of([0], count)
        silent = [rank for rank in others if not answers[rank]]
        stopped = [rank for rank in others if answers[rank].startswith("has stopped")]
        if silent:
            return self._told_of(silent, count)
        if stopped:
            rank = stopped[0]
            return f"Process {rank} (of {count}) {answers[rank].rstrip('.')}."
        elsewhere = [rank for rank in others if f" {self._place} for " not in answers[rank]] or others
        told = "; ".join(f"process {rank} (of {count}) {answers[rank]}" for rank in elsewhere)
        return (
            f"The processes no longer come together: {told}, while process {distributed.rank()} "
            f"{self._where()}."
        )

    def _told_of(self, silent: list[int], count: int) -> str:
        return (
            f"Process {', '.join(map(str, silent))} (of {count}) no longer answers; it has died, or "
            f"its machine cannot be reached. This one, process {distributed.rank()}, "
            f"{self._where()}."
        )

    def _leave(self, why: str) -> None:
        """Leave word, and let those that ask for it have it: the main process hosts the store."""
        with suppress(Exception):
            store = _store()
            store.set(_left(distributed.rank()), why)  # the thread may yet write its answer
            store.set(_answer(distributed.rank()), why)
            store.set(_TROUBLE, "yes")
            if distributed.is_main():
                _wait(store, [_left(rank) for rank in range(distributed.world_size())])


def _answer(rank: int) -> str:
    return f"answer/{rank}"


def _left(rank: int) -> str:
    return f"left/{rank}"


def _wait(store: Any, keys: list[str]) -> None:
    """Until there is something under each of ``keys``, or the time to answer is over."""
    until = time.monotonic() + _SECONDS_TO_ANSWER
    while not store.check(keys) and time.monotonic() < until:
        time.sleep(_POLL / 10)


def _store() -> Any:
    """A connection of its own to the processes' store, which one thread at a time can use."""
    from torch.distributed import PrefixStore, TCPStore

    with suppress(Exception):
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_SECONDS_TO_ANSWER),
        )
        # A launcher's store outlives a start of the processes.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"roll call {start}", store)
    return None
