"""From an evaluator's settings to a backbone, a place for the results, and what repeats them."""

from __future__ import annotations

import dataclasses
import platform
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

from dino_kit import log, weights
from dino_kit.config import fields
from dino_kit.config.evaluate import Checkpoint
from dino_kit.weights import Loaded

_PACKAGES = ("dino_kit", "torch", "torchvision", "faiss-cpu", "numpy", "pillow")


def load_checkpoint(config: Checkpoint) -> Loaded:
    """The backbone that ``config`` names, introduced in a line.

    Raises:
        UserError: the checkpoint does not fit what ``config`` says of it.
    """
    loaded = weights.load(
        config.weights,
        config.checkpoint_key,
        arch=config.arch,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        mlp_grid=config.mlp_grid,
    )
    log.say(loaded.summary())
    return loaded


def place(output_dir: str | None, loaded: Loaded, name: str) -> Path:
    """Where results called ``name`` go, without a suffix: beside the checkpoint unless told else.

    ``checkpoint.pth``'s teacher has the plain name; another file or network adds its own.
    """
    path = Path(loaded.path)
    parts = [name]
    if path.name != weights.NEWEST:
        parts.append(path.stem)
    if loaded.which not in (None, "teacher"):
        parts.append(loaded.which)
    return Path(output_dir or path.parent) / "_".join(parts)


def origin(loaded: Loaded) -> dict[str, Any]:
    """Which weights were evaluated, as plain data."""
    return {
        "checkpoint": {
            "path": str(Path(loaded.path).absolute()),
            "sha256": loaded.sha256,
            "network": loaded.which,
            "epoch": loaded.epoch,
            "step": loaded.step,
        },
        "architecture": loaded.architecture,
    }


def repetition(command: str, config: Checkpoint) -> dict[str, Any]:
    """What it takes to evaluate again: settings, a command line and versions, as plain data."""
    return {
        "settings": fields.to_plain(config),
        "command": _command_line(command, config),
        "versions": versions(),
    }


def _command_line(command: str, config: Checkpoint) -> str:
    words = ["dino-kit", command]
    if config.weights:
        words.append(config.weights)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in ("checkpoint", "pretrained_weights"):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name}", *map(str, values)]
    return shlex.join(words)


def versions() -> dict[str, str | None]:
    """Python's version, and those of the packages that results depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # such as faiss from a source other than its wheel
            found[name] = None
    return found
