"""Large photographs decoded at a smaller scale: when, how closely, and what else stays as it was."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_kit.data.augment import CropParameters, render
from dino_kit.data.crops import View
from dino_kit.data.decode import decode, decode_raster
from dino_kit.data.loader import Loader
from dino_kit.data.photograph import (
    MARGIN,
    REDUCTIONS,
    Photograph,
    for_crops,
    open_raster,
    reduction_for,
)
from dino_kit.data.pixels import Pixels
from dino_kit.data.raster import Raster, Reduced
from dino_kit.errors import BadImage, UserError


def sharp(height: int, width: int, seed: int = 0) -> Image.Image:
    """As photographs are: power that falls with the frequency, down to a pixel, and hard edges."""
    rng = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequencies[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequencies
    noise = np.fft.irfft2(spectrum, s=(height, width))
    pixels = 120 + 45 * noise[..., None] / noise.std() * (1.0, 0.9, 0.8)
    for _ in range(height * width // 20_000):
        top, left = rng.integers(0, height), rng.integers(0, width)
        tall, wide = rng.integers(1, 120, 2)
        part = pixels[top : top + tall, left : left + wide]
        part[:] = part * 0.3 + rng.integers(0, 180, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "jpeg", **({"quality": 90} | options))
    return file.getvalue()


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    return {
        "4:2:0": jpeg(sharp(900, 1200), subsampling="4:2:0"),
        "4:4:4": jpeg(sharp(900, 1200, 1), subsampling="4:4:4"),
        "odd": jpeg(sharp(1333, 2001, 2)),
        "prime": jpeg(sharp(1009, 877, 3)),
        "progressive": jpeg(sharp(900, 1200, 4), progressive=True),
    }


# When


boxes = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 5000), st.integers(1, 5000))
crops = st.builds(CropParameters, size=st.integers(1, 300), box=boxes)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(crops, min_size=1, max_size=10))
def test_every_box_stays_larger_than_its_crop_and_no_larger_reduction_leaves_it_so(crops):
    def allowed(reduction):
        return all(side >= MARGIN * reduction * c.size for c in crops for side in c.box[2:])

    reduction = reduction_for(crops)
    assert reduction in (1, *REDUCTIONS)
    assert reduction == 1 or allowed(reduction)
    assert not any(allowed(larger) for larger in REDUCTIONS if larger > reduction)


def test_a_crop_that_is_not_resized_or_none_leaves_an_image_whole():
    assert reduction_for([CropParameters(224, (0, 0, 4000, 4000))]) == 8
    assert reduction_for([CropParameters(224, (0, 0, 4000, 4000)), CropParameters(96, (0, 0, 96, 96))]) == 1
    assert reduction_for([]) == 1


@pytest.mark.parametrize("size, reduction", [(60, 4), (61, 2), (120, 2), (121, 1), (30, 8)])
def test_a_photograph_is_decoded_as_small_as_its_crops_allow(contents, size, reduction):
    image = open_raster(contents["4:2:0"], "x")
    assert isinstance(image, Photograph) and (image.height, image.width) == (900, 1200)
    found = image.decoded([CropParameters(size, (3, 5, 480, 700))])
    assert (found.height, found.width) == (900, 1200) and found.size == (1200, 900)
    if reduction == 1:
        assert isinstance(found, Raster)
    else:
        assert found.pixels.shape == (-(-900 // reduction), 1200 // reduction, 3)


# How closely


def some_boxes(height: int, width: int, smallest: int, seed: int) -> list[tuple[int, int, int, int]]:
    """At every place within a reduced pixel, and at all four borders; none much above the smallest."""
    rng = np.random.default_rng(seed)
    found = [(height - smallest - 1, width - smallest, smallest + 1, smallest), (0, 0, smallest, smallest)]
    for _ in range(10):
        tall, wide = rng.integers(smallest, smallest * 1.3, 2)
        found.append((rng.integers(height - tall + 1), rng.integers(width - wide + 1), tall, wide))
    return [tuple(map(int, box)) for box in found]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["4:2:0", "4:4:4", "odd", "prime", "progressive"])
def test_crops_are_the_references_up_to_rounding(contents, name, reduction):
    whole = decode(contents[name], name)
    size = 32 if reduction == 8 else 48
    offs = []
    for box in some_boxes(whole.height, whole.width, int(MARGIN * reduction * size), reduction):
        crop = CropParameters(size, box)
        image = for_crops(open_raster(contents[name], name), [crop])
        assert isinstance(image, Reduced) and image.reduction == reduction
        found = render(image, crop)
        assert found.shape == (size, size, 3) and found.dtype == np.uint8
        offs.append(found.astype(float) - render(whole, crop))
        assert np.abs(offs[-1]).mean() <= 1.3, box
    offs = np.stack(offs)
    assert np.abs(offs).mean() <= 1.0
    assert np.percentile(np.abs(offs), 99) <= 6
    assert abs(offs.mean()) <= 0.2


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_crop_is_moved(contents, reduction):
    """Against the whole, moved by a tenth of a crop's pixel to either side and up and down."""
    whole = decode(contents["odd"], "x")
    size, side = 24, round(2.3 * reduction * 24)
    step = side / size / 10

    def moved(box, x, y):
        top, left, height, width = box
        edges = left + x, top + y, left + width + x, top + height + y
        return np.asarray(whole.resize((size, size), Image.Resampling.BICUBIC, box=edges), float)

    for across, down in ((1, 0), (0, 1)):
        bias = []
        for box in some_boxes(1300, 1960, side, 7):
            box = (box[0] + 10, box[1] + 10, side, side)
            found = render(for_crops(open_raster(contents["odd"], "x"), [CropParameters(size, box)]),
                           CropParameters(size, box)).astype(float)[2:-2, 2:-2]  # fmt: skip
            before, after = (moved(box, s * across * step, s * down * step)[2:-2, 2:-2] for s in (-1, 1))
            slope = (after - before) / 0.2  # of 255 for a crop's pixel
            off = found - moved(box, 0, 0)[2:-2, 2:-2]
            bias.append((off * slope).sum() / (slope**2).sum())
        assert np.abs(bias).max() <= 0.02, (across, down)


