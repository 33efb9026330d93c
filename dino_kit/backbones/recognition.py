"""Which architecture a backbone's tensors are of.

What shows in the tensors' names and shapes counts; what the file says of itself, and what the
caller says, is held against it, and settles what does not show: a ViT's or T2T-ViT's number of heads,
how a ResMLP meets other grids of patches than its own, the scale of a DeepViT's maps, the heads and
stripes of a CSWin Transformer, and epsilons and the like. A model of a library is what the file or
the caller calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dino_kit.backbones import tensor_sizes
from dino_kit.config import arch_options, architectures
from dino_kit.config.architectures import Family
from dino_kit.errors import UserError


class Architecture(NamedTuple):
    """What to build."""

    name: str
    built_as: str  # what create_backbone calls it: the family's free name, or a library's own
    options: dict[str, Any]  # all that it takes


def recognize(
    state: Mapping[str, Any],
    said: Mapping[str, Any],
    arch: str | None,
    given: Mapping[str, Any],
    path: Path,
) -> Architecture:
    """The architecture that fits all that is known.

    Args:
        state: the backbone's tensors by their own names.
        said: the settings that the file was written with, as far as it tells.
        arch: an architecture's name, if the caller gave one.
        given: sizes by name, None where the caller gave none.
        path: what a sentence calls the file.

    Raises:
        UserError: no known architecture has such tensors; what is said or given contradicts them;
            or what does not show in them is neither said nor given.
    """
    library = _library(said, arch, path)
    if library:
        return Architecture(library, library, _library_options(said, given, path))
    family = tensor_sizes.family_of(state)
    sizes = tensor_sizes.sizes_of(family, state, path)
    saved = _saved_name(said, family, path)
    name = _name(arch, saved, family, path)
    _compare(given, said, sizes, family, path)
    by_flag = arch not in (None, family.free)
    name, fits = _named(name, by_flag, given, sizes, family, path)
    if "num_heads" in family.needed and "num_heads" not in sizes:
        sizes["num_heads"] = _heads(name, fits, given, said, sizes, family, path)
    if not family.takes_patch_size:
        sizes.pop("patch_size", None)
    if family is architectures.RESMLP:
        sizes["mlp_grid"] = _agreed("mlp_grid", given, said, path) or architectures.MLP_GRID
    elif family is architectures.DEEPVIT:
        sizes["scale_reattention"] = name in architectures.SCALED_REATTENTION
    sizes |= _unseen_options(name, fits, given, said, sizes, family, path)
    return Architecture(name if fits else family.free, family.free, sizes)


def _library(said: Mapping[str, Any], arch: str | None, path: Path) -> str | None:
    """The model of a library that the file or the caller names; None where neither names one.

    Its tensors are not asked: what they are called, and which there are, is the library's affair,
    and loading holds them against the model.
    """
    saved = _canonical(said, path)
    given = None if arch is None else architectures.canonical(arch)
    if given and saved and given.startswith("hf:") and saved.startswith("hf:"):
        return given  # the folder may have moved
    libraries = [name for name in (saved, given) if name is not None and _is_library(name)]
    if libraries and None not in (saved, given) and given != saved:
        raise UserError(f"--arch {arch} contradicts {path}, which says that it is {saved}.")
    if not libraries:
        return None
    name = libraries[0]
    if name.startswith("python:") and given is None:
        # A file must not choose which code is run.
        raise UserError(
            f"{path} is of {name}, code of your own, which is not run because a file says so; if it "
            f"is the one that you mean, give --arch {name}."
        )
    return name


def _is_library(name: str) -> bool:
    return not architectures.family_of(name).is_built_here


def _library_options(
    said: Mapping[str, Any], given: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """What a library's model was built with; each where it is known."""
    useless = [
        f"--{name}" for name, value in given.items()
        if value is not None and name not in ("in_chans", "arch_options")
    ]  # fmt: skip
    if useless:
        raise UserError(
            f"{path} is of a library's model, which has no use for {' and '.join(useless)}; what it "
            "takes is given by --arch_options."
        )
    saved = _pairs(said, path)
    options = arch_options.pairs(given["arch_options"]) or saved
    if saved and options != saved:
        raise UserError(
            f"--arch_options {' '.join(given['arch_options'])} contradicts {path}, which says "
            f"{' '.join(said['arch_options'])}."
        )
    in_chans = _agreed("in_chans", given, said, path)
    size = said.get("global_crops_size")
    return {
        **({} if size is None else {"image_size": size}),
        "in_chans": 3 if in_chans is None else in_chans,
        **options,
    }


def _saved_name(said: Mapping[str, Any], family: Family, path: Path) -> str | None:
    """The architecture that the file says it is of."""
    name = _canonical(said, path)
    if name is None:
        return None
    if architectures.family_of(name) is not family:
        raise UserError(
            f"{path} contradicts itself: it says that it is {name}, and its tensors are those of "
            f"{family.title}."
        )
    return name


def _canonical(said: Mapping[str, Any], path: Path) -> str | None:
    if said.get("arch") is None:
        return None
    try:
        return architectures.canonical(str(said["arch"]))
    except UserError as error:
        raise UserError(f"What {path} says of itself cannot be built: {error}") from error


def _name(arch: str | None, saved: str | None, family: Family, path: Path) -> str | None:
    """The architecture's name, given or said."""
    if arch is None:
        return saved
    given = architectures.canonical(arch)
    if saved and given not in (saved, family.free):
        raise UserError(f"--arch {arch} contradicts {path}, which says that it is {saved}.")
    if architectures.family_of(given) is not family:
        raise UserError(
            f"--arch {arch} contradicts {path}, whose tensors are those of {family.title}."
        )
    return saved or given


