"""The members of a tar archive, read from its headers alone.

``tarfile`` of the standard library keeps an object of a kilobyte for each member and takes several
times as long. Understood are the formats in use: v7, ustar, GNU (long names, sizes in base 256,
sparse files, which are passed over) and pax (names and sizes in extended headers).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from dino_kit import log
from dino_kit.errors import UserError

_BLOCK = 512
_MOST_TEXT = 1 << 20  # bytes of an extended header; real ones have a few hundred
_REGULAR, _LINK = b"0\x007", b"1"  # 7 is a contiguous file, \0 what v7 writes
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
_FOLDER, _SPARSE = b"5", b"S"
_LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL = b"L", b"K", b"xX", b"g"


class Member(NamedTuple):
    name: str  # parts joined by "/"
    kind: str  # "file", "folder", "link" to an earlier member, "other"
    offset: int  # where its bytes begin in the archive
    size: int
    target: str  # of a link


class Archive:
    """An open tar archive, whose bytes are read by their place.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - stays open
        except OSError as error:
            raise UserError(f"The archive {path} cannot be opened: {error.strerror}.") from error
        stat = os.fstat(self._file.fileno())
        self.size, self.changed_at = stat.st_size, stat.st_mtime_ns

    def close(self) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file."""
        parts = []
        try:
            while size > 0:
                part = self._read_at(offset, size)
                if not part:
                    break
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        except OSError as error:
            raise UserError(f"The archive {self.path} cannot be read: {error.strerror}.") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_at(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):  # processes that share the open file do not disturb each other
            return os.pread(self._file.fileno(), size, offset)
        self._file.seek(offset)
        return self._file.read(size)

    def members(self) -> Iterator[Member]:
        """All members, in the order of the archive.

        Raises:
            UserError: this is no tar archive, or it is damaged, or cut off.
        """
        offset, said = 0, _Said()
        while (header := self.read(offset, _BLOCK)) and header.count(0) != len(header):
            if len(header) < _BLOCK:
                raise self._cut_off(offset) if offset else UserError(self._no_archive(header))
            self._check(header, offset)
            kind = header[156:157]
            begin = offset + _BLOCK
            if kind == _SPARSE:
                begin = self._after_sparse_map(header, begin)
            size = 0 if kind in _WITHOUT_DATA else self._number(header, offset)
            if kind not in _WITHOUT_DATA and kind not in _LONG_NAME + _LONG_LINK + _EXTENDED:
                size = size if said.size is None else said.size
            if begin + size > self.size:
                raise self._cut_off(offset, said.name or _name(header))
            offset = begin + -(-size // _BLOCK) * _BLOCK
            if kind in _LONG_NAME + _LONG_LINK + _EXTENDED:
                said = said.joined(kind, self._text(begin, size))
                continue
            if kind == _GLOBAL:
                continue
            name = _plain(said.name or _name(header))
            target = _plain(said.target or _text(header[157:257]))
            yield Member(name, _kind(header, kind, said), begin, size, target)
            said = _Said()
        if not header:
            log.notice(f"{self.path} has no end marker: if it was cut off, images are missing.")

    def _check(self, header: bytes, offset: int) -> None:
        stored = _octal(header[148:156])
        # The sum is over the header with blanks in place of the sum.
        plain = sum(header) - sum(header[148:156]) + 8 * 32
        if stored == plain:
            return
        if offset == 0:
            raise UserError(self._no_archive(header))
        raise UserError(
            f"The archive {self.path} is damaged at byte {offset:,}: no header is there."
        )

    def _no_archive(self, header: bytes) -> str:
        for kind, begin in (
            ("gzip", b"\x1f\x8b"),
            ("bzip2", b"BZh"),
            ("xz", b"\xfd7zXZ"),
            ("zstandard", b"\x28\xb5\x2f\xfd"),
        ):
            if header.startswith(begin):
                return (
                    f"The archive {self.path} is compressed by {kind}, so its images cannot be read "
                    "in place; decompress it to a plain .tar."
                )
        return f"{self.path} is no tar archive."

    def _number(self, header: bytes, offset: int) -> int:
        field = header[124:136]
        if field[0] & 0x80:  # base 256
            number = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        else:
            number = _octal(field)
        if number is None or number > 1 << 62:
            raise UserError(f"The archive {self.path} is damaged at byte {offset:,}: no size.")
        return number

    def _after_sparse_map(self, header: bytes, begin: int) -> int:
        goes_on = header[482]
        while goes_on:
            block = self.read(begin, _BLOCK)
            if len(block) < _BLOCK:
                raise self._cut_off(begin)
            goes_on, begin = block[504], begin + _BLOCK
        return begin

    def _text(self, begin: int, size: int) -> bytes:
        if size > _MOST_TEXT:
            raise UserError(
                f"The archive {self.path} is damaged at byte {begin:,}: an extended header of "
                f"{size:,} bytes."
            )
        return self.read(begin, size)

    def _cut_off(self, offset: int, name: str = "") -> UserError:
        inside = f", in {name}" if name else ""
        return UserError(
            f"The archive {self.path} is cut off: it ends at byte {self.size:,}{inside}, after "
            f"{offset:,} bytes that are whole."
        )


class _Said(NamedTuple):
    """What extended headers say of the member after them."""

    name: str = ""
    target: str = ""
    size: int | None = None
    sparse: bool = False

    def joined(self, kind: bytes, text: bytes) -> _Said:
        if kind == _LONG_NAME:
            return self._replace(name=_text(text))
        if kind == _LONG_LINK:
            return self._replace(target=_text(text))
        joined = self
        for key, value in _records(text):
            if key == b"path":
                joined = joined._replace(name=_text(value))
            elif key == b"linkpath":
                joined = joined._replace(target=_text(value))
            elif key == b"size" and value.isdigit() and len(value) < 19:
                joined = joined._replace(size=int(value))
            elif key.startswith(b"GNU.sparse."):
                joined = joined._replace(sparse=True)
        return joined


def _records(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a pax header: "LENGTH KEY=VALUE\\n", the length that of all of it."""
    at = 0
    while at < len(text):
        length, blank, _ = text[at : at + 20].partition(b" ")
        if not blank or not length.isdigit() or int(length) <= len(length) + 1:
            return
        record = text[at + len(length) + 1 : at + int(length) - 1]
        key, equals, value = record.partition(b"=")
        if equals:
            yield key, value
        at += int(length)


def _kind(header: bytes, kind: bytes, said: _Said) -> str:
    if kind == _FOLDER or kind in _REGULAR and _name(header).endswith("/"):  # v7's folders
        return "folder"
    if kind in _REGULAR and not said.sparse:
        return "file"
    return "link" if kind == _LINK else "other"


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    # What is no Unicode is kept, as file systems do.
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _plain(name: str) -> str:
    """``name`` without what says nothing, such as "./" before it."""
    if "./" not in name and "//" not in name and name[:1] != "/" and name[-1:] != "/":
        return name
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0").partition(b"\0")[0].strip(b" ")
    # int() would also take signs and underscores.
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)
