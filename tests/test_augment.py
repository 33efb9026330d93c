"""Pixels: every operation against the reference's, and against torchvision on Pillow images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from dino_kit.data import augment
from dino_kit.data.augment import CropParameters, center_view, eval_sizes, render
from dino_kit.errors import BadImage

# Mean absolute difference, of 255, up to which two implementations of an operation agree.
TOLERANCES = {
    "crop": 0.1, "hflip": 0.0, "solarize": 0.0, "blur": 0.7, "hue": 0.7,
    "brightness": 0.6, "contrast": 0.6, "saturation": 0.6, "grayscale": 0.6,
}  # fmt: skip


def parse(key: str) -> tuple[str, list[float]]:
    """``crop_down_3_5_110_140_to_48`` → ``crop`` and its numbers, and so on."""
    name, *words = key.split("_")
    return name, [float(word) for word in words if word.lstrip("-").replace(".", "").isdecimal()]


def operate(image: Image.Image, name: str, numbers: list[float]) -> Image.Image:
    match name:
        case "crop":
            *box, size = map(int, numbers)
            return augment.resized_crop(image, tuple(box), size)
        case "hflip":
            return augment.flip(image)
        case "solarize":
            return augment.solarize(image, *(numbers or [128]))
        case _:
            return getattr(augment, name)(image, *numbers)


def test_golden_operations(golden):
    arrays = golden("augmentation_ops")
    image = Image.fromarray(arrays.pop("image"))
    done = set()
    for key, expected in arrays.items():
        name, numbers = parse(key)
        found = np.asarray(operate(image, name, numbers))
        assert found.shape == expected.shape and found.dtype == expected.dtype, key
        difference = found.astype(float) - expected
        assert np.abs(difference).mean() <= TOLERANCES[name], key
        assert abs(difference.mean()) <= 0.3, key
        # Another machine's rounding moves a hue by one of 256 steps, and no value by more.
        assert np.abs(difference).max() <= 6, key
        done.add(name)
    assert done == set(TOLERANCES)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise on slopes: every hue, and both smooth and rough places."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 200, height * width * 3).reshape(3, height, width).transpose(1, 2, 0)
    return Image.fromarray((slope + rng.integers(0, 56, slope.shape)).astype(np.uint8))


def rainbow() -> Image.Image:
    """64 × 64 × 64 colours, the grays and the extremes among them."""
    levels = np.linspace(0, 255, 64).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(512, 512, 3))


def assert_equal(found, expected) -> None:
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


SHAPES = [(1, 1), (1, 7), (23, 17), (40, 60)]
FACTORS = {
    "brightness": (F.adjust_brightness, (0.0, 0.6, 1.0, 1.37)),
    "contrast": (F.adjust_contrast, (0.0, 0.61, 1.0, 1.4)),
    "saturation": (F.adjust_saturation, (0.0, 0.83, 1.0, 1.2)),
    "hue": (F.adjust_hue, (-0.5, -0.1, -0.003, 0.0, 0.05, 0.1, 0.5)),
    "solarize": (F.solarize, (0, 1, 127.5, 128, 255, 256)),
}


@pytest.mark.parametrize("name, factor", [(n, x) for n, (_, xs) in FACTORS.items() for x in xs])
def test_colours_are_torchvisions(name, factor):
    for image in (rainbow(), *(picture(*shape) for shape in SHAPES)):
        assert_equal(getattr(augment, name)(image, factor), FACTORS[name][0](image, factor))


@settings(deadline=None, max_examples=60)
@given(st.floats(-0.5, 0.5), st.sampled_from(SHAPES))
def test_a_hue_is_turned_as_torchvision_turns_it(shift, shape):
    assert_equal(augment.hue(picture(*shape), shift), F.adjust_hue(picture(*shape), shift))


def test_gray_and_flip_are_torchvisions():
    for image in (rainbow(), *(picture(*shape) for shape in SHAPES)):
        assert_equal(augment.grayscale(image), F.rgb_to_grayscale(image, num_output_channels=3))
        assert_equal(augment.flip(image), F.hflip(image))


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 1.37, 2.0])
def test_a_blur_is_pillows_gaussian(radius):
    image = picture(40, 60)
    assert_equal(augment.blur(image, radius), image.filter(ImageFilter.GaussianBlur(radius)))


@pytest.mark.parametrize("radius", [1.0, 1.5, 2.0])
def test_the_radius_of_a_blur_is_its_deviation_in_pixels(radius):
    impulse = np.zeros((41, 41, 3), np.uint8)
    impulse[20, 20] = 255
    spread = np.asarray(augment.blur(Image.fromarray(impulse), radius))[..., 0].astype(float)
    deviation = np.sqrt((spread.sum(0) * (np.arange(41) - 20) ** 2).sum() / spread.sum())
    assert deviation == pytest.approx(radius, rel=0.1)


@st.composite
def boxes(draw) -> tuple[Image.Image, tuple[int, int, int, int]]:
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    shape = draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
    return picture(height, width, seed=height), (top, left, *shape)


@settings(deadline=None, max_examples=80)
@given(boxes(), st.integers(1, 60))
def test_a_resized_crop_is_torchvisions(image_and_box, size):
    image, box = image_and_box
    expected = F.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC)
    assert_equal(augment.resized_crop(image, box, size), expected)


def colour_orders():
    factors = st.fixed_dictionaries(
        {name: st.floats(0.5, 1.5) for name in ("brightness", "contrast", "saturation")}
        | {"hue": st.floats(-0.3, 0.3)}
    )
    return st.builds(
        lambda factors, order: tuple((name, factors[name]) for name in order),
        factors,
        st.permutations(["brightness", "contrast", "saturation", "hue"]),
    )


@settings(deadline=None, max_examples=60)
@given(
    flip=st.booleans(),
    jitter=st.one_of(st.just(()), colour_orders()),
    gray=st.booleans(),
    blur_radius=st.none() | st.floats(0.1, 3.0),
    solarize_threshold=st.none() | st.integers(60, 200),
)
def test_a_crop_is_rendered_in_the_order_of_the_parameters(
    flip, jitter, gray, blur_radius, solarize_threshold
):
    image, box, size = picture(50, 40), (3, 5, 31, 27), 24
    expected = F.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC)
    if flip:
        expected = F.hflip(expected)
    for name, factor in jitter:
        expected = FACTORS[name][0](expected, factor)
    if gray:
        expected = F.rgb_to_grayscale(expected, num_output_channels=3)
    if blur_radius is not None:
        expected = expected.filter(ImageFilter.GaussianBlur(blur_radius))
    if solarize_threshold is not None:
        expected = F.solarize(expected, solarize_threshold)
    found = render(
        image, CropParameters(size, box, flip, jitter, gray, blur_radius, solarize_threshold)
    )
    assert found.dtype == np.uint8 and found.shape == (size, size, 3)
    assert_equal(found, expected)


def test_rendering_leaves_the_image_as_it_is():
    image = picture(30, 30)
    before = np.array(image)
    jitter = tuple((name, 0.3) for name in augment.JITTER)
    render(image, CropParameters(30, (0, 0, 30, 30), True, jitter, True, 1.0, 100))
    assert_equal(image, before)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 60))
def test_the_view_of_an_evaluation_is_torchvisions(height, width, resize, crop):
    image = picture(height, width)
    expected = transforms.Compose(
        [transforms.Resize(resize, InterpolationMode.BICUBIC), transforms.CenterCrop(crop)]
    )(image)
    found = center_view(image, resize, crop)
    assert found.shape == (crop, crop, 3) and found.dtype == np.uint8
    assert_equal(found, expected)


@pytest.mark.parametrize("height, width", [(1, 900), (900, 1), (333, 500), (500, 333), (256, 256)])
def test_large_and_long_images_are_viewed_as_by_torchvision(height, width):
    image = picture(height, width)
    expected = transforms.Compose(
        [transforms.Resize(128, InterpolationMode.BICUBIC), transforms.CenterCrop(112)]
    )(image)
    assert_equal(center_view(image, 128, 112), expected)


@pytest.mark.parametrize(
    "training_size, sizes",
    [(224, (256, 224)), (8, (8, 8)), (32, (32, 32)), (64, (64, 64)), (65, (74, 65)),
     (96, (110, 96)), (112, (128, 112)), (384, (439, 384)), (448, (512, 448))],
)  # fmt: skip
def test_sizes_of_an_evaluation(training_size, sizes):
    assert eval_sizes(training_size) == sizes


@given(st.integers(1, 2000))
def test_an_evaluation_never_pads(training_size):
    resize, crop = eval_sizes(training_size)
    assert crop == training_size <= resize


def test_an_image_that_would_be_too_large_once_resized_is_a_bad_one():
    image = Image.new("RGB", (1, 40_000))
    with pytest.raises(BadImage, match="x.png is of 1 × 40000 pixels, so long and narrow"):
        center_view(image, 256, 224, "x.png")
    assert center_view(image, 4, 4, "x.png").shape == (4, 4, 3)
