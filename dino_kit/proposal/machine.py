"""What a machine has: a device, cores, and memory that is free."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ROOT = Path("/")
_FREE = 0.8  # a thread that gets so much of a core is hardly held up
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Machine:
    """Where a run is to take place."""

    device: str  # cpu, cuda or mps
    name: str  # of the device, for a reader; empty where nobody knows it
    cores: int  # that may be used
    workers: int  # processes that load data
    memory: int | None  # bytes that are free where the networks live; None where nobody says
    memory_of: str  # whose memory that is
    devices: int = 1  # GPUs of the machine, of which one was measured
    share: float = 1.0  # of a core that a thread gets, while other programs run

    @property
    def is_busy(self) -> bool:
        return self.share < _FREE


def find_machine(device: torch.device, cores: int, workers: int) -> Machine:
    """The machine that this process is on, as ``device`` sees it."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        name, count = torch.cuda.get_device_name(device), torch.cuda.device_count()
        return Machine("cuda", name, cores, workers, free, "the GPU", count, _share_of_a_core())
    memory, whose = host_memory()
    share = _share_of_a_core()
    return Machine(device.type, "", cores, workers, memory, whose, share=share)


def _share_of_a_core() -> float:
    """What a thread that always has something to do gets of a core."""
    began, worked = time.perf_counter(), time.thread_time()
    while (passed := time.perf_counter() - began) < _LOOK_SECONDS:
        pass
    return min((time.thread_time() - worked) / passed, 1.0)


def host_memory(root: Path = _ROOT) -> tuple[int | None, str]:
    """Bytes of the host that are free, and whose they are.

    Whichever is less: what the system says is available, and what a container or a job may still
    take. Where a system tells only its whole memory, half of that counts as free; where it tells
    nothing, there is None. ``root`` is where ``/proc`` and ``/sys`` are.
    """
    available, whose = _available(root), "the machine"
    if available is None and (available := _half_of_all()) is not None:
        whose = "the machine, half of all it has,"
    for left in _left_to_group(root):
        if available is None or left < available:
            available, whose = left, "this container or job"
    return available, whose


def _available(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _half_of_all() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _left_to_group(root: Path) -> list[int]:
    """What each control group that this process is in may still take, where it has a limit."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" and not controllers:
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current")
            cache = "inactive_file"
        elif "memory" in controllers.split(","):
            mount = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_inactive_file"
        else:
            continue
        place = Path(path.lstrip("/"))
        # A limit of any group above holds too; inside a container the path may lead nowhere.
        for group in (place, *place.parents):
            limit, used = (_number(_text(root / mount / group / name)) for name in names)
            if limit is None or used is None:
                continue
            statistics = dict(
                words
                for line in _text(root / mount / group / "memory.stat").splitlines()
                if len(words := line.split()) == 2
            )
            # What a group holds of files is given up when memory is needed.
            found.append(max(limit - used + (_number(statistics.get(cache, "")) or 0), 0))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit
