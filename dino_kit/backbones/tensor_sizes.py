"""What the names and shapes of a backbone's tensors show: its family, and its sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dino_kit.config import architectures
from dino_kit.config.architectures import Family
from dino_kit.errors import UserError

_T2T = "tokens_to_token."  # what the tensors of a T2T-ViT's first part begin with
_CSWIN = "stage1_conv_embed.0.weight"  # what a CSWin Transformer begins with


def family_of(state: Mapping[str, Any]) -> Family:
    """The family whose names the tensors have; a vision transformer's where no other's are seen."""
    if "blocks.0.attn.weight" in state:
        return architectures.RESMLP
    if any(name.startswith(_T2T) for name in state):
        return architectures.T2T
    if _CSWIN in state:
        return architectures.CSWIN
    return architectures.DEEPVIT if _mixing_matrices(state) else architectures.VIT


def sizes_of(family: Family, state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Every size that shows in the tensors of one of ``family``, by name.

    Raises:
        UserError: they are not of a layout known of it; ``path`` is what a sentence calls the file.
    """
    return _READERS[family.free](state, path)


def _mixing_matrices(state: Mapping[str, Any]) -> list[str]:
    """A DeepViT's, one of every block with Re-Attention."""
    return [name for name in state if name.endswith(".attn.reatten_matrix.weight")]


def _vit_sizes(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Every size of a vision transformer that shows in its tensors."""
    # It is the last that is thought of.
    _require("vision transformer and no ResMLP", {"pos_embed": 3}, state, path)
    sizes = _patch_sizes("vision transformer", state, path)
    sizes["image_size"] = _positions_side(state, path) * sizes["patch_size"]
    if "register_tokens" in state:
        _require("vision transformer with registers", {"register_tokens": 3}, state, path)
        sizes["num_register_tokens"] = state["register_tokens"].shape[1]
    if "blocks.0.ls1.gamma" in state:
        sizes["layer_scale"] = 1.0  # what it was at first does not show, nor matter any more
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


def _t2t_sizes(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Every size of a T2T-ViT that shows in its tensors."""
    features, norm = f"{_T2T}attention1.w", f"{_T2T}attention1.norm1.weight"
    needed = {features: 2, norm: 1, f"{_T2T}project.weight": 2, "pos_embed": 3}
    _require("T2T-ViT with Performers", needed, state, path)
    patch_size = architectures.T2T.patch_size
    return {
        "patch_size": patch_size,
        "in_chans": len(state[norm]) // 7**2,  # of pixels in the first soft split
        **_block_sizes("T2T-ViT", len(state[f"{_T2T}project.weight"]), state, path),
        "token_dim": state[features].shape[1],
        "image_size": _positions_side(state, path) * patch_size,
    }


def _cswin_sizes(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Every size of a CSWin Transformer that shows in its tensors."""
    hidden = "stage1.0.mlp.fc1.weight"
    _require("CSWin Transformer", {_CSWIN: 4, hidden: 2}, state, path)
    embed_dim, in_chans = state[_CSWIN].shape[:2]
    found = (re.match(r"stage([1-4])\.(\d+)\.", name) for name in state)
    blocks = {match.groups() for match in found if match}
    return {
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depths": [sum(stage == number for stage, _ in blocks) for number in "1234"],
        "mlp_ratio": _ratio(len(state[hidden]), embed_dim),
    }


_READERS: dict[str, Callable[[Mapping[str, Any], Path], dict[str, Any]]] = {
    architectures.FREE_VIT: _vit_sizes,
    architectures.FREE_RESMLP: _resmlp_sizes,
    architectures.FREE_DEEPVIT: _deepvit_sizes,
    architectures.FREE_T2T: _t2t_sizes,
    architectures.FREE_CSWIN: _cswin_sizes,
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
    _require(kind, {"patch_embed.proj.weight": 4}, state, path)
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    return {
        "patch_size": patch_size,
        "in_chans": in_chans,
        **_block_sizes(kind, embed_dim, state, path),
    }


def _block_sizes(
    kind: str, embed_dim: int, state: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The width, and what blocks show alike."""
    _require(kind, {"blocks.0.mlp.fc1.weight": 2}, state, path)
    blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "embed_dim": embed_dim,
        "depth": len(blocks),
        "mlp_ratio": _ratio(len(state["blocks.0.mlp.fc1.weight"]), embed_dim),
    }


def _ratio(hidden: int, width: int) -> float:
    """``mlp_ratio``, by half a unit more where rounding would lose one."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _positions_side(state: Mapping[str, Any], path: Path) -> int:
    beside = "position embeddings beside the class token's"
    return _side(state["pos_embed"].shape[1] - 1, path, beside)


def _side(patches: int, path: Path, what: str) -> int:
    side = round(max(patches, 0) ** 0.5)
    if side < 1 or side * side != patches:
        raise UserError(f"{path} has {patches} {what}; a square grid of patches is needed.")
    return side


def some(names: Iterable[Any]) -> str:
    """The first few of ``names``, and how many more there are, as part of a sentence."""
    names = [str(name) for name in names]
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[:3] if more else names) + more
