"""Processes of one run: who am I, and the few collectives that a step needs.

A run has several processes only when ``torchrun`` (or a launcher that sets the same variables)
started it. Nothing else in the environment is read, so a shell inside a Slurm allocation, where
``SLURM_PROCID`` is set, still runs one ordinary process. On one process every collective is the
identity, so the code of a step is the same everywhere.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dino_kit.errors import ToldByMain, UserError

if TYPE_CHECKING:
    import torch

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_apart = False  # see apart()


def launched() -> bool:
    """Whether this process is one of a group that ``torchrun`` started."""
    return all(name in os.environ for name in _TORCHRUN)


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() and not _apart else 1


def is_main() -> bool:
    return rank() == 0


def start(device: torch.device, minutes: float = 30.0) -> None:
    """Join the process group; on a single process there is none to join.

    A collective to which not all processes come within ``minutes`` fails.
    """
    if world_size() == 1:
        return
    from datetime import timedelta

    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))


def stop() -> None:
    """Leave the process group, if one was joined."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        threads = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if threads:
            # One of them may still have to free a tensor, for which it takes the interpreter's
            # lock; while the interpreter ends, that aborts a process that has done all its work.
            time.sleep(0.1)


@contextmanager
def apart() -> Iterator[None]:
    """Within, this process is the only one, for what it does when the others are lost to it."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def is_failure(error: BaseException) -> bool:
    """Whether it says that the processes did not come together, by the only signs there are."""
    told = f"{type(error).__name__} {error}".lower()
    signs = ("gloo", "nccl", "distnetwork", "diststore", "distbackend")
    return isinstance(error, RuntimeError) and any(sign in told for sign in signs)


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process do the body before all others, where there is a process group."""
    if is_main() or not _joined():
        try:
            yield
        finally:  # the others come to the same error by themselves
            if _joined():
                _wait_for_all()
    else:
        _wait_for_all()
        yield


def _joined() -> bool:
    if world_size() == 1:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def _wait_for_all() -> None:
    import torch.distributed as dist

    dist.barrier()


def total(number: int, device: torch.device) -> int:
    """The sum of a whole number over the processes."""
    if world_size() == 1:
        return number
    import torch

    return int(all_reduce_sum(torch.tensor(number, device=device)))


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of ``tensor`` over the processes."""
    return all_reduce_sum(tensor) / world_size()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of ``tensor`` over the processes, in a new tensor where there are several."""
    return _reduced(tensor, "SUM")


def all_reduce_min(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise minimum of ``tensor`` over the processes."""
    return _reduced(tensor, "MIN")


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise maximum of ``tensor`` over the processes."""
    return _reduced(tensor, "MAX")


def all_gather(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The processes' tensors, all of one shape, joined along ``dim`` in the order of the ranks."""
    if world_size() == 1:
        return tensor
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim=dim)


def all_gather_plain(value: Any) -> list[Any]:
    """The processes' values, any that can be pickled, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def follow_main(refusal: Exception | None) -> None:
    """Let no process go on where the main one found a reason not to; all have to call it.

    Raises:
        ToldByMain: on the others, where the main one raises its ``refusal``.
    """
    told = all_gather_plain(refusal and str(refusal))[0]
    if refusal is not None:
        raise refusal
    if told is not None:
        raise ToldByMain(told)


def _reduced(tensor: torch.Tensor, operation: str) -> torch.Tensor:
    if world_size() == 1:
        return tensor
    import torch.distributed as dist

    result = tensor.clone()
    dist.all_reduce(result, getattr(dist.ReduceOp, operation))
    return result


def data_parallel(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """``network`` with its gradients averaged over the processes; itself on one process."""
    if world_size() == 1:
        return network
    from torch.nn.parallel import DistributedDataParallel

    devices = [device] if device.type == "cuda" else None
    # Newer versions of PyTorch warn of the older name, and older ones do not know the newer.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(network, device_ids=devices, **{name: False})


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` is the first there is of cuda, mps, cpu.

    Under ``torchrun`` each process of a machine takes the GPU of its local rank.

    Raises:
        UserError: PyTorch sees no such device.
    """
    import torch

    if name == "auto":
        usable = "cuda" if torch.cuda.is_available() else None
        usable = usable or ("mps" if torch.backends.mps.is_available() else "cpu")
        name = usable
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank() if device.index is None else device.index
        if index >= count:
            raise UserError(
                f"--device {name} asks for GPU {index}, and PyTorch sees {count} of them; "
                "--device cpu computes without one."
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps needs a Mac whose GPU PyTorch can use; --device cpu works.")
    return device
