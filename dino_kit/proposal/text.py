"""A proposal as the text of a recipe, which says why."""

from __future__ import annotations

import textwrap
from typing import Any

from dino_kit.config import fields, recipe
from dino_kit.config.architectures import VIT_SIZES
from dino_kit.config.train import TrainConfig
from dino_kit.proposal.fit import Run
from dino_kit.proposal.machine import Machine
from dino_kit.proposal.propose import Proposal
from dino_kit.proposal.survey import Survey

PAPER = "vits16_100ep"  # the plain run of the paper
_OWN = ("data_path", "output_dir", "device")  # no matter of a method
_WIDTH, _COLUMN, _LABEL = 100, 34, 10


def as_text(proposal: Proposal, command: str, file: str) -> str:
    """The recipe as commented YAML.

    ``command`` is the one that it was proposed by, ``file`` what the reader calls it.
    """
    blocks = [_heading(proposal, command, file)]
    paper = _paper()
    for title, declared in fields.groups(TrainConfig):
        here = {field.name for field in declared}
        chosen = [choice for choice in proposal.choices if here & choice.values.keys()]
        if not chosen:
            continue
        blocks.append(f"# {title.partition(' (')[0]} ".ljust(_WIDTH, "-"))
        for choice in chosen:
            lines = _comment(choice.reason)
            lines += [_line(name, value, paper) for name, value in choice.values.items()]
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _heading(proposal: Proposal, command: str, file: str) -> str:
    survey, run = proposal.survey, proposal.run
    plural = "image" if survey.images == 1 else "images"
    lines = _comment(
        f"A recipe for {survey.images:,} {plural} of about {survey.width} × {survey.height} "
        f"pixels, {_about(run.seconds)} on this machine. Each value has its reason above it, and "
        f"beside it what the plain run of the paper has, {PAPER}."
    )
    lines += ["#"]
    lines += [f"#   dino-kit train {file} --output_dir OUT"]
    lines += [f"#   dino-kit config {file} --diff {PAPER}"]
    for label, text in {
        "images": _seen(survey),
        "machine": _described(proposal.machine),
        "measured": _measured(run),
        "cost": f"about {_about(run.seconds)} of --hours {proposal.request.hours:g}, for "
        f"{run.epochs:,} epoch{'s' * (run.epochs > 1)} of {run.steps_an_epoch:,} steps of "
        f"{run.batch} images",
        "unknown": "how good the features get. Sizes and times are measured; the values below "
        "follow rules of thumb between the published runs and small ones, made before these images "
        "were seen. `dino-kit knn OUT` tells, where there are labels, what came of it",
        "made by": command,
    }.items():
        lines += ["#", *_comment(text, label)]
    return "\n".join(lines)


def _about(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.95 * size:
            count = seconds / size
            return f"{count:.2g} {unit}" if count < 99 else f"{count:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _seen(survey: Survey) -> str:
    smallest, middle, largest = survey.shorter
    sides = (
        f"{middle} pixels on the shorter side" if smallest == largest
        else f"shorter sides of {smallest} to {largest} pixels, {middle} in the middle"
    )
    colour = (
        f"{survey.channels} channel{'s' * (survey.channels > 1)}" if survey.channels != 3
        else "in colour" if not survey.gray
        else "without colour" if survey.gray == 1
        else f"{survey.gray:.0%} without colour"
    )
    labels = (
        "no labels, and none are needed" if survey.classes in (None, 1)
        else f"{survey.classes} folders, which may be classes, and which training does not use"
    )
    part = f"{survey.sampled:,} of {survey.images:,}"
    sample = "all" if survey.sampled == survey.images else part
    kinds = f"{', '.join(survey.kinds)}, " if survey.kinds else ""
    broken = (
        f". Of those looked at {len(survey.unreadable)} cannot be used; a run takes others in "
        "their place, and ends beyond --max_bad_share: "
        f"{survey.unreadable[0].rstrip('.')}" if survey.unreadable else ""
    )
    return f"{sample} looked at: {kinds}{sides}, {colour}; {labels}{broken}"


def _described(machine: Machine) -> str:
    memory = (
        f"{machine.memory_of} has {machine.memory / 1e9:.1f} GB free" if machine.memory is not None
        else "how much memory is free, the system does not say"
    )
    cores = f"{machine.cores} usable core{'s' * (machine.cores != 1)}"
    if machine.device == "cpu":
        described = f"no GPU used, {cores}; {memory}"
    else:
        named = f"{machine.device} ({machine.name})" if machine.name else machine.device
        described = f"{named}, {cores}; {memory}"
    if machine.devices > 1:
        described += (
            f". One of {machine.devices} GPUs was measured: torchrun --nproc_per_node="
            f"{machine.devices} launch/train.py uses all, in a part of the time"
        )
    if machine.is_busy:
        described += (
            f". It was busy: other programs left {machine.share:.0%} of a core to a thread. All "
            "times are of this state; on a free machine the run would be over sooner"
        )
    return described


def _measured(run: Run) -> str:
    speed = run.trial.speed
    besides = f", a step {1000 * speed.step:.3g} ms besides" if speed.step else ""
    return (
        f"{run.steps_an_epoch * run.batch / run.epoch_seconds:.3g} images a second for a "
        f"{run.trial.candidate.title}, in {run.trial.precision}: an image takes "
        f"{1000 * speed.image:.3g} ms in the networks and {1000 * speed.crop:.3g} ms of one core "
        f"for its crops{besides}; a checkpoint, one an epoch, {speed.save:.2g} s"
    )


def _paper() -> dict[str, Any]:
    """The settings of the paper's plain run, the sizes of its network among them."""
    known = recipe.read(TrainConfig, PAPER)
    config = fields.create(TrainConfig, known, missing_ok=True)
    plain = fields.to_plain(config) | VIT_SIZES[config.arch]
    return {name: value for name, value in plain.items() if name not in _OWN}


def _line(name: str, value: Any, paper: dict[str, Any]) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    # Three equal numbers, for the three views, are written as one.
    short = plain[0] if isinstance(plain, list) and plain == plain[:1] * 3 else plain
    said = f"{name}: {recipe.written(short)}"
    if name not in paper:
        return said
    theirs = fields.describe_value(TrainConfig, name, paper[name])
    beside = "as in the paper" if plain == paper[name] else f"the paper: {theirs}"
    return f"{said:<{_COLUMN}}  # {beside}"


def _comment(text: str, label: str = "") -> list[str]:
    # A path may hold characters that would end a comment.
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    indent = f"# {label:<{_LABEL}}" if label else "# "
    return textwrap.wrap(
        printable, _WIDTH, initial_indent=indent, subsequent_indent="# ".ljust(len(indent)),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
