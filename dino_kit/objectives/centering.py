"""What keeps the teacher from collapsing: how its logits become targets, and the state of that.

``targets`` changes nothing; it returns the state that would follow, and ``commit`` takes it over.
A step that is dropped is one that never commits.

Legend: B images, K prototypes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dino_kit.errors import UserError
from dino_kit.objectives.dino import next_center, teacher_targets
from dino_kit.objectives.sinkhorn import sinkhorn_knopp


class Centering(Protocol):
    """Teacher logits to targets. Its state dict always holds ``center`` (1, K)."""

    def targets(self, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
        """Targets (2, B, K) of a whole step's logits (2, B, K), and the state to commit."""

    def commit(self, candidate: Tensor | None) -> None:
        """Make the state that ``targets`` returned the current one."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises :class:`UserError` when ``state`` is of another number of prototypes."""


class Center:
    """Subtract a moving average of the logits (Caron et al. 2021, equation 4).

    Args:
        out_dim: K.
        momentum: of the moving average.
        device: where the logits are.
    """

    def __init__(
        self, out_dim: int, *, momentum: float = 0.9, device: torch.device | str | None = None
    ):
        self.momentum = momentum
        self.center = torch.zeros(1, out_dim, device=device)

    def targets(self, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        candidate = next_center(self.center, teacher_logits, self.momentum)
        # A logit of -inf makes the centre infinite for ever while this step's loss stays finite.
        # Zero times the candidate turns that into a loss that is not a number, and changes no
        # finite one.
        center = self.center + 0.0 * candidate
        return teacher_targets(teacher_logits, center, temperature), candidate

    def commit(self, candidate: Tensor | None) -> None:
        self.center = candidate

    def state_dict(self) -> dict[str, Tensor]:
        return {"center": self.center}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.center = _loaded_center(state, self.center)


class SinkhornKnopp:
    """Balance each step's assignments by themselves; nothing is carried from step to step.

    Args:
        out_dim: K.
        device: where the logits are.
    """

    def __init__(self, out_dim: int, *, device: torch.device | str | None = None):
        # Checkpoints hold a centre in either case, so that they have one form.
        self._zeros = torch.zeros(1, out_dim, device=device)

    def targets(self, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, None]:
        return sinkhorn_knopp(teacher_logits, temperature), None

    def commit(self, candidate: Tensor | None) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {"center": self._zeros}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        _loaded_center(state, self._zeros)


CENTERINGS = {"center": Center, "sinkhorn": SinkhornKnopp}


def _loaded_center(state: dict[str, Tensor], like: Tensor) -> Tensor:
    center = state.get("center")
    if center is None or center.shape != like.shape:
        got = "no centre" if center is None else f"a centre of shape {tuple(center.shape)}"
        raise UserError(
            f"The checkpoint's dino_loss holds {got}, and this run's has shape "
            f"{tuple(like.shape)}; its out_dim must be the run's."
        )
    return center.to(like)
