"""What has become of a job: Slurm's word first, then the files that its processes left.

The files alone do not say. A job that was killed leaves none, and one that lost its nodes and is
in the queue again may have left the errors of processes that saw the others disappear.
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dino_kit.cluster.submission import Submitted
from dino_kit.errors import RunFailed

# Slurm's names of states after which nothing comes (squeue's and sacct's manuals).
ENDED = frozenset(
    ["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"]
)
UNKNOWN = "UNKNOWN"
# After this a traceback has what a command that stopped by itself said.
SENTENCE = f"\n{RunFailed.__module__}.{RunFailed.__qualname__}: "
_REST = 2**32 - 2  # Slurm's NO_VAL, in place of an element's number


@dataclass(frozen=True)
class State:
    """A job's state, by Slurm's name of it, and what else is known."""

    name: str
    nodes: str = ""
    reason: str = ""
    elapsed: str = ""
    restarts: int = 0

    @property
    def ended(self) -> bool:
        return self.name in ENDED

    def __str__(self) -> str:
        told = self.name
        told += f" on {self.nodes}" if self.nodes and not self.ended else ""
        if self.elapsed.strip("0:"):
            told += f" {'after' if self.ended else 'for'} {self.elapsed}"
        told += f" ({self.reason})" if self.reason else ""
        if self.restarts:
            told += f", started again {self.restarts} time{'s' if self.restarts > 1 else ''}"
        return told


def state_of(entry: Submitted, folder: Path) -> State:
    """The state of a job now; :data:`UNKNOWN` where nobody knows of it."""
    if entry.cluster == "local":
        return _local(entry, folder)
    told = _slurm(entry.job)
    if told.name == UNKNOWN:  # as it is some minutes after the end where there is no accounting
        return _by_results(entry, folder) or told
    return told


def _slurm(job: str) -> State:
    """By scontrol, which knows of a job until some minutes after its end; then by sacct.

    Elements of an array that were cancelled before they began are known as the rest of the array.
    """
    array, _, element = job.partition("_")
    shown = _output("scontrol", "show", "job", "-o", job)
    if element and not shown:
        records = _output("scontrol", "show", "job", "-o", array).splitlines()
        shown = "".join(record for record in records if f" ArrayTaskId={_REST} " in record)
    told = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    if "JobState" in told:
        reason = told.get("Reason", "None")
        nodes = told.get("NodeList", "(null)")
        return State(
            told["JobState"],
            "" if nodes == "(null)" else nodes,
            "" if reason == "None" else reason,
            told.get("RunTime", ""),
            int(told.get("Restarts", "0")),
        )
    accounted = _output("sacct", "-X", "-n", "-P", "-j", array, "-o", "JobID,State,NodeList,Elapsed")
    rows = {number: rest for number, *rest in (line.split("|") for line in accounted.splitlines())}
    for number in (job, *(number for number in rows if number.startswith(f"{array}_["))):
        if number in rows:
            name, nodes, elapsed = rows[number]
            # "CANCELLED by 0" says by whom.
            nodes = "" if nodes == "None assigned" else nodes
            return State(name.split()[0], nodes, elapsed=elapsed)
    return State(UNKNOWN)


def _output(*command: str) -> str:
    """What a program printed; nothing where it is not here, failed, or did not answer."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _local(entry: Submitted, folder: Path) -> State:
    ended = _by_results(entry, folder)
    if ended:
        return ended
    if entry.host != socket.gethostname():
        return State(UNKNOWN, reason=f"it runs on {entry.host}")
    return State("RUNNING" if _is_running(int(entry.job)) else "FAILED")


def _by_results(entry: Submitted, folder: Path) -> State | None:
    """The state of a job all of whose processes have left a word."""
    kinds = [result_of(entry, folder, task)[0] for task in range(entry.tasks)]
    if None in kinds:
        return None
    return State("FAILED" if "error" in kinds else "COMPLETED")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


class _OfPlainData(pickle.Unpickler):
    """Results are words and numbers, and anybody's folder can be looked at: no code is run."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def result_of(entry: Submitted, folder: Path, task: int) -> tuple[str | None, str]:
    """How a process ended (``success``, ``error``, None where it left no word), and its traceback."""
    path = entry.path(folder, "result_pickle", task)
    try:
        with open(path, "rb") as file:
            kind, value = _OfPlainData(file).load()
    except (OSError, EOFError, ValueError, pickle.UnpicklingError):
        return None, ""
    return kind, str(value) if kind == "error" else ""


def first_error(entry: Submitted, folder: Path) -> tuple[int, str] | None:
    """The process that failed first, and its traceback: the others' errors follow from that."""
    found = []
    for task in range(entry.tasks):
        kind, text = result_of(entry, folder, task)
        if kind == "error":
            found.append((entry.path(folder, "result_pickle", task).stat().st_mtime, task, text))
    return min(found)[1:] if found else None
