"""Several processes of one run, started as ``torchrun`` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_together(*command: str, processes: int = 2) -> list[str]:
    """Run ``python command`` in each process; returns what each said, all of them done and well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in map(str, range(processes)):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, *command], env=os.environ | group, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=Path(__file__).parent.parent,
            )
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()  # one that waits for another that has failed
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
    return said
