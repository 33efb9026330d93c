"""From what was seen and measured to settings, each with its reason: a pure function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dino_kit import log
from dino_kit.errors import UserError
from dino_kit.proposal import rules
from dino_kit.proposal.fit import Request, Run, Trial, fit, ladder, suffices
from dino_kit.proposal.machine import Machine
from dino_kit.proposal.survey import Survey


class Choice(NamedTuple):
    """Settings that go together, and why they are as they are."""

    values: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Proposal:
    """A recipe before it is written."""

    survey: Survey
    machine: Machine
    request: Request
    run: Run
    choices: list[Choice] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for choice in self.choices for name, value in choice.values.items()}


def propose(
    survey: Survey, machine: Machine, trials: Sequence[Trial], request: Request
) -> Proposal:
    """The recipe of the largest of ``trials``, from cheap to dear, that the hours suffice for.

    Raises:
        UserError: not one does; the sentence says what would be needed.
    """
    runs = [fit(trial, survey, machine, request) for trial in trials]
    # The least there is need not be worth its size, if it can run at all.
    good = [run for place, run in enumerate(runs) if suffices(run, survey, asked=place == 0)]
    if not good:
        raise UserError(_too_little(runs[0], survey, machine, request))
    run = good[-1]
    choices = [
        *_network(run, runs, survey, request),
        *_head(run, survey),
        *_objective(run),
        *_optimisation(run, survey, machine, request),
        *_crops(run, survey),
        *_rest(run, request),
    ]
    return Proposal(survey, machine, request, run, choices)


def _too_little(run: Run, survey: Survey, machine: Machine, request: Request) -> str:
    title = run.trial.candidate.title
    if not run.micro:
        needed = run.trial.speed.fixed_bytes + run.trial.speed.image_bytes
        return (
            f"The memory does not suffice: a {title}, needs {needed / 1e9:.1f} GB for a single "
            f"image, and {machine.memory_of} has {machine.memory / 1e9:.1f} GB free, of which "
            f"{rules.MEMORY_SHARE[machine.device]:.0%} may be planned with."
        )
    hours = run.epoch_seconds / 3600 / (1 - rules.RESERVE)
    digits = 2 - math.floor(math.log10(hours)) - 1
    needed = math.ceil(hours * 10**digits * 1.05) / 10**digits
    least = "what was asked for" if request.arch else "the least that is proposed"
    return (
        f"--hours {request.hours:g} does not suffice for one epoch: {least}, a {title}, takes "
        f"{log.duration(run.epoch_seconds)} for {survey.images:,} images here, and "
        f"{rules.RESERVE:.0%} of the hours are kept for the start and an evaluation; give --hours "
        f"{needed:g} or more, or fewer images."
    )


def _network(run: Run, runs: list[Run], survey: Survey, request: Request) -> list[Choice]:
    network, crops = run.trial.candidate
    if request.arch not in (None, rules.FREE_VIT):
        reason = "It was asked for by --arch."
    else:
        reason = (
            f"The {'largest' if network.seen else 'least'} that the hours suffice for: they hold "
            f"{run.capacity:,} images of it, each counted as often as it comes"
            f"{f', and {network.seen:,} are worth its size' if network.seen else ''}. "
            f"{_why_not_more(run, runs, survey, request)}"
        )
    grid = f"A global crop is a grid of {crops.grid} × {crops.grid}"
    grid += ", as in the paper" if crops.grid == 14 else "; the paper's is 14 × 14"
    depth = (
        "Stochastic depth keeps a deep network from learning by heart."
        if network.drop_path_rate
        else "Stochastic depth is for networks that could learn by heart; this one is too small."
    )
    return [
        Choice({"arch": network.arch, **dict(network.sizes)}, reason),
        Choice(
            {"patch_size": crops.patch},
            f"{grid}. Smaller patches give better features and cost more.",
        ),
        Choice({"drop_path_rate": network.drop_path_rate}, depth),
    ]


def _why_not_more(run: Run, runs: list[Run], survey: Survey, request: Request) -> str:
    candidates = ladder(survey, request.arch)
    place = candidates.index(run.trial.candidate) + 1
    if place == len(candidates):
        return "There is no larger one here."
    candidate = candidates[place]
    title = f"The next, a {candidate.title},"
    tried = next((other for other in runs if other.trial.candidate == candidate), None)
    if tried and not tried.micro:
        return f"{title} does not fit into memory."
    if survey.images < candidate.network.images:
        return f"{title} wants {candidate.network.images:,} different images."
    if tried and not tried.epochs:
        return f"{title} would not see all of them once."
    if tried:
        return f"{title} would want {candidate.network.seen:,}, and they hold {tried.capacity:,}."
    return f"{title} would want {candidate.network.seen:,}, and is slower."


def _head(run: Run, survey: Survey) -> list[Choice]:
    network = run.trial.candidate.network
    prototypes = rules.out_dim(survey.images)
    low, high = rules.PROTOTYPES
    choices = [
        Choice(
            {"out_dim": prototypes},
            f"Prototypes: about one for {rules.IMAGES_PER_PROTOTYPE} images, from {low:,} to "
            f"{high:,}. Far more than images can fill only slow the start.",
        )
    ]
    least, most = rules.BN_BATCH
    norm = least <= run.batch <= most and run.micro == run.batch
    if norm:
        reason = f"With {run.batch} images a step, a batch norm gets the first steps going."
    elif run.batch > most:
        reason = f"With {run.batch} images a step it is not needed."
    elif run.batch < least:
        reason = f"The statistics of {run.batch} images would say too little."
    else:
        reason = "Batches in parts do not allow a batch norm: each part would have its own."
    choices.append(Choice({"use_bn_in_head": norm}, reason))
    if network.head:
        reason = f"The paper's head would be many times the size of a {network.title}."
        choices.append(Choice(dict(network.head), reason))
    return choices


def _objective(run: Run) -> list[Choice]:
    start = end = rules.TEACHER_TEMP
    reason, warm = "Sharp targets from the first step; above 0.07 most runs are unstable.", 0
    arch = run.trial.candidate.network.arch
    if run.steps >= rules.LONG_RUN_STEPS and arch in rules.LONG_RUN_NETWORKS:
        warm = round(rules.WARMUP_SHARE * run.epochs)
        end = rules.LONG_RUN_TEMP if warm else start
        reason = (
            f"It grows over {warm * run.steps_an_epoch:,} steps, as in the published runs of 300 "
            "epochs and more, for this run is long too."
        )
    temperatures = {
        "warmup_teacher_temp": start,
        "teacher_temp": end,
        "warmup_teacher_temp_epochs": warm,
        "student_temp": rules.STUDENT_TEMP,
    }
    momentum = rules.momentum(run.steps, run.batch)
    mean = round(1 / (1 - momentum))
    return [
        Choice(temperatures, reason),
        Choice(
            {"momentum_teacher": momentum},
            f"The teacher is a mean over about {mean:,} steps of {run.steps:,}; it grows to 1. The "
            "fewer images a step, the longer the mean should be, but a short run has to hold "
            "several.",
        ),
    ]


def _optimisation(run: Run, survey: Survey, machine: Machine, request: Request) -> list[Choice]:
    network = run.trial.candidate.network
    last = (
        "the longest that is proposed, for on the same images more would add little"
        if (run.epochs + 1) * run.epoch_seconds < request.hours * 3600 * (1 - rules.RESERVE)
        else f"what --hours {request.hours:g} holds, less {rules.RESERVE:.0%} for the start and an "
        "evaluation"
    )
    if request.total_batch_size:
        batch = "It was asked for by --total_batch_size."
    elif run.batch in rules.BATCHES:
        batch = (
            f"The largest, up to the paper's, that leaves {rules.STEPS_FOR_LARGER_BATCH:,} steps "
            f"and {rules.STEPS_AN_EPOCH} an epoch."
        )
    elif run.batch == rules.SMALL_BATCH:
        batch = "Steps are what so short a run lacks, so it is the smallest that is proposed."
    else:
        batch = f"There are only {survey.images:,} images."
    parts = -(-run.batch // run.micro)
    batch += _memory(run, machine)
    if parts > 1:
        batch += f" So each step is accumulated from {parts} parts."
    peak = network.lr * run.batch / 256
    warm = round(rules.WARMUP_SHARE * run.epochs)
    short = run.epochs < rules.FEWEST_EPOCHS_TO_WARM
    warm = 0 if short else max(warm, 1)
    # One epoch with still prototypes is 1 % of the paper's run.
    frozen = 0 if short else 1
    coarse = (
        f"of {run.steps_an_epoch:,} steps {'is the whole run' if run.epochs == 1 else ''}"
        f"{f'would be a large part of the {run.epochs}' if run.epochs > 1 else ''}, and it cannot "
        "be cut"
    )
    choices = [
        Choice(
            {"epochs": run.epochs},
            f"{run.steps:,} steps, {run.steps_an_epoch:,} an epoch: {last}.",
        ),
        Choice({"total_batch_size": run.batch, "batch_size_per_gpu": run.micro}, batch),
        Choice(
            {"lr": network.lr},
            f"For a batch of 256: {peak:.2g} at the peak of this run. Small networks in short runs "
            "bear more than the paper's."
            if network.lr > 0.0005
            else f"For a batch of 256: {peak:.2g} at the peak of this run.",
        ),
        Choice(
            {"warmup_epochs": warm},
            f"None: one epoch, {coarse}." if short else
            f"{warm * run.steps_an_epoch:,} steps, a tenth of the run, as in the paper, in whole "
            "epochs.",
        ),
        Choice(
            {"weight_decay": 0.04, "weight_decay_end": 0.4},
            "It acts by the rate, so that it hardly touches a short run.",
        ),
        Choice({"clip_grad": 3.0}, "Of each tensor's norm: rarely reached, and against accidents."),
        Choice(
            {"freeze_last_layer": frozen},
            f"None: one epoch, {coarse}." if short else
            f"The prototypes stay for {run.steps_an_epoch:,} steps, until the rest has settled.",
        ),
    ]
    if machine.device == "cpu":
        choices.append(_precision(run.trial))
    return choices


def _memory(run: Run, machine: Machine) -> str:
    speed = run.trial.speed
    needed = speed.fixed_bytes + run.micro * speed.image_bytes
    if machine.memory is None:
        return (
            f" {run.micro} at a time need about {needed / 1e9:.1f} GB; how much is free, this "
            "system does not say."
        )
    return (
        f" {run.micro} at a time need about {needed / 1e9:.1f} GB of the "
        f"{machine.memory / 1e9:.1f} GB that {machine.memory_of} has free."
    )


def _precision(trial: Trial) -> Choice:
    chosen = trial.speed.image
    for precision, seconds in trial.others:
        if trial.precision == "bf16":
            return Choice(
                {"precision": "bf16"}, f"Measured: {seconds / chosen:.1f} times as fast as fp32."
            )
        how = f"{seconds / chosen:.1f} times as long" if seconds > chosen else "hardly less"
        return Choice(
            {"precision": trial.precision}, f"Measured: {precision} takes {how} on this machine."
        )
    return Choice({"precision": trial.precision}, "The exact one; no other was measured.")


def _crops(run: Run, survey: Survey) -> list[Choice]:
    crops = run.trial.candidate.crops
    settings = rules.crop_settings(survey, crops)
    side = survey.shorter[1]
    size = f"The pictures' shorter sides are of {side:,} pixels in the middle"
    if crops.globals > side:
        reason = f"{size}; {crops.grid} × {crops.grid} patches are the least to learn from."
    elif crops.globals < rules.crop_sizes(survey).globals:
        reason = f"{size}. Crops of half the size are seen several times as often in the hours."
    elif crops.globals == rules.LARGEST_CROP:
        reason = f"{size}, so there is enough for the paper's crops."
    else:
        reason = (
            f"{size}. Crops of three quarters of that cost about half of whole ones, and on small "
            "pictures gave the better features in equal time; enlarged ones would cost more and "
            "show nothing more."
        )
    number = (
        "A local crop costs little beside the two global ones."
        if crops.number == rules.LOCAL_CROPS
        else f"On a grid of {crops.grid} × {crops.grid} a local crop is not much cheaper than a "
        "global one, so fewer are worth their time."
    )
    least = math.sqrt(crops.local_scale[0] * survey.width * survey.height)
    groups = {
        ("global_crops_size", "local_crops_size"): reason,
        ("local_crops_number",): number,
        ("global_crops_scale", "local_crops_scale"): (
            f"Shares of the picture's area. The smallest local crop has {least:.0f} pixels a side "
            "before it is resized."
        ),
        ("flip_prob",): "A mirrored digit is another sign.",
        ("saturation", "hue", "gray_prob"): (
            "The images have no colour that could change."
            if survey.channels == 3
            else "They change the colours of RGB images, which these are not."
        ),
        ("blur_prob", "solarize_prob"): "Pictures this small hold a stroke or two, and no detail.",
        ("blur_radius_min", "blur_radius_max"): (
            f"The paper's 0.1 to 2 pixels are for crops of 224, and at {crops.globals} would wipe "
            "out the picture."
        ),
    }
    chosen = [
        Choice({name: settings[name] for name in names if name in settings}, reason)
        for names, reason in groups.items()
    ]
    if not survey.digits:
        flips = "Set it to 0 where left and right differ in meaning, as in letters or X-rays."
        chosen.append(Choice({"flip_prob": (0.5,) * 3}, flips))
    return [choice for choice in chosen if choice.values]


def _rest(run: Run, request: Request) -> list[Choice]:
    choices = [Choice({"data_path": request.data_path}, "")]
    if request.pixels:
        flags = ", ".join(f"--{name}" for name, _ in request.pixels)
        choices.append(Choice(dict(request.pixels), f"As asked for by {flags}."))
    if request.device != "auto":
        choices.append(Choice({"device": request.device}, "It was asked for by --device."))
    copies = run.epochs // rules.COPIES if run.epochs >= rules.EPOCHS_FOR_COPIES else 0
    every = max(1, min(rules.LOG_EVERY, run.steps // rules.LOG_LINES))
    choices.append(
        Choice(
            {"saveckp_freq": copies},
            "Checkpoints that are kept for good; the newest is written after each epoch anyway."
            if not copies else f"{rules.COPIES} checkpoints of the run are kept for good.",
        )
    )
    if run.epoch_seconds > 2 * 60 * rules.SAVE_MINUTES:
        step = run.epoch_seconds / run.steps_an_epoch
        steps = max(1, round(60 * rules.SAVE_MINUTES / step))
        reason = f"An epoch takes long: so about every {rules.SAVE_MINUTES:.0f} minutes are safe."
        choices.append(Choice({"save_every_steps": steps}, reason))
    choices.append(Choice({"log_every_steps": every}, f"{run.steps // every:,} lines in all."))
    return choices
