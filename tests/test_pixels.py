"""What an image becomes: every mode in every format, by the number of channels that is asked for."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, UnidentifiedImageError

from dino_kit.data import tiff
from dino_kit.data.bands import Bands
from dino_kit.data.decode import convert, decode
from dino_kit.data.pixels import Pixels
from dino_kit.errors import UserError

HEIGHT, WIDTH = 20, 31
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 1 << 16, (HEIGHT, WIDTH), dtype=np.uint16)
RGBS, GRAYS = Pixels(), Pixels(in_chans=1)


def picture(mode: str) -> Image.Image:
    if mode.startswith("I;16"):
        return Image.frombytes(
            mode, (WIDTH, HEIGHT), DEEP.astype(f"{'<>'['B' in mode]}u2").tobytes()
        )
    if mode == "I":
        return Image.fromarray(DEEP.astype(np.int32))
    if mode == "F":
        return Image.fromarray(DEEP.astype(np.float32) / 65535)
    if mode in ("RGBA", "CMYK", "RGBX"):
        return Image.frombytes(mode, (WIDTH, HEIGHT), NOISE.tobytes())
    if mode == "PA":
        return Image.frombytes("RGBA", (WIDTH, HEIGHT), NOISE.tobytes()).quantize(64).convert("PA")
    if mode == "LAB":
        return Image.frombytes("LAB", (WIDTH, HEIGHT), NOISE[..., :3].tobytes())
    return Image.fromarray(NOISE[..., :3]).convert(mode)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tif(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **({"photometric": "minisblack"} | options))
    return file.getvalue()


def planes(image: Image.Image | Bands) -> np.ndarray:
    """(H, W, C) in [0, 1], of either kind."""
    array = np.asarray(image)
    return array / 255 if array.dtype == np.uint8 else array


def sentence(data, pixels: Pixels) -> str:
    with pytest.raises(UserError) as caught:
        decode(data, "some/picture", pixels)
    text = str(caught.value)
    assert text.startswith("some/picture ") and text.endswith(".") and "\n" not in text
    assert not text.endswith("..")
    return text


AVIF = pytest.mark.skipif(
    ".avif" not in Image.registered_extensions(), reason="this Pillow has no AVIF"
)
TABLE = [
    ("png", ["1", "L", "LA", "P", "RGB", "RGBA"]),
    ("tiff", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"]),
    ("webp", ["L", "LA", "RGB", "RGBA"]),
    ("jpeg", ["L", "RGB", "CMYK", "YCbCr"]),
    ("avif", ["L", "LA", "RGB", "RGBA"]),
    ("gif", ["1", "L", "P", "RGB", "RGBA"]),
    ("bmp", ["1", "L", "P", "RGB", "RGBA"]),
    ("ppm", ["1", "L", "RGB"]),
]
MODES = [
    pytest.param(kind, mode, marks=[AVIF] if kind == "avif" else [])
    for kind, modes in TABLE
    for mode in modes
]


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind, mode", MODES)
def test_pictures_of_8_bits_become_what_pillow_converts_them_to(kind, mode):
    data = encode(picture(mode), kind)
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        pytest.skip("this Pillow does not read what it writes")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {c: decode(data, "it", Pixels(in_chans=c)) for c in (1, 2, 3, 4)}
    stored = Image.open(io.BytesIO(data))
    assert found[3].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found[3]), np.asarray(stored.convert("RGB")))
    if mode == "LAB":  # from which Pillow knows no other way
        stored = stored.convert("RGB")
    for channels, name in {1: "L", 2: "LA", 4: "RGBA"}.items():
        expected = np.asarray(stored.convert(name)).reshape(HEIGHT, WIDTH, -1)
        assert isinstance(found[channels], Bands) and found[channels].size == (WIDTH, HEIGHT)
        array = np.asarray(found[channels])
        assert array.dtype == np.float32 and array.shape == (HEIGHT, WIDTH, channels)
        np.testing.assert_array_equal((array * 255).round(), expected)
    again = decode(data, "it", Pixels(in_chans=4))
    np.testing.assert_array_equal(again.planes, found[4].planes)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_gray_pictures_of_more_bits_are_scaled_and_not_cut_off(kind, mode):
    pixels = {"I": {"value_range": (0.0, 65535.0)}}.get(mode, {})
    try:
        data = encode(picture(mode), kind)
        assert Image.open(io.BytesIO(data)).mode[:2] in (mode[:2], "I", "I;")
    except (OSError, AssertionError):
        pytest.skip("Pillow writes no such file")
    gray = decode(data, "it", Pixels(in_chans=1, **pixels))
    np.testing.assert_allclose(gray.planes[0], DEEP / 65535, atol=1e-7)
    rgb = np.asarray(decode(data, "it", Pixels(**pixels)))
    assert rgb.shape == (HEIGHT, WIDTH, 3) and rgb.dtype == np.uint8
    assert np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(rgb[..., 0], rgb[..., 2])
    np.testing.assert_array_equal(rgb[..., 0], (DEEP / 65535 * 255).round())


def deep_png(values: np.ndarray) -> bytes:
    """(H, W, C) uint16 as a PNG of 16 bits, which Pillow does not write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize("channels", [3, 4])
