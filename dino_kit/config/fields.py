"""Configurations: flat frozen dataclasses, filled from flags and recipes by one validator.

A field is declared with :func:`option`: its default, its help, its bounds. Its annotation says what
it takes: ``int``, ``float``, ``str``, ``bool``, ``Literal``, a tuple of numbers, of which three
floats are :data:`PerView`, a ``Literal`` or else such a tuple, or any of them ``| None``. A
recipe's value and a flag's text go through the same conversion, and every fault is a
:class:`UserError` of one sentence that says what was given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import shlex
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from dino_kit.errors import UserError

Config = TypeVar("Config")
TRUE, FALSE = ("true", "on", "1", "yes"), ("false", "off", "0", "no")
REQUIRED = dataclasses.MISSING
# For the first global view, the second, and the local ones; one number stands for all three.
PerView = tuple[float, float, float]
_UNIONS = (types.UnionType, typing.Union)


class Checked:
    """A base of configurations: each group of fields that has a ``check()`` is held to it."""

    def __post_init__(self) -> None:
        for group in type(self).__mro__:
            if "check" in vars(group):
                group.check(self)


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    positional: bool = False,
    switch: bool = False,
    nothing: str = "none",
    then: Callable[[Any], Any] | None = None,
) -> Any:
    """A field: ``low`` and ``high`` are allowed values, ``above`` and ``below`` are not.

    A ``positional`` one may stand without its flag; a word after a ``switch`` is its value only
    where it is one. ``nothing`` says in the help what leaving an optional field out means (empty
    where its help does); ``then`` maps or refuses a converted value.
    """
    metadata = {
        "help": help,
        "bounds": {"low": low, "high": high, "above": above, "below": below},
        "positional": positional,
        "switch": switch,
        "nothing": nothing,
        "then": then or (lambda value: value),
    }
    return dataclasses.field(default=default, metadata=metadata)


def names(schema: type) -> list[str]:
    return [field.name for field in dataclasses.fields(schema)]


def create(schema: type[Config], values: dict[str, Any], missing_ok: bool = False) -> Config:
    """A checked configuration from values by field name, each already converted.

    With ``missing_ok`` required fields may stay away; they are then empty strings.

    Raises:
        UserError: a required field is missing, or values do not fit together.
    """
    required = [f.name for f in dataclasses.fields(schema) if f.default is REQUIRED]
    absent = [name for name in required if name not in values]
    if absent and not missing_ok:
        flags = " and ".join(f"--{name}" for name in absent)
        raise UserError(f"{flags} {'is' if len(absent) == 1 else 'are'} missing.")
    return schema(**dict.fromkeys(absent, ""), **values)


def convert_words(schema: type, name: str, words: Sequence[str]) -> Any:
    """The value of field ``name`` from the words after its flag; see :func:`convert`."""
    kind, optional = _kind(schema, name)
    if not words and kind is bool:
        return True
    if not words:
        raise UserError(f"--{name} needs a value: {_allowed(kind, _field(schema, name))}.")
    if optional and kind is not str and [word.lower() for word in words] == ["none"]:
        return None
    return convert(schema, name, list(words) if _is_many(kind) else words[0], f"--{name}")


def convert(schema: type, name: str, value: Any, label: str = "") -> Any:
    """``value`` as field ``name`` takes it: text, or what YAML makes of a recipe's value.

    ``label`` is what a sentence calls the field, where that is not its name.

    Raises:
        UserError: it is of the wrong kind, or out of range.
    """
    field = _field(schema, name)
    kind, optional = _kind(schema, name)
    label = label or name
    if optional and (value is None or kind is not str and str(value).lower() == "none"):
        return None
    if not _is_many(kind):
        return _one(label, kind, value, field)
    items = list(value) if isinstance(value, list | tuple) else [value]
    if _is_either(kind):
        word, numbers = get_args(kind)
        if len(items) == 1 and _converted(float, items[0]) is None:
            return _one(label, word, items[0], field, _allowed(kind, field))
        kind = numbers
    inner = get_args(kind)
    if kind == PerView and len(items) == 1:
        items *= 3
    if not items or (Ellipsis not in inner and len(items) != len(inner)):
        given = "".join(f" {item}" for item in items)
        raise UserError(
            f"{label} takes {_allowed(kind, field)}, and got {len(items)}{given and ':'}{given}."
        )
    return tuple(_one(label, inner[0], item, field, _allowed(kind, field)) for item in items)


def nearest(given: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean X?"`` where a known name is close to the given one, else ``"."``.

    A name that begins as the given one does is close; ``prefix`` is written before the name.
    """
    known = list(known)
    longer = [name for name in known if given and name.startswith(given)]
    close = longer or difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else "."


