"""From an evaluator's settings to a backbone, a place for the results, and what repeats them."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from dino_kit import log, weights
from dino_kit.backbones.build import require_sizes
from dino_kit.config import fields
from dino_kit.config.evaluate import Checkpoint, Labelled
from dino_kit.data.sources.opening import LISTS, open_labelled_sources
from dino_kit.data.sources.source import Source
from dino_kit.errors import UserError
from dino_kit.weights import EvalTransform, Loaded

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
        in_chans=config.in_chans,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        mlp_grid=config.mlp_grid,
        arch_options=config.arch_options,
        exif=config.exif,
        value_range=config.value_range,
        normalize=config.normalize,
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


def transform(loaded: Loaded, image_size: int | None) -> EvalTransform:
    """How images are prepared: as the checkpoint says, at another size if one is given.

    Raises:
        UserError: the patches do not divide that size.
    """
    chosen = loaded.transform
    if image_size is not None:
        chosen = chosen._replace(image_size=image_size)
    size, patch = chosen.image_size, loaded.backbone.patch_size
    if size % patch:
        raise UserError(
            f"--image_size {size} is not a multiple of the patch size {patch}; the nearest that "
            f"is: {max(patch, patch * round(size / patch))}."
        )
    require_sizes(loaded.backbone, [size])
    return chosen


def labelled_sources(config: Labelled, target: Path) -> tuple[Source, Source]:
    """The two sets of labelled images that ``config`` names; their lists are kept beside ``target``.

    Raises:
        UserError: as :func:`~dino_kit.data.sources.opening.open_labelled_sources`.
    """
    return open_labelled_sources(
        config.data_path,
        config.train_data,
        config.val_data,
        config.val_share,
        lists=target.parent / LISTS,
        download=config.download,
    )


def described(transform: EvalTransform) -> dict[str, Any]:
    """``transform`` as plain data, for a record."""
    resize, crop = transform.sizes
    plain = transform.plain()
    del plain["image_size"]
    interpolation = None if resize is None else "bicubic"
    return {"resize": resize, "interpolation": interpolation, "center_crop": crop, **plain}


def data_flags(config: Labelled) -> dict[str, Any]:
    """The flags that named the images, for a record."""
    names = ("data_path", "train_data", "val_data", "val_share")
    return {name: getattr(config, name) for name in names}


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
        "command": fields.command_line(
            command, config, [config.weights] if config.weights else [],
            without=("checkpoint", "pretrained_weights"),
        ),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Python's version, and those of the packages that results depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # such as faiss from a source other than its wheel
            found[name] = None
    return found
