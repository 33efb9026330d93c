"""Measures of how embeddings lie, against what they are by definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dino_kit.geometry import effective_rank, spread, view_retrieval


def unit(*shape, seed=0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_the_effective_rank_counts_directions(shape):
    same = unit(1, shape[1]).expand(*shape)
    assert effective_rank(same).item() == pytest.approx(1, abs=1e-3)
    basis = torch.eye(shape[1])[torch.arange(shape[0]) % 4]
    assert effective_rank(basis).item() == pytest.approx(4, rel=1e-4)
    x = unit(*shape)
    singular = torch.linalg.svdvals(x.double())
    p = singular / singular.sum()
    assert effective_rank(x).item() == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-4)


def test_what_is_the_same_but_for_rounding_has_rank_one():
    x = unit(1, 32).expand(64, 32) + 1e-4 * unit(64, 32, seed=1)
    assert effective_rank(F.normalize(x, dim=-1)) < 1.05


def test_spread_is_the_total_variance():
    assert spread(unit(1, 8).expand(5, 8)).item() == pytest.approx(0, abs=1e-6)
    assert spread(torch.cat((unit(4, 8), -unit(4, 8)))).item() == pytest.approx(1)
    x = unit(30, 8)
    assert spread(x).item() == pytest.approx(x.var(dim=0, correction=0).sum().item(), rel=1e-5)


def test_views_that_are_nearest_find_each_other_and_ties_do_not():
    x = unit(6, 32)
    assert view_retrieval(x, x) == 1
    # Rolled by one, no view is nearest to its own; two swapped pairs leave the other four.
    assert view_retrieval(x, x.roll(1, dims=0)) == 0
    assert view_retrieval(x, x[[1, 0, 2, 3, 4, 5]]).item() == pytest.approx(4 / 6)
    assert view_retrieval(x[:1].expand(6, -1), x[:1].expand(6, -1)) == 0


def test_the_two_directions_of_retrieval_are_counted_apart():
    first = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    second = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    # first[0] finds second[0]; first[1] finds second[0] (0.96 against 0.8); second[0] finds
    # first[1]; second[1] finds first[1].
    assert view_retrieval(first, second).item() == pytest.approx(2 / 4)
