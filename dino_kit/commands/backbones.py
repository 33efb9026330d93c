"""``dino-kit backbones``: names, sizes, and which maps each has."""

from __future__ import annotations

import json

from dino_kit import log
from dino_kit.backbones import catalogue, maps
from dino_kit.backbones.catalogue import Entry
from dino_kit.config import architectures
from dino_kit.config.backbones import BackbonesConfig
from dino_kit.errors import UserError

_DETAILS = 24  # backbones at most that are built to be looked at: a second or so each
_NOTES = {"reattention": "; rows do not sum to one"}


def run(config: BackbonesConfig) -> None:
    """List the backbones that are built here, or those that fit a pattern.

    Raises:
        UserError: no name fits.
    """
    names = catalogue.own_names() if config.pattern is None else catalogue.matching(config.pattern)
    if not names:
        raise UserError(
            f"No backbone's name fits {config.pattern!r}; a pattern is as in a shell, such as "
            "'timm:*swin*'; dino-kit backbones lists what is built here."
        )
    if len(names) == 1:
        entries = [catalogue.describe(names[0])]
    elif len(names) <= _DETAILS:
        entries = list(catalogue.described(names))
    else:
        entries = [Entry(name) for name in names]
    if config.json:
        rows = [{key: value for key, value in e._asdict().items() if value} for e in entries]
        log.say(json.dumps(rows, indent=2))
        return
    if len(names) > _DETAILS:
        _say_names(names)
    else:
        _say_entries(entries)
    if config.pattern is None:
        _say_others()


def _say_names(names: list[str]) -> None:
    for name in names:
        log.say(name)
    log.paragraph(
        f"{len(names)} names; sizes and maps are shown of {_DETAILS} at most, so narrow the pattern."
    )


def _say_entries(entries: list[Entry]) -> None:
    rows = []
    for entry in entries:
        if entry.fault is None:
            sizes = [f"{entry.parameters / 1e6:.1f}", str(entry.patch_size), str(entry.width)]
            rows.append((entry.name, *sizes, ", ".join(entry.maps)))
        else:
            rows.append((entry.name, "–", "–", "–", "–"))
    log.table("", ["name", "M param.", "patch", "width", "maps"], rows)
    seen = {kind for entry in entries for kind in entry.maps}
    for name, kind in maps.KINDS.items():
        if name in seen:
            log.paragraph(f"{name}: {kind.shows}{_NOTES.get(name, '')}")
    for entry in entries:
        if entry.stands_for:
            log.say(f"{entry.name} is {entry.stands_for}")
        if entry.fault:
            log.paragraph(entry.fault)


def _say_others() -> None:
    """What is not in the table: sizes of one's own, the reference's names, and the libraries'."""
    aliases = architectures.ALIASES
    same = [f"{name} = {of}" for name, of in aliases.items() if ":" not in of]
    log.say("")
    log.paragraph(
        f"With sizes of your own, by flags: {', '.join(f.free for f in architectures.FAMILIES)}. The "
        f"reference's names are understood: {', '.join(same)}; "
        + "; ".join(_of_library(library) for library in ("torchvision", "timm"))
        + "."
    )
    for library in ("torchvision", "timm"):
        count = len(catalogue.library_names(library))
        log.say(f"{library}:NAME, {count} names; as in dino-kit backbones '{library}:*swin*'")
    log.say("hf:FOLDER, a configuration of Hugging Face transformers")
    log.say("python:PACKAGE.MODULE:CALLABLE, a model of your own")


def _of_library(library: str) -> str:
    """How many of the reference's names are a library's, and the first and the last of them."""
    names = [name for name, of in architectures.ALIASES.items() if of.startswith(f"{library}:")]
    return f"{len(names)} of {library}'s, from {names[0]} to {names[-1]}"
