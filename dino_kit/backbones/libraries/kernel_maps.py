"""Maps of a library's attention that is fused: its queries and keys are read as the kernel gets them.

So norms of queries and keys, rotary positions, biases and scales are in them as the library has them,
and all other blocks stay fused.

Legend: B batch, A heads, d their width, Q queries, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dino_kit.backbones.attention import attention_maps


def map_of(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The map ``(B, A, Q, T)``, after the softmax, of the one attention in ``block``.

    ``run`` runs the model that the block is a part of.
    """
    arguments, options = _arguments(block, run)
    fused = fused_attentions(block)
    before = [module.fused_attn for module in fused]
    try:
        for module in fused:
            module.fused_attn = True
        with _Kernel() as kernel:
            block(*arguments, **options)
    finally:
        for module, value in zip(fused, before, strict=True):
            module.fused_attn = value
    (call,) = kernel.calls
    return _map(*call)


def fused_attentions(block: nn.Module) -> list[nn.Module]:
    """The modules in ``block`` that give their queries and keys to the kernel, as timm marks them."""
    return [module for module in block.modules() if hasattr(module, "fused_attn")]


def _arguments(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple, dict[str, Any]]:
    """What ``module`` is called with."""
    seen: list[tuple[tuple, dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(
        lambda _, arguments, options: seen.append((arguments, options)), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return seen[-1]


class _Kernel(TorchFunctionMode):
    """Within: calls of PyTorch's fused attention are kept, and done."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, float | None]] = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is F.scaled_dot_product_attention:
            q, k, _, *mask = arguments
            mask = mask[0] if mask else options.get("attn_mask")
            self.calls.append((q, k, mask, options.get("scale")))
        return function(*arguments, **options)


def _map(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    if bias is None and scale is None:
        return attention_maps(q, k)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if bias is None else scores + bias).softmax(dim=-1)
