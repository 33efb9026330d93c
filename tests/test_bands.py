"""Images of any number of channels: each operation against Pillow's on images that both can hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dino_kit.data import augment
from dino_kit.data.augment import CropParameters, center_view, render
from dino_kit.data.bands import Bands, picture
from dino_kit.data.crops import View, sample_crop
from dino_kit.errors import UserError
from dino_kit.randomness import stream


def rgb(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise on slopes."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 200, height * width * 3).reshape(3, height, width).transpose(1, 2, 0)
    return Image.fromarray((slope + rng.integers(0, 56, slope.shape)).astype(np.uint8))


def bands(image: Image.Image) -> Bands:
    array = np.asarray(image).reshape(image.height, image.width, -1)
    return Bands(np.ascontiguousarray(array.transpose(2, 0, 1)) / np.float32(255))


def many(channels: int, height: int = 40, width: int = 50) -> Bands:
    return Bands(np.random.default_rng(channels).random((channels, height, width), np.float32))


def differs(found: Bands | np.ndarray, expected: Image.Image) -> float:
    """The largest difference, in steps of 8 bits."""
    expected = np.asarray(expected).reshape(expected.height, expected.width, -1)
    assert np.asarray(found).shape == expected.shape
    return float(np.abs(np.asarray(found) * 255 - expected).max())


OPERATIONS = {  # arguments, and by how many of 255 steps rounding may make them differ
    "flip": ([()], 1e-4),
    "vertical_flip": ([()], 1e-4),
    "turn": ([(1,), (2,), (3,)], 1e-4),
    "brightness": ([(0.0,), (0.6,), (1.0,), (1.4,)], 1.0),
    "solarize": ([(0,), (100,), (128,), (127.5,), (255,), (256,)], 1e-4),
    "blur": ([(0.1,), (0.5,), (1.0,), (1.37,), (2.0,)], 3.0),  # which rounds after six passes
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [(40, 60), (23, 17), (1, 1), (1, 7)])
def test_operations_agree_with_pillows_up_to_its_rounding(name, size):
    image = rgb(*size)
    operation = getattr(augment, name)
    arguments, tolerance = OPERATIONS[name]
    for values in arguments:
        found = operation(bands(image), *values)
        assert isinstance(found, Bands) and found.planes.dtype == np.float32
        expected = operation(image, *values)
        assert differs(found, expected) <= tolerance, values
        mean = np.abs(np.asarray(found) * 255 - np.asarray(expected)).mean()
        assert mean <= min(tolerance, 0.6), values


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
def test_contrast_spreads_about_the_mean_of_all_channels(factor):
    gray = rgb(40, 60).convert("L")
    assert differs(augment.contrast(bands(gray), factor), augment.contrast(gray, factor)) <= 1.5
    one = many(13)
    found = augment.contrast(one, factor).planes
    expected = (one.planes.mean() * (1 - factor) + one.planes * factor).clip(0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 60), st.data())
def test_a_resized_crop_agrees_with_pillows_up_to_its_rounding(height, width, size, data):
    top = data.draw(st.integers(0, height - 1))
    left = data.draw(st.integers(0, width - 1))
    box = (
        top,
        left,
        data.draw(st.integers(1, height - top)),
        data.draw(st.integers(1, width - left)),
    )
    # Between its two passes Pillow also cuts off at 0 and 255, which floats need not: so no value
    # is where bicubic overshoots that far.
    image = rgb(height, width).point(lambda value: 64 + value // 2)
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
        found = augment.resized_crop(bands(image), box, size, resample)
        # Pillow rounds after each of two passes.
        assert differs(found, augment.resized_crop(image, box, size, resample)) <= 1.6


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 60))
def test_the_view_of_an_evaluation_agrees_too_its_padding_included(height, width, resize, crop):
    image = rgb(height, width).point(lambda value: 64 + value // 2)  # as above
    found = center_view(bands(image), resize, crop)
    assert found.dtype == np.float32
    assert differs(found, Image.fromarray(center_view(image, resize, crop))) <= 1.6


def test_a_filter_that_overshoots_is_cut():
    edge = Bands(np.zeros((1, 8, 8), np.float32))
    edge.planes[:, :, 4:] = 1
    found = edge.resize((32, 32)).planes
    assert found.min() == 0 and found.max() == 1


def test_a_square_fit_is_pillows():
    image = rgb(31, 57)
    expected = ImageOps.fit(image, (24, 24), Image.Resampling.BICUBIC)
    found = ImageOps.fit(bands(image), (24, 24), Image.Resampling.BICUBIC)
    assert differs(found, expected) <= 1.6


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_a_crop_is_rendered_in_the_order_of_the_parameters(channels):
    whole = many(channels)
    before = whole.planes.copy()
    jitter = (("contrast", 1.3), ("brightness", 0.7))
    crop = CropParameters(
        24, (3, 5, 31, 27), True, jitter, False, 1.2, 100, vflip=True, quarter_turns=1
    )
    expected = augment.resized_crop(whole, crop.box, 24).flipped().flipped_vertically().turned(1)
    expected = expected.contrasted(1.3).brightened(0.7).blurred(1.2).solarized(100)
    found = render(whole, crop)
    assert found.shape == (24, 24, channels) and found.dtype == np.float32
    np.testing.assert_array_equal(found, np.asarray(expected))
    np.testing.assert_array_equal(whole.planes, before)
    assert 0 <= found.min() <= found.max() <= 1


def test_every_channel_is_treated_by_itself_but_for_contrast():
    whole = many(5)
    crop = CropParameters(16, (2, 2, 30, 30), True, (("brightness", 1.2),), False, 0.8, 128)
    together = render(whole, crop)
    for channel in range(5):
        alone = render(Bands(whole.planes[channel : channel + 1]), crop)
        np.testing.assert_array_equal(together[..., channel], alone[..., 0])


def test_a_turn_is_counter_clockwise_for_both_kinds():
    image = rgb(9, 9)
    for quarters in (1, 2, 3):
        expected = np.rot90(np.asarray(image), quarters)
        np.testing.assert_array_equal(np.asarray(augment.turn(image, quarters)), expected)
        assert (
            differs(augment.turn(bands(image), quarters), Image.fromarray(expected.copy())) < 1e-4
        )


# To look at


def test_a_picture_of_bands_is_gray_or_the_first_three_and_stretched():
    dim = many(1).planes * 0.1 + 0.3
    seen = np.asarray(picture(Bands(dim)))
    assert seen.shape == (40, 50, 3) and seen.min() == 0 and seen.max() == 255
    assert np.array_equal(seen[..., 0], seen[..., 1]) and np.array_equal(seen[..., 0], seen[..., 2])
    two = np.asarray(picture(Bands(np.concatenate([dim, 1 - dim]))))
    np.testing.assert_array_equal(two, seen)
    first = many(13)
    later = Bands(np.concatenate([first.planes[:3], np.zeros((2, 40, 50), np.float32)]))
    np.testing.assert_array_equal(np.asarray(picture(first)), np.asarray(picture(later)))
    order = np.corrcoef(np.asarray(picture(first))[..., 1].ravel(), first.planes[1].ravel())
    assert order[0, 1] > 0.99


def test_a_picture_of_one_value_is_that_gray():
    flat = Bands(np.full((1, 5, 5), 0.5, np.float32))
    assert set(np.unique(np.asarray(picture(flat)))) == {128}


def test_a_picture_of_an_rgb_image_is_itself():
    np.testing.assert_array_equal(np.asarray(picture(rgb(5, 6))), np.asarray(rgb(5, 6)))


# What is drawn


def test_a_box_that_is_not_resized_is_as_large_as_the_crop_and_lies_anywhere():
    view = View(8, None, vflip_prob=0.5)
    boxes = [sample_crop(view, 20, 11, stream("box", i)).box for i in range(500)]
    assert {box[2:] for box in boxes} == {(8, 8)}
    assert {box[0] for box in boxes} == set(range(13)) and {box[1] for box in boxes} == set(
        range(4)
    )
    assert sample_crop(view, 8, 8, stream("box", 0)).box == (0, 0, 8, 8)
    image = rgb(20, 11)
    crop = sample_crop(View(8, None, jitter_prob=0, gray_prob=0, blur_prob=0, flip_prob=0), 20, 11,
                       stream("box", 1))  # fmt: skip
    top, left = crop.box[:2]
    found = render(image, crop)
    np.testing.assert_array_equal(found, np.asarray(image)[top : top + 8, left : left + 8])


def test_an_image_smaller_than_a_crop_that_is_not_resized_is_named():
    for size in ((7, 20), (20, 7)):
        with pytest.raises(UserError, match=r"^a\.png is of .* too few for a crop of 8 × 8"):
            sample_crop(View(8, None), *size, stream("box", 0), "a.png")


def test_turns_and_vertical_flips_occur_as_often_as_asked_for():
    view = View(8, (0.4, 1.0), vflip_prob=0.3, rotate90_prob=0.6)
    crops = [sample_crop(view, 50, 50, stream("turns", i)) for i in range(4000)]
    flips = np.array([crop.vflip for crop in crops])
    turns = np.array([crop.quarter_turns for crop in crops])
    assert abs(flips.mean() - 0.3) < 0.03
    for quarters in (1, 2, 3):
        assert abs((turns == quarters).mean() - 0.2) < 0.03
    assert abs(np.corrcoef(flips, turns > 0)[0, 1]) < 0.06


def test_turns_change_nothing_else_of_a_crop():
    plain, turned = View(8, (0.4, 1.0)), View(8, (0.4, 1.0), vflip_prob=1.0, rotate90_prob=1.0)
    for seed in range(50):
        one, other = (sample_crop(view, 40, 50, stream("same", seed)) for view in (plain, turned))
        assert not one.vflip and one.quarter_turns == 0
        assert other.vflip and other.quarter_turns in (1, 2, 3)
        assert CropParameters(**{**vars(other), "vflip": False, "quarter_turns": 0}) == one
