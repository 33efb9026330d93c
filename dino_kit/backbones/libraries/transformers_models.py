"""``hf:FOLDER``: the model of images that a folder's ``config.json`` describes, by transformers.

The folder is local, and only its configuration is read: the weights are fresh, nothing comes from
the network, and code that lies beside a configuration is not run. Position embeddings are
interpolated for images of other sizes where the model can.

Legend: B batch, C channels, N = h·w patches, P prefix tokens, T = P+N, D width, A heads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_kit.backbones.frozen import in_eval_mode
from dino_kit.backbones.interface import Features
from dino_kit.backbones.layers import block_index, patch_grid
from dino_kit.backbones.libraries.wrapped import (
    LibraryBackbone,
    do_not_train_the_unused,
    outputs_of,
    require_depth,
    see_channels,
)
from dino_kit.config.fields import nearest
from dino_kit.errors import UserError

# What a flag says by another name, and what it is called in a configuration.
_FLAGS = {"num_channels": "--in_chans"}
# Noise on the positions of a DINOv3: a generator would draw it, see DrawnDropPath.
_NOISE = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
# Kinds that have no stochastic depth, but a dropout at the end of each residual branch.
_DROPOUT_AT_BRANCHES = ("vit", "deit")


def build(
    name: str,
    image_size: int | None = None,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> LibraryBackbone:
    """The model of the folder ``name``, with ``options`` in place of what its configuration says.

    Raises:
        UserError: transformers is not installed, the folder has no configuration, or one that
            describes no model of images of ``image_size``.
    """
    title = f"hf:{name}"
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"{title} needs the package transformers: pip install 'dino_kit[hf]'."
        ) from error
    if not Path(name, "config.json").is_file():
        raise UserError(
            f"{title} is a folder with a config.json of Hugging Face transformers, and {name} has "
            "none; a model's folder has to be there already, for none is fetched."
        )
    try:
        config = _configuration(
            name, title, image_size, in_chans=in_chans, drop_path_rate=drop_path_rate, **options
        )
        model = _fresh(transformers, config)
    except UserError:
        raise
    except Exception as error:  # of many kinds, by what the configuration is
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{title} cannot be built: {reason}.") from error
    if not hasattr(config, "num_channels"):
        see_channels(model, in_chans)
    if config.model_type in _DROPOUT_AT_BRANCHES:
        _set_stochastic_depth(model, drop_path_rate)
    if isinstance(getattr(getattr(model, "pooler", None), "dense", None), nn.Linear):
        model.pooler = None  # a head of its own, whose output nobody reads
    _keep_windows(model)

    size = image_size or _side(getattr(config, "image_size", None))
    kind = _GlobalAttention if _attends_globally(model, size, in_chans) else _Tokens
    backbone = kind(model, title, size, in_chans)
    do_not_train_the_unused(backbone)
    return backbone


def _configuration(folder: str, title: str, image_size: int | None, **options: Any) -> Any:
    """The folder's configuration with what a run asks for in it, and without what draws numbers."""
    from transformers import AutoConfig

    where = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **where)
    in_chans, drop_path_rate = options.pop("in_chans"), options.pop("drop_path_rate")
    known = config.to_dict()
    for key in options:
        if key in _FLAGS:
            raise UserError(f"--arch_options has {key}, which {_FLAGS[key]} says; give that.")
        if key not in known:
            raise UserError(
                f"The configuration of {title}, a {type(config).__name__}, has no {key}"
                f"{nearest(key, known)}"
            )
    asked = {"image_size": image_size, "num_channels": in_chans, "drop_path_rate": drop_path_rate}
    changes = {key: value for key, value in asked.items() if key in known and value is not None}
    changes |= {key: 0.0 for key, value in known.items() if "dropout" in key and _is_rate(value)}
    changes |= {key: None for key in _NOISE if key in known}
    said, _ = type(config).get_config_dict(folder, **where)
    return type(config).from_dict({**said, **changes, **options})


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fresh(transformers: Any, config: Any) -> nn.Module:
    """The model in single precision, by fused attention if it knows it."""
    build = partial(
        transformers.AutoModel.from_config, config, trust_remote_code=False, dtype=torch.float32
    )
    try:
        return build(attn_implementation="sdpa")
    except ValueError:
        return build(attn_implementation="eager")


