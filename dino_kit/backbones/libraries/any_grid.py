"""Token mixing of a library's models on any grid of patches, where it is made for one.

It is ``U(f(D x))``, where f is the library's, D resamples the tokens of the images' grid to the native
one and U back (:mod:`~dino_kit.backbones.grids`); as our own ResMLP has it, of one matrix. On the
native grid D and U are the identity.

Legend: B batch, M tokens of the images' grid and N of the native one, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from dino_kit.backbones.grids import Grid, resampling


class TokenMixings:
    """Modules that take ``(B, C, N)`` and give out the same; from here on ``(B, C, M)``.

    Their names in the state dict stay.
    """

    def __init__(self, modules: Iterable[nn.Module], native: Grid):
        self.native = native
        self.grid = native  # of the images that are seen next
        for module in modules:
            module.register_forward_pre_hook(self._to_native)
            module.register_forward_hook(self._to_images)

    def _to_native(self, module: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        return _resampled(arguments[0], self.grid, self.native)

    def _to_images(self, module: nn.Module, arguments: tuple[Tensor], x: Tensor) -> Tensor:
        return _resampled(x, self.native, self.grid)


def _resampled(x: Tensor, source: Grid, target: Grid) -> Tensor:
    """``(B, C, tokens)`` of one grid to those of another."""
    if source == target:
        return x
    return resampling(source, target, x.device, x.dtype)(x.mT).mT
