"""What every backbone offers, and what only some do.

Legend: B batch, C channels, H and W pixels, N patches, P prefix tokens, D width, L residual branches.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Features(NamedTuple):
    """A backbone's normalised output."""

    pooled: Tensor  # (B, D)
    patches: Tensor  # (B, N, D), row by row
    grid: tuple[int, int]  # patches down and across; their product is N


@runtime_checkable
class Backbone(Protocol):
    """Images ``(B, C, H, W)`` to one vector ``(B, D)`` each, and to one for each patch.

    Where by its authors more than biases and one-dimensional parameters do not decay, it has
    ``no_weight_decay() -> set[str]``, their names.
    """

    embed_dim: int
    patch_size: int
    num_prefix_tokens: int
    depth: int  # how many blocks' outputs get_intermediate_layers can give
    # The probability with which each residual branch is dropped, L numbers in order of execution.
    drop_path_rates: tuple[float, ...]
    # Whether blocks are computed again in the backward pass in place of keeping what they computed.
    checkpoint_activations: bool

    def __call__(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """``(B, D)``. ``keep`` (L, B), bool, on the host: the branches that each sample keeps."""

    def forward_features(self, images: Tensor) -> Features: ...

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last ``n`` blocks, first to last, normalised, each ``(B, P+N, D)``."""


@runtime_checkable
class HasSelfAttention(Protocol):
    """A backbone whose tokens all attend to each other, in each of its blocks."""

    depth: int  # how many blocks

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """The last block's attention after the softmax, ``(B, heads, P+N, P+N)``."""

    def get_selfattention(self, images: Tensor, block: int) -> Tensor:
        """The same of one block, counted from 0, or from the end as -1.

        Raises:
            UserError: there is no such block.
        """


@runtime_checkable
class HasReAttention(Protocol):
    """A backbone whose heads' maps are mixed and normalised after the softmax."""

    def get_last_reattention(self, images: Tensor) -> Tensor:
        """The last block's maps, ``(B, heads, P+N, P+N)``, signed; rows do not sum to 1."""


@runtime_checkable
class HasClassAttention(Protocol):
    """A backbone in whose last blocks the class token alone attends, to itself and the patches."""

    def get_last_classattention(self, images: Tensor) -> Tensor:
        """The last block's attention after the softmax, ``(B, heads, P+N)``; the class token first."""


@runtime_checkable
class HasTokenMixing(Protocol):
    """A backbone that mixes its patches by matrices of weights, the same for every image."""

    def get_last_mixing(self, grid: tuple[int, int]) -> Tensor:
        """The last block's matrix for patches of a ``grid``, ``(N, N)``, signed.

        Row i says what each patch adds to patch i. ``grid`` is one of :class:`Features`.
        """
