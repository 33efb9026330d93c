"""How a run's recipe differs from the paper's recipe that is nearest to it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from dino_kit.config import architectures, fields, recipe
from dino_kit.config.train import RESUMABLE, TrainConfig

# The shipped recipes that are runs of the paper's authors, all of them on ImageNet.
RECIPES = ("vits16_100ep", "vits16_300ep", "vits16_800ep", "vits8", "vitb16", "vitb8")
# How a run is kept and told, and where, which is no part of the method.
_BESIDE_THE_METHOD = RESUMABLE | {"seed", "precision", "use_fp16"}


class Difference(NamedTuple):
    """A setting that has another value than in the paper."""

    group: str  # the title of the settings that it belongs to
    name: str
    ours: str
    theirs: str
    help: str  # what the setting means


class Comparison(NamedTuple):
    recipe: str  # the name of the paper's
    differences: list[Difference]  # in the order of the flags
    same: int  # settings of the method that are equal


def compare(config: TrainConfig) -> Comparison:
    """Hold ``config`` against the paper's recipe of the nearest network with the fewest differences."""
    paper = {name: _read(name) for name in RECIPES}
    nearest = min(RECIPES, key=lambda name: _distance(config, paper[name]))
    changed = dict(_changed(config, paper[nearest]))
    differences = [
        Difference(title, field.name, *changed[field.name], field.metadata["help"])
        for title, declared in fields.groups(TrainConfig)
        for field in declared
        if field.name in changed
    ]
    method = [name for name in fields.names(TrainConfig) if name not in _BESIDE_THE_METHOD]
    return Comparison(nearest, differences, len(method) - len(differences))


def shown(value: Any) -> str:
    """A setting's value as a person would write it."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        one_for_all_views = len(value) == 3 and len(set(value)) == 1
        return " ".join(map(shown, value[:1] if one_for_all_views else value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def width(config: TrainConfig) -> int | None:
    """D, where the architecture's name or the recipe tells it."""
    known = architectures.VIT_SIZES.get(config.arch, {})
    return config.embed_dim or known.get("embed_dim")


def _read(name: str) -> TrainConfig:
    return fields.create(TrainConfig, recipe.read(TrainConfig, name), missing_ok=True)


def _distance(config: TrainConfig, paper: TrainConfig) -> tuple:
    own, other = width(config), width(paper)
    wider = abs(math.log(own / other)) if own and other else math.inf
    patch = abs(math.log(config.patch_size / paper.patch_size))
    return config.arch != paper.arch, wider, patch, len(_changed(config, paper))


def _changed(config: TrainConfig, paper: TrainConfig) -> list[tuple[str, tuple[str, str]]]:
    return [
        (name, (_told(config, name, ours), _told(paper, name, theirs)))
        for name, theirs, ours in fields.differences(paper, config)
        if name not in _BESIDE_THE_METHOD
    ]


def _told(config: TrainConfig, name: str, value: Any) -> str:
    """A value; of a size that the architecture's name implies, the size."""
    return shown(architectures.VIT_SIZES.get(config.arch, {}).get(name, value))
