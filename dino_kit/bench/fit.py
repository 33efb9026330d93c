"""Whether a run fits into a machine, how long it takes there and what limits it: a pure function."""

from __future__ import annotations

from dataclasses import dataclass

from dino_kit.checking.feeding import Cost, Device, pace
from dino_kit.proposal.fit import Speed, allowance, most_at_a_time
from dino_kit.proposal.machine import Machine

DATA, COMPUTE = "data", "compute"
_HELD_UP = 0.1  # share of the time by which what is prepared is too slow for what takes it


@dataclass(frozen=True)
class Asked:
    """The run, in numbers."""

    images: int  # that it reads
    epochs: int
    batch: int  # images of a step
    at_a_time: int  # of them that are computed together
    num_workers: int

    @property
    def steps_an_epoch(self) -> int:
        return self.images // self.batch


@dataclass(frozen=True)
class Verdict:
    """What becomes of the run."""

    fits: bool
    largest_batch: int | None  # images at a time that fit; None where nobody knows the memory
    needed_bytes: int  # by a step
    allowed_bytes: float | None  # of the free memory what a run may take
    compute_rate: float  # images a second through the networks, crops at hand
    rate: float  # images a second of the whole run
    limit: str  # data or compute
    hours: float


def judge(asked: Asked, speed: Speed, cost: Cost, machine: Machine) -> Verdict:
    """What ``speed`` of a step and ``cost`` of its crops make of the run on ``machine``."""
    largest = most_at_a_time(speed, machine)
    compute = speed.rate(asked.batch)
    device = Device(machine.device, machine.name, compute, machine.cores)
    rate = pace(cost, device, asked.num_workers)
    seconds = asked.steps_an_epoch * asked.batch / rate + speed.save
    return Verdict(
        largest is None or asked.at_a_time <= largest,
        largest,
        speed.fixed_bytes + asked.at_a_time * speed.image_bytes,
        allowance(machine),
        compute,
        rate,
        _limit(rate, cost, device, asked.num_workers),
        asked.epochs * seconds / 3600,
    )


def _limit(rate: float, cost: Cost, device: Device, num_workers: int) -> str:
    needs = rate < device.rate * (1 - _HELD_UP)
    if num_workers == 0 or (device.kind == "cpu" and num_workers * cost.rate > rate):
        # Both take turns, or share the cores: what takes the larger part of the time.
        needs = rate < device.rate / 2
    return DATA if needs else COMPUTE
