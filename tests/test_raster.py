"""The fast way to a crop against Pillow's: every operation, whole crops, decoding, and the loader."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_augment import FACTORS, SHAPES, TOLERANCES, boxes, colour_orders, operate, parse, rainbow
from test_augment import picture as noise
from test_torture import bad, good

from dino_kit.assemble import build_loader, view_groups
from dino_kit.config import fields
from dino_kit.config.train import TrainConfig
from dino_kit.data import augment
from dino_kit.data.augment import CropParameters, render
from dino_kit.data.crops import View, sample_crop
from dino_kit.data.decode import decode, decode_raster
from dino_kit.data.loader import Loader
from dino_kit.data.photograph import open_raster
from dino_kit.data.pixels import Pixels
from dino_kit.data.raster import Raster
from dino_kit.errors import BadImage
from dino_kit.randomness import stream


def difference(found, expected) -> np.ndarray:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.uint8
    return found.astype(float) - expected


def raster(image: Image.Image) -> Raster:
    return Raster(np.array(image))


def test_golden_operations_the_fast_way(golden):
    arrays = golden("augmentation_ops")
    image = Raster(arrays.pop("image"))
    done = set()
    for key, expected in arrays.items():
        name, numbers = parse(key)
        off = difference(operate(image, name, numbers), expected)
        assert np.abs(off).mean() <= TOLERANCES[name], key
        assert abs(off.mean()) <= 0.3, key
        assert np.abs(off).max() <= 9, key  # Pillow's hue has 255 steps, which here are not taken
        done.add(name)
    assert done == set(TOLERANCES)


def photograph(height: int = 150, width: int = 200, seed: int = 0) -> Image.Image:
    """Smooth places and edges, in colours of every strength."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    for _ in range(12):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        pixels[top : top + 20, left : left + 15] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name, factor", [(n, x) for n, (_, xs) in FACTORS.items() for x in xs])
def test_colours_are_pillows_up_to_rounding(name, factor):
    operation = getattr(augment, name)
    for image in (rainbow(), photograph(), *(noise(*shape) for shape in SHAPES)):
        off = difference(operation(raster(image), factor), operation(image, factor))
        # Of a rainbow, all of it strong colours, a step of Pillow's hue is six levels.
        limit = {"hue": 1.0, "saturation": 0.3}.get(name, 0.05)
        assert np.abs(off).mean() <= limit
        assert np.abs(off).max() <= (9 if name == "hue" else 1)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.floats(-0.5, 0.5))
def test_a_hue_has_no_bias(shift):
    off = difference(
        augment.hue(raster(photograph()), shift), augment.hue(photograph(), shift)
    )
    assert abs(off.mean()) <= 0.3 and np.abs(off).mean() <= 0.7


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.floats(0.1, 3.0), st.sampled_from([(1, 1), (1, 7), (40, 60), (3, 50)]))
def test_a_blur_is_pillows_up_to_rounding(radius, shape):
    image = photograph().resize(shape[::-1])
    off = difference(augment.blur(raster(image), radius), augment.blur(image, radius))
    # At the border Pillow goes on from what each pass gave, which a single pass does not know.
    assert np.abs(off).mean() <= (0.75 if min(shape) > 20 else 6)
    assert np.abs(off).max() <= 30


def test_a_blur_of_one_pixel_is_not_brighter_than_pillows():
    """Its weights are halves and quarters, whose ties Pillow rounds down, six times over."""
    for seed in range(3):
        image = photograph(seed=seed)
        off = difference(augment.blur(raster(image), 1.0), augment.blur(image, 1.0))
        assert abs(off.mean()) <= 0.3


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    boxes(), st.integers(1, 60),
    st.sampled_from([Image.Resampling.BICUBIC, Image.Resampling.BILINEAR]),
)  # fmt: skip
def test_a_resized_crop_is_pillows_up_to_rounding(image_and_box, size, resample):
    image, box = image_and_box
    off = difference(
        augment.resized_crop(raster(image), box, size, resample),
        augment.resized_crop(image, box, size, resample),
    )
    # Newer Pillow squeezes some boxes top to bottom first; of noise either order is off by as much.
    assert np.abs(off).mean() <= 0.6 and np.abs(off).max() <= 12


@pytest.mark.parametrize("height, width, size", [(375, 500, 224), (500, 375, 96), (60, 60, 96)])
def test_what_is_resized_is_pillows_on_photographs(height, width, size):
    image = photograph(height, width)
    off = difference(
        augment.resized_crop(raster(image), (0, 0, height, width), size),
        augment.resized_crop(image, (0, 0, height, width), size),
    )
    assert np.abs(off).mean() <= 0.1 and np.abs(off).max() <= 6


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    flip=st.booleans(), vflip=st.booleans(), turns=st.integers(0, 3),
    jitter=st.one_of(st.just(()), colour_orders()),
    gray=st.booleans(), blur_radius=st.none() | st.floats(0.1, 2.0),
    solarize_threshold=st.none() | st.integers(60, 200),
)  # fmt: skip
def test_a_whole_crop_is_that_of_the_exact_way(
    flip, vflip, turns, jitter, gray, blur_radius, solarize_threshold
):
    parameters = CropParameters(
        64, (10, 20, 120, 150), flip, jitter, gray, blur_radius, solarize_threshold, vflip, turns
    )
    off = difference(
        render(raster(photograph()), parameters), render(photograph(), parameters)
    )
    # Where a value crosses the threshold by a rounding, solarisation makes much of it.
    assert np.abs(off).mean() <= (2.0 if solarize_threshold is None else 4.0)
    assert abs(off.mean()) <= (0.6 if solarize_threshold is None else 1.5)


