"""From the words of a command line to a command's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dino_kit import log
from dino_kit.config import fields, recipe
from dino_kit.config.commands import COMMANDS, Command
from dino_kit.config.train import SAME_THING, TrainConfig
from dino_kit.errors import UserError


def named(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command that ``words`` begin with, and the words after it.

    It is in the table; or where only help is wanted of a command of several parts, its first word.

    Raises:
        UserError: there is no such command.
    """
    first, second = words[0], " ".join(words[:2])
    if first in COMMANDS:
        return first, list(words[1:])
    if second in COMMANDS:
        return second, list(words[2:])
    parts = [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]
    if not parts:
        known = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
        raise UserError(
            f"{first!r} is no command; there are {', '.join(known)}{fields.nearest(first, known)}"
        )
    if set(words[1:]) <= {"--help", "-h"}:
        return first, []
    raise UserError(
        f"dino-kit {first} takes one of {', '.join(parts)}, and got {words[1]!r}"
        f"{fields.nearest(words[1], parts)}"
    )


def parse(name: str, words: Sequence[str]) -> Any:
    """The configuration of command ``name`` from the words after it.

    Raises:
        UserError: the words do not fit the command.
    """
    command = COMMANDS[name]
    started: list[str] = []  # the command line that this one starts
    if command.takes_command:
        words, started = _divided(name, command, words)
    given, loose = _split(name, command, words)
    values: dict[str, Any] = {}
    if command.takes_command and "profile" in given:
        path = fields.convert_words(command.schema, "profile", given["profile"])
        values = recipe.read_file(command.schema, path, "profile")
        for key in ("profile", "command"):
            if key in values:
                raise UserError(f"The profile {path} has the key {key}; that stands on the command line.")
    positionals = [] if command.takes_command else fields.marked(command.schema, "positional")
    if command.takes_recipe and len(loose) > len(set(positionals) - set(given)):
        # A recipe is a run's; a command that needs less of it leaves the rest.
        known = fields.names(command.schema)
        written = recipe.read(TrainConfig, loose.pop(0))
        values |= {key: value for key, value in written.items() if key in known}
        for flag in given:
            values.pop(SAME_THING.get(flag), None)
    for positional in positionals:
        if loose:
            given[positional] = [loose.pop(0)]
    if loose:
        raise UserError(f"{loose[0]!r} belongs to no flag; see dino-kit {name} --help.")
    idle = [flag for flag in given if flag in command.without_effect]
    for flag in given:
        if flag not in idle:
            values[flag] = fields.convert_words(command.schema, flag, given[flag])
    if command.takes_command:
        values["command"] = tuple(started)
    config = fields.create(command.schema, values, command.missing_ok)
    for flag in idle:
        log.notice(f"--{flag} has no effect: {command.without_effect[flag]}.")
    return config


def _divided(name: str, command: Command, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's own words, and the command line it is to start.

    ``--`` stands between the two. Without it all is for ``train`` that is no flag of the launcher,
    as the reference's launcher has it.

    Raises:
        UserError: a command is missing, or stands without the two dashes; or a flag belongs to
            neither the launcher nor ``train``.
    """
    if "--" in words:
        place = list(words).index("--")
        started = list(words[place + 1 :])
        if started[:1] == ["dino-kit"]:
            del started[0]
        if not started:
            raise UserError("After -- a command is missing, such as train or knn, with its flags.")
        return list(words[:place]), started
    own: list[str] = []
    started = ["train"]
    switches = fields.marked(command.schema, "switch")
    both = [*_flags(command), *_flags(COMMANDS["train"])]
    room = 0
    for word in words:
        if word.startswith("--"):
            text, equals, _ = word[2:].partition("=")
            flag = text.replace("-", "_")
            if flag not in both:
                raise UserError(
                    f"Neither dino-kit {name} nor train has a flag --{text}"
                    f"{fields.nearest(flag, both, prefix='--')}"
                )
            known = flag in _flags(command)
            many = known and fields.takes_many(command.schema, flag)
            room = 0 if equals or not known else len(words) if many else 1
            (own if known else started).append(word)
        elif room and (flag not in switches or word.lower() in fields.TRUE + fields.FALSE):
            own.append(word)
            room -= 1
        else:
            if started == ["train"] and word in COMMANDS:
                raise UserError(f"Before {word} -- is missing: dino-kit {name} [flags] -- {word} ...")
            room = 0
            started.append(word)
    return own, started


def _flags(command: Command) -> list[str]:
    """What can stand on the command line after ``--``."""
    known = [*fields.names(command.schema), *command.without_effect]
    return [flag for flag in known if not (command.takes_command and flag == "command")]


def _split(
    name: str, command: Command, words: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Words by the flag they follow, and those that follow none; the last of two flags counts."""
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    switches = fields.marked(command.schema, "switch")
    flag, room = "", 0  # the last flag, and how many words it still takes
    for word in words:
        if word.startswith("--") and len(word) > 2:
            text, equals, value = word[2:].partition("=")
            flag = _known_flag(name, command, text)
            given[flag] = [value] if equals else []
            many = flag not in command.without_effect and fields.takes_many(command.schema, flag)
            room = 0 if equals else len(words) if many else 1
        elif room and (flag not in switches or word.lower() in fields.TRUE + fields.FALSE):
            given[flag].append(word)
            room -= 1
        elif len(word) > 1 and word.startswith("-"):
            raise UserError(f"dino-kit {name} has no flag {word}; see dino-kit {name} --help.")
        else:
            room = 0
            loose.append(word)
    return given, loose


def _known_flag(name: str, command: Command, text: str) -> str:
    """The field that ``--text`` sets, with ``-`` for ``_`` or without."""
    flag = text.replace("-", "_")
    known = _flags(command)
    if flag not in known:
        hint = fields.nearest(flag, known, prefix="--")
        if hint == ".":
            hint = f"; see dino-kit {name} --help."
        raise UserError(f"dino-kit {name} has no flag --{text}{hint}")
    return flag
