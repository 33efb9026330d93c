"""Two processes that train together, as a launcher would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple


class Ended(NamedTuple):
    status: int
    said: str  # on standard error
    seconds: float


def together(
    program: str, line: Sequence[str], processes: int = 2, timeout: float = 300, **environment: str
) -> list[Ended]:
    """Run ``program`` with the words ``line`` in each process; how each ended, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *line], text=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
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
            process.kill()
    return ended
