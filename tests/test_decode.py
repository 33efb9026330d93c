"""Decoding: every mode becomes RGB as Pillow does it, and every fault a sentence."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import refusals
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_kit.data.decode import decode
from dino_kit.errors import BadImage, UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 31, 4), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    if mode in ("RGBA", "CMYK"):
        return Image.frombytes(mode, (31, 20), PIXELS.tobytes())
    return Image.fromarray(PIXELS).convert(mode)


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize(
    "mode, kind",
    [("RGB", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("1", "png"),
     ("P", "gif"), ("L", "jpeg"), ("RGB", "jpeg"), ("CMYK", "jpeg"),
     ("CMYK", "tiff"), ("RGBA", "webp"), ("RGB", "bmp")],
)  # fmt: skip
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode, kind):
    data = encode(picture(mode), kind)
    stored = Image.open(io.BytesIO(data))
    image = decode(data, "picture")
    assert image.mode == "RGB" and image.size == (31, 20)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(stored.convert("RGB")))
    assert stored.mode == mode or kind in ("gif", "webp")


def test_pixels_of_lossless_files_are_kept():
    found = decode(encode(picture("RGBA"), "png"), "picture")
    np.testing.assert_array_equal(np.asarray(found), PIXELS[..., :3])  # what is clear counts too
    gray = np.asarray(decode(encode(picture("L"), "png"), "picture"))
    assert all(np.array_equal(gray[..., c], np.asarray(picture("L"))) for c in range(3))


def test_a_palette_with_transparent_colours_gives_its_colours_and_no_warning():
    data = encode(picture("P"), "png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(data, "picture")
        with pytest.raises(UserWarning, match="Transparency"):
            Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(picture("P").convert("RGB")))


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (20, 31)])
def test_an_array_is_taken_as_it_is(shape):
    pixels = PIXELS[: shape[0], : shape[1], :3]
    image = decode(pixels, "array")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


def refusal(data: bytes) -> str:
    sentence = refusals.refusal(decode, data, "some/picture.jpg")
    assert sentence.startswith("some/picture.jpg ")
    return sentence


def changed(data: bytes, place: int, value: int) -> bytes:
    return data[:place] + bytes([value]) + data[place + 1 :]


PNG, JPEG = (encode(picture("RGB"), kind) for kind in ("png", "jpeg"))


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "the file is empty"),
        (b"<html>404</html>", "in no format that Pillow knows"),
        (PNG[:4], "in no format that Pillow knows"),
        (bytes(1000), "in no format that Pillow knows"),
        (PNG[: len(PNG) // 2], "truncated"),
        (JPEG[: len(JPEG) // 2], "Truncated"),
        (JPEG[:-20], "truncated"),
        (changed(PNG, len(PNG) // 2, PNG[len(PNG) // 2] ^ 255), "broken"),
        # Kinds of images that Pillow gives up in other ways than the common ones.
        (changed(encode(picture("RGB"), "dds"), 80, 0), "Unknown pixel format"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(data, reason):
    sentence = refusal(data)
    assert sentence.startswith("some/picture.jpg cannot be read as an image: ")
    assert reason in sentence


@pytest.mark.parametrize("shape", [(0, 3, 3), (3, 0, 3), (0, 3)])
def test_a_picture_without_pixels_is_named(shape):
    empty = np.zeros(shape, np.uint8)
    for data in (empty, Image.new("RGB", shape[:2])):
        with pytest.raises(BadImage, match="^x has no pixels: its size is "):
            decode(data, "x")


@pytest.mark.parametrize(
    "error, reason", [(OSError("two\nlines."), "two lines"), (EOFError(), "EOFError")]
)
def test_what_pillow_says_becomes_part_of_one_sentence(monkeypatch, error, reason):
    def broken(file):
        raise error

    monkeypatch.setattr(Image, "open", broken)
    assert refusal(PNG) == f"some/picture.jpg cannot be read as an image: {reason}."


def test_a_truncated_avif_is_named():
    pytest.importorskip("PIL._avif", reason="this Pillow reads no AVIF")
    data = encode(picture("RGB"), "avif")
    assert "cannot be read" in refusal(data[: len(data) // 2])


def test_an_image_that_could_exhaust_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 31 // 2 - 1)
    sentence = refusal(PNG)
    assert sentence.startswith("some/picture.jpg is too large to be read as an image: ")
    assert "620 pixels" in sentence


def test_a_large_photograph_is_read_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 31 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(PNG, "picture").size == (31, 20)
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(PNG))


FILES = [PNG, JPEG] + [
    encode(picture(mode), kind)
    for mode, kind in [("RGB", "tiff"), ("RGBA", "webp"), ("P", "gif"), ("RGB", "bmp"),
                       ("L", "ppm"), ("RGB", "dds"), ("I;16", "png"), ("CMYK", "tiff")]
]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_damage_gives_an_image_or_a_sentence(data):
    damaged = data.draw(st.sampled_from(FILES))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(damaged), 200) - 1))
        damaged = changed(damaged, place, data.draw(st.integers(0, 255)))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    try:
        assert decode(damaged, "some/picture.jpg").mode == "RGB"
    except UserError:
        refusal(damaged)
