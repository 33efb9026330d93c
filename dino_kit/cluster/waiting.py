"""Staying with a job until it has ended, and saying how."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dino_kit import log
from dino_kit.cluster.state import SENTENCE, UNKNOWN, State, first_error, result_of, state_of
from dino_kit.cluster.submission import Submitted

_POLLS = (1.0, 10.0)  # seconds between two looks, at first and later
# Seconds for which nobody knows of a job before it counts as lost: a controller that is started
# again does not answer, and its jobs go on.
_PATIENCE = 600.0


def wait(
    entry: Submitted, folder: Path, alive: Callable[[], bool] | None = None, follow: bool = True
) -> State:
    """Return the final state of a job; its main process's output is shown meanwhile.

    A job that is in the queue again is waited for, whatever its processes wrote before. One of
    which Slurm says twice that it has ended, or which nobody knows of any more, is not. ``alive``
    says of a local job whether it runs.
    """
    shown, pause, lost, last, before = 0, _POLLS[0], 0.0, ("", ""), ""
    while True:
        state = state_of(entry, folder) if alive is None else _of_a_child(entry, folder, alive)
        if follow:
            shown = _show(entry.path(folder, "stdout"), shown)
        if (state.name, state.reason) != last and alive is None:
            log.say(f"job {entry.job}: {state}")
        # A job that is being queued again can look as if it had ended.
        if state.ended and (before == state.name or alive is not None):
            return state
        last, before = (state.name, state.reason), state.name
        lost = lost + pause if state.name == UNKNOWN else 0.0
        if lost > _PATIENCE:
            return state
        time.sleep(_POLLS[0] if state.ended else pause)
        pause = min(1.2 * pause, _POLLS[1])


def _of_a_child(entry: Submitted, folder: Path, alive: Callable[[], bool]) -> State:
    if alive():
        return State("RUNNING")
    kinds = {result_of(entry, folder, task)[0] for task in range(entry.tasks)}
    return State("COMPLETED" if kinds == {"success"} else "FAILED")


def _show(path: Path, shown: int) -> int:
    """Print what was added to a log after ``shown`` bytes; returns how many there are now."""
    if not path.is_file():
        return shown
    with open(path, "rb") as file:
        file.seek(shown)
        added, end, _ = file.read().rpartition(b"\n")
    for line in own_lines(added.decode("utf-8", "replace").splitlines()):
        log.say(line)
    return shown + len(added + end)


def own_lines(lines: Sequence[str]) -> list[str]:
    """A log without submitit's lines about itself."""
    return [line for line in lines if not line.startswith("submitit ")]


def tail(path: Path, lines: int) -> list[str]:
    """The last ``lines`` of a log that say something."""
    if not path.is_file() or not lines:
        return []
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 65_536))
        text = file.read().decode("utf-8", "replace")
    return [line for line in own_lines(text.splitlines()) if line.strip()][-lines:]


def verdict(entry: Submitted, folder: Path, state: State) -> str:
    """Why a job that has ended did not succeed, with the traceback of its first error; else "".

    Slurm's word counts: a job that it killed leaves no traceback, or one that misleads.
    """
    kinds = [result_of(entry, folder, task)[0] for task in range(entry.tasks)]
    if state.name == "COMPLETED" and kinds == ["success"] * entry.tasks:
        return ""
    if state.name == UNKNOWN:
        return f"Neither Slurm nor its accounting knows of job {entry.job}; it may have been removed."
    error = first_error(entry, folder)
    if state.name == "FAILED" and error:
        task, text = error
        # A command that stopped by itself has said why, and where in the code is nobody's concern.
        _, ours, sentence = text.rpartition(SENTENCE)
        why = f" {sentence.strip()}" if ours else f"\n{text.rstrip()}"
        return f"Process {task} of job {entry.job} failed:{why}"
    by = {
        "CANCELLED": "was cancelled",
        "TIMEOUT": "ran out of time, and was not queued again",
        "OUT_OF_MEMORY": "took more memory than it asked for, and Slurm killed it; see --mem_gb",
        "NODE_FAIL": "lost a node",
        "PREEMPTED": "had to make way for another one",
        "FAILED": "was killed, or ended without a word",
        "COMPLETED": "ended without leaving a result",
    }.get(state.name, f"ended as {state.name}")
    told = f"Job {entry.job} {by}."
    for task in range(entry.tasks):
        if kinds[task] != "success" and (last := tail(entry.path(folder, "stderr", task), 5)):
            told += f" The last that process {task} said:\n" + "\n".join(last)
            break
    return told
