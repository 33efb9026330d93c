"""``dino-kit recipe``: propose a recipe for some images and this machine."""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from dino_kit import distributed, files, log
from dino_kit.assemble import measure_step
from dino_kit.config import fields
from dino_kit.config.propose import RecipeConfig
from dino_kit.config.train import TrainConfig
from dino_kit.data.loader import default_workers, usable_cores
from dino_kit.data.sources.opening import open_training_source
from dino_kit.data.sources.source import Source
from dino_kit.errors import UserError
from dino_kit.preparation import pixels_of
from dino_kit.proposal import text
from dino_kit.proposal.fit import (
    Candidate,
    Request,
    Speed,
    Trial,
    fit,
    ladder,
    require_batch,
    settings_of,
    worth_trying,
)
from dino_kit.proposal.machine import find_machine
from dino_kit.proposal.propose import propose
from dino_kit.proposal.survey import Survey, look
from dino_kit.training.precision import resolve_precision

_FASTER = 1.15  # how much faster half precision must be on a CPU to be worth its rounding


def run(config: RecipeConfig) -> None:
    """Look at the images, time a few steps of each network that comes into question, and write.

    Raises:
        UserError: the images cannot be read, or the hours or the memory do not suffice.
    """
    if config.output is not None and Path(config.output).exists():
        raise UserError(
            f"--output {config.output} exists; remove it, or give the recipe another name."
        )
    # Standard output is the recipe's: whoever sends it to a file sees the rest on the terminal.
    with redirect_stdout(sys.stderr):
        written = _write(config)
    if config.output is None:
        log.say(written.removesuffix("\n"))
    else:
        files.write_text(config.output, written)
        log.say(f"written to {config.output}; it has a reason for each value. Next:")
        log.say(f"  dino-kit train {shlex.quote(config.output)} --output_dir OUT")


def _write(config: RecipeConfig) -> str:
    device = distributed.choose_device(config.device)
    source = open_training_source(config.data_path)
    request = Request(
        config.data_path,
        config.hours,
        config.total_batch_size,
        config.arch,
        config.device,
        _unusual_pixels(config),
    )
    survey = look(source, pixels_of(config))
    require_batch(survey, request)
    for sentence in survey.unreadable[:1]:
        log.notice(
            f"{len(survey.unreadable)} of {survey.sampled:,} images that were tried cannot be "
            f"used; a run takes others in their place, and ends beyond --max_bad_share: {sentence}"
        )
    machine = find_machine(device, usable_cores(), default_workers())
    if machine.is_busy:
        log.notice(
            f"The machine is busy: other programs leave {machine.share:.0%} of a core to a thread. "
            "The recipe is for as much as the hours hold in this state; on a free machine they "
            "hold more."
        )
    candidates = ladder(survey, config.arch)
    trials: list[Trial] = []
    log.say(
        f"{survey.images:,} images of about {survey.width} × {survey.height} pixels; timing a few "
        "steps of each network that may suit the hours"
    )
    for candidate in candidates:
        if not worth_trying(candidate, trials, survey, machine, request):
            break
        try:
            trial = _try(candidate, source, survey, request, device)
        except (MemoryError, torch.OutOfMemoryError):
            if not trials:
                raise
            log.say(f"  {candidate.title}: does not fit into memory")
            break
        trials.append(trial)
        rate = fit(trial, survey, machine, request)
        log.say(
            f"  {candidate.title}: {rate.steps_an_epoch * rate.batch / rate.epoch_seconds:.3g} "
            f"images a second in {trial.precision}"
        )
    proposal = propose(survey, machine, trials, request)
    asked = fields.command_line("recipe", config, [config.data_path], ("data_path", "output"))
    return text.as_text(proposal, asked, config.output or "mine.yaml")


def _try(
    candidate: Candidate, source: Source, survey: Survey, request: Request, device: torch.device
) -> Trial:
    """``candidate``, timed in the precision that suits the device."""
    settings = settings_of(candidate, survey)
    config = fields.from_plain(
        TrainConfig,
        {**settings, **dict(request.pixels), "data_path": "-", "output_dir": "-",
         "num_workers": 0, "epochs": 100, "freeze_last_layer": 0},
    )  # fmt: skip

    def timed(precision: str) -> Speed:
        return measure_step(config, source, device, precision)

    if device.type != "cpu":
        precision = resolve_precision("auto", None, device)
        return Trial(candidate, precision, timed(precision))
    exact, half = timed("fp32"), timed("bf16")
    if half.image * _FASTER < exact.image:
        return Trial(candidate, "bf16", half, (("fp32", exact.image),))
    return Trial(candidate, "fp32", exact, (("bf16", half.image),))


def _unusual_pixels(config: RecipeConfig) -> tuple[tuple[str, Any], ...]:
    names = ("in_chans", "exif", "value_range", "normalize")
    given = {name: getattr(config, name) for name in names}
    return tuple(
        (name, value) for name, value in given.items() if value != getattr(TrainConfig, name)
    )
