"""``dino-kit config``: print the recipe that flags and a recipe come to."""

from __future__ import annotations

from dino_kit import log
from dino_kit.config import fields, recipe
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
        (name, _shown(theirs), _shown(ours))
        for name, theirs, ours in fields.differences(other, own)
    ]
    if rows:
        log.table("", ["setting", config.diff, "this"], rows)
    else:
        log.say(f"no difference from {config.diff}")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value in (None, "") else str(value)
