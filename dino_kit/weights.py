"""From a checkpoint of any known layout to a backbone.

Layouts: a run's checkpoint, as dino_kit or the reference writes it (networks under ``student`` and
``teacher``, prefixes ``module.`` and ``backbone.``, a head beside the backbone, settings under
``config`` or ``args``), and the bare tensors of a backbone. What a file says of its architecture is
held against its tensors' shapes, and what the caller says against both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino_kit import files
from dino_kit.backbones.build import create_backbone
from dino_kit.config import architectures
from dino_kit.errors import UserError
from dino_kit.normalize import IMAGENET_MEAN, IMAGENET_STD

NEWEST = "checkpoint.pth"


class EvalTransform(NamedTuple):
    """How images are prepared for a backbone."""

    image_size: int  # the side, in pixels, that the backbone was trained at
    mean: tuple[float, ...] = IMAGENET_MEAN  # of each channel, pixels in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD


class Loaded(NamedTuple):
    """A backbone and where it comes from."""

    backbone: nn.Module  # in eval mode, on the CPU
    transform: EvalTransform
    architecture: dict[str, Any]  # name, and the sizes by which create_backbone built it
    which: str | None  # the network of the checkpoint; None where the file holds one backbone only
    path: str  # the file
    sha256: str
    matched: int  # tensors of the backbone, each found in the file
    epoch: int | None  # epochs done, where the file says so
    step: int | None

    def summary(self) -> str:
        """What was loaded, in a line."""
        of = f"{self.which} of {self.path}" if self.which else self.path
        age = "" if self.epoch is None else f", epoch {self.epoch}"
        return f"loaded {of}{age}: {self.architecture['name']}, {self.matched} tensors matched"


def load_backbone(path: str | Path, which: str = "teacher", **options: Any) -> nn.Module:
    """The backbone of a checkpoint, in eval mode, on the CPU; arguments as :func:`load`."""
    return load(path, which, **options).backbone


def load(
    path: str | Path,
    which: str = "teacher",
    *,
    arch: str | None = None,
    patch_size: int | None = None,
    in_chans: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
) -> Loaded:
    """Read a backbone and what is known of it; no code in the file is run.

    Args:
        path: a checkpoint, or a run's folder, whose ``checkpoint.pth`` is meant.
        which: network of the checkpoint, ``"teacher"`` or ``"student"``.
        arch: an architecture's name; like all sizes needed only where the file does not tell.
        patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio: as for ``create_backbone``.

    Raises:
        UserError: the file is missing or no checkpoint; it lacks the network; an argument
            contradicts it; its tensors are not all of those that the backbone has, and no others;
            or the number of heads, which no tensor shows, is neither said nor given.
    """
    path = _file(Path(path))
    content = files.read_weights(path)
    state, which = _network(content, which, path)
    said = _settings(content)
    given = {
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
    }
    sizes = _sizes(state, path)
    name = _name(arch, said, path)
    _compare(given, said, sizes, path)
    by_flag = arch not in (None, architectures.FREE_VIT)
    name, sizes["num_heads"] = _heads(name, by_flag, given, said, sizes, path)
    # First weights are drawn only to be replaced, so the caller's random numbers are left alone.
    with torch.random.fork_rng(devices=[]):
        backbone = create_backbone(architectures.FREE_VIT, **sizes)
    matched = _fill(backbone, state, path)
    return Loaded(
        backbone.eval(),
        EvalTransform(said.get("global_crops_size") or sizes["image_size"]),
        {"name": name, **sizes},
        which,
        str(path),
        files.sha256(path),
        matched,
        content.get("epoch") if which else None,
        content.get("step") if which else None,
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / NEWEST).is_file():
        return path / NEWEST
    others = sorted(entry.name for entry in path.iterdir())
    weights = [name for name in others if name.endswith((".pth", ".pt"))]
    if weights:
        raise UserError(
            f"The folder {path} has no {NEWEST}; it has {_some(weights)}: give that file's path."
        )
    raise UserError(
        f"The folder {path} has no {NEWEST}, so it is no run's folder; it has "
        f"{_some(others) if others else 'nothing in it'}."
    )


def _network(
    content: dict[str, Any], which: str, path: Path
) -> tuple[dict[str, Any], str | None]:
    """The backbone's tensors by their own names, and which network they are of."""
    networks = [key for key, value in content.items() if _is_network(value)]
    if which in networks:
        state: Mapping[str, Any] = content[which]
    elif networks:
        raise UserError(
            f"{path} holds no network {which!r}; it holds {_some(networks)}: choose one by "
            "--checkpoint_key."
        )
    elif any(isinstance(value, Tensor) for value in content.values()):
        state, which = content, None
    else:
        raise UserError(f"{path} holds no weights; what it holds: {_some(content) or 'nothing'}.")
    backbone = {}
    for name, value in state.items():
        name = str(name).removeprefix("module.").removeprefix("backbone.")
        if not name.startswith("head."):
            backbone[name] = value
    return backbone, which


