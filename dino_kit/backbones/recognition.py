"""Which architecture a backbone's tensors are of.

What shows in the tensors' names and shapes counts; what the file says of itself, and what the
caller says, is held against it, and settles what does not show: a ViT's number of heads, how a
ResMLP meets other grids of patches than its own, and the scale of a DeepViT's maps. A model of a
library is what the file or the caller calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    family = _family(state)
    sizes = _READERS[family.free](state, path)
    saved = _saved_name(said, family, path)
    name = _name(arch, saved, family, path)
    _compare(given, said, sizes, family, path)
    by_flag = arch not in (None, family.free)
    name, fits = _named(name, by_flag, given, sizes, family, path)
    if family is architectures.VIT:
        sizes["num_heads"] = _heads(name, fits, given, said, sizes, path)
    elif family is architectures.RESMLP:
        sizes["mlp_grid"] = _agreed("mlp_grid", given, said, path) or architectures.MLP_GRID
    else:
        sizes["scale_reattention"] = name in architectures.SCALED_REATTENTION
    return Architecture(name if fits else family.free, family.free, sizes)


def _library(said: Mapping[str, Any], arch: str | None, path: Path) -> str | None:
    """The model of a library that the file or the caller names; None where neither names one.

    Its tensors are not asked: what they are called, and which there are, is the library's affair,
    and loading holds them against the model.
    """
    saved = _canonical(said, path)
    given = None if arch is None else architectures.canonical(arch)
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
    in_chans = _agreed("in_chans", given, said, path)
    words = _agreed("arch_options", given, said, path)
    size = said.get("global_crops_size")
    return {
        **({} if size is None else {"image_size": size}),
        "in_chans": 3 if in_chans is None else in_chans,
        **arch_options.pairs(words),
    }


def some(names: Iterable[Any]) -> str:
    """The first few of ``names``, and how many more there are, as part of a sentence."""
    names = [str(name) for name in names]
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[:3] if more else names) + more


def _family(state: Mapping[str, Any]) -> Family:
    if "blocks.0.attn.weight" in state:
        return architectures.RESMLP
    return architectures.DEEPVIT if _mixing_matrices(state) else architectures.VIT


def _mixing_matrices(state: Mapping[str, Any]) -> list[str]:
    """A DeepViT's, one of every block with Re-Attention."""
    return [name for name in state if name.endswith(".attn.reatten_matrix.weight")]