def test_a_png_of_16_bits_in_colours_is_its_upper_8_as_pillow_reads_it(channels):
    values = np.random.default_rng(2).integers(0, 1 << 16, (9, 7, channels), dtype=np.uint16)
    data = deep_png(values)
    np.testing.assert_array_equal(np.asarray(decode(data, "it"))[..., :3], values[..., :3] >> 8)
    four = np.asarray(decode(data, "it", Pixels(in_chans=4)))
    np.testing.assert_array_equal((four * 255).round()[..., :3], values[..., :3] >> 8)
    said = sentence(data, Pixels(value_range=(0.0, 4095.0)))
    assert "only the upper 8" in said and "TIFF or .npy" in said


def test_an_avif_that_pillow_does_not_read_is_told(monkeypatch):
    def unknown(file):
        raise UnidentifiedImageError("cannot identify image file")

    data = b"\0\0\0\x1cftypavif" + bytes(40)
    monkeypatch.setattr(Image, "open", unknown)
    monkeypatch.setattr(Image, "registered_extensions", dict)
    assert "it is an AVIF, which this Pillow does not read" in sentence(data, RGBS)


# Which way up


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(NOISE[..., :3]), kind, exif=exif, **(
        {"quality": 100} if kind in ("jpeg", "avif") else {"lossless": True} if kind == "webp" else {}
    ))  # fmt: skip


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", pytest.param("avif", marks=AVIF)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says_only_where_that_is_asked_for(kind, orientation):
    data = turned(kind, orientation)
    stored = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode(data, "it")), np.asarray(stored))
    right = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    found = decode(data, "it", Pixels(exif="apply"))
    np.testing.assert_array_equal(np.asarray(found), right)
    assert (found.size == stored.size) == (orientation < 5)
    gray = decode(data, "it", Pixels(in_chans=1, exif="apply"))
    assert gray.size == found.size
    assert (np.asarray(found) != np.asarray(stored)).any() if orientation in (2, 3, 4) else True


