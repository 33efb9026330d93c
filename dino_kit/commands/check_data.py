"""``dino-kit check-data``: what is there, before a run costs anything."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dino_kit import distributed, figures, files, log
from dino_kit.assemble import decoder, measure_step, view_groups
from dino_kit.checking import feeding, text
from dino_kit.checking.feeding import Device
from dino_kit.checking.sheet import contact_sheet
from dino_kit.checking.summary import summarize
from dino_kit.config import fields, recipe
from dino_kit.config.check import CheckConfig
from dino_kit.config.train import TrainConfig
from dino_kit.data.inspection import Findings, inspect
from dino_kit.data.loader import default_workers, usable_cores
from dino_kit.data.sources.opening import LISTS, Data, open_data
from dino_kit.data.sources.source import Source, Subset
from dino_kit.errors import UserError
from dino_kit.preparation import pixels_of, tell_what_is_left_out, views_to_load
from dino_kit.proposal.machine import find_machine
from dino_kit.training.precision import resolve_precision

_TIMED = 64  # images, at most, of a step that is timed


def run(config: CheckConfig) -> int:
    """Read every image once, make a contact sheet, time a step; the status is 1 if one is broken.

    Raises:
        UserError: nothing there can be read as images, or the settings do not fit together.
    """
    if not config.json:
        return _check(config)[1]
    # Standard output is the numbers': whoever sends them to a file sees the rest on the terminal.
    with redirect_stdout(sys.stderr):
        numbers, status = _check(config)
    # In ASCII, so that any name is JSON in any terminal's encoding.
    log.say(json.dumps(numbers, indent=2))
    return status


def _check(config: CheckConfig) -> tuple[dict[str, Any], int]:
    train = _as_run(config)
    device = distributed.choose_device(config.device)
    precision = resolve_precision(train.precision, train.use_fp16, device)
    data, sources = _open(config)
    pixels, groups = pixels_of(train), view_groups(train)
    views = [view for group in groups for view in group]
    workers = default_workers() if config.num_workers is None else config.num_workers
    found = {
        part: inspect(
            source, pixels, views, most=config.max_images, num_workers=workers,
            description=f"reading {part or 'images'}",
        )
        for part, source in sources.items()
    }  # fmt: skip
    crop = config.global_crops_size
    summary = summarize(found, crop)
    settled = ("turned",) * (config.exif == "apply") + ("transparent",) * (pixels.in_chans in (2, 4))
    text.tell(summary, data.root, crop, settled)
    training = data.training if data.training in sources else next(iter(sources))
    _tell_batch(train, sources[training])

    log.say("")
    sheet = _write_sheet(config, sources[training], train)
    speed = _feeding(train, found, training, device, precision)
    numbers = {
        "data_path": config.data_path,
        "images": summary.checked,
        **asdict(summary),
        "contact_sheet": sheet,
        "speed": speed,
    }
    return numbers, 1 if summary.broken else 0


def _as_run(config: CheckConfig) -> TrainConfig:
    """The run whose images these are, as far as it is known."""
    return fields.from_plain(TrainConfig, fields.to_plain(config) | {"num_workers": 0})


def _open(config: CheckConfig) -> tuple[Data, dict[str, Source]]:
    """The images, and by the names of the parts their sources."""
    path = config.data_path
    if not Path(path).exists() and path in recipe.shipped():
        raise UserError(
            f"{path} is a recipe; name the images, too: dino-kit check-data {path} FOLDER."
        )
    files.require_folder("output_dir", config.output_dir)
    data = open_data(path, Path(config.output_dir) / LISTS, config.download)
    return data, {part: data.open(part) for part in data.parts or ("",)}


def _tell_batch(train: TrainConfig, source: Source) -> None:
    batch = train.total_batch_size or train.batch_size_per_gpu
    if batch > len(source):
        log.paragraph(
            f"There are fewer images to train on than a batch of {batch}, so a run needs "
            f"--total_batch_size {len(source)} or less."
        )


def _write_sheet(config: CheckConfig, source: Source, train: TrainConfig) -> str | None:
    tell_what_is_left_out(train)
    title = f"What the network will see of {source.root}"
    sheet = contact_sheet(source, view_groups(train), pixels_of(train), config.seed, title)
    if sheet is None:
        log.say("There is no image to show.")
        return None
    path = Path(config.output_dir) / "contact_sheet.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.save(path, sheet)
    log.paragraph(f"What the network will see: {path}, some images and their crops.")
    return str(path)


def _feeding(
    train: TrainConfig,
    found: dict[str, Findings],
    training: str,
    device: torch.device,
    precision: str,
) -> dict[str, Any] | None:
    source, pixels, groups = found[training].source, pixels_of(train), views_to_load(train, device)
    cost = feeding.cost(
        list(found.values()), source, groups, pixels, train.seed, decoder(train, groups)
    )
    if cost is None:
        return None
    log.paragraph(
        f"One worker prepares {cost.rate:,.0f} images a second: it reads one in "
        f"{_milliseconds(cost.read)} (as in the pass above, from the disk or the system's cache), "
        f"decodes it in {_milliseconds(cost.decode)} and makes its crops in "
        f"{_milliseconds(cost.crops)} (measured on {cost.sampled})."
    )
    numbers = {
        "read_ms": 1000 * cost.read,
        "decode_ms": 1000 * cost.decode,
        "crops_ms": 1000 * cost.crops,
        "images_a_second_a_worker": cost.rate,
    }
    rate = _step_rate(train, found[training], device, precision)
    machine = find_machine(device, usable_cores(), default_workers())
    if rate is None:
        return numbers
    taker = Device(machine.device, machine.name, rate, machine.cores)
    log.paragraph(feeding.advice(cost, taker))
    return numbers | {
        "device": str(device),
        "precision": precision,
        "images_a_second_of_the_device": rate,
        "cores": machine.cores,
        "num_workers": feeding.workers(cost, taker),
    }


def _step_rate(
    train: TrainConfig, found: Findings, device: torch.device, precision: str
) -> float | None:
    """Images a second that the networks take; None where memory does not suffice to tell."""
    readable = found.indices[found.readable]
    source = Subset(found.source, readable[: _TIMED].tolist())
    log.say(f"timing a step on {device} in {precision}")

    try:
        speed = measure_step(train, source, device, precision, 1 if device.type == "cpu" else 4)
    except (MemoryError, torch.OutOfMemoryError):
        log.notice(f"A step of this network does not fit into the memory of {device}.")
        return None
    batch = train.total_batch_size or train.batch_size_per_gpu
    return speed.rate(batch)


def _milliseconds(seconds: float) -> str:
    told = f"{1000 * seconds:.1f}" if seconds < 0.01 else f"{1000 * seconds:,.0f}"
    return "less than 0.1 ms" if told == "0.0" else f"{told} ms"
