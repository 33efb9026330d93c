"""Files of every format, damaged in every way: an image or a sentence, in bounded memory.

More examples than the suite takes: ``DINO_KIT_FUZZ=20000 pytest tests/test_decode_fuzz.py``, with
other random numbers each time.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from dino_kit.data.bands import Bands
from dino_kit.data.decode import decode
from dino_kit.data.pixels import Pixels
from dino_kit.errors import BadImage

SHAPE = (9, 12)
VALUES = np.random.default_rng(0).integers(0, 256, (*SHAPE, 4), dtype=np.uint8)
PICTURE = Image.fromarray(VALUES).convert("RGB")
RULES = [
    Pixels(), Pixels(exif="apply"), Pixels(1), Pixels(4), Pixels(5), Pixels(2, "ignore", (0, 4095)),
    Pixels(3, "ignore", (0.0, 1.0)),
]  # fmt: skip


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def npy(values: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version)
    return file.getvalue()


def files() -> dict[str, bytes]:
    deep = VALUES.astype(np.uint16) * 257
    turned = Image.Exif()
    turned[0x0112] = 6
    gray, palette = PICTURE.convert("L"), PICTURE.convert("P")
    found = {
        "jpeg": saved(PICTURE, "jpeg"),
        "progressive jpeg": saved(PICTURE, "jpeg", progressive=True, exif=turned),
        "cmyk jpeg": saved(PICTURE.convert("CMYK"), "jpeg"),
        "png": saved(PICTURE, "png"),
        "png alpha": saved(Image.fromarray(VALUES), "png", exif=turned),
        "png 16": saved(Image.fromarray(deep[..., 0]), "png"),
        "png palette": saved(palette, "png", transparency=bytes(range(256))),
        "png 1": saved(PICTURE.convert("1"), "png"),
        "gif": saved(palette, "gif"),
        "gif of two": saved(palette, "gif", save_all=True, append_images=[gray.convert("P")]),
        "webp": saved(PICTURE, "webp"),
        "webp lossless": saved(Image.fromarray(VALUES), "webp", lossless=True),
        "webp of two": saved(PICTURE, "webp", save_all=True, append_images=[PICTURE.rotate(9)]),
        "bmp": saved(PICTURE, "bmp"),
        "bmp palette": saved(palette, "bmp"),
        "ppm": saved(PICTURE, "ppm"),
        "pgm": saved(gray, "ppm"),
        "pgm 16": b"P5 12 9 65535\n" + deep[..., 0].astype(">u2").tobytes(),
        "tiff": saved(PICTURE, "tiff"),
        "tiff deflate": saved(PICTURE, "tiff", compression="tiff_deflate"),
        "tiff jpeg": saved(PICTURE, "tiff", compression="jpeg"),
        "tiff 16": tiff(deep[..., 0]),
        "tiff float": tiff(VALUES[..., 0].astype(np.float32) / 255),
        "tiff bands": tiff(np.dstack([deep, deep[..., :1]]), photometric="minisblack",
                           planarconfig="contig"),
        "tiff bands deflate": tiff(np.moveaxis(deep, 2, 0), photometric="minisblack",
                                   planarconfig="separate", compression="zlib"),
        "tiff pages": tiff(np.moveaxis(deep[..., :2], 2, 0), photometric="minisblack"),
        "tiff tiles": tiff(np.tile(deep[..., 0], (4, 4)), tile=(16, 16), compression="zlib"),
        "bigtiff": tiff(deep[..., :4], bigtiff=True, photometric="minisblack",
                        planarconfig="contig"),
        "npy": npy(VALUES[..., :3]),
        "npy float": npy(np.asfortranarray(VALUES[..., 0] / 255)),
        "npy 3.0": npy(deep.astype(">u2"), (3, 0)),
    }  # fmt: skip
    if features.check("avif"):
        found["avif"] = saved(PICTURE, "avif")
    return found


FILES = files()
EXTREMES = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\1\0",
            b"\1\0\0\0", b"999999999", b"-1", b"\0", b"\xff"]  # fmt: skip


def outcome(data: bytes, rule: Pixels) -> str:
    """What :func:`decode` says; empty where it returns an image as it should be."""
    try:
        found = decode(data, "some/picture.png", rule)
    except BadImage as error:
        sentence = str(error)
        assert sentence.startswith("some/picture.png ") and sentence.endswith(".")
        assert "\n" not in sentence
        return sentence
    if rule.in_chans == 3:
        assert isinstance(found, Image.Image) and found.mode == "RGB"
        assert np.asarray(found).shape == (found.height, found.width, 3)
    else:
        assert isinstance(found, Bands) and found.channels == rule.in_chans
        assert found.planes.dtype == np.float32 and np.isfinite(found.planes).all()
        assert found.planes.min() >= 0 and found.planes.max() <= 1
    return ""


def took_too_much(sentence: str) -> bool:
    return "MemoryError" in sentence or "llocate" in sentence


@pytest.mark.parametrize("name", FILES)
def test_what_is_damaged_below_is_whole_at_first(name):
    assert any(outcome(FILES[name], rule) == "" for rule in RULES)


@pytest.fixture(scope="module")
def little_memory():
    """Room for what the limit of pixels allows, and not for much more."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 1 << 20
    try:
        import resource
    except ImportError:  # Windows
        yield
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if os.path.exists("/proc/self/statm"):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + (512 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        yield
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    Image.MAX_IMAGE_PIXELS = before


PLACE = st.integers(0, 2**16) | st.integers(0, 160)  # headers are at the front
CHANGE = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("set"), PLACE, st.sampled_from(EXTREMES)),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("delete"), PLACE, st.integers(1, 16)),
    st.tuples(st.just("cut"), PLACE, st.none()),
    st.tuples(st.just("splice"), PLACE, st.tuples(st.sampled_from(sorted(FILES)), PLACE)),
)