def _is_network(value: Any) -> bool:
    return isinstance(value, Mapping) and any(str(name).endswith(".weight") for name in value)


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that wrote the file, by name; none where it does not say."""
    said = content.get("config", content.get("args"))
    said = said if isinstance(said, Mapping) else getattr(said, "__dict__", {})
    return {name: value for name, value in said.items() if value is not None}


def _sizes(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Every size of a vision transformer that shows in its tensors."""
    # Names that have to be there, and their numbers of dimensions.
    needed = {"pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
    for name, dimensions in needed.items():
        if getattr(state.get(name), "ndim", None) != dimensions:
            raise UserError(
                f"{path} is no vision transformer of a known layout: it has no tensor {name} with "
                f"{dimensions} dimensions, but {_some(state) or 'nothing'}."
            )
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    positions = state["pos_embed"].shape[1] - 1
    side = round(max(positions, 0) ** 0.5)
    if side < 1 or side * side != positions:
        raise UserError(
            f"{path} has {positions} position embeddings beside the class token's; a square grid "
            "of patches is needed."
        )
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    ratio = hidden / embed_dim
    blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "patch_size": patch_size,
        "image_size": side * patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": len(blocks),
        # Half a unit more where rounding would lose one.
        "mlp_ratio": ratio if int(embed_dim * ratio) == hidden else (hidden + 0.5) / embed_dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }


def _name(arch: str | None, said: dict[str, Any], path: Path) -> str | None:
    """The architecture's name, given or said."""
    if arch is not None:
        architectures.require_buildable(arch)
    if said.get("arch") is not None:
        try:
            architectures.require_buildable(str(said["arch"]))
        except UserError as error:
            raise UserError(f"What {path} says of itself cannot be built: {error}") from error
    given, saved = (
        None if name is None else architectures.canonical(str(name))
        for name in (arch, said.get("arch"))
    )
    if given and saved and given != saved and given != architectures.FREE_VIT:
        raise UserError(f"--arch {arch} contradicts {path}, which says that it is {saved}.")
    return saved or given


def _compare(
    given: dict[str, Any], said: dict[str, Any], sizes: dict[str, Any], path: Path
) -> None:
    """Hold sizes that are given, or said by the file, against the tensors."""
    for name in ("patch_size", "in_chans", "embed_dim", "depth", "mlp_ratio"):
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


def _same(name: str, value: Any, sizes: dict[str, Any]) -> bool:
    if name == "mlp_ratio":
        width = sizes["embed_dim"]
        return int(width * value) == int(width * sizes["mlp_ratio"])
    return value == sizes[name]


def _heads(
    name: str | None,
    by_flag: bool,
    given: dict[str, Any],
    said: dict[str, Any],
    sizes: dict[str, Any],
    path: Path,
) -> tuple[str, int]:
    """The architecture's name and its number of heads, which is in no tensor's shape.

    A named architecture's own number counts only where the tensors have its sizes.
    """
    if name is None:
        name = next(
            (
                known
                for known, table in architectures.VIT_SIZES.items()
                if all(sizes[size] == table[size] for size in ("embed_dim", "depth"))
            ),
            architectures.FREE_VIT,
        )
    table = architectures.VIT_SIZES.get(name, {})
    shape = f"tensors have embed_dim {sizes['embed_dim']} and depth {sizes['depth']}"
    other = [
        size for size in ("embed_dim", "depth") if table and table[size] != sizes[size]
    ]
    named = f"{name} has {', '.join(f'{size} {table[size]}' for size in other)}"
    if by_flag and any(given[size] is None for size in other):
        flags = " and ".join(f"--{size}" for size in other)
        raise UserError(f"--arch {name} contradicts {path}: {named}, and the file's {shape}; "
                        f"leave --arch out, or give {flags} too.")
    heads = said.get("num_heads", None if other else table.get("num_heads"))
    if given["num_heads"] is not None:
        if heads is not None and heads != given["num_heads"]:
            raise UserError(
                f"--num_heads {given['num_heads']} contradicts {path}, which is of {heads} heads "
                f"({name})."
            )
        heads = given["num_heads"]
    if heads is None:
        but = f", and it is called {name}, but {named}" if other else ""
        raise UserError(
            f"The number of attention heads of {path} is not known: its {shape}{but}; give "
            "--num_heads."
        )
    return architectures.FREE_VIT if other else name, heads


def _fill(backbone: nn.Module, state: dict[str, Any], path: Path) -> int:
    """Load ``state`` strictly; return the number of tensors."""
    wanted = backbone.state_dict()
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    if missing or unexpected:
        lacks = f"lacks {_some(missing)}" if missing else ""
        more = f"has {_some(unexpected)} besides" if unexpected else ""
        raise UserError(
            f"{path} does not fit the backbone that its tensors describe: it "
            f"{' and '.join(filter(None, (lacks, more)))}."
        )
    for name, tensor in wanted.items():
        shape = getattr(state[name], "shape", None)
        if shape != tensor.shape:
            raise UserError(
                f"{path} does not fit the backbone that its tensors describe: {name} is "
                f"{tuple(shape) if shape is not None else type(state[name]).__name__} and should "
                f"be {tuple(tensor.shape)}."
            )
    backbone.load_state_dict(state)
    return len(wanted)


def _some(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[:3] if more else names) + more
