"""What runs in each process of a job: a command line, wherever the process group says it is.

A job goes to the nodes as a pickle of :class:`Job`, which is a few words. submitit starts it, and
keeps what it returned or raised in a file for whoever waits. What a cluster does to a job meanwhile
is met here: the variables of ``torchrun`` are set from the job's own, and when time is up or
another job takes the nodes, submitit's handler is called by the main process only, where it queues
the job again, and no process leaves a result behind that a reader would take for the end.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from dino_kit.config import command_line, fields
from dino_kit.config.commands import COMMANDS
from dino_kit.errors import RunFailed

# Below the ports that systems hand out by themselves.
_PORTS = range(20_000, 32_000)


class Job:
    """A command line, ``words`` without ``dino-kit``, as submitit takes and requeues it.

    ``starts`` counts how often it was queued again on its own demand.

    Raises:
        RunFailed: when called, and the command ended with a status other than 0; it says why.
    """

    def __init__(self, words: Sequence[str], starts: int = 0):
        self.words, self.starts = tuple(words), starts

    def __call__(self) -> int:
        import submitit

        environment = submitit.JobEnvironment()
        # What an earlier start left would be taken for the result of this one.
        environment.paths.result_pickle.unlink(missing_ok=True)
        os.environ.update(process_group(environment, self.starts))
        _take_signals(environment)
        # By its name, because the command line stands above everything that it can start.
        # Each process leaves a word of its own, and the first one is shown.
        status, told = importlib.import_module("dino_kit.cli").outcome(
            self.words_now(), repeat=True
        )
        if status:
            line = shlex.join(["dino-kit", *self.words])
            raise RunFailed(told or f"{line} ended with status {status}")
        return status

    def words_now(self) -> tuple[str, ...]:
        """The command line of this start: what was to begin anew did so at the first one."""
        again = self.starts or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        name, _ = command_line.named(self.words)
        # A recipe can say it, too.
        resumes = "resume" in fields.names(COMMANDS[name].schema)
        return (*self.words, "--resume=auto") if again and resumes else self.words

    def checkpoint(self) -> Any:
        """What is queued again: the same command, which goes on where its folder says."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(self.words, self.starts + 1))

    # submitit asks for the one name whether a job can be queued again, and calls the other.
    __submitit_checkpoint__ = checkpoint


def process_group(environment: Any, starts: int) -> dict[str, str]:
    """The variables by which :mod:`~dino_kit.distributed` knows this process of a job.

    All processes come to the same port, and to another one after each restart: connections of the
    start before may still hold the old one.
    """
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    told = f"{environment.job_id} {restarts} {starts}".encode()
    number = int.from_bytes(hashlib.sha256(told).digest()[:8], "big")
    # Where a site shows each process only its own GPU, that is the first one it sees.
    alone = len(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1
    sees_one = alone and bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return {
        "RANK": str(environment.global_rank),
        "WORLD_SIZE": str(environment.num_tasks),
        "LOCAL_RANK": "0" if sees_one else str(environment.local_rank),
        "MASTER_ADDR": environment.hostnames[0],
        "MASTER_PORT": str(_PORTS[number % len(_PORTS)]),
    }


def _take_signals(environment: Any) -> None:
    """Put the rules of this module around submitit's handlers; training puts them off further."""
    warning = getattr(signal, f"SIG{environment.USR_SIG}", None)
    handler = signal.getsignal(warning) if warning else None
    if callable(handler):
        signal.signal(warning, _requeue(environment, handler))
    if environment.cluster == "local" and hasattr(signal, "SIGTERM"):
        # Slurm sends SIGTERM before what counts, so submitit passes it over; here it counts.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _requeue(
    environment: Any, handler: Callable[[int, FrameType | None], Any]
) -> Callable[[int, FrameType | None], None]:
    from submitit.core.utils import UncompletedJobError

    def warned(number: int, frame: FrameType | None) -> None:
        if environment.global_rank == 0:
            try:
                handler(number, frame)
            except UncompletedJobError as error:
                raise RunFailed(
                    "Its time was up more often than --max_timeouts allows; the same command goes "
                    "on from the last checkpoint."
                ) from error
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                # Without a time of grace Slurm queues the job again by itself, and refuses ours.
                print("Slurm did not take the request to queue the job again.", flush=True)
        # Not an exception that submitit would keep as the job's failure.
        raise SystemExit(0)

    return warned
