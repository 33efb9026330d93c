"""``python:PACKAGE.MODULE:CALLABLE``: a model of the user's own, or of any library, wrapped.

The module is imported from the environment or the working folder, and the callable (a class, or a
function that returns a model) is given ``--arch_options`` and, by whichever name its signature
has, the size and the channels of images and the rate of stochastic depth. Two options are not
handed on: ``without=PART``, or a list of them, puts the identity in the place of a part, as of a
classifier; ``tokens=PART`` names the part whose output is the tokens, where the model gives out the
pooled feature alone. A model that has the interface
(:class:`~dino_kit.backbones.interface.Backbone`) is taken as it is. Of any other one the output is

- ``(B, D)``, the pooled feature alone;
- ``(B, D, h, w)``, a map, whose mean is pooled;
- ``(B, T, D)``, tokens: patches in a square row by row, behind as many prefix tokens as the model
  says by ``num_prefix_tokens``, else behind a class token where the rest is no square; the first
  token is pooled, or the mean where there is none;
- the pooled feature and the patches ``(B, N, D)`` or ``(B, D, h, w)``: as a tuple of the two, or by
  the names ``pooled`` and ``patches`` of an object or a dict; or tokens or a map by the name
  ``last_hidden_state``.

Legend: B batch, N = h·w patches, P prefix tokens, T = P+N, D width.
"""

from __future__ import annotations

import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_kit import log
from dino_kit.backbones.frozen import in_eval_mode
from dino_kit.backbones.interface import Backbone, Features
from dino_kit.backbones.libraries.wrapped import (
    LibraryBackbone,
    do_not_train_the_unused,
    outputs_of,
    require_depth,
)
from dino_kit.config.fields import nearest
from dino_kit.errors import UserError

# What signatures call what a run's flags say.
_SIZE = ("image_size", "img_size", "input_size")
_CHANNELS = ("in_chans", "in_channels", "num_channels", "channels")
_RATE = ("drop_path_rate", "drop_path", "stochastic_depth_prob")


def build(
    name: str,
    image_size: int | None = None,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    without: str | list[str] = (),
    tokens: str | None = None,
    **options: Any,
) -> nn.Module:
    """What ``name``, ``PACKAGE.MODULE:CALLABLE``, returns for ``options``, as a backbone.

    Raises:
        UserError: there is no such module, callable, option or part; it returns no model, or one
            that takes no images of ``image_size``, or gives out what no rule above reads.
    """
    title = f"python:{name}"
    call = _callable(name, title)
    signature = _signature(call)
    size = image_size or _default(signature, _SIZE) or 224
    known = ((_SIZE, size), (_CHANNELS, in_chans), (_RATE, drop_path_rate))
    said = {
        name: value
        for names, value in known
        for name in names
        if name in signature and not any(other in options for other in names)
    }
    model = _called(call, title, {**said, **options})
    if not isinstance(model, nn.Module):
        raise UserError(f"{title} returns {type(model).__name__}, and a torch.nn.Module is needed.")
    for part in [without] if isinstance(without, str) else without:
        _parent(model, part, title)[part.rpartition(".")[2]] = nn.Identity()
    if tokens is not None:
        _parent(model, tokens, title)
    elif isinstance(model, Backbone):
        return model
    backbone = _Own(model, title, size, in_chans, tokens)
    unused = do_not_train_the_unused(backbone)
    if unused:
        log.notice(
            f"the pooled feature of {title} does not depend on {', '.join(unused)}, which then are "
            "not trained."
        )
    return backbone