def to_plain(config: Any) -> dict[str, Any]:
    """The configuration as numbers, strings, lists and None by field name."""
    return {
        name: list(value) if isinstance(value := getattr(config, name), tuple) else value
        for name in names(type(config))
    }


def from_plain(schema: type[Config], plain: dict[str, Any]) -> Config:
    """The checked configuration that :func:`to_plain` was given; unknown names are passed over.

    Raises:
        UserError: a value does not fit, or a required one is missing.
    """
    known = set(names(schema))
    return create(schema, {k: convert(schema, k, v) for k, v in plain.items() if k in known})


def differences(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """Fields in which two configurations of one schema differ: (name, before, after), plain."""
    one, other = to_plain(before), to_plain(after)
    return [(name, one[name], other[name]) for name in one if one[name] != other[name]]


def groups(schema: type) -> list[tuple[str, list[dataclasses.Field]]]:
    """The fields in the order of their declaration, by the title of the class that declares them.

    The title is the first line of the class's docstring.
    """
    found: list[tuple[str, list[dataclasses.Field]]] = []
    own = {f.name: f for f in dataclasses.fields(schema)}
    for part in reversed(schema.__mro__):
        declared = [own[name] for name in vars(part).get("__annotations__", ()) if name in own]
        if declared:
            found.append(((part.__doc__ or "").strip().splitlines()[0], declared))
    return found


def describe_kind(schema: type, field: dataclasses.Field) -> str:
    """What the field takes, for its help: ``{a,b}``, ``INT``, ``FLOAT FLOAT`` ..."""
    kind, _ = _kind(schema, field.name)
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if kind == PerView:
        return "FLOAT [FLOAT FLOAT]"
    if _is_either(kind):
        words, _ = get_args(kind)
        return "{" + ",".join(get_args(words)) + "} or FLOAT FLOAT ..."
    if _is_many(kind):
        inner = get_args(kind)
        word = "TEXT" if inner[0] is str else inner[0].__name__.upper()
        return f"{word} [{word} ...]" if Ellipsis in inner else " ".join([word] * len(inner))
    if kind is bool:
        return "[{true,false}]" if field.metadata["switch"] else "{true,false}"
    return "TEXT" if kind is str else kind.__name__.upper()


def describe_default(schema: type, field: dataclasses.Field) -> str:
    """The field's default as a sentence of its help."""
    default = field.default
    if default is REQUIRED:
        return "Required."
    if _kind(schema, field.name)[0] == PerView and len(set(default)) == 1:
        default = default[:1]
    if default is None:
        text = field.metadata["nothing"]
        if not text:
            return ""
    elif isinstance(default, tuple):
        text = " ".join(f"{x:g}" for x in default)
    else:
        text = str(default).lower() if isinstance(default, bool) else str(default)
    return f"Default: {text}."


def describe_value(schema: type, name: str, value: Any) -> str:
    """A value, as :func:`to_plain` gives it, for a reader: one number where all views share it."""
    if value == "":
        return "not set"
    if value is None:
        return _field(schema, name).metadata["nothing"]
    if isinstance(value, list):
        same = _kind(schema, name)[0] == PerView and len(set(value)) == 1
        told = value[:1] if same else value
        return " ".join(describe_value(schema, name, item) for item in told)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def command_line(command: str, config: Any, loose: Sequence[str] = (), without=()) -> str:
    """The words that give ``config``: ``loose`` ones, then a flag for all that is not usual.

    ``without`` names the fields that are left out; so are required ones that were not given.
    """
    words = ["dino-kit", *command.split(), *loose]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value not in ("", field.default) and field.name not in without:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name}", *map(str, values)]
    return shlex.join(words)


