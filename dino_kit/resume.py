"""What a run goes on from: the newest checkpoint of its folder, if it is of the same run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dino_kit.config import fields
from dino_kit.config.train import RESUMABLE, TrainConfig
from dino_kit.errors import UserError
from dino_kit.training import checkpoint
from dino_kit.training.precision import resolve_precision


def find_checkpoint(
    config: TrainConfig, images: int, names: str, device: torch.device
) -> dict[str, Any] | None:
    """The checkpoint that ``config`` goes on from, if its folder has one.

    ``images`` is the number of those to train on, and ``names`` the fingerprint of their names.

    Raises:
        UserError: the folder holds a run that differs in a field that must not change.
    """
    if config.resume == "never":
        return None
    saved = checkpoint.newest(config.output_dir)
    if saved is None:
        return None
    needed = ("step", "config", "images", "skipped", "monitor")
    if any(name not in saved for name in needed) or not isinstance(saved["config"], dict):
        raise UserError(
            f"The checkpoint in {config.output_dir} was not written by dino-kit train, so a run "
            "cannot go on from it; give another --output_dir."
        )
    before = fields.from_plain(TrainConfig, saved["config"])
    changed = [
        f"{name} was {old} and is now {new}"
        for name, old, new in fields.differences(
            _with_one_precision(before, device),
            _with_one_precision(_with_measured(config, before), device),
        )
        if name not in RESUMABLE
    ]
    if saved["images"] != images:
        changed.append(f"the data had {saved['images']} images and now has {images}")
    elif saved.get("names", names) != names:  # older checkpoints do not say
        changed.append("the names of the images were others")
    if changed:
        raise UserError(
            f"{config.output_dir} holds a run with other settings: {'; '.join(changed)}. Give "
            "another --output_dir, or --resume never to begin again in this one."
        )
    return saved


def _with_measured(config: TrainConfig, before: TrainConfig) -> TrainConfig:
    """``config`` with the numbers that the run has measured, where it is to measure them."""
    if config.is_measured and isinstance(before.normalize, tuple):
        return replace(config, normalize=before.normalize)
    return config


def _with_one_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """``config`` with what ``use_fp16`` or ``auto`` mean on ``device`` written as ``precision``."""
    precision = config.asked_precision
    if precision == "auto" or device.type != "cuda" and config.use_fp16:
        precision = resolve_precision("auto", None, device)
    return replace(config, precision=precision, use_fp16=None)
