"""A run's checkpoints: the reference's layout, whole on the disk or not there.

``checkpoint.pth`` is the newest, ``checkpoint_previous.pth`` the one before it, and
``checkpoint0020.pth`` a copy kept for good (named by its 0-based epoch, as in the reference), and
``checkpoint_best.pth`` a copy of the one whose probe with labels was best. Where a process's memory
cannot hold it, most of it lies in :mod:`~dino_kit.shards` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dino_kit import distributed, files, log, sharding, shards
from dino_kit.batch_norm import batch_norms
from dino_kit.errors import RunFailed, UserError

NEWEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
_NUMBERED = re.compile(r"checkpoint\d{4,}\.pth").fullmatch


def network_states(student: nn.Module, teacher: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Both networks' tensors under the names that the reference's data-parallel wrappers give.

    The student is always wrapped there, the teacher only when it has a batch norm.
    """
    wrapped = bool(batch_norms(teacher))
    return {
        "student": _prefixed(student.state_dict(), "module."),
        "teacher": _prefixed(teacher.state_dict(), "module." if wrapped else ""),
    }


def load_network(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load one of :func:`network_states` strictly, whatever prefix it was saved under."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    network.load_state_dict(sharding.divided_network(state, network))


def save(folder: str | Path, content: dict[str, Any], also_as: str | None = None) -> None:
    """Write ``content`` as the newest checkpoint of ``folder``.

    What was the newest stays as the previous one; at no moment is there none. ``also_as`` keeps
    the new one under a second name. An interruption from the keyboard waits until all is written.
    """
    folder = Path(folder)
    new = folder / f"{NEWEST}.new"
    with files.uninterrupted():
        files.write_weights(new, content)
        if also_as is not None:  # before the rename, behind which a run that is killed goes on
            files.same_content(new, folder / also_as)
        if (folder / NEWEST).exists():
            files.same_content(folder / NEWEST, folder / PREVIOUS)
        new.replace(folder / NEWEST)
        remove_unused_shards(folder)


def newest(folder: str | Path) -> dict[str, Any] | None:
    """The newest readable checkpoint of ``folder``, or None where there is none.

    Where the newest cannot be read, the one before it takes its place, so that the next save
    does not push a damaged file into the place of the only good one.

    All processes have to call it, and come to the same.

    Raises:
        UserError: there are checkpoints, and none of them can be read; or some processes see none.
    """
    newest, previous = Path(folder) / NEWEST, Path(folder) / PREVIOUS
    found = [path.name for path in (newest, previous) if path.is_file()]
    if any(other != found for other in distributed.all_gather_plain(found)):
        raise UserError(
            f"The processes do not find the same checkpoints in {folder}; all need the same "
            "--output_dir, on a disk that they share."
        )
    if not newest.is_file():
        return _read(previous) if previous.is_file() else None
    try:
        return _read(newest)
    except UserError as error:
        if not previous.is_file():
            raise
        content = _read(previous)
        log.notice(f"{error} The one before it, {PREVIOUS}, is used.")
    if distributed.is_main():
        files.same_content(previous, newest)
    return content


def is_best(scores: Sequence[float | None]) -> bool:
    """Whether the last of these scores is above all before it; None is no score."""
    if not scores or scores[-1] is None:
        return False
    return all(score is None or score < scores[-1] for score in scores[:-1])


def keep_as_best(folder: str | Path) -> None:
    """Let ``checkpoint_best.pth`` hold what the newest checkpoint holds."""
    files.same_content(Path(folder) / NEWEST, Path(folder) / BEST)
    remove_unused_shards(folder)


def remove(folder: str | Path) -> None:
    """Remove the checkpoints that a run wrote to ``folder``."""
    for path in _all(folder):
        path.unlink(missing_ok=True)
    remove_unused_shards(folder)


def remove_unused_shards(folder: str | Path) -> None:
    """Remove those that no checkpoint in ``folder`` refers to, nor a copy under another name.

    They are of checkpoints that made way, or were never written. Where a checkpoint cannot be read,
    nobody knows which are its; then all stay, and that is told.
    """
    if not shards.written_in(folder):
        return
    needed, own = set(), _all(folder)
    for path in Path(folder).glob("*.pth"):
        try:
            needed |= shards.referred_to(path)
        except UserError as error:
            if path in own:
                log.notice(
                    f"{error} As some may be its, no shards are removed from {folder}, which takes "
                    "room with every save; remove that file, or put a sound one in its place."
                )
                return
    shards.remove_all_but(folder, needed)


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint, whose tensors may be stored in parts; all processes have to call it.

    Raises:
        UserError: on all processes, where one of them cannot read it.
        RunFailed: it is not the same on all.
    """
    content, told = {}, None
    try:
        content = shards.read(path, shards.checked)
    except UserError as error:
        told = str(error)
    refusals, steps = zip(*distributed.all_gather_plain((told, content.get("step"))), strict=True)
    for refusal in filter(None, refusals):
        raise UserError(refusal)
    if any(step != steps[0] for step in steps):
        raise RunFailed(f"{path} was replaced while it was read; another run is training there.")
    return content


def _all(folder: str | Path) -> list[Path]:
    named = [Path(folder) / name for name in (NEWEST, PREVIOUS, BEST)]
    numbered = [path for path in Path(folder).glob("checkpoint*.pth") if _NUMBERED(path.name)]
    return [path for path in (*named, *numbered) if path.is_file()]


def _prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}