def _set_stochastic_depth(model: nn.Module, last: float) -> None:
    """Rates from 0 linearly to ``last``, in the place of each block's dropout."""
    from torchvision.ops import StochasticDepth

    blocks = _blocks(model)
    for index, block in enumerate(blocks):
        if isinstance(getattr(block, "dropout", None), nn.Dropout):
            block.dropout = StochasticDepth(last * index / max(1, len(blocks) - 1), "row")


def _keep_windows(model: nn.Module) -> None:
    """Windows stay what they are at the native size, and smaller maps are padded to one.

    A Swin of transformers clamps its windows to the smallest map that it has seen, for good, and
    its table of relative positions does not fit them then.
    """
    for module in model.modules():
        if hasattr(module, "set_shift_and_window_size"):
            if min(module.input_resolution) <= module.window_size:
                module.shift_size = 0  # one window covers the map
            module.set_shift_and_window_size = _leave


def _leave(input_resolution: tuple[int, int]) -> None:
    """In the place of what would change windows."""


def _side(size: Any) -> int:
    """Of an ``image_size`` as configurations have it: a number, a pair, or nothing."""
    return next(iter(size)) if isinstance(size, list | tuple) else size or 224


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The longest list of parts; of a hierarchical model that of its last stage."""
    parts = _largest_list(model, nn.ModuleList)
    if parts and hasattr(model.config, "depths"):
        parts = _largest_list(parts[-1], nn.ModuleList, nn.Sequential)
    return parts


def _largest_list(module: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    def size(part: nn.Module) -> int:
        return sum(p.numel() for p in part.parameters())

    lists = [part for part in module.modules() if isinstance(part, kinds)]
    return list(max(lists, key=size, default=()))


class _Tokens(LibraryBackbone):
    """A model whose ``last_hidden_state`` is tokens ``(B, T, D)`` or a map ``(B, D, h, w)``."""

    def __init__(self, model: nn.Module, name: str, image_size: int, in_chans: int):
        self._run = _runner(model)
        self._blocks = tuple(_blocks(model))  # in a tuple they are no second parts of this module
        self.depth = len(self._blocks)
        pooler = getattr(getattr(model, "pooler", None), "layernorm", None)
        # What normalises the mean, where the model leaves its patches as they are.
        self._norm_of_mean = (pooler,) if isinstance(pooler, nn.Module) else ()
        embeddings = getattr(model, "embeddings", None)
        self._is_distilled = getattr(embeddings, "distillation_token", None) is not None
        if not model.config.model_type.startswith("dino"):  # whose authors let positions decay
            self.exempt = ("position_embeddings",)
        self.exempt += ("relative_position_bias_table",)
        super().__init__(model, name, image_size, in_chans)
        images = self.blank(image_size)
        with in_eval_mode(self), torch.no_grad():
            tokens = _as_tokens(self._run(images).last_hidden_state).shape[1]
            self.num_prefix_tokens = tokens - self.read(images).patches.shape[1]

    @property
    def blocks(self) -> list[nn.Module]:
        return _largest_list(self.model, nn.ModuleList)

    def read(self, images: Tensor) -> Features:
        x = self._run(images).last_hidden_state
        if x.ndim == 4 and not self._norm_of_mean and hasattr(self.model, "layernorm"):
            self._norm_of_mean = (self.model.layernorm,)
        grid = tuple(x.shape[2:]) if x.ndim == 4 else self._grid(images)
        x = _as_tokens(x)
        p = x.shape[1] - grid[0] * grid[1]
        if p < 0:
            raise UserError(
                f"{self.name} gives {x.shape[1]} tokens for {grid[0]} × {grid[1]} patches, so which "
                "they are is not known."
            )
        patches = x[:, p:]
        for norm in self._norm_of_mean:
            return Features(norm(patches.mean(1)), norm(patches), grid)
        if p == 0:
            return Features(patches.mean(1), patches, grid)
        return Features(x[:, :2].mean(1) if self._is_distilled else x[:, 0], patches, grid)

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last ``n`` blocks, first to last, normalised, each ``(B, T, D)``.

        Of a hierarchical model of the last stage.
        """
        require_depth(self, n)
        self.keep_all()
        outputs = outputs_of(self._blocks[-n:], self._run, images)
        return [self._normed(_as_tokens(x)) for x in outputs]

    def _normed(self, x: Tensor) -> Tensor:
        names = ("layernorm", "norm")
        norms = [getattr(self.model, name) for name in names if hasattr(self.model, name)]
        for norm in (*self._norm_of_mean, *norms):
            return norm(x)
        return x

    def _grid(self, images: Tensor) -> tuple[int, int]:
        config = self.model.config
        patch_size = getattr(config, "patch_size", None)
        if not isinstance(patch_size, int):
            raise UserError(
                f"The configuration of {self.name} has no patch_size that tells the grid of its "
                "tokens."
            )
        if not hasattr(config, "depths"):
            return patch_grid(images, self.in_chans, patch_size)
        h, w = (-(-side // patch_size) for side in images.shape[2:])
        for _ in config.depths[1:]:
            h, w = -(-h // 2), -(-w // 2)
        return h, w


class _GlobalAttention(_Tokens):
    """A model whose tokens all attend to each other."""

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """The last block's attention after the softmax, ``(B, A, T, T)``, prefix tokens first."""
        return self.get_selfattention(images, -1)

    def get_selfattention(self, images: Tensor, block: int) -> Tensor:
        """The same of any block, counted from 0, or from the end as -1, -2, …"""
        index = block_index(block, self.depth)
        self.keep_all()
        return _map_of(self._blocks[index], self._run, images)


def _runner(model: nn.Module) -> Any:
    """``model`` as it is called with images alone: of any size where it can be told so."""
    can = inspect.signature(model.forward).parameters
    how = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in can else {}
    return partial(model, **how)


def _as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT if x.ndim == 4 else x


def _attention_in(block: nn.Module) -> nn.Module | None:
    """The innermost module that chooses its kernel by a configuration."""
    found = [
        module for module in block.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "config")
    ]  # fmt: skip
    return found[-1] if found else None


def _attends_globally(model: nn.Module, size: int, in_chans: int) -> bool:
    """Whether the last block has one attention map over all tokens that the model gives out."""
    blocks = _blocks(model)
    if not blocks or hasattr(model.config, "depths") or _attention_in(blocks[-1]) is None:
        return False
    images = torch.zeros(1, in_chans, size, size, device=next(model.parameters()).device)
    run = _runner(model)
    try:
        with in_eval_mode(model), torch.no_grad():
            tokens = run(images).last_hidden_state.shape[1]
            return _map_of(blocks[-1], run, images).shape[-2:] == (tokens, tokens)
    except (RuntimeError, ValueError, TypeError, AttributeError, UserError):
        # Which the first trial of the wrapped model will tell.
        return False


def _map_of(block: nn.Module, run: Any, images: Tensor) -> Tensor:
    """What a block's attention computes beside its output, where its kernel is not a fused one."""
    attention = _attention_in(block)
    with _unfused(attention):
        return outputs_of([attention], run, images, place=1)[0]


@contextmanager
def _unfused(attention: nn.Module) -> Iterator[None]:
    """Within, this one module computes its map; the others share a configuration and keep theirs."""
    shared = attention.config
    attention.config = copy.copy(shared)
    attention.config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        attention.config = shared
