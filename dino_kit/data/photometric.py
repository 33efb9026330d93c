"""The colours of a whole batch of crops, changed on the device: what CropParameters say beyond geometry.

Workers write down which crops an operation is done to, in what order and by which numbers; the
device then does one operation after the other to all of its crops at once. Sizes are known on the
host, so nothing waits for the device. Each operation takes and gives 8 bits, and its arithmetic is
that of :class:`~dino_kit.data.raster.Raster`, with which it agrees up to rounding.

Legend: V_g views of one size, B images, N = V_g·B crops, n of them in a stage, S pixels of a side,
K numbers of a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kit.data import gaussian
from dino_kit.data.augment import JITTER, CropParameters
from dino_kit.data.raster import CUT, blur_offset, hue_turn, saturation_mix

_STEPS = 1024  # of 1, in which OpenCV counts when it mixes channels
_SECTOR = 60.0  # degrees of a hue from one corner of the colours to the next


class Stage(NamedTuple):
    """One operation on some crops."""

    operation: str
    crops: int  # n
    numbers: int  # K


class Changes(NamedTuple):
    """What is done to a group's crops, stage after stage."""

    stages: tuple[Stage, ...]
    crops: Tensor  # (Σ n,) int64: of each stage its crops, as v·B + b
    numbers: Tensor  # (Σ n·K,) float32: of each stage those of its crops


def changes_of(drawn: Sequence[Sequence[CropParameters]]) -> Changes:
    """What is left to do, after their geometry, to the crops of ``drawn``: V_g views of B images."""
    found: dict[tuple[int, str], tuple[list[int], list[float]]] = {}
    every = (parameters for view in drawn for parameters in view)
    for place, parameters in enumerate(every):
        for turn, operation, factor in _operations(parameters):
            crops, factors = found.setdefault((turn, operation), ([], []))
            crops.append(place)
            factors.append(factor)
    stages, places, values = [], [], [np.empty(0, np.float32)]
    for (_, operation), (crops, factors) in sorted(found.items()):
        table = _TABLES[operation](factors)  # (n, K)
        stages.append(Stage(operation, *table.shape))
        places += crops
        values.append(table.ravel())
    return Changes(
        tuple(stages),
        torch.tensor(places, dtype=torch.int64),
        torch.from_numpy(np.concatenate(values, dtype=np.float32)),
    )


def _operations(p: CropParameters) -> Iterator[tuple[int, str, float]]:
    """When each operation has its turn, its name and its factor, where it has one."""
    for turn, (operation, factor) in enumerate(p.jitter):
        # Without colour it is gray, which is rounded otherwise.
        yield turn, "gray" if (operation, factor) == ("saturation", 0) else operation, factor
    last = len(JITTER)
    if p.gray:
        yield last, "gray", 0
    if p.blur_radius is not None:
        yield last + 1, "blur", p.blur_radius
    if p.solarize_threshold is not None:
        yield last + 2, "solarize", p.solarize_threshold


def _as_they_are(factors: Sequence[float]) -> np.ndarray:
    return np.array(factors)[:, None]


def _none(factors: Sequence[float]) -> np.ndarray:
    return np.empty((len(factors), 0))


def _mixes(factors: Sequence[float]) -> np.ndarray:
    """(n, 9): by how much each channel goes into each."""
    mixes = np.stack([saturation_mix(factor)[:, :3] for factor in factors])
    return (np.rint(mixes * _STEPS) / _STEPS).reshape(-1, 9)


def _sectors(shifts: Sequence[float]) -> np.ndarray:
    return np.array([[hue_turn(shift) / _SECTOR] for shift in shifts])


