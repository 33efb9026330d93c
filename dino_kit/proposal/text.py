"""A proposal as the text of a recipe, which says why."""

from __future__ import annotations

import textwrap
from typing import Any

from dino_kit import log
from dino_kit.config import fields, recipe
from dino_kit.config.architectures import VIT_SIZES
from dino_kit.config.train import TrainConfig
from dino_kit.proposal.machine import Machine
from dino_kit.proposal.propose import Proposal
from dino_kit.proposal.survey import Survey

PAPER = "vits16_100ep"  # the plain run of the paper
_WIDTH, _COLUMN = 100, 34


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
        lines = [f"# {title.partition(' (')[0]}"]
        for choice in chosen:
            lines += ["", *_comment(choice.reason)] if choice.reason else [""]
            lines += [_line(name, value, paper) for name, value in choice.values.items()]
        blocks.append("\n".join(lines))
    return "\n\n\n".join(blocks) + "\n"


def _heading(proposal: Proposal, command: str, file: str) -> str:
    run, machine, request = proposal.run, proposal.machine, proposal.request
    candidate, speed = run.trial.candidate, run.trial.speed
    images_a_second = run.steps_an_epoch * run.batch / run.epoch_seconds
    paragraphs = [
        f"A proposal for {_images(proposal.survey)}.",
        None,
        f"Images: {_seen(proposal.survey)}",
        f"Machine: {_described(machine)}",
        f"Measured: {candidate.title}, in {run.trial.precision}: an image takes "
        f"{1000 * speed.image:.3g} ms in the networks and {1000 * speed.crop:.3g} ms of one core for "
        f"its crops, a step {1000 * speed.step:.3g} ms besides, a checkpoint {speed.save:.2g} s; in "
        f"all {images_a_second:.3g} images a second.",
        f"Cost: about {log.duration(run.seconds)}, of the {request.hours:g} hours that were given: "
        f"{run.epochs:,} epochs of {run.steps_an_epoch:,} steps of {run.batch}.",
        "Not measured: how good the features get. Sizes and times are measured, the rest follows "
        "rules of thumb between the published runs and small ones; the rules were made before these "
        "images were seen. `dino-kit knn OUT` with labels tells what came of it.",
        f"Proposed by: {command}",
    ]
    lines: list[str] = []
    for paragraph in paragraphs:
        if paragraph is None:
            lines += [
                "#", f"#   dino-kit train {file} --output_dir OUT",
                f"#   dino-kit config {file} --diff {PAPER}", "#",
            ]  # fmt: skip
        else:
            lines += _comment(paragraph)
    lines += ["#", *_comment("Each value has its reason above it, and beside it what the paper's "
                             f"plain run has, {PAPER}.")]
    return "\n".join(lines)


def _images(survey: Survey) -> str:
    plural = "image" if survey.images == 1 else "images"
    return f"{survey.images:,} {plural} of about {survey.width} × {survey.height} pixels"


def _seen(survey: Survey) -> str:
    smallest, middle, largest = survey.shorter
    sides = (
        f"{middle} pixels on the shorter side" if smallest == largest
        else f"shorter sides of {smallest} to {largest} pixels, {middle} in the middle"
    )
    colour = (
        "in colour" if not survey.gray
        else "without colour" if survey.gray == 1
        else f"{survey.gray:.0%} without colour"
    )
    labels = (
        "no labels" if survey.classes is None
        else f"{survey.classes} folders, which may be classes; nothing here uses them"
    )
    sample = "all of them" if survey.sampled == survey.images else (
        f"{survey.sampled:,} of {survey.images:,}")
    kinds = f"{', '.join(survey.kinds)}; " if survey.kinds else ""
    broken = ""
    if survey.unreadable:
        broken = (
            f" {len(survey.unreadable)} of these cannot be read, and a run stops at one that "
            f"cannot: {survey.unreadable[0]}"
        )
    return f"{sample} were looked at: {kinds}{sides}; {colour}; {labels}.{broken}"


def _described(machine: Machine) -> str:
    memory = (
        f"{machine.memory_of} has {machine.memory / 1e9:.1f} GB free" if machine.memory is not None
        else "how much memory is free, this system does not say"
    )
    if machine.device == "cpu":
        return f"CPU, {machine.cores} usable core{'s' * (machine.cores != 1)}; {memory}."
    several = ""
    if machine.devices > 1:
        several = (
            f" One of {machine.devices} GPUs was measured: torchrun --nproc_per_node="
            f"{machine.devices} launch/train.py uses all, in a part of the time."
        )
    named = f"{machine.device} ({machine.name})" if machine.name else machine.device
    return f"{named}, {machine.workers} data workers; {memory}.{several}"


def _paper() -> dict[str, Any]:
    known = recipe.read(TrainConfig, PAPER)
    config = fields.create(TrainConfig, known, missing_ok=True)
    return fields.to_plain(config) | VIT_SIZES[config.arch]


def _line(name: str, value: Any, paper: dict[str, Any]) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    said = f"{name}: {recipe.written(_short(plain))}"
    if name in ("data_path", "device"):
        return said
    theirs = paper[name]
    beside = "as in the paper" if plain == theirs else f"the paper: {_shown(theirs)}"
    return f"{said:<{_COLUMN}}  # {beside}"


def _short(value: Any) -> Any:
    """Three equal numbers, for the three views, are written as one."""
    if isinstance(value, list) and len(value) == 3 and len(set(value)) == 1:
        return value[0]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        short = _short(value)
        return " ".join(map(str, value)) if isinstance(short, list) else str(short)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _comment(text: str) -> list[str]:
    # A path may hold characters that would end a comment.
    printable = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return textwrap.wrap(
        printable, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False,
        break_on_hyphens=False,
    )