def test_crops_as_they_are_drawn_have_no_bias():
    """Over many crops of a run, with the operations as often as they come."""
    offs = []
    image = photograph(200, 260)
    for number in range(60):
        view = View(64, (0.14, 1.0), blur_prob=0.5, solarize_prob=0.0)
        parameters = sample_crop(view, image.height, image.width, stream("", number))
        offs.append(difference(render(raster(image), parameters), render(image, parameters)))
    offs = np.stack(offs)
    assert abs(offs.mean()) <= 0.1 and np.abs(offs).mean() <= 0.6


def test_rendering_leaves_the_image_as_it_is():
    image = raster(photograph(30, 30))
    before = image.pixels.copy()
    jitter = tuple((name, 0.3) for name in augment.JITTER)
    for box, size in (((0, 0, 30, 30), 30), ((0, 0, 20, 30), 30)):
        parameters = CropParameters(size, box, True, jitter, True, 1.0, 100, True, 1)
        render(image, parameters)
        render(image, CropParameters(size, box))
        np.testing.assert_array_equal(image.pixels, before)


# Decoding


@pytest.mark.parametrize("name", sorted(good()))
def test_every_kind_of_image_is_decoded_to_the_same_pixels(name):
    content = good()[name]
    expected = decode(content, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_raster(content, name)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert found.size == expected.size


@pytest.mark.parametrize("name", sorted(bad()))
def test_what_cannot_be_used_is_told_in_the_same_words(name):
    sentences = []
    for read in (decode, decode_raster):
        with pytest.raises(BadImage) as caught:
            read(bad()[name], name)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "jpeg", **options)
    return file.getvalue()


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["cut", "flip", "insert"]))
def test_a_damaged_jpeg_is_what_it_is_to_pillow(seed, how):
    rng = np.random.default_rng(seed)
    content = bytearray(jpeg(photograph(40, 60), quality=90))
    place = int(rng.integers(2, len(content)))
    if how == "cut":
        content = content[:place]
    elif how == "flip":
        content[place] ^= 1 << int(rng.integers(8))
    else:
        content[place:place] = rng.bytes(5)
    results = []
    for read in (decode, decode_raster):
        try:
            results.append(np.asarray(read(bytes(content), "x.jpg")))
        except BadImage as error:
            results.append(str(error))
    assert type(results[0]) is type(results[1])
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        np.testing.assert_array_equal(*results)


def test_exif_is_applied_where_it_is_asked_for():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = jpeg(photograph(40, 60), exif=exif)
    for rule in (Pixels(), Pixels(exif="apply")):
        expected = decode(content, "x", rule)
        np.testing.assert_array_equal(decode_raster(content, "x", rule), np.asarray(expected))


@pytest.mark.parametrize("kind", ["array", "frozen", "slice", "gray", "pillow"])
def test_pixels_that_are_there_are_taken_without_a_warning(kind):
    pixels = np.array(photograph(40, 60))
    data = {
        "array": pixels, "slice": np.array(photograph(80, 60))[::2], "gray": pixels[..., 0],
        "frozen": np.frombuffer(pixels.tobytes(), np.uint8).reshape(pixels.shape),
        "pillow": photograph(40, 60),
    }[kind]  # fmt: skip
    parameters = CropParameters(16, (0, 0, 30, 30), True, (("hue", 0.1),), False, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_raster(data, "x")
        render(found, parameters)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(decode(data, "x")))


# In a run


class Photographs:
    classes, root = None, "photographs"

    def __len__(self):
        return 12

    def read(self, index):
        return jpeg(photograph(60 + index, 80 - index, index), quality=95)

    def label(self, index):
        return None

    key = name = lambda self, index: f"{index}.jpg"


GROUPS = [[View(24, (0.4, 1.0), blur_prob=1.0)] * 2, [View(12, (0.05, 0.4))] * 2]


def load(decode, **options) -> list:
    options = {"seed": 3, "epochs": 1, "total_batch_size": 6, "batch_size_per_gpu": 3} | options
    loader = Loader(Photographs(), GROUPS, decode=decode, **options)
    return [batch for batches in loader for batch in batches]


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}])
def test_workers_make_the_same_crops(options):
    for one, other in zip(load(decode_raster), load(decode_raster, **options), strict=True):
        assert torch.equal(one.indices, other.indices)
        assert all(map(torch.equal, one.groups, other.groups))


def test_both_ways_make_the_same_crops_up_to_rounding():
    for fast, exact in zip(load(decode_raster), load(decode), strict=True):
        assert torch.equal(fast.indices, exact.indices)
        for one, other in zip(fast.groups, exact.groups, strict=True):
            assert one.shape == other.shape
            off = one.float() - other.float()
            assert off.abs().mean() <= 1.0 and abs(off.mean()) <= 0.2
            assert not torch.equal(one, other)


def loader_of(*words: str, views=None):
    values = {"data_path": "-", "output_dir": "-", "total_batch_size": 4, "batch_size_per_gpu": 4,
              "num_workers": 0, "epochs": 1, "global_crops_size": 32, "local_crops_size": 16}  # fmt: skip
    values |= dict(zip(words[::2], words[1::2], strict=True))
    config = fields.from_plain(TrainConfig, values)
    return build_loader(
        config, Photographs(), views or view_groups(config), torch.device("cpu"), 0
    )._batches.dataset


def own(image, parameters):
    return np.asarray(image.crop((0, 0, 8, 8)))


def test_a_run_is_fast_unless_it_is_to_be_exact_or_renders_itself():
    assert loader_of().decode is open_raster
    assert loader_of("pixels", "exact").decode is decode
    assert loader_of(views=[[View(8, (0.4, 1.0), render=own)] * 2]).decode is decode