def _compare(
    given: Mapping[str, Any],
    said: Mapping[str, Any],
    sizes: dict[str, Any],
    family: Family,
    path: Path,
) -> None:
    """Hold sizes that are given, or said by the file, against the tensors."""
    for name in (name for name in given if name in sizes):
        shown = _shown(sizes[name])
        if given[name] is not None:
            if not _same(name, given[name], sizes):
                raise UserError(
                    f"--{name} {given[name]} contradicts {path}, whose tensors have {name} {shown}."
                )
        elif name in said and not _same(name, said[name], sizes):
            raise UserError(
                f"{path} contradicts itself: it says {name} {said[name]}, and its tensors have "
                f"{shown}; --{name} {shown} goes by the tensors."
            )
    for name in given:
        known = (*sizes, *family.needed, *family.settings, "arch_options")
        if given[name] is not None and name not in known:
            raise UserError(
                f"--{name} {given[name]} contradicts {path}, which is {family.title} and has no "
                "use for it."
            )


def _shown(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _same(name: str, value: Any, sizes: dict[str, Any]) -> bool:
    if name == "mlp_ratio":
        width = sizes["embed_dim"]
        return int(width * value) == int(width * sizes["mlp_ratio"])
    return value == sizes[name]


def _named(
    name: str | None,
    by_flag: bool,
    given: Mapping[str, Any],
    sizes: dict[str, Any],
    family: Family,
    path: Path,
) -> tuple[str, bool]:
    """The architecture's name, and whether the tensors have the sizes that go by it."""
    if name is None:
        fitting = (known for known in family.sizes if not _others(known, sizes, family))
        name = next(fitting, family.free)
    other = _others(name, sizes, family)
    if by_flag and any(given.get(size) is None for size in other):
        flags = " and ".join(f"--{size}" for size in other if size in given)
        raise UserError(
            f"--arch {name} contradicts {path}: {_says(name, other, family)}, and the file's "
            f"{_shape(sizes, other)}; leave --arch out{flags and f', or give {flags} too'}."
        )
    return name, not other


def _others(name: str, sizes: dict[str, Any], family: Family) -> list[str]:
    """Which of the sizes that go by ``name``, and that show, the tensors have otherwise."""
    table = family.sizes.get(name, {})
    return [size for size in table if size in sizes and not _same(size, table[size], sizes)]


def _says(name: str, other: Iterable[str], family: Family) -> str:
    table = family.sizes[name]
    return f"{name} has {', '.join(f'{size} {_shown(table[size])}' for size in other)}"


def _shape(sizes: dict[str, Any], other: Iterable[str] = ()) -> str:
    own = (size for size in ("embed_dim", "depth", "depths") if size in sizes)
    shown = dict.fromkeys((*own, *other))
    return f"tensors have {' and '.join(f'{size} {_shown(sizes[size])}' for size in shown)}"


def _heads(
    name: str,
    fits: bool,
    given: Mapping[str, Any],
    said: Mapping[str, Any],
    sizes: dict[str, Any],
    family: Family,
    path: Path,
) -> int:
    """The number of heads, which is in no tensor's shape.

    A named architecture's own number counts only where the tensors have its sizes.
    """
    table = family.sizes.get(name, {})
    heads = said.get("num_heads", table.get("num_heads") if fits else None)
    if given["num_heads"] is not None:
        if heads is not None and heads != given["num_heads"]:
            raise UserError(
                f"--num_heads {given['num_heads']} contradicts {path}, which is of {heads} heads "
                f"({name})."
            )
        heads = given["num_heads"]
    if heads is None:
        other = _others(name, sizes, family)
        but = ""
        if other:
            but = f", and it is called {name}, but {_says(name, other, family)}"
        raise UserError(
            f"The number of attention heads of {path} is not known: its {_shape(sizes)}{but}; give "
            "--num_heads."
        )
    return heads


def _unseen_options(
    name: str,
    fits: bool,
    given: Mapping[str, Any],
    said: Mapping[str, Any],
    sizes: Mapping[str, Any],
    family: Family,
    path: Path,
) -> dict[str, Any]:
    """Arguments without a flag that show in no tensor: as given or said, else by the name."""
    saved, own = _pairs(said, path), arch_options.pairs(given.get("arch_options"))
    for key, value in own.items():
        known = {**sizes, **saved}
        if known.get(key, value) != value:
            raise UserError(
                f"--arch_options {key}={value} contradicts {path}, which has {key} {known[key]}."
            )
    table = family.sizes.get(name, {}) if fits or said.get("arch") else {}
    if not table and said.get("arch"):
        # A run under the free name that does not say a size had that of the first name.
        table = next(iter(family.sizes.values()))
    found = {**{size: table[size] for size in family.unseen if table}, **saved, **own}
    missing = [size for size in family.unseen if size not in found]
    if missing:
        raise UserError(
            f"The {' and '.join(missing)} of {path} are not known: its {_shape(sizes)}, which go by "
            f"no name; give --arch_options {' '.join(f'{size}=[…]' for size in missing)}."
        )
    return {size: value for size, value in found.items() if size not in sizes}


def _pairs(said: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The ``arch_options`` that a file says it was written with."""
    words = said.get("arch_options") or []
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise UserError(f"What {path} says of itself cannot be read: its arch_options are {words!r}.")
    return arch_options.pairs(words)


def _agreed(
    name: str, given: Mapping[str, Any], said: Mapping[str, Any], path: Path
) -> Any:
    """A setting that shows in no tensor, given or said; None where neither is."""
    value = given[name]
    if value is not None and said.get(name) not in (None, value):
        raise UserError(f"--{name} {value} contradicts {path}, which says {name} {said[name]}.")
    return value if value is not None else said.get(name)
