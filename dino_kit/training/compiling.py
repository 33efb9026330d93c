"""``--compile``: the branches of a backbone's blocks by ``torch.compile``."""

from __future__ import annotations

import torch
from torch import nn

from dino_kit.errors import UserError


def compile_blocks(backbone: nn.Module, device: torch.device) -> None:
    """Let the token mixing and the MLP of every block be compiled when they are first called.

    On a CPU the MLP alone: compiled, products and attention would be by slower libraries there. So
    it is of a CSWin's blocks everywhere, whose stripes the compiler cannot cut by symbols.

    The names in the state dict stay. Stochastic depth gives a branch another number of images at
    every step, so sizes are symbols; and it is left outside, as are the norms, whose kernels are
    fused as they are.

    Raises:
        UserError: nothing can be compiled here, or the blocks have no MLP, as not all of other
            libraries' have.
    """
    if not all(hasattr(block, "mlp") for block in backbone.blocks):
        name = getattr(backbone, "name", type(backbone).__name__)
        raise UserError(
            f"--compile compiles a block's attention and MLP, and {name} has blocks of "
            "other parts; leave it off."
        )
    _require_compiler(device)
    for block in backbone.blocks:
        names = ("mlp",) if device.type == "cpu" else ("attn", "mlp")
        for branch in (getattr(block, name) for name in names if hasattr(block, name)):
            branch.compile(dynamic=True)


def _require_compiler(device: torch.device) -> None:
    """What fails inside a step would be a traceback, so a small thing is compiled first."""
    try:
        torch.compile(_small, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, header or Triton: each of another type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--compile cannot compile on {device} here ({reason}); install a C++ compiler (for a "
            "GPU also Triton), or leave it off."
        ) from error


def _small(x: torch.Tensor) -> torch.Tensor:
    return (2.0 * x + 1.0).relu()
