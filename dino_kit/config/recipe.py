"""Recipes: flags written down in a YAML file, one a line."""

from __future__ import annotations

import importlib.resources
import math
from pathlib import Path
from typing import Any

from dino_kit.config import fields
from dino_kit.config.fields import nearest
from dino_kit.errors import UserError

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = importlib.resources.files("dino_kit") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def text_of(recipe: str) -> str:
    """The text of a recipe, a shipped one's name or a file's path.

    Raises:
        UserError: there is no such recipe.
    """
    if recipe in shipped():
        entry = importlib.resources.files("dino_kit") / "recipes" / f"{recipe}.yaml"
        return entry.read_text(encoding="utf-8")
    try:
        return Path(recipe).read_text(encoding="utf-8")
    except (OSError, ValueError):  # ValueError: not UTF-8, or a path with a null character
        raise UserError(
            f"{recipe!r} is neither a YAML file that can be read nor the name of a shipped recipe, "
            f"which are {', '.join(shipped())}{nearest(recipe, shipped())}"
        ) from None


def read(schema: type, recipe: str) -> dict[str, Any]:
    """The converted values of a recipe by field name.

    Raises:
        UserError: it is no flat mapping of the schema's fields, a key stands twice, or a value
            does not fit.
    """
    return _read(schema, f"recipe {recipe}", text_of(recipe))


def read_file(schema: type, path: str, kind: str) -> dict[str, Any]:
    """The same of a file of flags that is no recipe; ``kind`` says what it is.

    Raises:
        UserError: as :func:`read`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UserError(f"The {kind} {path!r} is no YAML file that can be read.") from None
    return _read(schema, f"{kind} {path}", text)


def _read(schema: type, source: str, text: str) -> dict[str, Any]:
    """``source`` says in a sentence where the ``text`` is from."""
    known = fields.names(schema)
    values: dict[str, Any] = {}
    for line, key, value in _entries(source, text):
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(
                f"The {source} has in line {line} the key {str(key)!r}, which is no setting"
                f"{nearest(name, known)}"
            )
        if name in values:
            raise UserError(
                f"The {source} has the key {name} twice, again in line {line}; keep one."
            )
        values[name] = fields.convert(schema, name, value, f"{name} in the {source}")
    return values


def dump(config: Any) -> str:
    """``config`` as the text of a recipe that reads back to the same.

    Fields that are not set, and required ones that are empty, become comments.
    """
    blocks = []
    for title, declared in fields.groups(type(config)):
        lines = [f"# {title}"]
        for field in declared:
            value = getattr(config, field.name)
            if field.default is fields.REQUIRED and value == "":
                lines.append(f"# {field.name}: required")
            elif value is None and field.default is None:
                lines.append(f"# {field.name}: {field.metadata['nothing']}")
            else:
                lines.append(f"{field.name}: {written(value)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def written(value: Any) -> str:
    """A value as YAML on one line."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    # Only double quotes can hold every character: PyYAML loses a few of its line breaks in others.
    quotes = '"' if isinstance(value, str) and not value.isprintable() else None
    written = yaml.safe_dump(
        plain, default_flow_style=True, default_style=quotes, allow_unicode=True, width=math.inf
    )
    return written.removesuffix("\n").removesuffix("\n...")


def _entries(source: str, text: str) -> list[tuple[int, Any, Any]]:
    """Line, key and value in the order of the file; YAML itself lets the last of two keys win."""
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        # Numbers stay text, which the one converter of flags reads too: YAML would make 90 of
        # 1:30, 8 of 010, and a string of 5e-4.
        numbers = dict.fromkeys(_NUMBERS, yaml.SafeLoader.construct_scalar)
        loader.yaml_constructors = loader.yaml_constructors | numbers
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"The {source} should be lines of `name: value`.")
        return [
            (
                key.start_mark.line + 1,
                loader.construct_object(key, deep=True),
                loader.construct_object(value, deep=True),
            )
            for key, value in node.value
        ]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(f"The {source} is no YAML{line}: {problem}.") from error
