"""Which maps of an image's patches a backbone has, and what is said of one that it has not."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from dino_kit.backbones.interface import (
    HasClassAttention,
    HasReAttention,
    HasSelfAttention,
    HasTokenMixing,
)
from dino_kit.errors import NoSelfAttention


class Kind(NamedTuple):
    capability: type | None  # what a backbone has to offer for it; None where any will do
    lacking: str  # what a sentence says that another backbone has not
    shows: str  # what is to be seen, as the object of a sentence


# What tells most comes first.
KINDS = {
    "attention": Kind(HasSelfAttention, "self-attention", "attention maps"),
    "rollout": Kind(HasSelfAttention, "self-attention", "attention through all blocks"),
    "reattention": Kind(HasReAttention, "Re-Attention", "the signed maps of its last Re-Attention"),
    "classattention": Kind(
        HasClassAttention,
        "blocks in which the class token alone attends",
        "what its class token attends to in its last block",
    ),
    "mixing": Kind(HasTokenMixing, "token mixing by a matrix", "rows of its last token mixing"),
    "similarity": Kind(None, "", "the similarity of each patch to the pooled feature"),
}
_SELFATTENTION = ("get_last_selfattention", "get_selfattention")


def available(backbone: nn.Module) -> tuple[str, ...]:
    """The kinds of maps that ``backbone`` has, what it tells most by first."""
    return tuple(name for name, kind in KINDS.items() if _has(backbone, kind))


def lacking(backbone: nn.Module, name: str) -> str:
    """What a sentence says that ``backbone`` has not, where it has no such maps."""
    kind = KINDS[name]
    if kind.capability is HasSelfAttention and _attends(backbone):
        return "class token, which would look at the patches"
    return kind.lacking


def title(backbone: object) -> str:
    """What a sentence calls a backbone: a library's model by its name, one of our own by its class."""
    return getattr(backbone, "name", type(backbone).__name__)


def no_selfattention(backbone: nn.Module) -> NoSelfAttention:
    """What to raise where attention is asked of a backbone without; it names what there is instead."""
    shown = [
        f"--maps {name} shows {kind.shows}"
        for name, kind in KINDS.items()
        if kind.capability is not HasSelfAttention and _has(backbone, kind)
    ]
    why = "has no self-attention among all of its tokens"
    if _attends(backbone):
        why = f"has no {lacking(backbone, 'attention')}"
    if isinstance(backbone, HasReAttention):
        why = "mixes and normalises its maps after the softmax, so that they are no self-attention"
    told = [f"{title(backbone)} {why}", *([", and ".join(shown)] if shown else [])]
    return NoSelfAttention(f"{'; '.join(told)}.")


def _has(backbone: nn.Module, kind: Kind) -> bool:
    if not getattr(backbone, "gives_patches", True):  # as a model of the user's own may
        return False
    if kind.capability is None:
        return True
    if not isinstance(backbone, kind.capability):
        return False
    return kind.capability is not HasSelfAttention or has_class_token(backbone)


def _attends(backbone: nn.Module) -> bool:
    # Not by the protocol, which asks for an attribute that is answered by a sentence of this.
    return hasattr(type(backbone), _SELFATTENTION[0])


def has_class_token(backbone: nn.Module) -> bool:
    """Whether the first token sums up the image; registers alone do not."""
    return getattr(backbone, "has_class_token", backbone.num_prefix_tokens > 0)


class WithoutSelfAttention(nn.Module):
    """A base of backbones that lack it, or may: who asks for it is told why, and what to ask for."""

    def __getattr__(self, name: str) -> Any:  # called for what is not there
        if name in _SELFATTENTION:
            raise no_selfattention(self)
        return super().__getattr__(name)
