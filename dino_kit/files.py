"""Files that appear whole or not at all, and weights that are read without running code."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dino_kit.errors import UserError

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 20  # bytes that are read at once


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Write ``path`` by way of a temporary file beside it.

    The file is flushed to the disk before it takes its name, so that a reader, or a machine that
    lost power, finds the old content or the new and nothing between. When the body raises, the
    old content stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A file's name need not be valid text; what is not is written as an escape that JSON reads.
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def require_folder(flag: str, folder: str | None) -> None:
    """Raises :class:`UserError` where the folder that ``flag`` names cannot be one."""
    for place in (Path(folder), *Path(folder).parents) if folder else ():
        if place.exists() and not place.is_dir():
            inside = "" if place == Path(folder) else f" would lie in {place}, which"
            raise UserError(f"--{flag} {folder}{inside} is a file; a folder is needed.")


def require_outside(flag: str, folder: str, images: str) -> None:
    """Raises :class:`UserError` where ``folder`` lies in a folder of images, ``images``.

    The pictures that are written to it would be read as images the next time.
    """
    if os.path.isdir(images) and Path(folder).resolve().is_relative_to(Path(images).resolve()):
        raise UserError(
            f"--{flag} {folder} lies among the images of {images}, which would then hold the run's "
            "own pictures, too; give a folder elsewhere."
        )


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def same_content(source: str | Path, target: str | Path) -> None:
    """Let ``target`` hold what ``source`` holds now, without a moment in which it holds less.

    A second name for the same data costs no space and no time; file systems that have no second
    names get a copy. Files written by :func:`atomic_write` are never changed in place, so the two
    names do not follow each other later.
    """
    source, target = Path(source), Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as original, atomic_write(target) as copy:
            shutil.copyfileobj(original, copy, _BLOCK)
        return
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # where both were names of one file, nothing was replaced
    _sync_folder(target.parent)


def remove_leftovers(folder: str | Path) -> None:
    """Remove temporary files that killed processes left in ``folder``; those in use stay."""
    for leftover in Path(folder).glob(".*.tmp"):
        process = leftover.name.removesuffix(".tmp").rpartition(".")[2]
        if process.isdecimal() and not _is_running(int(process)):
            with suppress(OSError):
                leftover.unlink()


def _is_running(process: int) -> bool:
    if os.name != "posix":  # signal 0 asks only there; on Windows a file in use cannot be removed
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def cut_lines(path: str | Path, keep: Callable[[Any], bool]) -> list[Any]:
    """Keep of a file of JSON lines those whose value satisfies ``keep``; drop a torn last line.

    Returns the values kept; none where there is no such file.
    """
    path = Path(path)
    if not path.exists():
        return []
    kept, values = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if keep(value):
            kept.append(line + "\n")
            values.append(value)
    write_text(path, "".join(kept))
    return values


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_weights(path: str | Path, content: Any) -> None:
    """Write ``content``, tensors and plain data, as ``torch.save`` does, whole or not at all.

    Raises:
        OSError: the place cannot be written to, or is full; the old content stays.
    """
    import torch

    with uninterrupted(), atomic_write(path) as file:
        target = _Target(file)
        torch.save(content, target)
        if target.error is not None:
            raise target.error


class _Target:
    """A file for ``torch.save``, which must not see an error: it ends in others, or the process."""

    def __init__(self, file: IO):
        self.file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within, an interruption from the keyboard waits; it is raised at the end."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *what: received.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``tensors``, on the CPU, in the format safetensors, to a name that is not used yet.

    Raises:
        OSError: the place cannot be written to, or is full; there is no such file then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    mode = path.stat().st_mode  # safetensors makes files that nobody else may read
    try:
        with uninterrupted():
            save_file(dict(tensors), path)
            with suppress(OSError):  # some file systems have no modes
                path.chmod(mode)
            with open(path, "r+b") as file:  # Windows brings only what may be written to the disk
                os.fsync(file.fileno())
            for new in (path, *made):
                _sync_folder(new.parent)
    except BaseException as error:
        with suppress(OSError):
            path.unlink()
        if not isinstance(error, SafetensorError):
            raise
        number = re.search(r"os error (\d+)", str(error))  # the only place where it says which
        if number is None:
            raise OSError(str(error)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def read_tensor(path: str | Path, name: str) -> torch.Tensor:
    """One of the tensors that :func:`write_tensors` wrote, on the CPU.

    Raises:
        UserError: the file is missing, damaged or no such file, or has no such tensor.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"There is no file {path}, where a part of a checkpoint lies.")
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {name!r} cannot be read from it.") from error


def read_weights(path: str | Path, lazily: bool = False) -> dict[str, Any]:
    """What ``torch.save`` wrote to ``path``, on the CPU, without running pickled code.

    Tensors, plain data and the few harmless types of published files (the parsed arguments, NumPy
    scalars) are read; everything else is refused. The checksums inside the file are verified first,
    because ``torch.load`` reads a flipped byte without a word. With ``lazily`` they are not, and
    tensors stay on the disk until they are used.

    Raises:
        UserError: the file is missing, damaged, no checkpoint, or holds types that could run code.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    archived = False
    try:
        archived = zipfile.is_zipfile(path)
        if archived and not lazily:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path} is damaged: the checksum of {damaged!r} does not match.")
        with torch.serialization.safe_globals(_harmless_types()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the readers raise almost anything
        if archived and isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{path} holds pickled objects that could run code, so it was not loaded; "
                "a checkpoint of tensors and plain data is needed."
            ) from error
        raise UserError(f"{path} is not a checkpoint that PyTorch can read, or is damaged.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__} where a checkpoint, a dictionary of "
            "tensors, is needed."
        )
    return content


def _harmless_types() -> list:
    import numpy as np

    # Published checkpoints hold their arguments as a Namespace, with NumPy scalars among them;
    # NumPy 2 moved numpy.core to numpy._core, and files of both spellings are about.
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "bool")}
    return [
        argparse.Namespace,
        np.dtype,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        *kinds,
    ]


def _sync_folder(folder: Path) -> None:
    # A rename is on the disk only once its folder is; Windows has no handle for that.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
