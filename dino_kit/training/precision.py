"""Number formats of a step: which one a device gets, and the loss scale that fp16 needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dino_kit import log
from dino_kit.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, use_fp16: bool | None, device: torch.device) -> str:
    """``fp32``, ``bf16`` or ``fp16`` for ``--precision``, the older ``--use_fp16`` and a device.

    Where ``use_fp16`` is given it says what ``precision`` would.

    Raises:
        UserError: fp16 is asked for by its name off a CUDA device.
    """
    if use_fp16 is not None:
        if use_fp16 and device.type != "cuda":
            log.notice(f"--use_fp16 has no effect on {device.type}: the run computes in fp32.")
            return "fp32"
        return "fp16" if use_fp16 else "fp32"
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"--precision fp16 needs a CUDA device, and this run is on {device.type}; "
            "use --precision bf16 or fp32."
        )
    return precision


@dataclass
class LossScale:
    """The factor that keeps fp16 gradients above the smallest fp16 number.

    It halves when a gradient overflows and doubles after ``growth_interval`` steps without. It is
    decided on the host from the step's one finite flag, which ``torch.amp.GradScaler`` would
    fetch a second time; its state has that class's keys, so either can load the other's.
    """

    scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    good_steps: int = 0

    def update(self, overflowed: bool) -> None:
        if overflowed:
            self.scale *= self.backoff_factor
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale *= self.growth_factor
            self.good_steps = 0

    def can_shrink(self) -> bool:
        """Whether a smaller scale could still help; at 1 the gradient itself is too large."""
        return self.scale > 1.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self.good_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale = state["scale"]
        self.growth_factor = state["growth_factor"]
        self.backoff_factor = state["backoff_factor"]
        self.growth_interval = state["growth_interval"]
        self.good_steps = state["_growth_tracker"]
