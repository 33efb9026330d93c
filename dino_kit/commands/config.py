"""``dino-kit config``: print the recipe that flags and a recipe come to."""

from __future__ import annotations

from dino_kit import log
from dino_kit.config import architectures, fields, recipe
from dino_kit.config.commands import ConfigConfig, train_part
from dino_kit.config.train import TrainConfig


def run(config: ConfigConfig) -> None:
    """Print every value as YAML, or with ``--diff`` only what differs from another recipe.

    Raises:
        UserError: the other recipe does not exist, or does not fit.
    """
    own = train_part(config)
    if config.diff is None:
        log.say(recipe.dump(own).removesuffix("\n"))
        return
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