def _callable(name: str, title: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # behind the environment, so that no file here hides a package
    try:
        module = import_module(module_name)
    except Exception as error:  # code of the user's own has any
        raise UserError(f"{title} cannot be imported: {_reason(error)}.") from error
    call = getattr(module, attribute, None)
    if not callable(call):
        # The callables alone; a module has other names without number.
        names = [key for key in vars(module) if callable(getattr(module, key)) and key[0] != "_"]
        raise UserError(
            f"{title}: the module {module_name} has no callable {attribute}{nearest(attribute, names)}"
        )
    return call


def _called(call: Callable[..., Any], title: str, options: dict[str, Any]) -> Any:
    try:
        inspect.signature(call).bind(**options)
    except TypeError as error:
        raise UserError(
            f"{title} cannot be called with {', '.join(options) or 'nothing'}: {error}; "
            "--arch_options gives its arguments."
        ) from error
    except ValueError:
        pass  # it shows no signature
    try:
        return call(**options)
    except Exception as error:  # code of the user's own has any
        raise UserError(f"{title} fails: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """What happened and where, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text} ({last.filename}, line {last.lineno})"


def _signature(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(call).parameters
    except (TypeError, ValueError):  # of some that are written in C there is none
        return {}


def _default(signature: Mapping[str, inspect.Parameter], names: tuple[str, ...]) -> int | None:
    found = [signature[name].default for name in names if name in signature]
    return next((value for value in found if isinstance(value, int)), None)


def _parent(model: nn.Module, part: str, title: str) -> dict[str, Any]:
    """The parts beside ``part``, by name."""
    parts = dict(model.named_modules())
    if part not in parts or not part:
        top = ", ".join(name for name, _ in model.named_children())
        raise UserError(f"{title} has no part {part!r}; it has {top or 'none'}, and parts of these.")
    return parts[part.rpartition(".")[0]]._modules


class _Own(LibraryBackbone):
    """A model by what it gives out."""

    depth = 1

    def __init__(
        self, model: nn.Module, name: str, image_size: int, in_chans: int, tokens: str | None
    ):
        self._tokens = tokens
        super().__init__(model, name, image_size, in_chans)
        with in_eval_mode(self), torch.no_grad():
            _, patches, prefix, _ = self._outputs(self.blank(image_size))
        self.gives_patches = patches is not None
        self.num_prefix_tokens = prefix.shape[1] if self.gives_patches else 1
        if not self.gives_patches:
            log.notice(
                f"{name} gives no patches, so maps of similarity, and whatever else looks at "
                "patches, are not there; an option tokens=PART names the part that has them."
            )

    def read(self, images: Tensor) -> Features:
        pooled, patches, _, grid = self._outputs(images)
        # Without patches the whole image is one, for what is asked of every backbone.
        return Features(pooled, pooled[:, None] if patches is None else patches, grid)

    def forward_features(self, images: Tensor) -> Features:
        """Pooled feature, patches and their grid, as the model gives them out.

        Raises:
            UserError: it gives no patches.
        """
        self.keep_all()
        if not self.gives_patches:
            raise UserError(f"{self.name} gives no patches, and what was asked for needs them.")
        return self.read(images)

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """The output alone, ``(B, T, D)``; without patches it is the pooled feature, T = 1."""
        require_depth(self, n)
        self.keep_all()
        pooled, patches, prefix, _ = self._outputs(images)
        return [pooled[:, None]] if patches is None else [torch.cat((prefix, patches), dim=1)]

    def _outputs(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor, tuple[int, int]]:
        """Pooled feature, patches or None, prefix tokens (B, P, D), and the grid of patches."""
        if self._tokens is None:
            given = self.model(images)
            given = _by_name(given, "last_hidden_state", given)
            pooled, given = _pair(given)
        else:
            seen: list[Any] = []
            part = self.model.get_submodule(self._tokens)
            (given,) = outputs_of([part], lambda x: seen.append(self.model(x)), images)
            (pooled,) = seen
        if not all(x is None or isinstance(x, Tensor) for x in (pooled, given)):
            raise UserError(f"{self.name} gives out {type(given).__name__}, which no rule reads.")
        if pooled is not None and pooled.ndim != 2:
            raise UserError(
                f"The pooled feature of {self.name} has the shape {tuple(pooled.shape)}, and not (B, D)."
            )
        if given is None:
            return pooled, None, pooled[:, None][:, :0], (1, 1)
        prefix, patches, grid = self._split(given, images)
        if pooled is None:
            pooled = prefix[:, 0] if prefix.shape[1] else patches.mean(1)
        return pooled, patches, prefix, grid

    def _split(self, x: Tensor, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Tokens or a map to prefix tokens, patches and their grid."""
        if x.ndim == 4:
            patches = x.flatten(2).mT
            return patches[:, :0], patches, tuple(x.shape[2:])
        if x.ndim != 3:
            raise UserError(
                f"The tokens of {self.name} have the shape {tuple(x.shape)}, which no rule reads."
            )
        height, width = images.shape[2:]
        found = self.__dict__.get("num_prefix_tokens")  # at the native size
        said = getattr(self.model, "num_prefix_tokens", found)
        for p in (0, 1) if said is None else (said,):
            # As many patches down for a pixel as across.
            down = math.isqrt(max(0, x.shape[1] - p) * height // width)
            across = round(down * width / height)
            if down and down * across == x.shape[1] - p:
                return x[:, :p], x[:, p:], (down, across)
        raise UserError(
            f"{self.name} gives {x.shape[1]} tokens for {height} × {width} pixels, which are no grid "
            f"behind {'one or no' if said is None else said} prefix token; num_prefix_tokens of the "
            "model says how many there are."
        )


def _pair(given: Any) -> tuple[Any, Any]:
    """Pooled feature and patches of an output; None for what it lacks."""
    if isinstance(given, Tensor):
        return (given, None) if given.ndim == 2 else (None, given)
    if isinstance(given, tuple | list) and not hasattr(given, "pooled"):
        return tuple(given) if len(given) == 2 else (None, given)
    pooled, patches = _by_name(given, "pooled"), _by_name(given, "patches")
    return (None, given) if pooled is None and patches is None else (pooled, patches)


def _by_name(given: Any, name: str, otherwise: Any = None) -> Any:
    found = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
    return otherwise if found is None else found
