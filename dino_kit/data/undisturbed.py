"""Data workers that signals to the whole job leave alone: they end when the run ends them.

Slurm signals every process of a job, and a terminal every process in its foreground. A worker that
died of it would take the run with it in the middle of the step that is to be finished and saved.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def undisturbed(worker: int = 0) -> None:
    """Called in a data worker: heed of the signals that ask a run to end only the parent's own."""
    for name in ("SIGINT", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # where there is none, nor is there Slurm
        # PyTorch ends a worker that does not stop by itself by SIGTERM, so that is not ignored.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_parent_says(above: int) -> None:
    # A fork server stands between the two, where there is one.
    parent = multiprocessing.parent_process().pid
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender in (parent, above) or os.getppid() != above:
            os._exit(0)
