"""The exact search, against sorting everything and against faiss."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_kit.errors import UserError
from dino_kit.evaluators.knn import nearest_by_faiss
from dino_kit.search import nearest


def features(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


sizes = {
    "n": st.integers(1, 60),
    "m": st.integers(1, 12),
    "width": st.integers(1, 9),
    "seed": st.integers(0, 1000),
    "data": st.data(),
}


@settings(deadline=None, max_examples=60)
@given(**sizes, chunk=st.sampled_from([1, 7, 50, 1 << 20]))
def test_it_finds_what_sorting_all_inner_products_finds(n, m, width, seed, data, chunk):
    k = data.draw(st.integers(1, n))
    bank, queries = features(n, width, seed).double(), features(m, width, seed + 1).double()
    similarity, index = nearest(bank, queries, k, chunk=chunk)
    products = queries @ bank.T
    torch.testing.assert_close(similarity, products.sort(dim=1, descending=True).values[:, :k])
    torch.testing.assert_close(similarity, products.gather(1, index))
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("rows", [1, 3, 10, 29, 30, 31])
def test_a_bank_searched_in_parts_is_a_bank_searched_at_once(monkeypatch, rows):
    bank, queries = features(30, 5, 0), features(4, 5, 1)
    expected = nearest(bank, queries, 7)
    monkeypatch.setattr("dino_kit.search._BANK_ROWS", rows)
    for found, wanted in zip(nearest(bank, queries, 7), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_equal_neighbours_come_in_the_order_of_their_rows():
    bank = torch.tensor([[0.0], [1.0], [2.0], [1.0], [2.0], [1.0]])
    similarity, index = nearest(bank, torch.ones(1, 1), 5)
    assert similarity.tolist() == [[2, 2, 1, 1, 1]]
    assert index.tolist() == [[2, 4, 1, 3, 5]]


@settings(deadline=None, max_examples=60)
@given(**sizes, levels=st.sampled_from([2, 5, 1000]))
def test_faiss_equals_it_up_to_ties(n, m, width, seed, data, levels):
    k = data.draw(st.integers(1, n))
    # Few levels make many ties.
    bank, queries = (
        (features(rows, width, seed + rows) * levels / 4).round() / levels for rows in (n, m)
    )
    ours, where = nearest(bank, queries, k)
    theirs, place = nearest_by_faiss(bank, queries, k)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for row in range(m):
        clear = ours[row] > ours[row, -1] + 1e-5  # ranks that no tie at the k-th place touches
        assert set(where[row, clear].tolist()) <= set(place[row].tolist())


def test_faiss_takes_the_threads_of_torch_and_gets_its_own_back(monkeypatch):
    import faiss

    before, used = faiss.omp_get_max_threads(), []
    search = faiss.knn
    monkeypatch.setattr(
        faiss, "knn", lambda *a, **b: used.append(faiss.omp_get_max_threads()) or search(*a, **b)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    nearest_by_faiss(features(30, 5, 0), features(4, 5, 1), 3)
    assert used == [before + 1] and faiss.omp_get_max_threads() == before


def test_on_macos_faiss_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it would fail
    bank, queries = features(30, 5, 0), features(4, 5, 1)
    assert torch.equal(nearest_by_faiss(bank, queries, 3)[1], nearest(bank, queries, 3)[1])


@pytest.mark.parametrize("k", [0, 31])
def test_a_k_outside_of_the_bank_is_refused(k):
    with pytest.raises(UserError, match="1 to 30"):
        nearest(features(30, 5, 0), features(4, 5, 1), k)


def test_features_of_two_widths_are_refused():
    with pytest.raises(UserError, match="5 wide and the queries' 6"):
        nearest(features(30, 5, 0), features(4, 6, 1), 3)
