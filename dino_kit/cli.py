"""``dino-kit COMMAND ...``: read the command line, import the one command it names, call it."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from dino_kit.config import fields, recipe
from dino_kit.config.command_line import named, parse
from dino_kit.config.commands import COMMANDS, Command
from dino_kit.errors import Interrupted, RunFailed, ToldByMain, UserError, is_out_of_memory

_REFUSED_BY_THE_SYSTEM = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EIO, errno.EFBIG, errno.ELOOP,
    errno.EMFILE, errno.ENFILE,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status, and prints why it is not 0.

    0 is success, 1 a run that had to stop or a check that found a fault, 2 a fault of the input,
    128 + its number a signal that it stopped for, as 130 for an interruption from the keyboard.
    """
    status, told = outcome(list(sys.argv[1:] if arguments is None else arguments))
    if told:
        print(f"dino-kit: {told}", file=sys.stderr)
    return status


def outcome(words: Sequence[str], repeat: bool = False) -> tuple[int, str]:
    """Run a command line; returns the exit status, and the sentence that says why it is not 0.

    Without ``repeat`` what the main process of several tells comes from no other.
    """
    try:
        status = _main(list(words))
        sys.stdout.flush()
        return status, ""
    except ToldByMain as error:
        return 2, f"error: {error}" if repeat else ""
    except UserError as error:
        return 2, f"error: {error}"
    except RunFailed as error:
        return 1, f"stopped: {error}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = str(error).strip().partition("\n")[0] or "no more can be had"
        return 1, (
            f"stopped: the memory does not suffice ({told}); a smaller --batch_size_per_gpu, "
            "smaller crops or images, or a smaller network need less."
        )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "interrupted."
    except Interrupted as error:
        return 128 + error.number, f"stopped by {signal.Signals(error.number).name}."
    except BrokenPipeError:
        # The reader of the output has gone, as `| head` does; nothing is left to say to it, and
        # the interpreter's own flush at its end must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        # A place that cannot be written to, or a full disk. What has no such reason is a fault of
        # ours, and keeps its traceback.
        if error.errno not in _REFUSED_BY_THE_SYSTEM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"error: {where}{error.strerror}."
    return 0, ""


def _main(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"dino-kit {version('dino_kit')}")
        return 0
    name, words = named(words)
    if name not in COMMANDS:
        print(_overview(name))
        return 0
    command = COMMANDS[name]
    if {"--help", "-h"} & set(words):
        print(_help(name, command))
        return 0
    config = parse(name, words)
    # PyTorch's threads wait for each other in busy loops, and starve when anything else, a data
    # worker too, wants their core: beside one busy process on two cores a step takes twice as
    # long as with threads that sleep, which cost nothing when the machine is free. PyTorch reads
    # this once, as it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    module, function = command.function.split(":")
    return getattr(importlib.import_module(module), function)(config) or 0


def _overview(first: str = "") -> str:
    """All commands; or the parts of the one whose first word is given."""
    width = max(map(len, COMMANDS)) + 2
    rows = [
        f"  {name:<{width}}{command.summary}"
        for name, command in COMMANDS.items()
        if name.startswith(f"{first} " if first else "")
    ]
    if first:
        usage = f"usage: dino-kit {first} PART [flags]"
        return "\n".join([usage, "", *rows, "", "Each part has --help."])
    return "\n".join(
        [
            "dino-kit: pretrain a vision backbone by DINO on images without labels, measure it,",
            "look at it.",
            "",
            "usage: dino-kit COMMAND [flags]",
            "",
            *rows,
            "",
            "Begin with `dino-kit quickstart`. For images of your own:",
            "",
            *(f"  {COMMANDS[name].examples[0]}" for name in ("train", "knn")),
            "",
            "Each command has --help; dino-kit --version says which version this is.",
        ]
    )


def _help(name: str, command: Command) -> str:
    width = min(max(shutil.get_terminal_size().columns, 60), 100)
    words = ["[RECIPE]"] if command.takes_recipe else []
    positionals = [name.upper() for name in fields.marked(command.schema, "positional")]
    # The command that another one starts comes last, with flags of its own.
    words += ["[flags] --", *positionals, "..."] if command.takes_command else [*positionals, "[flags]"]
    lines = [f"usage: dino-kit {' '.join([name, *words])}", ""]
    lines += textwrap.wrap(f"{command.summary[0].upper()}{command.summary[1:]}.", width)
    lines += ["", *(f"  {example}" for example in command.examples)]
    if command.takes_recipe:
        text = (
            "RECIPE is a YAML file of flags, one a line, or the name of a shipped one: "
            f"{', '.join(recipe.shipped())}. Flags on the command line win over it."
        )
        lines += ["", *textwrap.wrap(text, width)]
    for title, declared in fields.groups(command.schema):
        lines += ["", *textwrap.wrap(f"{title}:", width)]
        for field in declared:
            lines += _help_of(command, field, width)
    if command.without_effect:
        flags = ", ".join(f"--{flag}" for flag in command.without_effect)
        text = f"Accepted for old command lines, without effect: {flags}."
        lines += ["", *textwrap.wrap(text, width)]
    return "\n".join(lines)


def _help_of(command: Command, field: Any, width: int) -> list[str]:
    head = f"--{field.name} {fields.describe_kind(command.schema, field)}"
    if field.metadata["positional"]:
        head = field.name.upper()
    text = field.metadata["help"]
    if not (command.missing_ok and field.default is fields.REQUIRED):
        text = f"{text} {fields.describe_default(command.schema, field)}"
    indent = " " * 6
    # A long list of words goes on in the next line, after a comma.
    heads = textwrap.wrap(head.replace(",", ", "), width, initial_indent="  ",
                          subsequent_indent=indent, break_on_hyphens=False)
    return [*(line.replace(", ", ",") for line in heads),
            *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent,
                           break_on_hyphens=False)]