@pytest.mark.parametrize("name", ["4:2:0", "odd"])
def test_what_is_not_reduced_is_as_before_bit_for_bit(contents, name):
    crop = CropParameters(300, (10, 20, 640, 800), True, (("hue", 0.1),), False, 1.0)
    image = for_crops(open_raster(contents[name], name), [crop])
    expected = decode_raster(contents[name], name)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    np.testing.assert_array_equal(render(image, crop), render(expected, crop))


def test_crops_leave_a_reduced_image_as_it_is(contents):
    crops = [CropParameters(24, (1, 3, 500, 600), True, (("contrast", 0.5),)), CropParameters(24, (0, 0, 900, 1200))]
    image = for_crops(open_raster(contents["4:2:0"], "x"), crops)
    before = image.pixels.copy()
    first = [render(image, crop) for crop in crops]
    np.testing.assert_array_equal(image.pixels, before)
    for one, other in zip(first, (render(image, crop) for crop in crops), strict=True):
        np.testing.assert_array_equal(one, other)


# What is not for it


@pytest.mark.parametrize("kind", ["gray", "CMYK", "png", "exif", "bands", "array"])
def test_what_no_plain_jpeg_in_colours_is_read_whole_as_before(kind):
    image = sharp(400, 500)
    data, pixels = jpeg(image), Pixels()
    if kind in ("gray", "CMYK"):
        data = jpeg(image.convert({"gray": "L"}.get(kind, kind)))
    elif kind == "png":
        file = io.BytesIO()
        image.save(file, "png")
        data = file.getvalue()
    elif kind == "array":
        data = np.array(image)
    else:
        pixels = Pixels(exif="apply") if kind == "exif" else Pixels(in_chans=1)
    crop = CropParameters(16, (1, 1, 300, 400))
    found = open_raster(data, "x", pixels)
    assert not isinstance(found, Photograph) and for_crops(found, [crop]) is found
    expected = render(decode_raster(data, "x", pixels), crop)
    np.testing.assert_array_equal(render(found, crop), expected)


