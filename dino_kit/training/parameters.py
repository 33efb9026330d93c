"""What a network's parameters begin as, and which of them decay, folded where blocks repeat."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino_kit.training.optim import split_by_decay

DECAYS, DOES_NOT, STILL = "decays", "–", "not trained"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Group(NamedTuple):
    """Parameters of one name but for the numbers in it."""

    name: str  # with * for numbers that differ
    count: int  # tensors
    numel: int  # numbers in all of them
    shape: str
    decay: str  # DECAYS, DOES_NOT or STILL
    begins: str


def groups(network: nn.Module) -> list[Group]:
    """The parameters of a network with a ``backbone``, in order; as the optimiser groups them."""
    decayed, others = split_by_decay(network)
    found: dict[tuple[str, str], list[tuple[str, Tensor]]] = {}
    for name, parameter in network.named_parameters():
        decay = DECAYS if name in decayed else DOES_NOT if name in others else STILL
        found.setdefault((_NUMBER.sub("*", name), decay), []).append((name, parameter))
    return [
        Group(
            _folded([name for name, _ in members]),
            len(members),
            sum(parameter.numel() for _, parameter in members),
            _one_of({"×".join(map(str, parameter.shape)) for _, parameter in members}),
            decay,
            _beginning([parameter for _, parameter in members]),
        )
        for (_, decay), members in found.items()
    ]


def _folded(names: list[str]) -> str:
    """The one name of several that differ in numbers."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)


def _one_of(texts: set[str]) -> str:
    return texts.pop() if len(texts) == 1 else "several"


def _beginning(parameters: Sequence[Tensor]) -> str:
    """A value, or mean and deviation, of each alike; or from the smallest deviation to the largest."""
    with torch.no_grad():
        numbers = list(_statistics(parameters))
    if not numbers:
        return ""
    means, deviations = zip(*numbers, strict=True)
    low, high = min(deviations), max(deviations)
    if high == 0.0:
        return _one_of({f"{mean:.3g}" for mean in means})
    center = sum(means) / len(means)
    drawn = sum(parameter.numel() for parameter in parameters)
    # What few numbers drawn about zero may well have for a mean is none.
    shown = "0" if abs(center) < max(0.2, 3 / drawn**0.5) * high else f"{center:.2g}"
    spread = f"{low:.1g}" if high < 1.5 * low else f"{low:.1g} to {high:.1g}"
    return f"{shown} ± {spread}"


def _statistics(parameters: Iterable[Tensor]) -> Iterator[tuple[float, float]]:
    for parameter in parameters:
        if parameter.is_meta or not parameter.numel():
            continue  # without values
        first = parameter.flatten()[0]
        if torch.equal(parameter, first.expand_as(parameter)):
            yield first.item(), 0.0  # exactly, which a sum over many would not be
        else:
            yield parameter.mean().item(), parameter.std().item()
