"""From a configuration to what the networks see: pixels, views, mean and deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dino_kit import distributed, log
from dino_kit.config.train import TrainConfig
from dino_kit.data import augment
from dino_kit.data.crops import View
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.source import Source
from dino_kit.data.statistics import measure
from dino_kit.normalize import statistics
from dino_kit.weights import EvalTransform

_OF_COLOUR = ("saturation", "hue", "gray_prob")


def pixels_of(config: Any) -> Pixels:
    """What an image becomes, by the settings of a run, or of a proposed one."""
    return Pixels(config.in_chans, config.exif, config.value_range)


def transform_of(config: TrainConfig) -> EvalTransform:
    """How images are prepared to look at a network of the run, whose normalisation is known."""
    mean, std = statistics(config.normalize, config.in_chans)
    return EvalTransform(
        config.global_crops_size, mean, std, pixels_of(config), config.crop_without_resize
    )


def view_groups(config: Any) -> list[list[View]]:
    """The views of an image, those of one size together: two global ones, then the local ones.

    ``config`` is whatever has the settings of crops.
    """
    coloured = config.in_chans == 3

    def view(kind: int, size: int, scale, ratio) -> View:
        return View(
            size=size,
            scale=None if config.crop_without_resize else scale,
            ratio=config.crop_ratio or ratio,
            flip_prob=config.flip_prob[kind],
            jitter_prob=config.jitter_prob[kind],
            brightness=config.brightness[kind],
            contrast=config.contrast[kind],
            saturation=config.saturation[kind] if coloured else 0.0,
            hue=config.hue[kind] if coloured else 0.0,
            gray_prob=config.gray_prob[kind] if coloured else 0.0,
            blur_prob=config.blur_prob[kind],
            blur_radius=(config.blur_radius_min[kind], config.blur_radius_max[kind]),
            solarize_prob=config.solarize_prob[kind],
            solarize_threshold=config.solarize_threshold[kind],
            vflip_prob=config.vflip[kind],
            rotate90_prob=config.rotate90[kind],
        )

    sizes = (config.global_crops_size, config.global_crops_scale, config.global_crops_ratio)
    groups = [[view(0, *sizes), view(1, *sizes)]]
    if config.local_crops_number:
        sizes = (config.local_crops_size, config.local_crops_scale, config.local_crops_ratio)
        groups.append([view(2, *sizes)] * config.local_crops_number)
    return groups


def views_to_load(
    config: Any, device: torch.device, views: Sequence[Sequence[View]] | None = None
) -> Sequence[Sequence[View]]:
    """The views as workers make them for ``device``; of those that it changes, the geometry alone.

    ``views`` take the place of the views of ``config``. A group in which a view has a ``render`` of
    its own is made to the end by the workers.
    """
    views = views or view_groups(config)
    if not _changes_on(device, config):
        return views
    return [
        [replace(view, render=augment.geometry) for view in group]
        if all(view.render is augment.render for view in group)
        else group
        for group in views
    ]


def _changes_on(device: torch.device, config: Any) -> bool:
    possible = config.in_chans == 3 and config.pixels == "fast"
    # Elsewhere the device shares its cores with the workers, or was not tried.
    wanted = config.augment == "device" or (config.augment == "auto" and device.type == "cuda")
    return possible and wanted


def tell_what_is_left_out(config: TrainConfig) -> None:
    """Notices where there are changes of colour to make, and no colours or no RGB."""
    if config.in_chans != 3 and config.augment == "device":
        log.notice(
            f"--augment device is for RGB images; at --in_chans {config.in_chans} the workers change "
            "brightness and contrast, and blur."
        )
    wanted = [name for name in _OF_COLOUR if any(getattr(config, name))]
    if config.in_chans != 3 and wanted:
        log.notice(
            f"{', '.join(f'--{name}' for name in wanted)} need RGB images, and are left out at "
            f"--in_chans {config.in_chans}."
        )


def with_normalization(
    config: TrainConfig, source: Source, saved: Mapping[str, Any] | None, device: torch.device
) -> TrainConfig:
    """``config`` with means and deviations in numbers where they are to be measured.

    A run that goes on has them in its checkpoint, ``saved``; else the main process measures.

    Raises:
        UserError: no image of the sample can be used.
    """
    if not config.is_measured:
        return config
    if saved:
        return replace(config, normalize=tuple(saved["config"]["normalize"]))
    # Apple's GPUs have no float64, and a process there is alone.
    where = device if device.type == "cuda" else "cpu"
    found = torch.zeros(2, config.in_chans, dtype=torch.float64, device=where)
    images = 0
    if distributed.is_main():
        *measured, images = measure(source, pixels_of(config))
        found += torch.tensor(measured, dtype=torch.float64, device=where)
    mean, std = distributed.all_reduce_sum(found).tolist()  # of the main process alone
    still = [str(place) for place, deviation in enumerate(std, 1) if deviation == 0]
    if still:
        log.notice(
            f"Channel {', '.join(still)} has the same value in every pixel of the sample; its "
            "deviation counts as 1."
        )
    std = [deviation or 1.0 for deviation in std]
    log.say(
        f"normalised as measured on {images:,} images: mean "
        f"{_numbers(mean)}, deviation {_numbers(std)}"
    )
    return replace(config, normalize=(*mean, *std))


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
