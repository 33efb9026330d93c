"""How many workers it takes to feed the networks, and whether this machine's cores suffice."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dino_kit.checking.sheet import first_batches
from dino_kit.data.crops import View
from dino_kit.data.inspection import Findings
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.source import Source

_SAMPLE, _SECONDS = 64, 3.0  # images whose crops are made to time it, at most, and for how long
_WORTH_TELLING = 0.1  # share of the time


@dataclass(frozen=True)
class Cost:
    """Seconds that an image takes in one worker, on average."""

    read: float  # by the clock: a worker waits for the disk
    decode: float  # of a core
    crops: float  # of a core
    sampled: int  # images whose crops were timed

    @property
    def work(self) -> float:
        """Seconds of a core."""
        return self.decode + self.crops

    @property
    def rate(self) -> float:
        """Images a second that one worker prepares."""
        return 1 / max(self.read + self.work, 1e-9)


@dataclass(frozen=True)
class Device:
    """What takes the crops, and how fast."""

    kind: str  # cpu, cuda or mps
    name: str  # of a GPU; empty where nobody knows it
    rate: float  # images a second through the networks, crops at hand
    cores: int  # of the machine that may be used

    @property
    def title(self) -> str:
        return "CPU" if self.kind == "cpu" else f"GPU ({self.name})" if self.name else "GPU"


def cost(
    found: Sequence[Findings],
    source: Source,
    groups: Sequence[Sequence[View]],
    pixels: Pixels,
    seed: int,
) -> Cost | None:
    """What ``found`` tells of reading and decoding, and a sample of ``source`` of crops.

    None where no image can be read.
    """
    seconds = np.concatenate([findings.seconds[findings.readable] for findings in found])
    if not len(seconds):
        return None
    read, decode = seconds.mean(axis=0, dtype=np.float64)
    taken: list[float] = []
    began, worked = time.monotonic(), time.thread_time()
    for _ in first_batches(source, groups, pixels, seed):
        now = time.thread_time()
        taken.append(now - worked)
        worked = now
        if len(taken) > _SAMPLE or time.monotonic() - began > _SECONDS:
            break
    if not taken:
        return None
    sample = taken[1:] or taken  # the first also starts what the others find started
    # The sample was decoded, too, on the way to its crops.
    crops = max(sum(sample) / len(sample) - decode, 0.0)
    return Cost(float(read), float(decode), float(crops), len(sample))


def workers(cost: Cost, device: Device) -> int:
    """Processes that feed ``device``; as many as there are cores where those do not suffice."""
    return max(1, min(device.cores, math.ceil(device.rate / cost.rate)))


def advice(cost: Cost, device: Device) -> str:
    """What to do about the workers, in a sentence or two."""
    count, most = workers(cost, device), device.cores / cost.work
    takes = f"{_rate(device.rate)} images a second"
    flag = f"--num_workers {count}"
    if device.kind == "cpu":
        share = device.rate * cost.work / device.cores
        told = f", and making their crops takes {share:.0%} on top" * (share > _WORTH_TELLING)
        return (
            f"This machine's CPU takes {takes}{told}; {flag} suffices. A GPU needs a worker for "
            f"every {_rate(cost.rate)} images a second that it takes."
        )
    if device.rate <= most:
        return f"The {device.title} takes {takes}, and {flag} suffices."
    return (
        f"This machine's {device.cores} cores can feed {_rate(most)} of the {takes} that the "
        f"{device.title} takes, so it waits {1 - most / device.rate:.0%} of the time, also with "
        f"{flag}. Smaller images on the disk, fewer --local_crops_number or more cores help."
    )


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
