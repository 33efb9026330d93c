"""A run's checkpoints: the reference's layout, whole on the disk or not there.

``checkpoint.pth`` is the newest, ``checkpoint_previous.pth`` the one before it, and
``checkpoint0020.pth`` a copy kept for good (named by its 0-based epoch, as in the reference).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dino_kit import files, log
from dino_kit.errors import UserError

NEWEST = "checkpoint.pth"
PREVIOUS = "checkpoint_previous.pth"
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


def network_states(student: nn.Module, teacher: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Both networks' tensors under the names that the reference's data-parallel wrappers give.

    The student is always wrapped there, the teacher only when it has a batch norm.
    """
    wrapped = any(isinstance(module, _BATCH_NORMS) for module in teacher.modules())
    return {
        "student": _prefixed(student.state_dict(), "module."),
        "teacher": _prefixed(teacher.state_dict(), "module." if wrapped else ""),
    }


def load_network(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load one of :func:`network_states` strictly, whatever prefix it was saved under."""
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})


def save(folder: str | Path, content: dict[str, Any], also_as: str | None = None) -> None:
    """Write ``content`` as the newest checkpoint of ``folder``.

    What was the newest stays as the previous one; at no moment is there none. ``also_as`` keeps
    the new one under a second name.
    """
    folder = Path(folder)
    with files.atomic_write(folder / f"{NEWEST}.new") as file:
        torch.save(content, file)
    if (folder / NEWEST).exists():
        files.same_content(folder / NEWEST, folder / PREVIOUS)
    (folder / f"{NEWEST}.new").replace(folder / NEWEST)
    if also_as is not None:
        files.same_content(folder / NEWEST, folder / also_as)


def newest(folder: str | Path) -> dict[str, Any] | None:
    """The newest readable checkpoint of ``folder``, or None where there is none.

    Raises:
        UserError: there are checkpoints, and none of them can be read.
    """
    found = [path for name in (NEWEST, PREVIOUS) if (path := Path(folder) / name).is_file()]
    for position, path in enumerate(found):
        try:
            return files.read_weights(path)
        except UserError as error:
            if position == len(found) - 1:
                raise
            log.notice(f"{error} The one before it, {found[position + 1].name}, is used.")
    return None


def _prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}
