"""Tensors that lie in parts on the processes, in files beside a checkpoint: one of each process.

A process writes what it holds, and a reader takes the rows that it needs, so nobody has to hold a
whole checkpoint. The files are safetensors, in a folder of their own for each checkpoint. Nothing
refers to it before that checkpoint is renamed into place, so what a killed process leaves behind is
a folder that the next save removes. Where a tensor of R rows would stand, the checkpoint has::

    {"shape": [R, ...], "parts": [[file, name, start, stop, sha256], ...]}

with the rows of each part, from ``start`` to before ``stop``, and the checksum of their bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dino_kit import distributed, files
from dino_kit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

FOLDER = "shards"
_OF_A_CHECKPOINT = re.compile(r"step\d{8,}-[0-9a-f]{8}").fullmatch


class Part(NamedTuple):
    """Some rows of a tensor."""

    file: str  # from the checkpoint's folder
    name: str  # in the file
    start: int
    stop: int
    sha256: str


class StoredTensor:
    """A tensor of a checkpoint that lies in parts: read when it is asked for, and no more of it.

    What reads it raises :class:`UserError` where a file is missing or damaged.
    """

    def __init__(self, place: Mapping[str, Any], folder: Path):
        self.shape, self._folder = tuple(map(int, place["shape"])), folder
        self._parts = [Part(*part) for part in place["parts"]]
        stops = [0, *(part.stop for part in self._parts)]
        if [*(part.start for part in self._parts), self.shape[0]] != stops:
            raise ValueError("rows that are missing, or there twice")

    def rows(self, start: int, stop: int) -> Tensor:
        """Those from ``start`` to before ``stop``, on the CPU."""
        wanted = [part for part in self._parts if part.start < stop and start < part.stop]
        if not wanted:  # of no rows there is still a type, which need not keep the file open
            return self._read(self._parts[0])[:0].clone()
        import torch

        return torch.cat([
            self._read(part)[max(start - part.start, 0) : stop - part.start] for part in wanted
        ])  # fmt: skip

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0])

    @property
    def folders(self) -> set[Path]:
        """Where its parts lie."""
        return {(self._folder / part.file).parent for part in self._parts}

    def check(self, turn: int, turns: int) -> None:
        """Read of every ``turns`` files the one whose ``turn`` it is."""
        for part in self._parts[turn::turns]:
            self._read(part)

    def _read(self, part: Part) -> Tensor:
        path = self._folder / part.file
        found = files.read_tensor(path, part.name)
        if found.shape != (part.stop - part.start, *self.shape[1:]) or _sha256(found) != part.sha256:
            raise UserError(f"{path} is damaged: the checksum of {part.name!r} does not match.")
        return found


def in_parts(value: Any) -> bool:
    """Whether this process has a part of it: whether it is a DTensor, whose import costs a second."""
    return hasattr(value, "to_local")


def replaced(
    state: Any, is_one: Callable[[Any], bool], by: Callable[[str, Any], Any], name: str = ""
) -> Any:
    """``state``, mappings and lists, with ``by(name, value)`` for each value that ``is_one``.

    The name has all keys on the way to the value, with strokes between.
    """
    if is_one(state):
        return by(name, state)
    if isinstance(state, Mapping):
        return {
            key: replaced(value, is_one, by, f"{name}/{key}" if name else str(key))
            for key, value in state.items()
        }
    if isinstance(state, list):
        return [replaced(value, is_one, by, f"{name}/{n}") for n, value in enumerate(state)]
    return state


def write(folder: str | Path, step: int, state: Any) -> Any:
    """Write what this process holds of the tensors in ``state``, nested, that are in parts.

    All processes have to call it, and get ``state`` as the checkpoint is to have it.

    Raises:
        OSError: on all processes, where one of them could not write.
    """
    rank, processes = distributed.rank(), distributed.world_size()
    # A name that no other attempt at this step had: a checkpoint may refer to its files.
    token = distributed.all_gather_plain(secrets.token_hex(4))[0]
    inside = f"{FOLDER}/step{step:08}-{token}"
    names = [f"{inside}/{number:05}-of-{processes:05}.safetensors" for number in range(processes)]
    held: dict[str, Tensor] = {}
    places: set[int] = set()  # in memory

    def hold(name: str, tensor: Any) -> None:
        if len(own := tensor.to_local()):
            own = own.detach().cpu().contiguous()
            # safetensors takes no tensor under two names, as a model that ties weights has it.
            held[name] = own.clone() if own.data_ptr() in places else own
            places.add(own.data_ptr())

    replaced(state, in_parts, hold)
    told, refusal = {}, None
    try:
        files.write_tensors(Path(folder, names[rank]), held)
        told = {name: (len(own), _sha256(own)) for name, own in held.items()}
    except OSError as error:
        refusal = (error.errno, error.strerror or str(error))
    everyones, refusals = zip(*distributed.all_gather_plain((told, refusal)), strict=True)
    refused = [refusal for refusal in refusals if refusal is not None]
    # Not as Path asks it, who may raise, and then the others would wait.
    unseen = [name for name in names if not os.path.isfile(Path(folder, name))]
    if unseen and not refused:
        refused = [(None, f"{unseen[0]} is on another disk; all need the same --output_dir")]
    if refused := distributed.all_gather_plain(refused)[0]:
        shutil.rmtree(Path(folder, inside), ignore_errors=True)  # on a full disk it is in the way
        raise OSError(*refused[0])

    def place(name: str, tensor: Any) -> dict[str, Any]:
        parts, start = [], 0
        for file, of_process in zip(names, everyones, strict=True):
            if name in of_process:
                rows, checksum = of_process[name]
                parts.append([file, name, start, start + rows, checksum])
                start += rows
        return {"shape": list(tensor.shape), "parts": parts}

    return replaced(state, in_parts, place)


def read(path: Path, take: Callable[[dict[str, Any]], T]) -> T:
    """``take`` of what the checkpoint ``path`` holds: a :class:`StoredTensor` where one is stored.

    A run that goes on replaces the file, and removes shards that nobody refers to any more; where
    that was in the way, the new file is read.

    Raises:
        UserError: the checkpoint, or what ``take`` reads of it, is missing or damaged.
    """
    while True:
        before = _stamp(path)
        try:
            return take(_opened(files.read_weights(path), path))
        except UserError:
            if _stamp(path) == before:
                raise


def checked(content: Any) -> Any:
    """``content``, of whose stored tensors this process has read its share.

    Raises:
        UserError: a file is missing or damaged.
    """
    turn = distributed.rank(), distributed.world_size()
    replaced(content, _is_stored, lambda name, stored: stored.check(*turn))
    return content


def whole(content: Any) -> Any:
    """``content`` with each :class:`StoredTensor` read."""
    return replaced(content, _is_stored, lambda name, stored: stored.whole())


def referred_to(path: Path) -> set[Path]:
    """The folders in which parts of the checkpoint ``path`` lie.

    Raises:
        UserError: it cannot be read, or is none.
    """
    needed: set[Path] = set()
    content = _opened(files.read_weights(path, lazily=True), path)
    replaced(content, _is_stored, lambda name, stored: needed.update(stored.folders))
    return needed


def remove_all_but(folder: str | Path, needed: Collection[Path]) -> None:
    """Remove what :func:`write` made in ``folder``, and nothing else, but for these folders."""
    for found in written_in(folder):
        if found not in needed:
            shutil.rmtree(found, ignore_errors=True)
    with suppress(OSError):  # it holds more
        Path(folder, FOLDER).rmdir()


def written_in(folder: str | Path) -> list[Path]:
    """The folders that :func:`write` made; beside them there may be what it knows nothing of."""
    try:
        return [path for path in Path(folder, FOLDER).iterdir() if _OF_A_CHECKPOINT(path.name)]
    except OSError:
        return []


def _stamp(path: Path) -> tuple[int, int] | None:
    """Another one after each time that the file was replaced."""
    try:
        return (found := path.stat()).st_ino, found.st_mtime_ns
    except OSError:
        return None


def _opened(content: Any, path: Path) -> Any:
    try:
        return replaced(content, _is_place, lambda name, place: StoredTensor(place, path.parent))
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged: it has a tensor in parts that make none.") from error


def _is_place(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"shape", "parts"}


def _is_stored(value: Any) -> bool:
    return isinstance(value, StoredTensor)


def _sha256(tensor: Tensor) -> str:
    import torch

    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
