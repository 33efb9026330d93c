"""Several processes of one run, started as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    status: int
    said: str  # on standard error
    seconds: float


def together(
    *command: str, processes: int = 2, timeout: float = 300, **environment: str
) -> list[Ended]:
    """Run ``python command`` in each process; how each ended, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, *command], text=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent,
            env=os.environ | group | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    began, ended = time.monotonic(), []
    try:
        for process in started:
            said = process.communicate(timeout=timeout)[1]
            ended.append(Ended(process.returncode, said, time.monotonic() - began))
    finally:
        for process in started:
            process.kill()  # one that waits for another that has failed
    return ended


def run_together(*command: str, processes: int = 2) -> None:
    """Run ``python command`` in each process, all of which have to end well."""
    ended = together(*command, processes=processes)
    assert [one.status for one in ended] == [0] * processes, "\n".join(one.said for one in ended)
