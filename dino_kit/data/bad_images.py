"""The images that a run cannot use: each named once in a file, told, and held against a limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dino_kit import distributed, files, journal, log
from dino_kit.data.crops import View, require_crops
from dino_kit.data.decode import decode
from dino_kit.data.loader import Batch, Loader
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.source import Source
from dino_kit.errors import BadImage, UserError

NAME = "bad_images.txt"
_JUDGED = 1000  # images, or all where there are fewer, before which a share would say little
_ONE_LINE = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


class BadImages:
    """Watches a loader that puts other images in the place of those that cannot be used.

    ``bad_images.txt`` has a line for each: its name, a tab, the reason. Every process writes down
    what it meets, and knows of the others' when it does.

    Args:
        source: what the loader reads.
        pixels: what an image becomes.
        folder: where ``bad_images.txt`` goes.
        max_share: the share of bad images, among those looked at, beyond which the run ends.
        views: crops that have to be possible of each image.
    """

    def __init__(
        self,
        source: Source,
        pixels: Pixels,
        folder: str | Path,
        max_share: float,
        views: Sequence[View] = (),
    ):
        self.source, self.pixels, self.max_share = source, pixels, max_share
        self.views = views
        self.path = Path(folder) / NAME
        self._met: set[int] = set()
        self._written: dict[str, str] = {}  # reasons by names
        self._read = 0  # bytes of the file

    def __len__(self) -> int:
        """How many are written down."""
        self._refresh()
        return len(self._written)

    def open(self, anew: bool = False) -> None:
        """Begin; what was written down goes, ``anew`` all of it, else what has been mended since."""
        with distributed.main_first():
            if distributed.is_main() and self.path.exists():
                kept = {} if anew else self._still_bad()
                if kept:
                    files.write_text(self.path, "".join(_line(*entry) for entry in kept.items()))
                else:
                    self.path.unlink()
                self._written, self._read = {}, 0

    def _still_bad(self) -> dict[str, str]:
        """What is written down and holds, in the order in which it was met."""
        self._refresh()
        bad = set()
        for index in range(len(self.source)):
            name = _plain(self.source.name(index))
            if name in self._written:
                try:
                    image = decode(self.source.read(index), name, self.pixels)
                    require_crops(self.views, image.height, image.width, name)
                except BadImage:
                    bad.add(name)
        return {name: why for name, why in self._written.items() if name in bad}

    def watch(self, loader: Loader) -> Iterator[Sequence[Batch]]:
        """The steps of ``loader``, with an eye on what is bad in them.

        Raises:
            UserError: more images are bad than ``max_share`` allows.
        """
        for step, batches in enumerate(loader, loader.start_step + 1):
            found = {i: why for batch in batches for i, why in batch.bad if i not in self._met}
            if found:
                self._note(found)
                self._judge(step * loader.total_batch_size)
            yield batches

    def _note(self, found: dict[int, str]) -> None:
        self._refresh()
        for index, sentence in found.items():
            self._met.add(index)
            name = self.source.name(index)
            if _plain(name) in self._written:
                continue
            if not self._written:
                log.notice(
                    f"{sentence} Another image takes its place, as for every one that cannot be "
                    f"used; {self.path} names them."
                )
            try:
                line = _line(_plain(name), _plain(sentence.removeprefix(name)))
                journal.append_whole(self.path, line.encode())
            except OSError as error:  # it is written down when it is met again
                self._met.discard(index)
                log.notice(f"{self.path} could not be written to ({error.strerror}). {sentence}")
            self._refresh()


    def _judge(self, used: int) -> None:
        seen = min(used + len(self), len(self.source))
        basis = max(seen, min(len(self.source), _JUDGED))
        allowed = int(self.max_share * basis + 1e-6)  # 0.29 of 100 are 29
        if len(self) > allowed:
            raise UserError(
                f"{len(self):,} of the {seen:,} images looked at so far cannot be used, and "
                f"--max_bad_share {self.max_share:g} allows {allowed:,} of {basis:,}; {self.path} "
                "names them with the reasons. Mend or replace them, or raise --max_bad_share; the "
                "same command then goes on with the run."
            )

    def _refresh(self) -> None:
        """Read what was appended since."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read += len(whole + end)
        self._written |= _entries(whole)


def written(folder: str | Path) -> dict[str, str]:
    """What a run's folder names: reasons by names."""
    path = Path(folder) / NAME
    return _entries(path.read_bytes()) if path.is_file() else {}


def _entries(content: bytes) -> dict[str, str]:
    lines = content.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    return dict(line.split("\t", 1) for line in lines if "\t" in line)


def _line(name: str, reason: str) -> str:
    return f"{name}\t{reason.strip()}\n"


def _plain(text: str) -> str:
    """``text`` in one line without a tab, as text that every file takes."""
    return text.translate(_ONE_LINE).encode("utf-8", "backslashreplace").decode()
