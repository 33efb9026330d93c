"""A model of another library as :class:`~dino_kit.backbones.interface.Backbone` describes.

What differs from library to library, how a model gives out its tokens, is for the subclasses; what
DINO needs of every model is here: names of tensors as the library has them, stochastic depth that
is drawn by the caller, no dropout, and sizes of images that are known to pass.

Legend: B batch, C channels, H and W pixels, N patches, P prefix tokens, D width, L residual branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kit.backbones.frozen import in_eval_mode
from dino_kit.backbones.interface import Features
from dino_kit.backbones.layers import run_block
from dino_kit.backbones.libraries import sizes
from dino_kit.backbones.maps import WithoutSelfAttention
from dino_kit.errors import UserError


class LibraryBackbone(WithoutSelfAttention):
    """``model``, of which a subclass tells how to read it.

    Its tensors are called in the state dict as the library calls them.

    Args:
        model: without a classifier, with fresh weights.
        name: what a sentence calls it.
        image_size: side of the images that it was made for.
        in_chans: C, channels of an image.

    Raises:
        UserError: it takes no images of ``image_size``.
    """

    num_prefix_tokens = 0
    # Ends of names of parameters that the authors exempt from weight decay, beside vectors.
    exempt: tuple[str, ...] = ()
    checkpoint_activations = False  # see run_block

    def __init__(self, model: nn.Module, name: str, image_size: int, in_chans: int):
        super().__init__()
        self.model = model
        self.name, self.image_size, self.in_chans = name, image_size, in_chans
        _turn_off_dropout(model)
        self._drops = _draw_elsewhere(model)
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

        features = self._try(image_size)
        for drop in self._drops:
            drop.calls = drop.turn
        self.embed_dim = features.pooled.shape[1]
        self.patch_size = round(image_size / features.grid[0])
        # A branch is drawn for by each call of its module, and some modules serve two branches.
        self.drop_path_rates = tuple(drop.rate for drop in self._drops for _ in range(drop.calls))

    # What a subclass tells

    def read(self, images: Tensor) -> Features:
        """What :meth:`forward_features` gives."""
        raise NotImplementedError

    def read_pooled(self, images: Tensor) -> Tensor:
        """The pooled features alone, where they cost less than all."""
        return self.read(images).pooled

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last ``n`` of ``depth`` blocks, of a hierarchical model of its last stage."""
        raise NotImplementedError

    # What a run asks for

    @property
    def blocks(self) -> list[nn.Module]:
        """The model's largest parts in order, each of which is computed by itself."""
        return largest_parts(self.model)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """The pooled features ``(B, D)``.

        ``keep`` (L, B), bool, on the host, says which residual branches each sample keeps (see
        :func:`~dino_kit.backbones.stochastic_depth.draw_keep`); None keeps all, unscaled.
        """
        again = self.checkpoint_activations
        return run_block(self._pooled, again, images, keep, within=self.model)

    def forward_features(self, images: Tensor) -> Features:
        """Pooled feature, patches and their grid, normalised as the library does."""
        self.keep_all()
        return self.read(images)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that do not decay: vectors, and what the authors exempt besides.

        A vector is one in whatever shape it comes: a layer scale of (1, 1, D) or of (D, 1, 1), too.
        """
        said = [_PREFIX + name for name in getattr(self.model, "no_weight_decay", set)()]
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.squeeze().ndim <= 1
            or name.endswith(self.exempt)
            or any(fnmatchcase(name, pattern) for pattern in said)
        }

    def require_sizes(self, sides: Sequence[int], way_out: str = "") -> None:
        """Raises :class:`UserError` where images of one of these sides do not pass."""
        for size in sides:
            if self._passes(size):
                continue
            tried = sizes.near(size, self.patch_size, self.image_size)
            raise sizes.refused(self.name, size, filter(self._passes, tried), way_out)

    # How

    def _pooled(self, images: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            self.keep_all()
        else:
            self._keep(keep, images.device)
        return self.read_pooled(images)

    def keep_all(self) -> None:
        """From here on no branch is dropped."""
        for drop in self._drops:
            drop.kept, drop.turn = None, 0

    def _keep(self, keep: Tensor, device: torch.device) -> None:
        """Give each module of stochastic depth its rows of ``keep``."""
        rows = iter(keep.to(device, non_blocking=True))
        for drop in self._drops:
            drop.kept, drop.turn = [next(rows) for _ in range(drop.calls)], 0

    def _try(self, size: int) -> Features:
        """One blank image of a side."""
        try:
            with in_eval_mode(self), torch.no_grad():
                self.keep_all()
                features = self.read(self.blank(size))
        except UserError:
            raise
        except Exception as error:  # each library has its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.name} takes no images of {size} pixels a side with {self.in_chans} channels: "
                f"{reason.rstrip('.')}."
            ) from error
        return features

    def blank(self, size: int) -> Tensor:
        """One image without anything on it."""
        like = next(self.parameters())
        return torch.zeros(1, self.in_chans, size, size, device=like.device, dtype=like.dtype)

    def _passes(self, size: int) -> bool:
        try:
            self._try(size)
        except UserError:
            return False
        return True


class DrawnDropPath(nn.Module):
    """Stochastic depth of one module, whose draws come from :meth:`LibraryBackbone.forward`.

    The library's own would draw from a generator, so that a run that is resumed, or split over
    processes otherwise, would be another run.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.calls = 0  # in a forward pass
        self.turn = 0  # of the next call in this pass
        self.kept: list[Tensor] | None = None  # for each call (B,), bool

    def forward(self, x: Tensor) -> Tensor:
        kept = None if self.kept is None else self.kept[self.turn]
        self.turn += 1
        if kept is None:
            return x
        # Where an image is in parts, as windows, these follow one another.
        factors = kept.to(x.dtype).repeat_interleave(len(x) // len(kept)) / (1.0 - self.rate)
        return x * factors.view(-1, *(1,) * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def _draw_elsewhere(model: nn.Module) -> list[DrawnDropPath]:
    """Replace all stochastic depth in ``model``; in the order in which it is registered."""
    drops: dict[nn.Module, DrawnDropPath] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith(("DropPath", "StochasticDepth")):
                rate = getattr(child, "drop_prob", getattr(child, "p", None)) or 0.0
                setattr(parent, name, drops.setdefault(child, DrawnDropPath(float(rate))))
    return list(drops.values())


def _turn_off_dropout(model: nn.Module) -> None:
    """DINO's regularisation is its crops; and dropout draws from a generator, see DrawnDropPath."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def see_channels(model: nn.Module, in_chans: int) -> None:
    """Give the first convolution of a model for RGB images ``in_chans`` channels, with new weights."""
    if in_chans == 3:
        return
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and child.in_channels == 3:
                new = nn.Conv2d(
                    in_chans, child.out_channels, child.kernel_size, child.stride, child.padding,
                    bias=child.bias is not None,
                )  # fmt: skip
                setattr(parent, name, new)
                return
    raise UserError(f"{type(model).__name__} begins with no convolution, and takes RGB images only.")


def do_not_train_the_unused(backbone: LibraryBackbone) -> list[str]:
    """Ask for no gradient of parameters that the pooled feature does not depend on; their names.

    A mask token is one, of a model that was made to be trained otherwise.
    """
    parameters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    with in_eval_mode(backbone), torch.enable_grad():
        backbone.keep_all()
        pooled = backbone.read(backbone.blank(backbone.image_size)).pooled
        found = torch.autograd.grad(pooled.sum(), list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, found, strict=True) if gradient is None]
    for name in unused:
        parameters[name].requires_grad_(False)
    return [name.removeprefix(_PREFIX) for name in unused]


def largest_parts(model: nn.Module) -> list[nn.Module]:
    """The elements of the largest list of modules that ``model`` has; none where it has no list."""
    parts = [part for part in model.children() if isinstance(part, nn.ModuleList)]
    parts += [part for part in model.children() if isinstance(part, nn.Sequential)]
    return list(max(parts, key=_size, default=()))


def outputs_of(
    modules: Iterable[nn.Module], model: Callable[[Tensor], Any], images: Tensor, place: int = 0
) -> list[Tensor]:
    """What each of ``modules`` gives out while ``model`` sees ``images``.

    Where it gives out several things, that at ``place``.
    """
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, x: Any) -> None:
        found[module] = x[place] if isinstance(x, tuple) else x

    modules = list(modules)
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[module] for module in modules]


def resized_positions(
    positions: Tensor, native: tuple[int, int], grid: tuple[int, int], prefix: int
) -> Tensor:
    """Position embeddings ``(1, prefix + N, D)`` of the ``native`` grid for another one; bicubic."""
    if grid == native:
        return positions
    own, patches = positions[:, :prefix], positions[:, prefix:]
    patches = patches.unflatten(1, native).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, grid, mode="bicubic", antialias=True)
    return torch.cat((own, patches.flatten(2).mT), dim=1)


def require_depth(backbone: Any, n: int) -> None:
    """Raises :class:`UserError` where a backbone has no ``n`` last blocks to give the outputs of."""
    if not 1 <= n <= backbone.depth:
        raise UserError(
            f"{backbone.name} gives the outputs of its last {backbone.depth} blocks, and {n} are "
            "asked for."
        )


def _size(part: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in part for p in module.parameters())


_PREFIX = "model."


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + _PREFIX)]:
        state[prefix + name.removeprefix(prefix + _PREFIX)] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + _PREFIX + name.removeprefix(prefix)] = state.pop(name)
