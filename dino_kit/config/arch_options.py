"""``--arch_options``: arguments of an architecture that have no flag of their own.

A word is ``KEY=VALUE``, and its value is YAML, so that lists, numbers and ``true`` are what they are
in a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dino_kit.errors import UserError

# What a flag of its own says of every architecture.
_FLAGS = {
    "in_chans": "--in_chans",
    "image_size": "--global_crops_size",
    "img_size": "--global_crops_size",
    "drop_path_rate": "--drop_path_rate",
}
# What an option of a library's model may be called by which it fetches or unpickles weights.
_WEIGHTS = re.compile(r"pretrain|weights|checkpoint|cache_dir|ckpt|state_dict")
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def check(word: str) -> str:
    """``word``, if it is one; raises :class:`UserError` otherwise."""
    _pair(word)
    return word


def pairs(words: Iterable[str] | None) -> dict[str, Any]:
    """Words as arguments of :func:`~dino_kit.backbones.build.create_backbone`.

    Raises:
        UserError: a word is none, a key stands twice, or a flag says what it says.
    """
    found: dict[str, Any] = {}
    for word in words or ():
        key, value = _pair(word)
        if key in found:
            raise UserError(f"--arch_options has {key} twice.")
        if key in _FLAGS:
            raise UserError(f"--arch_options has {key}, which {_FLAGS[key]} says; give that.")
        found[key] = value
    return found


def require_fresh(name: str, options: Iterable[str]) -> None:
    """Raises :class:`UserError` where an option of a library's model is about weights.

    By a name alone nothing is fetched from the network, and nothing unpickled.
    """
    for key in options:
        if _WEIGHTS.search(key):
            raise UserError(
                f"The option {key} of {name} is about weights, and a backbone begins with fresh "
                "ones; leave it out."
            )


def _pair(word: str) -> tuple[str, Any]:
    import yaml

    key, sign, value = word.partition("=")
    if not (sign and key.isidentifier()):
        raise UserError(
            f"--arch_options has {word!r}; it takes words KEY=VALUE, such as depths=[2,2,6,2]."
        )
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"--arch_options has {word!r}, whose value is no YAML; write it as in a recipe."
        ) from error
    if isinstance(read, str) and _NUMBER.fullmatch(read):
        read = float(read)  # YAML takes 1e-5 for a word
    return key, read