@pytest.mark.parametrize("exif", ["ignore", "apply"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_always_turned_as_it_says_by_pillow_and_by_tifffile_alike(orientation, exif):
    by_pillow = np.asarray(decode(turned("tiff", orientation), "it", Pixels(exif=exif)))
    seven = np.stack([NOISE[..., 0]] * 7)
    data = tif(seven, planarconfig="separate", extratags=[(274, "H", 1, orientation, True)])
    by_tifffile = decode(data, "it", Pixels(in_chans=7, exif=exif))
    np.testing.assert_array_equal((by_tifffile.planes[3] * 255).round(), by_pillow[..., 0])


def test_notes_that_cannot_be_read_turn_nothing(monkeypatch):
    def broken(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    found = decode(encode(picture("RGB"), "png"), "it", Pixels(exif="apply"))
    np.testing.assert_array_equal(np.asarray(found), NOISE[..., :3])


# Animations and pages


@pytest.mark.parametrize("kind", ["gif", "webp", "png", pytest.param("avif", marks=AVIF), "tiff"])
def test_of_an_animation_it_is_the_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue", "white")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 4
    for channels in (3, 4):
        pixels = np.asarray(decode(data, "it", Pixels(in_chans=channels)))[..., :3]
        level = 255 if channels == 3 else 1
        assert pixels[..., 0].min() > 0.95 * level and pixels[..., 1:].max() < 0.05 * level
    gray = decode(data, "it", GRAYS).planes
    assert gray.std() < 0.01 and abs(gray.mean() - 0.299) < 0.02


def test_pages_are_channels_where_they_are_as_many_and_each_is_one():
    pages = np.random.default_rng(3).integers(0, 256, (4, 9, 11), dtype=np.uint8)
    for dtype in (np.uint8, np.uint16):
        data = tif(pages.astype(dtype) * (257 if dtype is np.uint16 else 1))
        four = decode(data, "it", Pixels(in_chans=4))
        np.testing.assert_array_equal((four.planes * 255).round(), pages)
        one = decode(data, "it", GRAYS)
        np.testing.assert_array_equal((one.planes[0] * 255).round(), pages[0])
        three = np.asarray(decode(data, "it"))
        assert all(np.array_equal(three[..., c], pages[0]) for c in range(3))
        said = sentence(data, Pixels(in_chans=7))
        assert "has 4 channels" in said and "--in_chans 4 fits" in said


def test_three_pages_are_a_picture_of_the_first_as_in_the_reference_but_not_of_more_bits():
    pages = np.random.default_rng(3).integers(0, 256, (3, 9, 11), dtype=np.uint8)
    first = np.asarray(decode(tif(pages), "it"))
    assert all(np.array_equal(first[..., c], pages[0]) for c in range(3))
    deep = np.asarray(decode(tif(pages.astype(np.uint16) * 257), "it"))
    np.testing.assert_array_equal(deep, pages.transpose(1, 2, 0))


# Bands

TYPES = [np.uint8, np.uint16, np.uint32, np.float32, np.float64]


def bands(channels: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Values (C, H, W) of that type, and what they are in [0, 1]."""
    rng = np.random.default_rng(channels)
    if np.dtype(dtype).kind == "f":
        values = rng.random((channels, 12, 17)).astype(dtype)
        return values, values
    values = rng.integers(0, np.iinfo(dtype).max, (channels, 12, 17), dtype=dtype, endpoint=True)
    return values, values / np.iinfo(dtype).max


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
def test_arrays_and_tiffs_of_bands_are_scaled_by_their_type(channels, dtype):
    values, expected = bands(channels, dtype)
    last = np.ascontiguousarray(values.transpose(1, 2, 0))
    files = [npy(values), npy(last), npy(np.asfortranarray(last))]
    if channels > 1:
        kinds = {"planarconfig": "separate"}, {"planarconfig": "separate", "compression": "zlib"}
        files += [tif(values, **kind) for kind in kinds]
        files += [tif(last, planarconfig="contig"), tif(values)]  # bands of a page, and pages
        files += [tif(last, planarconfig="contig", compression="zlib", tile=(16, 16))]
        files += [tif(values, imagej=True)] if dtype in (np.uint16, np.float32) else []
        files += [tif(last, planarconfig="contig", bigtiff=True)]
    else:
        files += [npy(values[0]), tif(values[0]), tif(values[0], compression="zlib")]
    for data in files:
        found = decode(data, "it", Pixels(in_chans=channels))
        assert (
            found.planes.dtype == np.float32 and 0 <= found.planes.min() <= found.planes.max() <= 1
        )
        np.testing.assert_allclose(found.planes, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
def test_three_bands_become_an_rgb_image_of_8_bits(dtype):
    values, expected = bands(3, dtype)
    expected = (expected.transpose(1, 2, 0) * 255).round()
    for data in (npy(values), npy(values.transpose(1, 2, 0))):
        image = decode(data, "it")
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)
    data = tif(values.transpose(1, 2, 0), photometric="rgb")
    found = np.asarray(decode(data, "it"))
    if dtype is np.uint16:  # which the reference's Pillow accepts: it takes the upper 8 bits
        np.testing.assert_array_equal(found, values.transpose(1, 2, 0) >> 8)
        full = decode(data, "it", Pixels(value_range=(0.0, 65535.0)))
        np.testing.assert_array_equal(np.asarray(full), expected)
    else:
        np.testing.assert_array_equal(found, expected)


def test_a_range_says_what_black_and_white_are_and_is_kept_to():
    pixels = Pixels(in_chans=2, value_range=(-100.0, 4000.0))
    values = np.array([[[-9999, -100, 1950]], [[4000, 32767, 0]]], dtype=np.int16)
    expected = [[[0, 0, 0.5]], [[1, 1, 100 / 4100]]]
    for data in (npy(values), npy(values.astype(np.float32)), tif(values, planarconfig="separate")):
        np.testing.assert_allclose(decode(data, "it", pixels).planes, expected, atol=1e-6)
    gray = npy(np.array([[0, 4095, 2048]], dtype=np.uint16))
    twelve = decode(gray, "it", Pixels(value_range=(0.0, 4095.0)))
    assert np.asarray(twelve)[0, :, 0].tolist() == [0, 255, 128]


def test_a_range_leaves_8_bits_alone():
    data = encode(picture("L"), "png")
    plain, ranged = (decode(data, "it", Pixels(1, value_range=r)) for r in (None, (0.0, 4095.0)))
    np.testing.assert_array_equal(plain.planes, ranged.planes)
    data = npy(NOISE[..., :2])
    plain, ranged = (decode(data, "it", Pixels(2, value_range=r)) for r in (None, (0.0, 4095.0)))
    np.testing.assert_array_equal(plain.planes, ranged.planes)


def test_a_mask_is_black_and_white():
    mask = np.eye(5, dtype=bool)
    np.testing.assert_array_equal(decode(npy(mask), "it", GRAYS).planes[0], mask)
    assert np.asarray(decode(npy(mask), "it")).max() == 255


@pytest.mark.parametrize(
    "dtype, kind", [(np.int16, "tif"), (np.int32, "tif"), (np.int16, "npy"), (np.int64, "npy")]
)
def test_of_signed_numbers_it_has_to_be_said_what_is_white(dtype, kind):
    values = np.arange(-50, 50, dtype=dtype).reshape(10, 10)
    data = tif(values) if kind == "tif" else npy(values)
    said = sentence(data, GRAYS)
    assert "signed" in said and "from -50 to 49" in said and "--value_range" in said
    found = decode(data, "it", Pixels(1, value_range=(-50.0, 49.0)))
    np.testing.assert_allclose(found.planes[0], (values + 50) / 99, atol=1e-6)


@pytest.mark.parametrize(
    "value, said",
    [
        (np.nan, "no finite numbers"),
        (np.inf, "no finite numbers"),
        (1.5, "floats from 0 to 1.5"),
        (-0.5, "floats from -0.5 to 0"),
    ],
)
def test_floats_have_to_be_numbers_from_0_to_1(value, said):
    values = np.zeros((6, 7), dtype=np.float32)
    values[2, 3] = value
    for data in (npy(values), tif(values)):
        for pixels in (RGBS, GRAYS):
            assert said in sentence(data, pixels)
    if np.isfinite(value):
        decode(npy(values), "it", Pixels(1, value_range=(-1.0, 2.0)))
    else:
        assert said in sentence(npy(values), Pixels(1, value_range=(-1.0, 2.0)))


# Arrays


def test_an_array_has_its_channels_first_or_last():
    values, _ = bands(5, np.uint8)
    for array in (values, values.transpose(1, 2, 0)):
        np.testing.assert_array_equal(
            (decode(npy(array), "it", Pixels(5)).planes * 255).round(), values
        )
    for shape in ((1, 8, 9), (8, 9, 1), (8, 9)):
        assert decode(npy(np.zeros(shape, np.uint8)), "it", GRAYS).size == (9, 8)
        assert decode(npy(np.zeros(shape, np.uint8)), "it").size == (9, 8)


@pytest.mark.parametrize(
    "array, channels, said",
    [
        (np.zeros((5, 9, 5), np.uint8), 5, "could both be the 5 channels"),
        (np.zeros((3, 9, 3), np.uint8), 3, "could both be the 3 channels"),
        (np.zeros((9, 8, 13), np.uint8), 4, "(9, 8, 13), and --in_chans 4 wants its first or last"),
        (np.zeros((13, 20, 30), np.uint16), 3, "axis to be 3; --in_chans 13 fits."),
        (np.zeros((9, 8), np.uint8), 4, "has 1 channel of uint8, and --in_chans is 4; --in_chans"),
        (np.zeros((9, 8, 3), np.uint8), 1, "(9, 8, 3), and --in_chans 1 wants its first or last"),
        (np.zeros((9, 8, 1), np.uint8), 2, "--in_chans 1 or 3 fits"),
        (np.zeros(9), 3, r"an array of shape (9,), which is no image"),
        (np.zeros((2, 3, 4, 5)), 3, "(2, 3, 4, 5), which is no image"),
        (np.zeros((0, 4)), 3, "which is no image"),
        (np.array([["a", "b"]]), 1, "no numbers of pixels"),
        (np.zeros((4, 4), np.complex64), 1, "no numbers of pixels"),
        (np.array([[{}, None]], dtype=object), 1, "Object arrays cannot be loaded"),
    ],
)  # fmt: skip
def test_an_array_that_is_no_such_image_is_told(array, channels, said):
    assert said in sentence(npy(array), Pixels(in_chans=channels))


def test_an_array_that_is_cut_off_is_told():
    data = npy(np.zeros((40, 40), np.uint8))
    assert "cannot be read as an image" in sentence(data[:300], GRAYS)
    assert "cannot be read as an image" in sentence(data[:20], GRAYS)


def test_a_picture_has_at_most_four_channels():
    said = sentence(encode(picture("RGB"), "png"), Pixels(in_chans=13))
    assert "is a picture, RGB of 8 bits, and --in_chans is 13" in said


def test_a_way_to_compress_that_needs_another_package_is_told():
    if tiff_reads_lzw():
        pytest.skip("imagecodecs is installed")
    data = encode(Image.fromarray(NOISE[..., 0]), "tiff", compression="tiff_lzw",
                  save_all=True, append_images=[Image.fromarray(NOISE[..., 1])])  # fmt: skip
    said = sentence(data, Pixels(in_chans=2))
    assert "LZW" in said and "pip install imagecodecs" in said
    assert decode(data, "it", GRAYS).size == (WIDTH, HEIGHT)  # by Pillow, which knows it


def tiff_reads_lzw() -> bool:
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_tiff_that_could_exhaust_the_memory_is_refused(monkeypatch):
    values, _ = bands(5, np.uint8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 17 // 2 - 1)
    assert "could exhaust the memory" in sentence(tif(values, planarconfig="separate"), Pixels(5))


def test_only_what_needs_tifffile_loads_it(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("tifffile is not needed")

    monkeypatch.setattr(tiff, "read", refuse)
    for mode in ("L", "RGB", "RGBA", "CMYK"):
        decode(encode(picture(mode), "tiff", compression="tiff_lzw"), "it")
        decode(encode(picture(mode), "tiff"), "it", GRAYS)
    decode(encode(picture("I;16"), "tiff", compression="tiff_lzw"), "it", GRAYS)


def test_a_file_of_deeper_levels_has_the_largest(tmp_path):
    """As cloud-optimised GeoTIFFs have."""
    values, expected = bands(5, np.uint16)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        options = {"photometric": "minisblack", "planarconfig": "separate"}
        writer.write(values, subifds=1, **options)
        writer.write(values[:, ::2, ::2], subfiletype=1, **options)
    found = decode(file.getvalue(), "it", Pixels(in_chans=5))
    np.testing.assert_allclose(found.planes, expected, atol=1e-6)


# From Python


def test_arrays_of_a_source_are_rgb_images_or_bands_already():
    rgb = NOISE[..., :3]
    np.testing.assert_array_equal(np.asarray(decode(rgb, "it")), rgb)
    gray = np.asarray(Image.fromarray(rgb).convert("L"))
    np.testing.assert_array_equal((decode(rgb, "it", GRAYS).planes[0] * 255).round(), gray)
    floats = np.random.default_rng(0).random((5, 6, 13), dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(decode(floats, "it", Pixels(13))), floats)
    # No second scaling of what is scaled already; three channels are of 8 bits here too.
    ranged = decode(floats, "it", Pixels(13, value_range=(0.0, 10000.0)))
    np.testing.assert_array_equal(np.asarray(ranged), floats)
    three = decode(floats[..., :3], "it")
    assert three.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(three), (floats[..., :3] * 255).round())


def test_a_picture_that_is_open_already_becomes_the_same():
    for mode in ("RGB", "RGBA", "I;16", "L"):
        data = encode(picture(mode), "png")
        for pixels in (RGBS, GRAYS):
            opened = convert(Image.open(io.BytesIO(data)), "it", pixels)
            np.testing.assert_array_equal(
                np.asarray(opened), np.asarray(decode(data, "it", pixels))
            )


def test_the_rule_can_be_sent_to_workers_and_written_down():
    pixels = Pixels(13, "apply", (0.0, 10000.0))
    assert pickle.loads(pickle.dumps(pixels)) == pixels
    assert Pixels.from_plain(pixels.plain()) == pixels
    assert Pixels.from_plain({"arch": "vit"}) == Pixels()
    assert Pixels.from_plain({"in_chans": 1, "value_range": None}) == GRAYS


DAMAGED = [
    npy(DEEP), npy(NOISE), tif(bands(5, np.uint16)[0], planarconfig="separate", compression="zlib"),
    tif(bands(2, np.uint8)[0]), turned("jpeg", 6), turned("png", 5), encode(picture("I;16"), "tiff"),
]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_damage_gives_an_image_or_a_sentence(data):
    damaged = data.draw(st.sampled_from(DAMAGED))
    pixels = Pixels(data.draw(st.sampled_from([1, 2, 3, 4, 5])), "apply")
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(damaged), 300) - 1))
        damaged = damaged[:place] + bytes([data.draw(st.integers(0, 255))]) + damaged[place + 1 :]
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    try:
        image = decode(damaged, "some/picture", pixels)
        assert isinstance(image, Image.Image if pixels.in_chans == 3 else Bands)
    except UserError:
        sentence(damaged, pixels)


def test_what_readers_log_does_not_reach_the_terminal(tmp_path):
    """A library's record without a handler goes to standard error, and names no file."""
    (tmp_path / "13.tif").write_bytes(tif(np.zeros((8, 9, 13), np.uint16), planarconfig="contig"))
    program = (
        "import sys; from dino_kit.data.decode import decode; from dino_kit.errors import UserError\n"
        "try: decode(open(sys.argv[1], 'rb').read(), 'it')\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "13.tif")], capture_output=True, text=True
    )
    assert "has 13 channels" in done.stdout and done.stderr == ""
