"""``dino-kit config``: print the recipe that flags and a recipe come to."""

from __future__ import annotations

from typing import Any

from dino_kit import log
from dino_kit.config import architectures, fields, recipe
from dino_kit.config.commands import ConfigConfig, train_part
from dino_kit.config.train import TrainConfig
from dino_kit.errors import UserError

_MANY = 500_000_000  # numbers in a network, above which its first ones are not drawn to be shown


def run(config: ConfigConfig) -> None:
    """Print every value as YAML, or with ``--diff`` only what differs from another recipe.

    With ``--explain`` comments follow, so that what is printed still is a recipe.

    Raises:
        UserError: the other recipe does not exist, or does not fit; or the network cannot be built.
    """
    own = train_part(config)
    if config.diff is None:
        explained = _explained(own) if config.explain else []
        log.say("\n".join([recipe.dump(own).removesuffix("\n"), *explained]))
        return
    if config.explain:
        raise UserError("--explain is of one recipe, and --diff of two; give one of the flags.")
    other = fields.create(TrainConfig, recipe.read(TrainConfig, config.diff), missing_ok=True)
    rows = [
        (name, _shown(name, theirs, other), _shown(name, ours, own))
        for name, theirs, ours in fields.differences(other, own)
    ]
    if rows:
        log.table("", ["setting", config.diff, "this"], rows)
    else:
        log.say(f"no difference from {config.diff}")


def _shown(name: str, value: object, config: TrainConfig) -> str:
    if value is None:  # the sizes of a network are its name's
        value = architectures.VIT_SIZES.get(config.arch, {}).get(name)
    return fields.describe_value(TrainConfig, name, value)


def _explained(config: TrainConfig) -> list[str]:
    """How the parameters of the student begin, and which decay, as comments of YAML."""
    from dino_kit.training import parameters
    from dino_kit.training.parameters import DECAYS, DOES_NOT, STILL

    found = parameters.groups(_student(config))
    lines = ["", "# Student: name in a checkpoint, shape, weight decay, first values (mean ± deviation)"]
    for part in ("backbone", "head"):
        # As they are called in a checkpoint: a library's model has no name of its own in it.
        rows = [
            (
                group.name.removeprefix(f"{part}.").removeprefix("model.")
                + (f" ×{group.count}" if group.count > 1 else ""),
                group.shape, group.decay, group.begins,
            )
            for group in found if group.name.startswith(f"{part}.")
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["#", f"# {part}"]
        lines += [
            ("#   " + "  ".join(map(str.ljust, row, widths))).rstrip() for row in rows
        ]
    total = {
        decay: sum(group.numel for group in found if group.decay == decay)
        for decay in (DECAYS, DOES_NOT, STILL)
    }
    numbers = [f"{total[decay] / 1e6:.2f} M" for decay in (DECAYS, DOES_NOT, STILL)]
    text = "# {} numbers decay, {} are trained without decay, {} are not trained."
    return [*lines, "#", text.format(*numbers)]


def _student(config: TrainConfig) -> Any:
    """The student with its first weights; without any where they are many."""
    import torch

    from dino_kit.assemble import untrained_student

    if architectures.family_of(config.arch).is_built_here:
        with torch.device("meta"):
            student = untrained_student(config)
        if sum(p.numel() for p in student.parameters()) > _MANY:
            return student
    return untrained_student(config)