def takes_many(schema: type, name: str) -> bool:
    return _is_many(_kind(schema, name)[0])


def marked(schema: type, mark: str) -> list[str]:
    """Names of the fields that are ``positional``, or a ``switch``."""
    return [f.name for f in dataclasses.fields(schema) if f.metadata[mark]]


def _one(
    label: str, kind: Any, value: Any, field: dataclasses.Field, allowed: str = ""
) -> Any:
    """A single converted value, within its bounds; ``allowed`` says what the whole field takes."""
    converted = _converted(kind, value)
    if converted is None or not _inside(converted, field.metadata["bounds"]):
        hint = nearest(str(value), get_args(kind)) if get_origin(kind) is Literal else "."
        shown = repr(value) if isinstance(value, str) else str(value)
        if kind is str and not isinstance(value, str):
            allowed = "text, which YAML needs in quotes here"
        raise UserError(f"{label} is {shown}; it takes {allowed or _allowed(kind, field)}{hint}")
    return field.metadata["then"](converted)


def _converted(kind: Any, value: Any) -> Any:
    """``value`` as ``kind``, or None where it is no such thing."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if kind is bool:
        text = str(value).lower()
        return text in TRUE if text in TRUE + FALSE else None
    if kind is str:
        return value if isinstance(value, str) and value else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if kind is int and isinstance(value, float):
        return None
    try:
        number = kind(value)
        return number if math.isfinite(number) else None
    except (ValueError, OverflowError):
        return None


def _inside(value: Any, bounds: dict[str, float | None]) -> bool:
    low, high, above, below = (bounds[name] for name in ("low", "high", "above", "below"))
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _allowed(kind: Any, field: dataclasses.Field) -> str:
    """What the field takes, as the object of a sentence."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if kind is bool:
        return "true or false"
    if kind is str:
        return "text"
    limits = _limits(**field.metadata["bounds"])
    if _is_either(kind):
        words, numbers = get_args(kind)
        return f"{', '.join(get_args(words))}, or {_allowed(numbers, field)}"
    if not _is_many(kind):
        return ("a whole number" if kind is int else "a number") + limits
    inner = get_args(kind)
    if kind == PerView:
        what = "one number, or three (first global, second global, local views)"
    else:
        what = "one or more" if Ellipsis in inner else str(len(inner))
        what += {int: " whole numbers", str: " words"}.get(inner[0], " numbers")
    return what + (limits and f", each{limits}")


def _limits(
    low: float | None, high: float | None, above: float | None, below: float | None
) -> str:
    """The bounds in words that follow "a number", with the space between."""
    words = [
        f" from {low}" if low is not None else "",
        f" above {above}" if above is not None else "",
        (f" to {high}" if low is not None else f", at most {high}") if high is not None else "",
        f", below {below}" if below is not None else "",
    ]
    return "".join(words)


def _field(schema: type, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(schema) if field.name == name)


@functools.lru_cache
def _annotations(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _kind(schema: type, name: str) -> tuple[Any, bool]:
    """What a field takes, and whether it may be None: ``int | None`` gives (int, True)."""
    annotation = _annotations(schema)[name]
    if get_origin(annotation) not in _UNIONS:
        return annotation, False
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return functools.reduce(operator.or_, kinds), type(None) in get_args(annotation)


def _is_many(kind: Any) -> bool:
    return get_origin(kind) is tuple or _is_either(kind)


def _is_either(kind: Any) -> bool:
    """Whether the field takes a word or else numbers."""
    return get_origin(kind) in _UNIONS
