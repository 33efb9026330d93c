"""Any model of timm: its tokens or its last map, pooled and normalised as its authors do.

Legend: B batch, C channels, H and W pixels, N = h·w patches, P prefix tokens, T = P+N, D width.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dino_kit.backbones.interface import Features
from dino_kit.backbones.libraries.wrapped import (
    LibraryBackbone,
    largest_parts,
    outputs_of,
    require_depth,
)
from dino_kit.errors import UserError

_ABOUT_SHAPES = re.compile(r"\b(shapes?|sizes? of tensor|sizes for tensor|is invalid for input)\b")

# Parts of names of parameters that the authors exempt from weight decay.
_EXEMPT = {"pos_embed", "reg_token", "relative_position_bias_table", "cpb_mlp"}


class TimmBackbone(LibraryBackbone):
    """A model of timm.

    The pooled feature is the class token where there is one, of a distilled model the mean of the
    class and the distillation token, of a model that pools by attention what that gives; else the
    mean of the patches, before or after the norm as timm has it.
    """

    def __init__(self, model: nn.Module, name: str, image_size: int, in_chans: int):
        _draw_nothing(model)
        embeds = getattr(model, "embeds", model)  # where a NaFlexViT has it
        self.has_class_token = getattr(embeds, "cls_token", None) is not None
        self.num_prefix_tokens = getattr(model, "num_prefix_tokens", int(self.has_class_token))
        self._pools_class = (
            self.has_class_token
            and getattr(model, "dist_token", None) is None
            and getattr(model, "attn_pool", None) is None
        )
        with _calls(_last_blocks(model)) as calls:
            super().__init__(model, name, image_size, in_chans)
        # In a tuple they are no second part of this module.
        self._equal_blocks = _equal(calls)
        self.depth = max(1, len(self._equal_blocks))

    def encode(self, images: Tensor) -> Tensor:
        """What the model makes of images: tokens ``(B, T, D)``, or a map of whichever layout."""
        x = self.model.forward_features(images)
        if not (isinstance(x, Tensor) and x.ndim in (3, 4)):
            shown = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise UserError(
                f"{self.name} gives {shown} for images of {tuple(images.shape)}, and neither tokens "
                "nor a map; its patches cannot be told."
            )
        return x

    def read(self, images: Tensor) -> Features:
        x = self._encode(images)
        tokens = self._tokens(x)
        patches = tokens[:, self.num_prefix_tokens :]
        return Features(self._pool(x), patches, self._grid(x, patches, images))

    def read_pooled(self, images: Tensor) -> Tensor:
        return self._pool(self._encode(images))

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last ``n`` of ``depth`` blocks, ``(B, T, D)``, of the last stage alone.

        Each is what the model gives out where the blocks after it let everything pass.
        """
        require_depth(self, n)
        self.keep_all()
        last: list[Tensor] = []
        outputs = outputs_of(
            self._equal_blocks[-n:-1], lambda x: last.append(self._encode(x)), images
        )
        earlier = []
        for output in outputs:
            with _letting_pass(self._equal_blocks, output):
                earlier.append(self._encode(images))
        return [self._tokens(x) for x in (*earlier, *last)]

    def no_weight_decay(self) -> set[str]:
        """As of every library, and what timm's lists leave out in this version or that."""
        return super().no_weight_decay() | {
            name for name, _ in self.named_parameters() if _EXEMPT.intersection(name.split("."))
        }

    def from_published(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Tensors by timm's names where they are of a layout that timm reads; else as they are."""
        rename = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if rename is None:
            return state
        try:
            return dict(rename(dict(state), self.model))
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError):
            return state  # of another layout, on which timm fails in one way or another

    def _encode(self, images: Tensor) -> Tensor:
        try:
            return self.encode(images)
        except (AssertionError, RuntimeError) as error:  # how timm refuses a size, and how it fails
            if isinstance(error, RuntimeError) and not _ABOUT_SHAPES.search(str(error)):
                raise
            height, width = images.shape[2:]
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            told = f": {reason}" if reason else ""
            raise UserError(
                f"{self.name} takes no images of {height} × {width} pixels{told}."
            ) from error

    def _pool(self, x: Tensor) -> Tensor:
        if self._pools_class:
            return self._tokens(x[:, :1])[:, 0]
        pooled = self.model.forward_head(x, pre_logits=True)
        if pooled.ndim != 2:
            raise UserError(
                f"{self.name} gives no vector for an image, but {tuple(pooled.shape)}; it has to "
                "pool its patches, so leave out an option such as global_pool."
            )
        return pooled

    def _tokens(self, x: Tensor) -> Tensor:
        """Tokens ``(B, T, D)`` or a map to normalised tokens."""
        if x.ndim == 3:
            norm = getattr(self.model, "fc_norm", None)  # where authors normalise after pooling
            return x if norm is None else norm(x)
        # Each patch is a map of one, which pools to itself, and goes on as the mean of a map does.
        if self._channels_last:
            ones = x.reshape(-1, 1, 1, x.shape[3])
        else:
            ones = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1], 1, 1)
        return self.model.forward_head(ones, pre_logits=True).unflatten(0, (len(x), -1))

    def _grid(self, x: Tensor, patches: Tensor, images: Tensor) -> tuple[int, int]:
        if x.ndim == 4:
            return tuple(x.shape[1:3] if self._channels_last else x.shape[2:])
        height, width = images.shape[2:]
        number = patches.shape[1]
        down = round((number * height / width) ** 0.5)
        if number < 1 or number % max(1, down):
            raise UserError(
                f"{self.name} gives {number} tokens beside its prefix for images of {height} × "
                f"{width} pixels, which are no grid of patches."
            )
        return down, number // down

    @property
    def _channels_last(self) -> bool:
        return getattr(self.model, "output_fmt", "NCHW") == "NHWC"


