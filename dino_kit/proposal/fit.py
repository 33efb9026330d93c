"""How a network that was measured fits into the hours and the memory: a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dino_kit.errors import UserError
from dino_kit.proposal import rules
from dino_kit.proposal.machine import Machine
from dino_kit.proposal.rules import CropSizes, Network
from dino_kit.proposal.survey import Survey


class Candidate(NamedTuple):
    """A network on crops of a size."""

    network: Network
    crops: CropSizes

    @property
    def title(self) -> str:
        return f"{self.network.title}, on crops of {self.crops.globals} pixels"


@dataclass(frozen=True)
class Speed:
    """What a candidate costs on a machine, in seconds and bytes."""

    step: float  # of a step, however few its images: optimiser and moving average
    image: float  # of an image: its crops through both networks, there and back
    crop: float  # of making an image's crops, in one process
    save: float  # of writing a checkpoint, as each epoch does
    fixed_bytes: int  # of weights, gradients and moments
    image_bytes: int  # of an image, at the fullest moment of a step

    def rate(self, batch: int) -> float:
        """Images a second through the networks in steps of ``batch``, crops at hand."""
        return batch / (self.step + batch * self.image)


class Trial(NamedTuple):
    """A candidate that was measured."""

    candidate: Candidate
    precision: str  # fp32, bf16 or fp16
    speed: Speed
    others: tuple[tuple[str, float], ...] = ()  # seconds an image in the precisions not taken


class Request(NamedTuple):
    """What a proposal is asked for."""

    data_path: str
    hours: float
    total_batch_size: int | None = None
    arch: str | None = None
    device: str = "auto"
    pixels: tuple[tuple[str, Any], ...] = ()  # settings of what an image becomes, where not usual


class Run(NamedTuple):
    """How a trial fits into the hours; ``epochs`` is 0 where not one does."""

    trial: Trial
    batch: int
    micro: int  # images at a time; 0 where not one fits into memory
    epochs: int
    steps_an_epoch: int
    epoch_seconds: float
    capacity: int  # images that the hours hold, a part of an epoch and more than all among them

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_an_epoch

    @property
    def seen(self) -> int:
        return self.steps * self.batch

    @property
    def seconds(self) -> float:
        return self.epochs * self.epoch_seconds


def ladder(survey: Survey, arch: str | None) -> list[Candidate]:
    """What may be proposed, from cheap to dear; ``arch`` keeps those of that name."""
    networks = [network for network in rules.NETWORKS if arch in (None, network.arch)]
    if not networks:
        networks = [Network(arch, rules.NETWORKS[-1].lr, 0, 0, drop_path_rate=0.1)]
    full = [Candidate(network, rules.crop_sizes(survey)) for network in networks]
    if not rules.can_reduce(survey):
        return full
    crops = rules.crop_sizes(survey, reduced=True)
    reduced = [Candidate(network, crops) for network in networks[: rules.REDUCED]]
    return [*reduced, *full[len(reduced) - 1 :]]


def settings_of(candidate: Candidate, survey: Survey) -> dict[str, Any]:
    """All settings that decide what a step of ``candidate`` costs but for its batch."""
    network = candidate.network
    return {
        "arch": network.arch,
        **dict(network.sizes),
        "patch_size": candidate.crops.patch,
        "drop_path_rate": network.drop_path_rate,
        "out_dim": rules.out_dim(survey.images),
        **dict(network.head),
        **rules.crop_settings(survey, candidate.crops),
    }


def fit(trial: Trial, survey: Survey, machine: Machine, request: Request) -> Run:
    """The longest run of ``trial`` that the hours hold, with the batch that suits its length.

    Raises:
        UserError: there are fewer images than the batch that was asked for.
    """
    require_batch(survey, request)
    seconds = request.hours * 3600 * (1 - rules.RESERVE)
    for batch in _batches(survey.images, request.total_batch_size):
        steps_an_epoch = survey.images // batch
        epoch = steps_an_epoch * _step_seconds(trial.speed, batch, machine) + trial.speed.save
        most = max(rules.MOST_EPOCHS, -(-rules.MOST_STEPS // steps_an_epoch))
        epochs = int(min(seconds / epoch, most))
        micro = _micro(trial.speed, batch, machine)
        capacity = int(seconds / epoch * steps_an_epoch * batch)
        run = Run(trial, batch, micro, epochs, steps_an_epoch, epoch, capacity)
        if run.steps >= rules.STEPS_FOR_LARGER_BATCH:
            break
    return run  # where none has so many steps, of the smallest batch


def worth_trying(
    candidate: Candidate,
    trials: Sequence[Trial],
    survey: Survey,
    machine: Machine,
    request: Request,
) -> bool:
    """Whether ``candidate`` may still suffice, by the ``trials`` of all cheaper ones."""
    if not trials:
        return True
    before = fit(trials[-1], survey, machine, request)
    network = candidate.network
    return (
        suffices(before, survey)
        and before.capacity >= network.seen  # it takes longer than the one before
        and survey.images >= network.images
    )


def require_batch(survey: Survey, request: Request) -> None:
    """Raises :class:`UserError` where there are fewer images than the batch that was asked for."""
    if (request.total_batch_size or 0) > survey.images:
        raise UserError(
            f"There are {survey.images} images, fewer than one batch of "
            f"{request.total_batch_size}; give --total_batch_size {survey.images} or less."
        )


def suffices(run: Run, survey: Survey, asked: bool = False) -> bool:
    """Whether the run is worth its network's size; one that was ``asked`` for needs an epoch."""
    network = run.trial.candidate.network
    enough = run.capacity >= network.seen and survey.images >= network.images
    return run.epochs > 0 and run.micro > 0 and (asked or enough)


def _batches(images: int, given: int | None) -> list[int]:
    """Batches to try, the largest first."""
    if given:
        return [given]
    larger = [batch for batch in rules.BATCHES if images // batch >= rules.STEPS_AN_EPOCH]
    return [*larger, rules.small_batch(images)]


def _step_seconds(speed: Speed, batch: int, machine: Machine) -> float:
    compute = speed.step + batch * speed.image
    if machine.device == "cpu":  # crops and networks share the cores
        return compute + batch * speed.crop / machine.cores
    return max(compute, batch * speed.crop / max(machine.workers, 1))


def most_at_a_time(speed: Speed, machine: Machine) -> int | None:
    """Images at a time that fit into the memory that is free; None where nobody knows that."""
    allowed = allowance(machine)
    if allowed is None:
        return None
    return max(int((allowed - speed.fixed_bytes) // max(speed.image_bytes, 1)), 0)


def allowance(machine: Machine) -> float | None:
    """Bytes of the free memory that a run may take; the rest is for what was not foreseen."""
    if machine.memory is None:
        return None
    return machine.memory * rules.MEMORY_SHARE[machine.device]


def _micro(speed: Speed, batch: int, machine: Machine) -> int:
    """Images at a time, at most ``batch``, in parts of one size that fit into memory."""
    fitting = most_at_a_time(speed, machine)
    if fitting is None:
        return batch
    if fitting < 1:
        return 0
    return -(-batch // -(-batch // min(fitting, batch)))