def changed(data: bytes, kind: str, place: int, what) -> bytes:
    place %= len(data) + 1
    if kind == "flip":
        middle = bytes([data[place] ^ 1 << what]) if place < len(data) else b""
        return data[:place] + middle + data[place + 1 :]
    if kind == "set":
        return data[:place] + what + data[place + len(what) :]
    if kind == "insert":
        return data[:place] + what + data[place:]
    if kind == "delete":
        return data[:place] + data[place + what :]
    if kind == "cut":
        return data[:place]
    other = FILES[what[0]]
    return data[:place] + other[what[1] % len(other) :]


def with_sums_of_png(data: bytes) -> bytes:
    """A PNG whose chunks have the sums that belong to them, so that damage is looked at further."""
    at, parts = 8, [data[:8]]
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        parts.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts) + data[at:]


MORE = int(os.environ.get("DINO_KIT_FUZZ", "0"))


@settings(deadline=None, max_examples=MORE or 300, derandomize=not MORE, database=None)
@given(
    name=st.sampled_from(sorted(FILES)), rule=st.sampled_from(RULES), sums=st.booleans(),
    changes=st.lists(CHANGE, min_size=1, max_size=5),
)  # fmt: skip
def test_any_damage_gives_an_image_or_a_sentence_in_bounded_memory(
    little_memory, name, rule, changes, sums
):
    data = FILES[name]
    for change in changes:
        data = changed(data, *change)
    if sums and data.startswith(b"\x89PNG"):
        data = with_sums_of_png(data)
    assert not took_too_much(outcome(data, rule))


# Headers that claim enormous sizes


def npy_header(shape: str, kind: str = "<f8") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text + b"\n" + bytes(64)


def tiff_header(width: int, height: int, **more) -> bytes:
    """A TIFF of a single strip of 8 bytes, with these tags."""
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 8,
            339: 1} | {int(tag[1:]): value for tag, value in more.items()}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def in_a_circle(name: str, pages: int) -> bytes:
    """The last page of a file of so many leads back to the first."""
    data = FILES[name]
    big = data[2] == 43
    number, entries, size = ("<Q", "<Q", 20) if big else ("<I", "<H", 12)
    (first,) = struct.unpack_from(number, data, 8 if big else 4)
    page = first
    for _ in range(pages):
        (count,) = struct.unpack_from(entries, data, page)
        at = page + struct.calcsize(entries) + count * size
        (page,) = struct.unpack_from(number, data, at)
    assert page == 0
    return data[:at] + struct.pack(number, first) + data[at + struct.calcsize(number) :]


def png_header(width: int, height: int, content: bytes = b"", bits: int = 8, kind: int = 2) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    for name, body in ((b"IHDR", head), (b"IDAT", content), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(body)) + name + body
                     + struct.pack(">I", zlib.crc32(name + body)))  # fmt: skip
    return b"".join(parts)