def _last_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, or of its last stage, in order; none where they stand in no list."""
    blocks = largest_parts(model)
    while blocks:
        inner = getattr(blocks[-1], "blocks", blocks[-1])
        if type(inner) not in (nn.Sequential, nn.ModuleList) or not len(inner):
            break
        blocks = list(inner)
    # Where layers stand by themselves there, their outputs are no blocks'.
    return blocks if all(len(list(block.children())) for block in blocks) else []


@contextmanager
def _calls(blocks: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Any, Any]]]:
    """Within: what each block was given first, and gave out, in its last call; in their order."""
    found: dict[nn.Module, tuple[Any, Any]] = dict.fromkeys(blocks, (None, None))

    def keep(block: nn.Module, arguments: tuple, output: Any) -> None:
        found[block] = (arguments[0] if arguments else None, output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _equal(calls: dict[nn.Module, tuple[Any, Any]]) -> tuple[nn.Module, ...]:
    """The last blocks whose outputs are of one shape, which each after the first takes, too."""
    shapes = [
        (block, getattr(given, "shape", None), getattr(output, "shape", None))
        for block, (given, output) in calls.items()
    ]
    found: list[nn.Module] = []
    for block, taken, given in reversed(shapes):
        if given is None or given != shapes[-1][2]:
            break
        found.append(block)
        if taken != given:
            break
    return tuple(reversed(found))


@contextmanager
def _letting_pass(blocks: tuple[nn.Module, ...], output: Tensor) -> Iterator[None]:
    """Within: the first of ``blocks`` gives ``output``, and the others what they are given."""
    blocks[0].forward = lambda *_, **__: output
    for block in blocks[1:]:
        block.forward = lambda x, *_, **__: x
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _draw_nothing(model: nn.Module) -> None:
    """Turn off what else draws from a generator in training; see DrawnDropPath."""
    for module in model.modules():
        if hasattr(module, "aug_active"):  # jitter of rotary positions
            module.aug_active = False
        if "PatchDropout" in type(module).__name__:
            module.prob = 0.0
        if "DropBlock" in type(module).__name__:
            module.drop_prob = 0.0
        if isinstance(getattr(module, "drop_rate", None), float):
            module.drop_rate = 0.0
