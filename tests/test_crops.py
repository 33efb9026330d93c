"""Crops as parameters: their bounds, and their distributions against the reference's."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from math import log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from dino_kit.assemble import view_groups
from dino_kit.config.train import TrainConfig
from dino_kit.data import augment
from dino_kit.data.augment import CropParameters
from dino_kit.data.crops import View, sample_crop
from dino_kit.randomness import stream

DRAWS = 600


def reference_views(config: dict) -> dict[str, View]:
    """The views of a run whose flags are the reference's defaults, by the names of the file."""
    flags = {name: tuple(value) if isinstance(value, list) else value
             for name, value in config.items() if name not in ("draws", "columns")}  # fmt: skip
    groups = view_groups(TrainConfig(data_path="images", output_dir="run", **flags))
    return {"global1": groups[0][0], "global2": groups[0][1], "local": groups[1][0]}


def measure(pixels: np.ndarray) -> dict[str, float]:
    """Statistics of a crop (S, S, 3) in [0, 1]."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 255
    flat = planes.reshape(3, -1)
    return {
        **{f"mean_{name}": x for name, x in zip("rgb", flat.mean(axis=1), strict=True)},
        **{f"std_{name}": x for name, x in zip("rgb", flat.std(axis=1), strict=True)},
        "mean_abs_horizontal_gradient": np.abs(planes[..., 1:] - planes[..., :-1]).mean(),
        "share_gray": float((flat == flat[0]).all()),
    }


@pytest.fixture(scope="module")
def golden_draws(golden):
    """What the reference measured, by view, and as much of ours: (DRAWS, statistics)."""
    arrays = golden("augmentation_statistics")
    config = json.loads(str(arrays["config"]))
    image = Image.fromarray((golden("augmentation_ops") | arrays)["image"])
    ours = {}
    for name, view in reference_views(config).items():
        crops = [sample_crop(view, image.height, image.width, stream(f"golden {name}", i))
                 for i in range(DRAWS)]  # fmt: skip
        rows = [measure(view.render(image, crop)) for crop in crops]
        ours[name] = np.array([[row[column] for column in config["columns"]] for row in rows])
    assert {key.split("/")[0] for key in arrays if "/" in key} == set(ours)
    return arrays, config, ours


VIEWS = ["global1", "global2", "local"]


@pytest.mark.parametrize("view", VIEWS)
def test_golden_means_of_crops(golden_draws, view):
    arrays, config, ours = golden_draws
    variance = ours[view].var(axis=0, ddof=1) / DRAWS + arrays[f"{view}/std"] ** 2 / config["draws"]
    difference = np.abs(ours[view].mean(axis=0) - arrays[f"{view}/mean"])
    assert np.all(difference <= 4 * np.sqrt(variance) + 1e-6), dict(
        zip(config["columns"], difference / np.sqrt(variance), strict=True)
    )


@pytest.mark.parametrize("view", VIEWS)
def test_golden_spreads_of_crops(golden_draws, view):
    arrays, config, ours = golden_draws
    centered = ours[view] - ours[view].mean(axis=0)
    variance = (centered**2).mean(axis=0)
    # The standard error of a variance is that of the mean of squared deviations.
    error = (centered**2).std(axis=0) * sqrt(1 / DRAWS + 1 / config["draws"])
    difference = np.abs(variance - arrays[f"{view}/std"] ** 2)
    assert np.all(difference <= 5 * error + 1e-6), dict(
        zip(config["columns"], difference / error, strict=True)
    )


@pytest.mark.parametrize("view", VIEWS)
def test_golden_quantiles_of_crops(golden_draws, view):
    """The file does not say at which levels its quantiles stand: the same ones for all."""
    arrays, config, ours = golden_draws
    quantiles = arrays[f"{view}/quantiles"]  # (levels, statistics but share_gray)
    ranks = (ours[view][:, None, : quantiles.shape[1]] <= quantiles).mean(axis=0)
    levels = np.median(ranks, axis=1, keepdims=True)
    error = np.sqrt(levels * (1 - levels) * (1 / DRAWS + 1 / config["draws"]))
    assert np.all(np.abs(ranks - levels) <= 5 * error + 1e-6), ranks


def ranges(low: float, high: float):
    """Two numbers in order."""
    return st.lists(st.floats(low, high), min_size=2, max_size=2).map(lambda x: tuple(sorted(x)))


shares = st.floats(0, 1)
views = st.builds(
    View,
    size=st.integers(1, 256),
    scale=ranges(0.001, 1.0),
    ratio=ranges(0.2, 5.0),
    flip_prob=shares,
    jitter_prob=shares,
    brightness=st.floats(0, 2),
    contrast=st.floats(0, 2),
    saturation=st.floats(0, 2),
    hue=st.floats(0, 0.5),
    gray_prob=shares,
    blur_prob=shares,
    blur_radius=ranges(0.0, 5.0),
    solarize_prob=shares,
    solarize_threshold=st.integers(0, 256),
)
sides = st.integers(1, 40) | st.integers(1, 5000) | st.integers(1, 200_000)
seeds = st.integers(0, 2**32)


@settings(deadline=None, max_examples=400)
@given(views, sides, sides, seeds)
def test_a_box_lies_inside_any_image(view, height, width, seed):
    top, left, box_height, box_width = box = sample_crop(view, height, width, stream("", seed)).box
    assert all(type(side) is int for side in box)
    assert top >= 0 and left >= 0 and box_height >= 1 and box_width >= 1
    assert top + box_height <= height and left + box_width <= width


@settings(deadline=None, max_examples=200)
@given(ranges(0.05, 0.5), ranges(0.75, 4 / 3), st.integers(40, 3000), st.floats(0.8, 1.25), seeds)
def test_scale_and_ratio_stay_within_their_bounds_up_to_rounding(scale, ratio, height, shape, seed):
    """On images in which every such box fits, so that none is a stopgap."""
    width = round(height * shape)
    view = View(8, scale, ratio)
    _, _, h, w = sample_crop(view, height, width, stream("", seed)).box
    slack = 1 + 1e-9
    assert (h - 0.5) * (w - 0.5) <= scale[1] * height * width * slack
    assert (h + 0.5) * (w + 0.5) * slack >= scale[0] * height * width
    assert (w - 0.5) / (h + 0.5) <= ratio[1] * slack
    assert (w + 0.5) / (h - 0.5) * slack >= ratio[0]


@pytest.mark.parametrize("height, width", [(1, 1000), (1000, 1), (3, 200), (200, 3), (30, 4000)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.9, 1.0), (1.5, 2.5)])
def test_where_no_box_fits_it_is_torchvisions_central_one(height, width, ratio):
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.4, 1.0], [*ratio])
    for seed in range(5):
        box = sample_crop(View(8, (0.4, 1.0), ratio), height, width, stream("", seed)).box
        assert box == tuple(expected)


@pytest.mark.parametrize("height, width", [(20_000, 20_000), (20_000, 30_000), (30_000, 20_000)])
def test_where_no_box_fits_an_image_of_an_allowed_shape_it_is_the_whole(height, width):
    view = View(8, scale=(1.0, 1.0), ratio=(0.5, 2.0))
    for seed in range(20):
        assert sample_crop(view, height, width, stream("", seed)).box == (0, 0, height, width)


def test_an_image_of_one_pixel_is_cropped_whole():
    for scale in ((0.05, 0.4), (0.4, 1.0)):
        assert sample_crop(View(8, scale), 1, 1, stream("", 0)).box == (0, 0, 1, 1)


@settings(deadline=None, max_examples=200)
@given(views, seeds)
def test_parameters_stay_within_their_ranges(view, seed):
    crop = sample_crop(view, 60, 80, stream("", seed))
    assert crop.size == view.size
    assert type(crop.flip) is bool and type(crop.gray) is bool
    strengths = {name: getattr(view, name) for name in augment.JITTER}
    if crop.jitter:
        assert Counter(name for name, _ in crop.jitter) == Counter(
            name for name, strength in strengths.items() if strength > 0
        )
    for name, factor in crop.jitter:
        low, high = (-view.hue, view.hue) if name == "hue" else (
            max(0, 1 - strengths[name]), 1 + strengths[name])  # fmt: skip
        assert low <= factor <= high
    if crop.blur_radius is not None:
        assert view.blur_radius[0] <= crop.blur_radius <= view.blur_radius[1]
    assert crop.solarize_threshold in (None, view.solarize_threshold)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_probability_of_0_is_never_and_of_1_always(probability):
    probabilities = ("flip", "jitter", "gray", "blur", "solarize")
    view = View(8, (0.4, 1.0), **{f"{name}_prob": probability for name in probabilities})
    for seed in range(50):
        crop = sample_crop(view, 60, 80, stream("", seed))
        assert crop.flip == crop.gray == bool(crop.jitter) == bool(probability)
        assert (crop.blur_radius is not None) == bool(probability)
        assert (crop.solarize_threshold is not None) == bool(probability)


@settings(deadline=None, max_examples=100)
@given(views, sides, sides, seeds)
def test_the_same_stream_gives_the_same_crop(view, height, width, seed):
    first, again = (sample_crop(view, height, width, stream("crop", seed)) for _ in range(2))
    assert first == again


def test_streams_with_other_indices_or_purposes_give_other_crops():
    keys = [("crop", 0, 0), ("crop", 0, 1), ("crop", 1, 0), ("crop", 1, 1), ("eval", 0, 0)]
    view = View(8, (0.05, 0.4))
    crops = [sample_crop(view, 500, 600, stream(*key)) for key in keys]
    assert len({crop.box for crop in crops}) == len(keys)


def samples(view: View, height: int, width: int, count: int = 4000) -> list[CropParameters]:
    return [sample_crop(view, height, width, stream("sample", i)) for i in range(count)]


def same_distribution(ours, theirs) -> None:
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


@pytest.fixture
def torch_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("height, width", [(375, 500), (600, 200), (500, 500)])
def test_boxes_are_distributed_as_torchvisions(torch_seed, scale, height, width):
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, [*scale], [3 / 4, 4 / 3]) for _ in range(4000)]
    ours = [crop.box for crop in samples(View(8, scale), height, width)]
    for quantity in (
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: log(w / h),
        lambda top, left, h, w: top / (height - h) if h < height else 0.5,
        lambda top, left, h, w: left / (width - w) if w < width else 0.5,
    ):
        same_distribution([quantity(*box) for box in ours], [quantity(*box) for box in theirs])


def test_colours_are_distributed_as_torchvisions(torch_seed):
    view = View(8, (0.4, 1.0), jitter_prob=1.0, brightness=0.4, contrast=1.5, saturation=0.2)
    jitter = ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    bounds = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [ColorJitter.get_params(*bounds) for _ in range(4000)]
    ours = [crop.jitter for crop in samples(view, 50, 50)]
    names = ["brightness", "contrast", "saturation", "hue"]
    for place, name in enumerate(names):
        factors = [dict(one)[name] for one in ours]
        same_distribution(factors, [one[1 + place] for one in theirs])
    orders = Counter(tuple(name for name, _ in one) for one in ours)
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3
    # Factors do not depend on the order.
    first = [one[0][1] for one in ours if one[0][0] == "brightness"]
    same_distribution(first, [one[1] for one in theirs])


def test_operations_occur_as_often_as_they_should_and_by_themselves():
    view = View(8, (0.4, 1.0), flip_prob=0.5, jitter_prob=0.8, gray_prob=0.2, blur_prob=0.1,
                solarize_prob=0.3)  # fmt: skip
    rows = np.array(
        [
            [c.flip, bool(c.jitter), c.gray, c.blur_radius is not None,
             c.solarize_threshold is not None]
            for c in samples(view, 50, 50)
        ]
    )  # fmt: skip
    probabilities = np.array([0.5, 0.8, 0.2, 0.1, 0.3])
    deviations = np.sqrt(probabilities * (1 - probabilities) / len(rows))
    assert np.all(np.abs(rows.mean(axis=0) - probabilities) < 4 * deviations)
    correlations = np.corrcoef(rows.T)[np.triu_indices(5, 1)]
    assert np.all(np.abs(correlations) < 4 / sqrt(len(rows)))


def test_the_radius_of_a_blur_is_uniform():
    view = View(8, (0.4, 1.0), blur_prob=1.0, blur_radius=(0.1, 2.0))
    radii = [crop.blur_radius for crop in samples(view, 50, 50)]
    assert stats.kstest(radii, "uniform", (0.1, 1.9)).pvalue > 1e-3


def test_a_view_is_rendered_by_any_function_of_image_and_parameters():
    calls = []

    def as_floats(image, parameters):
        calls.append((image, parameters))
        return torch.full((3, parameters.size, parameters.size), 0.25)

    view = View(6, (0.4, 1.0), render=as_floats)
    image, crop = object(), sample_crop(view, 20, 30, stream("", 0))
    rendered = view.render(image, crop)
    assert calls == [(image, crop)]
    assert rendered.dtype == torch.float32 and rendered.shape == (3, 6, 6)
    # How it is rendered changes nothing about what is drawn.
    plain = View(**asdict(view) | {"render": augment.render})
    assert sample_crop(plain, 20, 30, stream("", 0)) == crop


def test_a_view_is_rendered_by_pillow_unless_told_otherwise():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    view = View(6, (0.4, 1.0))
    crop = sample_crop(view, 20, 30, stream("", 0))
    np.testing.assert_array_equal(view.render(image, crop), augment.render(image, crop))
