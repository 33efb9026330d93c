"""Tokens of one grid of patches as those of another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_kit.backbones.grids import resampling

GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 12))


def matrix(source, target) -> torch.Tensor:
    """The resampling as one matrix (h'·w', h·w), in float64."""
    resample = resampling(source, target, dtype=torch.float64)
    return resample(torch.eye(source[0] * source[1], dtype=torch.float64))


@settings(deadline=None)
@given(GRIDS, GRIDS)
def test_weights_of_each_patch_sum_to_one_and_none_is_negative(source, target):
    weights = matrix(source, target)
    assert weights.shape == (target[0] * target[1], source[0] * source[1])
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights), dtype=torch.float64))


@settings(deadline=None)
@given(GRIDS)
def test_a_grid_is_resampled_to_itself_exactly(grid):
    x = torch.randn(2, grid[0] * grid[1], 3)
    assert torch.equal(matrix(grid, grid), torch.eye(grid[0] * grid[1], dtype=torch.float64))
    assert torch.equal(resampling(grid, grid)(x), x)


@settings(deadline=None)
@given(GRIDS, GRIDS)
def test_constants_stay_what_they_are(source, target):
    x = torch.full((1, source[0] * source[1], 2), 3.7)
    torch.testing.assert_close(
        resampling(source, target)(x), torch.full((1, target[0] * target[1], 2), 3.7)
    )


@settings(deadline=None)
@given(GRIDS, GRIDS, st.sampled_from([(1,), (2,), (1, 2)]))
def test_a_mirrored_picture_gives_mirrored_tokens(source, target, axes):
    x = torch.randn(1, source[0] * source[1], 2)
    resample = resampling(source, target)

    def mirrored(tokens, grid):
        return tokens.unflatten(1, grid).flip(axes).flatten(1, 2)

    torch.testing.assert_close(
        resample(mirrored(x, source)), mirrored(resample(x), target), rtol=0, atol=1e-6
    )


@settings(deadline=None)
@given(GRIDS, GRIDS)
def test_the_transposed_resampling_is_the_transposed_matrix(source, target):
    resample = resampling(source, target, dtype=torch.float64)
    eye = torch.eye(target[0] * target[1], dtype=torch.float64)
    torch.testing.assert_close(resample.transposed()(eye), matrix(source, target).T)


def test_a_coarser_grid_takes_the_mean_of_what_a_patch_covers():
    x = torch.arange(6.0).reshape(1, 6, 1)
    assert resampling((1, 6), (1, 3))(x).flatten().tolist() == pytest.approx([0.5, 2.5, 4.5])
    # Each of four patches covers one and a half of six.
    expected = [1 / 3, (0.5 * 1 + 2) / 1.5, (3 + 0.5 * 4) / 1.5, (0.5 * 4 + 5) / 1.5]
    assert resampling((6, 1), (4, 1))(x).flatten().tolist() == pytest.approx(expected)


def test_a_finer_grid_interpolates_between_centres():
    """As PyTorch's bilinear interpolation does."""
    x = torch.randn(2, 4 * 6, 5)
    pictures = x.unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(pictures, (7, 9), mode="bilinear")
    torch.testing.assert_close(
        resampling((4, 6), (7, 9))(x), expected.flatten(2).mT, rtol=0, atol=1e-5
    )


def test_axes_may_go_different_ways():
    x = torch.randn(1, 12, 3)
    both = resampling((2, 6), (4, 3))(x)
    first = resampling((2, 6), (4, 6))(x)
    torch.testing.assert_close(resampling((4, 6), (4, 3))(first), both)


def test_what_an_evaluator_needed_first_serves_a_training_step_too():
    with torch.inference_mode():
        resampling((11, 13), (5, 17))
    x = torch.randn(1, 11 * 13, 2, requires_grad=True)
    resampling((11, 13), (5, 17))(x).sum().backward()
    assert x.grad is not None