def _kernels(radii: Sequence[float]) -> np.ndarray:
    """(n, 1 + reach + 1): what is added to a result, and the half of the kernel from its middle on."""
    kernels = [gaussian.kernel(radius) for radius in radii]
    table = np.zeros((len(radii), 2 + max(map(len, kernels)) // 2))
    for row, radius, kernel in zip(table, radii, kernels, strict=True):
        half = kernel[len(kernel) // 2 :]
        row[0], row[1 : 1 + len(half)] = blur_offset(radius), half
    return table


_TABLES: dict[str, Callable[[Sequence[float]], np.ndarray]] = {
    "brightness": _as_they_are, "contrast": _as_they_are, "saturation": _mixes, "hue": _sectors,
    "gray": _none, "blur": _kernels, "solarize": _as_they_are,
}  # fmt: skip


def change(group: Tensor, changes: Changes) -> Tensor:
    """Crops (V_g, B, 3, S, S) uint8 with ``changes`` made, as new ones in the same order of memory."""
    device = group.device
    # Here a crop's planes lie one after the other, as the operations go through them.
    crops = group.flatten(0, 1).clone(memory_format=torch.contiguous_format)  # (N, 3, S, S)
    sizes = [stage.crops for stage in changes.stages]
    places = changes.crops.to(device, non_blocking=True).split(sizes)
    counts = [stage.crops * stage.numbers for stage in changes.stages]
    numbers = changes.numbers.to(device, non_blocking=True).split(counts)
    for stage, at, of_all in zip(changes.stages, places, numbers, strict=True):
        operate = _OPERATIONS[stage.operation]
        levels = crops.index_select(0, at).float()
        changed = operate(levels, of_all.view(stage.crops, stage.numbers))
        crops.index_copy_(0, at, changed.round_().clamp_(0, 255).to(torch.uint8))
    return torch.empty_like(group).copy_(crops.view(group.shape))


# Of levels (n, 3, S, S), from 0 to 255 and whole, and numbers (n, K) each makes new levels, which are
# rounded and cut off afterwards.


def _brightness(levels: Tensor, numbers: Tensor) -> Tensor:
    return levels.mul_(_each(numbers)).add_(CUT)


def _contrast(levels: Tensor, numbers: Tensor) -> Tensor:
    mean = _luma(levels).mean(dim=(-2, -1), keepdim=True).add_(0.5).floor_()
    return _blend(mean, levels, _each(numbers))


def _saturation(levels: Tensor, numbers: Tensor) -> Tensor:
    mix = numbers.view(-1, 3, 3, 1, 1)  # (n, to, from, 1, 1)
    red, green, blue = levels.split(1, dim=1)
    return (red * mix[:, :, 0]).addcmul_(green, mix[:, :, 1]).addcmul_(blue, mix[:, :, 2]).add_(CUT)


def _blend(other: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    """``factor`` of ``levels``, and the rest of ``other``; a fraction is cut off, as by Pillow."""
    return torch.addcmul(other.mul_(1 - factor).add_(CUT), levels, factor)


def _hue(levels: Tensor, numbers: Tensor) -> Tensor:
    """By ``numbers`` sectors, sixths of a turn.

    Source: Foley et al. 1990, "Computer Graphics", 13.3.4 (HSV), with all sectors in one formula.
    """
    red, green, blue = levels.split(1, dim=1)  # (n, 1, S, S)
    value = levels.amax(dim=1, keepdim=True)
    chroma = value - levels.amin(dim=1, keepdim=True)
    steps = 1 / chroma.clamp(min=1)  # where there is no chroma there is no hue either
    hue = torch.where(
        value == red,
        (green - blue) * steps,
        torch.where(value == green, (blue - red) * steps + 2, (red - green) * steps + 4),
    ).add_(_each(numbers))
    corners = torch.arange(5, 0, -2, device=levels.device).view(3, 1, 1)
    # How far each channel's corner is, from 0 to 6; at 0 it is at its darkest only from 1 to 3.
    far = (hue + corners).remainder_(6)  # (n, 3, S, S)
    return value - chroma * torch.minimum(far, 4 - far).clamp_(0, 1)


def _gray(levels: Tensor, numbers: Tensor) -> Tensor:
    return _luma(levels).expand_as(levels).contiguous()


def _blur(levels: Tensor, numbers: Tensor) -> Tensor:
    """A kernel of its own for each crop, along rows and then along columns.

    Of a kernel there is the half from its middle on, after what is added to the result.
    """
    shape, planes = levels.shape, levels.shape[0] * levels.shape[1]
    offset, half = numbers[:, :1], numbers[:, 1:]
    kernels = torch.cat((half.flip(1)[:, :-1], half), dim=1)
    kernels = kernels.repeat_interleave(shape[1], dim=0).unsqueeze(1)  # (3·n, 1, taps)
    levels = F.pad(levels, (half.shape[1] - 1,) * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
    levels = F.conv2d(levels, kernels.unsqueeze(2), groups=planes)
    levels = F.conv2d(levels, kernels.unsqueeze(3), groups=planes)
    return levels.view(shape).add_(_each(offset))


def _solarize(levels: Tensor, numbers: Tensor) -> Tensor:
    return torch.where(levels < _each(numbers), levels, 255 - levels)


def _each(numbers: Tensor) -> Tensor:
    """(n, 1) as (n, 1, 1, 1)."""
    return numbers.view(-1, 1, 1, 1)


def _luma(levels: Tensor) -> Tensor:
    """(n, 1, S, S), rounded: OpenCV's weights, whole numbers that float32 holds exactly."""
    red, green, blue = levels.split(1, dim=1)
    luma = (red * 9798).add_(green, alpha=19235).add_(blue, alpha=3735)
    return luma.add_(16384).div_(32768).floor_()


_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue,
    "gray": _gray, "blur": _blur, "solarize": _solarize,
}  # fmt: skip
