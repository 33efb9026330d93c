"""On what something was measured, and the most memory that it took."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dino_kit.data.loader import usable_cores
from dino_kit.proposal.speed import wait
from dino_kit.training.precision import DTYPES

_MATMUL_SECONDS = 1.0
_MATMUL_SIDE = {"cuda": 8192}  # of the matrices; large enough for the full rate
_SMALLER_SIDE = 2048


def describe(device: torch.device) -> dict[str, Any]:
    """The machine as plain data, to stand beside what was measured on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "device": name,
        "platform": platform.platform(),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; on a machine that does not tell, its kind, such as ``arm64``."""
    try:
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    except (OSError, ValueError):
        pass
    return platform.processor() or platform.machine()


def matmul_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of one large matrix product: what is there to be used."""
    side = _MATMUL_SIDE.get(device.type, _SMALLER_SIDE)
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    return 2 * side**3 / _least_seconds(lambda: a @ b, device)


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    # The least, because what else the machine does only ever adds to it.
    taken: list[float] = []
    work()
    while sum(taken) < _MATMUL_SECONDS:
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


class Peak:
    """The most memory taken since this object was made, above what was taken then.

    On a GPU it is what PyTorch took of the device's, elsewhere the process's own, files that it
    maps included.
    """

    def __init__(self, device: torch.device | None = None):
        self._cuda = device if device is not None and device.type == "cuda" else None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before: int | None = torch.cuda.memory_allocated(self._cuda)
        else:
            _forget_peak()
            self._before = _status("VmRSS") or _peak()

    def bytes(self) -> int | None:
        """None where the system does not tell, as Windows does not."""
        now = _peak() if self._cuda is None else torch.cuda.max_memory_allocated(self._cuda)
        return None if now is None or self._before is None else max(now - self._before, 0)


def _forget_peak() -> None:
    with suppress(OSError):  # else what was taken before counts, where that was more
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    if (most := _status("VmHWM")) is not None:
        return most
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None