def _vit_sizes(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Every size of a vision transformer that shows in its tensors."""
    # It is the last that is thought of.
    _require("vision transformer and no ResMLP", {"pos_embed": 3}, state, path)
    sizes = _patch_sizes("vision transformer", state, path)
    sizes["image_size"] = _positions_side(state, path) * sizes["patch_size"]
    return {**sizes, "qkv_bias": "blocks.0.attn.qkv.bias" in state}


def _deepvit_sizes(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Every size of a DeepViT that shows in its tensors."""
    mixing = _mixing_matrices(state)
    needed = {"pos_embed": 3, "patch_embed.conv1.weight": 4, mixing[0]: 4}
    _require("DeepViT", needed, state, path)
    sizes = _patch_sizes("DeepViT", state, path)
    sizes["in_chans"] = state["patch_embed.conv1.weight"].shape[1]
    sizes["patch_size"] *= 2  # the linear map of a patch sees every second pixel
    sizes["image_size"] = _positions_side(state, path) * sizes["patch_size"]
    sizes["num_heads"] = len(state[mixing[0]])
    return {**sizes, "reattention_blocks": len(mixing)}


def _resmlp_sizes(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Every size of a ResMLP that shows in its tensors."""
    _require("ResMLP", {"blocks.0.attn.weight": 2}, state, path)
    sizes = _patch_sizes("ResMLP", state, path)
    side = _side(state["blocks.0.attn.weight"].shape[0], path, "patches in its token mixing")
    return {**sizes, "image_size": side * sizes["patch_size"]}


_READERS: dict[str, Callable[[Mapping[str, Any], Path], dict[str, Any]]] = {
    architectures.FREE_VIT: _vit_sizes,
    architectures.FREE_RESMLP: _resmlp_sizes,
    architectures.FREE_DEEPVIT: _deepvit_sizes,
}


def _require(
    kind: str, needed: dict[str, int], state: Mapping[str, Any], path: Path
) -> None:
    """Names that have to be there, with their numbers of dimensions."""
    for name, dimensions in needed.items():
        if getattr(state.get(name), "ndim", None) != dimensions:
            raise UserError(
                f"{path} is no {kind} of a known layout: it has no tensor {name} with "
                f"{dimensions} dimensions, but {some(state) or 'nothing'}."
            )


def _patch_sizes(kind: str, state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Sizes that every network of patches and blocks shows alike."""
    _require(kind, {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}, state, path)
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    ratio = hidden / embed_dim
    blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": len(blocks),
        # Half a unit more where rounding would lose one.
        "mlp_ratio": ratio if int(embed_dim * ratio) == hidden else (hidden + 0.5) / embed_dim,
    }


def _positions_side(state: Mapping[str, Any], path: Path) -> int:
    beside = "position embeddings beside the class token's"
    return _side(state["pos_embed"].shape[1] - 1, path, beside)


def _side(patches: int, path: Path, what: str) -> int:
    side = round(max(patches, 0) ** 0.5)
    if side < 1 or side * side != patches:
        raise UserError(f"{path} has {patches} {what}; a square grid of patches is needed.")
    return side


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
        shown = f"{sizes[name]:g}" if name == "mlp_ratio" else sizes[name]
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
    if given.get("arch_options") is not None:
        raise UserError(
            f"--arch_options is of no use for {path}, {family.title}, whose tensors tell; leave it out."
        )
    for name in ("num_heads", "mlp_grid"):
        if given[name] is not None and name not in (*family.needed, *family.settings):
            raise UserError(
                f"--{name} {given[name]} contradicts {path}, which is {family.title} and has no "
                "use for it."
            )


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
    return [size for size in table if size in sizes and table[size] != sizes[size]]


def _says(name: str, other: Iterable[str], family: Family) -> str:
    return f"{name} has {', '.join(f'{size} {family.sizes[name][size]}' for size in other)}"


def _shape(sizes: dict[str, Any], other: Iterable[str] = ()) -> str:
    shown = dict.fromkeys(("embed_dim", "depth", *other))
    return f"tensors have {' and '.join(f'{size} {sizes[size]}' for size in shown)}"


def _heads(
    name: str,
    fits: bool,
    given: Mapping[str, Any],
    said: Mapping[str, Any],
    sizes: dict[str, Any],
    path: Path,
) -> int:
    """The number of heads, which is in no tensor's shape.

    A named architecture's own number counts only where the tensors have its sizes.
    """
    table = architectures.VIT.sizes.get(name, {})
    heads = said.get("num_heads", table.get("num_heads") if fits else None)
    if given["num_heads"] is not None:
        if heads is not None and heads != given["num_heads"]:
            raise UserError(
                f"--num_heads {given['num_heads']} contradicts {path}, which is of {heads} heads "
                f"({name})."
            )
        heads = given["num_heads"]
    if heads is None:
        other = _others(name, sizes, architectures.VIT)
        but = ""
        if other:
            but = f", and it is called {name}, but {_says(name, other, architectures.VIT)}"
        raise UserError(
            f"The number of attention heads of {path} is not known: its {_shape(sizes)}{but}; give "
            "--num_heads."
        )
    return heads


def _agreed(
    name: str, given: Mapping[str, Any], said: Mapping[str, Any], path: Path
) -> Any:
    """A setting that shows in no tensor, given or said; None where neither is."""
    value = given[name]
    if value is not None and said.get(name) not in (None, value):
        raise UserError(f"--{name} {value} contradicts {path}, which says {name} {said[name]}.")
    return value if value is not None else said.get(name)
