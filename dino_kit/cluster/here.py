"""The processes of a job on this machine, of which none waits in vain for one that has died.

submitit's controller starts them and waits for all of them. Here, as with Slurm's
``--kill-on-bad-exit``, one that ends badly ends the others, after some seconds in which they can say
what they have seen of it; and one that was killed, which can leave no word, is spoken for.

``python -m dino_kit.cluster.here FOLDER`` is the controller.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.core.utils import JobPaths
from submitit.local import local

from dino_kit import files
from dino_kit.cluster.job import Job
from dino_kit.cluster.state import SENTENCE
from dino_kit.cluster.submission import Submitted, code_variables, outside_of_a_job, record
from dino_kit.cluster.waiting import tail

# As long as processes that train together take to find out who is missing.
_SECONDS_TO_LEAVE = 15.0
_POLL = 0.05


def submit(
    folder: Path, words: Sequence[str], gpus: int, tasks: int, code: Path | None
) -> tuple[Submitted, local.LocalJob]:
    """Start a job on this machine; returns its record and submitit's job."""
    # The first of those that the shell leaves; CUDA knows them by other names than numbers, too.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    seen = visible.split(",") if visible else [str(number) for number in range(gpus)]
    executor = Executor(folder, gpus or tasks, seen[:gpus])
    before = os.environ.copy()
    try:
        os.environ.update(code_variables(code))
        with outside_of_a_job():
            job = executor.submit(Job(words))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return record(folder, job.job_id, "local", words, gpus or tasks), job


class Executor(local.LocalExecutor):
    """submitit's, with the controller of this module, for ``tasks`` processes that see ``gpus``."""

    def __init__(self, folder: Path, tasks: int, gpus: Sequence[str]):
        super().__init__(folder, max_num_timeout=0)
        self.update_parameters(tasks_per_node=tasks)
        self.gpus = gpus

    def _submit_command(self, command: str) -> local.LocalJob:
        tasks = self._num_tasks()
        variables = {
            "NTASKS": str(tasks),
            "COMMAND": command,
            "NODEID": "0",
            "JOB_NUM_NODES": "1",
            # There is none; submitit asks.
            "TIMEOUT_S": str(2**31),
            "SIGNAL_DELAY_S": "0",
            "WITH_SHELL": "",
        }
        environment = {
            **os.environ,
            **{f"SUBMITIT_LOCAL_{name}": value for name, value in variables.items()},
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_STDERR_TO_STDOUT": "",
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpus),
        }
        line = [sys.executable, "-m", "dino_kit.cluster.here", str(self.folder)]
        process = subprocess.Popen(line, env=environment)
        return local.LocalJob(self.folder, str(process.pid), list(range(tasks)), process)


class Controller(local.Controller):
    """submitit's, whose ``run`` starts the processes, waits, and ends those that are left."""

    def wait(self, freq: int = 0) -> list[int | None]:
        """Until all processes have ended, or one ended badly and the others had time to follow."""
        spoken_for, late = set(), float("inf")
        while True:
            codes = [task.poll() for task in self.tasks]
            for task, code in enumerate(codes):
                if code not in (None, 0, local.LOCAL_REQUEUE_RETURN_CODE):
                    late = min(late, time.monotonic() + _SECONDS_TO_LEAVE)
                    if task not in spoken_for:  # at once: the first word is that of the cause
                        spoken_for.add(task)
                        self._speak_for(task, code)
            if None not in codes or time.monotonic() > late:
                return codes
            time.sleep(_POLL)

    def _speak_for(self, task: int, code: int) -> None:
        """Write down how a process ended, if it has not done so itself."""
        paths = JobPaths(self.folder, self.pid, task)
        if paths.result_pickle.exists():
            return
        told = f"killed by {_name(-code)}." if code < 0 else f"it ended with status {code}."
        if code == -getattr(signal, "SIGKILL", 0):
            told += " The system does that where memory runs out."
        if last := tail(paths.stderr, 5):
            told += " The last that it said:\n" + "\n".join(last)
        with files.atomic_write(paths.result_pickle) as file:
            pickle.dump(("error", SENTENCE + told), file)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    Controller(Path(sys.argv[1])).run()