def test_images_beyond_pillows_limit_are_told_as_before(monkeypatch, contents):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match="x is too large"):
        open_raster(contents["4:2:0"], "x")


def broken(content: bytes) -> dict[str, bytes]:
    start = content.index(b"\xff\xda")
    return {
        "cut": content[: len(content) // 2],
        "cut in the header": content[: start // 2],
        "restart": content[: start + 500] + b"\xff\xd9" + content[start + 500 :],
        "damaged": content[: start + 2000] + b"\xff\xc4" * 4 + content[start + 2000 :],
    }


@pytest.mark.parametrize("how", sorted(broken(b"\xff\xda")))
@pytest.mark.parametrize("size", [16, 400])
def test_a_broken_one_is_what_it_is_to_pillow(contents, how, size):
    data, crop = broken(contents["4:2:0"])[how], CropParameters(size, (1, 3, 700, 900))
    results = []
    for read in (decode, lambda data, name: for_crops(open_raster(data, name), [crop])):
        try:
            results.append(np.asarray(read(data, "x.jpg")))
        except BadImage as error:
            results.append(str(error))
    assert type(results[0]) is type(results[1])
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:  # Pillow took it, and so whole
        np.testing.assert_array_equal(*results)


# In a run


class Photographs:
    classes, root = None, "photographs"

    def __init__(self, bad: int | None = None):
        self.images = [jpeg(sharp(301 + 7 * n, 420 - 5 * n, n)) for n in range(6)]
        if bad is not None:
            self.images[bad] = self.images[bad][:-900]

    def __len__(self):
        return len(self.images)

    def read(self, index):
        return self.images[index]

    def label(self, index):
        return None

    key = name = lambda self, index: f"{index}.jpg"


PLAIN = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0}
GROUPS = [[View(32, (0.4, 1.0), **PLAIN)] * 2, [View(12, (0.05, 0.4), **PLAIN)] * 4]


def load(decode, bad: int | None = None, groups=GROUPS, **options) -> list:
    options = {"seed": 3, "epochs": 1, "total_batch_size": 6, "batch_size_per_gpu": 3} | options
    loader = Loader(Photographs(bad), groups, decode=decode, **options)
    return [batch for batches in loader for batch in batches]


def same(some: list, others: list) -> bool:
    return all(
        torch.equal(one.indices, other.indices) and one.bad == other.bad
        and all(map(torch.equal, one.groups, other.groups))
        for one, other in zip(some, others, strict=True)
    )  # fmt: skip


def test_a_run_has_the_same_crops_up_to_rounding():
    reduced, whole = load(open_raster), load(decode)
    assert not same(reduced, load(decode_raster))
    for one, other in zip(reduced, whole, strict=True):
        assert torch.equal(one.indices, other.indices)
        for crops, expected in zip(one.groups, other.groups, strict=True):
            assert crops.shape == expected.shape
            assert (crops.float() - expected.float()).abs().mean() <= 1.0


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}])
def test_workers_make_the_same_crops(options):
    assert same(load(open_raster), load(open_raster, **options))


def test_crops_that_are_not_resized_are_cut_out_of_the_whole():
    groups = [[View(32, None, **PLAIN)] * 2]
    assert same(load(open_raster, groups=groups), load(decode, groups=groups))


def test_a_fault_that_is_found_late_is_told_and_replaced_as_ever():
    said = []
    for read in (open_raster, decode):
        with pytest.raises(UserError) as caught:
            load(read, bad=2)
        said.append(str(caught.value))
    assert said[0] == said[1] and "2.jpg" in said[0]
    late, ever = (load(read, bad=2, on_bad_image="replace") for read in (open_raster, decode))
    for one, other in zip(late, ever, strict=True):
        assert torch.equal(one.indices, other.indices) and one.bad == other.bad
    assert sum(len(batch.bad) for batch in late) >= 1
