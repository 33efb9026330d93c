"""How many workers it takes to feed the networks, and whether this machine's cores suffice."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dino_kit.checking.sheet import first_batches
from dino_kit.data.crops import View
from dino_kit.data.decode import decode
from dino_kit.data.inspection import Findings
from dino_kit.data.loader import Decode
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.source import Source

_SAMPLE, _SECONDS = 64, 3.0  # images whose crops are made to time it, at most, and for how long
_WORTH_TELLING = 0.1  # share of the time
_NOT_WORTH_ONE_MORE = 0.1  # of a worker


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
    decode: Decode = decode,
) -> Cost | None:
    """What ``found`` tells of reading and decoding, and a sample of ``source`` of crops.

    ``decode`` is what the run reads images by; the pass in which they were found had Pillow's. The
    work of an image is the sample's, and only how it is split between the two is an estimate.

    None where no image can be read.
    """
    seconds = np.concatenate([findings.seconds[findings.readable] for findings in found])
    if not len(seconds):
        return None
    read, decoding = seconds.mean(axis=0, dtype=np.float64)
    taken: list[float] = []
    began, worked = time.monotonic(), time.thread_time()
    for _ in first_batches(source, groups, pixels, seed, decode):
        now = time.thread_time()
        taken.append(now - worked)
        worked = now
        if len(taken) > _SAMPLE or time.monotonic() - began > _SECONDS:
            break
    if not taken:
        return None
    sample = taken[1:] or taken  # the first also starts what the others find started
    # The sample was decoded, too, on the way to its crops.
    crops = max(sum(sample) / len(sample) - decoding, 0.0)
    return Cost(float(read), float(decoding), float(crops), len(sample))


def workers(cost: Cost, device: Device) -> int:
    """Processes that feed ``device`` as far as the cores can; where reading waits, more than cores."""
    return max(1, math.ceil(pace(cost, device) / cost.rate - _NOT_WORTH_ONE_MORE))


def advice(cost: Cost, device: Device) -> str:
    """What to do about the workers, in a sentence or two."""
    paced, takes = pace(cost, device), f"takes {_rate(device.rate)} images a second"
    flag = f"--num_workers {workers(cost, device)}"
    slower = paced < device.rate * (1 - _WORTH_TELLING)
    if device.kind == "cpu":
        told = f" through the networks, and {_rate(paced)} where it also makes the crops" * slower
        return (
            f"This machine's CPU {takes}{told}; {flag} suffices. A GPU needs a worker for every "
            f"{_rate(cost.rate)} images a second that it takes."
        )
    if paced == device.rate:
        return f"The {device.title} {takes}, and {flag} suffices."
    return (
        f"The {device.title} {takes}, of which the {device.cores} cores here can prepare "
        f"{_rate(paced)}: it waits {1 - paced / device.rate:.0%} of the time, with {flag} as with "
        "more. Smaller images on the disk, fewer --local_crops_number or more cores help."
    )


def pace(cost: Cost, device: Device, num_workers: int | None = None) -> float:
    """Images a second of the whole run; on a CPU networks and workers share the cores.

    With so many workers, of which 0 means that nothing is prepared while the networks compute;
    None is as many as it takes.
    """
    if num_workers == 0:
        return 1 / (1 / device.rate + 1 / cost.rate)
    fed = math.inf if num_workers is None else num_workers * cost.rate
    if device.kind == "cpu":
        return min(fed, 1 / (1 / device.rate + cost.work / device.cores))
    return min(fed, device.rate, device.cores / max(cost.work, 1e-9))


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
