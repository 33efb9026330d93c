"""``--fsdp``: a network whose tensors lie in parts on the processes, and what has to know that.

A block's weights are gathered when the block computes, forward and backward, and dropped again; so
a process holds one block, and its own part of all weights, gradients and moments. What works
element by element, as a moving average and most optimisers do, works on the parts. A norm does not,
nor does a checkpoint. Source: Zhao et al. 2023, "PyTorch FSDP"; ``torch.distributed.fsdp``.

On a network that is whole, each function here does what its name says of whole tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dino_kit import distributed
from dino_kit.shards import StoredTensor, in_parts, replaced


def shard(network: nn.Module, device: torch.device) -> None:
    """Split ``network``, a backbone and a head on the CPU or on ``device``, over all processes.

    Every process has to hold the same weights before.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for part in (*network.backbone.blocks, network.backbone, network.head):
        # Also the outermost: a teacher has no backward pass that would drop its stale weights.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    return any(in_parts(parameter) for parameter in network.parameters())


def sum_gradients(network: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums up gradients over the processes, or keeps its own."""
    for part in (network.backbone, network.head):
        part.set_requires_gradient_sync(now)


@torch.no_grad()
def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each, not copied."""
    return [tensor.to_local() if in_parts(tensor) else tensor for tensor in tensors]


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each of n tensors, all of them in parts or none: ``(n,)``, on the device."""
    own = torch.stack(torch._foreach_norm(parts(tensors)))
    if not any(map(in_parts, tensors)):
        return own
    return distributed.all_reduce_sum(own.double().square()).sqrt().to(own.dtype)


def gathered(state: Any) -> Any:
    """``state``, plain data and tensors, with each tensor that is in parts made whole.

    All processes have to call it. Whole ones go to the main process's memory, one after the other;
    the other processes get None in their place.
    """

    def fetched(name: str, tensor: Any) -> Tensor | None:
        whole = tensor.full_tensor()
        return whole.cpu() if distributed.is_main() else None

    return replaced(state, in_parts, fetched)


def divided_network(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """``state``, whole on every process or stored in parts, as ``network`` loads it."""
    own = network.state_dict()
    return {name: _divided(value, own.get(name)) for name, value in state.items()}


def divided_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``state``, whole on every process or stored in parts, as ``optimizer`` loads it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {name: _divided(value, parameters[number]) for name, value in own.items()}
        for number, own in state["state"].items()
    }
    return {**state, "state": moments}


def without_weights(network: nn.Module) -> nn.Module:
    """A copy of ``network``, which is whole, for :func:`whole_copy` to fill."""
    return copy.deepcopy(network).to("meta")


def whole_copy(network: nn.Module, empty: nn.Module) -> nn.Module | None:
    """``network`` on the CPU, made of :func:`without_weights`; all processes have to call it.

    Processes but the main one get None.
    """
    state = gathered(network.state_dict())
    if not distributed.is_main():
        return None
    filled = copy.deepcopy(empty)
    filled.load_state_dict(state, assign=True)
    return filled


def _divided(whole: Any, like: Tensor | None) -> Any:
    """``whole`` in parts as ``like``'s, where that is in parts and of the same shape."""
    if not isinstance(whole, Tensor | StoredTensor):
        return whole
    stored = isinstance(whole, StoredTensor)
    if not in_parts(like) or whole.shape != like.shape:
        return whole.whole() if stored else whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    if not stored:
        return distribute_tensor(whole.to(like.device), mesh, placements)
    own = whole.rows(*_own_rows(len(like), distributed.rank(), distributed.world_size()))
    return DTensor.from_local(
        own.to(like.device), mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _own_rows(rows: int, rank: int, processes: int) -> tuple[int, int]:
    """The first row of a process, and the first after it, as ``fully_shard`` and ``chunk`` split them."""
    most = -(-rows // processes)  # of the last processes' some may be fewer, or none
    return min(rank * most, rows), min((rank + 1) * most, rows)