def webp_header(width: int, height: int) -> bytes:
    """The canvas of an animation, of any size, and one frame of it."""
    whole = FILES["webp of two"]
    return whole[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + whole[30:]


CLAIMS = {
    "npy": (npy_header("(1000000000, 1000000000)"), 3),
    "npy of two gigabytes": (npy_header("(16384, 16384)"), 3),
    "npy of a gigabyte of bytes": (npy_header("(1073741824,)", "|u1"), 1),
    "npy of nothing": (npy_header("(1000000000, 1000000000)", "|S0"), 3),
    "npy too long for any number": (npy_header(f"({10**30}, 0, {10**30})"), 3),
    "tiff": (tiff_header(2**31, 2**31), 3),
    "tiff for tifffile": (tiff_header(2**20, 2**20), 5),
    "tiff of many bands": (tiff_header(10_000, 10_000, t277=1000, t284=1), 5),
    "tiff of many bands, for three": (tiff_header(10_000, 10_000, t277=1000, t284=1), 3),
    "tiff of as many bands as asked": (tiff_header(13_000, 13_000, t277=5, t284=1), 5),
    "compressed tiff": (tiff_header(10_000, 10_000, t277=1000, t284=1, t259=8), 5),
    "compressed tiff of as many bands": (tiff_header(13_000, 13_000, t277=5, t284=1, t259=8), 5),
    "tiff of tiles": (tiff_header(13_000, 13_000, t277=5, t322=2**16, t323=2**16, t324=8, t325=8,
                                  t259=8), 5),
    "tiff of a tile": (tiff_header(100, 100, t277=5, t322=2**14, t323=2**13, t324=8, t325=8, t259=8),
                       5),
    "tiff of a larger tile": (tiff_header(100, 100, t277=5, t322=2**16, t323=2**16, t324=8, t325=8,
                                          t259=50000), 5),
    "tiff in a circle": (in_a_circle("tiff bands", 1), 7),
    "tiff of pages in a circle": (in_a_circle("tiff pages", 2), 7),
    "bigtiff in a circle": (in_a_circle("bigtiff", 1), 7),
    "tiff for Pillow in a circle": (in_a_circle("tiff 16", 1), 4),
    "png": (png_header(2**31 - 1, 2**31 - 1), 3),
    "png bomb": (png_header(50_000, 50_000, zlib.compress(bytes(50_000_000), 9)), 3),
    "bmp": (FILES["bmp"][:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + FILES["bmp"][26:], 3),
    "ppm": (b"P6 1000000000 1000000000 255\n" + bytes(99), 3),
    "pgm": (b"P5 200000 200000 65535\n" + bytes(99), 1),
    "gif": (FILES["gif"][:6] + b"\xff\xff\xff\xff" + FILES["gif"][10:], 3),
    "webp": (webp_header(1 << 24, 255), 3),
    "jpeg": (FILES["jpeg"].replace(struct.pack(">HH", *SHAPE), b"\xff\xdc\xff\xdc", 1), 3),
}  # fmt: skip

PROGRAM = """
import resource, sys
from pathlib import Path
from PIL import Image
import tifffile
from dino_kit.data.decode import decode
from dino_kit.data.pixels import Pixels
from dino_kit.errors import BadImage

Image.init()
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for path in sys.argv[1:]:
    try:
        decode(Path(path).read_bytes(), path, Pixels(int(path.rpartition("_")[2])))
    except BadImage as error:
        print(error)
    else:
        print("read", path)
"""


@pytest.fixture(scope="module")
def claims(tmp_path_factory) -> dict[str, str]:
    """What is said of each of CLAIMS, by a process that has a quarter of a gigabyte for all."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("this system does not limit the memory of a process")
    folder = tmp_path_factory.mktemp("claims")
    paths = {name: folder / f"{name.replace(' ', '-')}_{CLAIMS[name][1]}" for name in CLAIMS}
    for name, path in paths.items():
        path.write_bytes(CLAIMS[name][0])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, paths.values())],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return dict(zip(paths, (line.removeprefix(f"{folder}{os.sep}") for line in lines), strict=True))


@pytest.mark.parametrize("name", CLAIMS)
def test_an_enormous_claim_is_refused_before_the_memory_is_taken(claims, name):
    print(claims[name])
    assert not claims[name].startswith("read ") and not took_too_much(claims[name])
