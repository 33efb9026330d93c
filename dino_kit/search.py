"""Exact nearest neighbours by inner product, in torch alone and in bounded memory.

Legend: n rows of the bank, m queries, D width, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dino_kit.errors import UserError

_CHUNK = 1 << 24  # similarities held at once, 64 MiB in float32
_BANK_ROWS = 1 << 16  # of the bank in one matrix product, so that many queries share a pass over it


def nearest(bank: Tensor, queries: Tensor, k: int, chunk: int = _CHUNK) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``bank`` with the largest inner product with each query, best first.

    Args:
        bank: (n, D), floating point.
        queries: (m, D), of the same type and on the same device.
        k: number of neighbours, from 1 to n.
        chunk: similarities held in memory at once.

    Returns:
        Inner products (m, k), falling, and row indices (m, k), int64. Equal neighbours come in the
        order of their rows; which of several rows that are equally k-th is among them is open.

    Raises:
        UserError: ``k`` is not in 1 … n, or the widths differ.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"k is {k}; a bank of {len(bank)} rows has 1 to {len(bank)} neighbours.")
    if bank.shape[1] != queries.shape[1]:
        raise UserError(
            f"The bank's features are {bank.shape[1]} wide and the queries' {queries.shape[1]}; "
            "both have to come from the same backbone."
        )
    similarity = bank.new_empty(len(queries), k)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=bank.device)
    bank_rows = min(_BANK_ROWS, len(bank))
    query_rows = max(1, chunk // bank_rows)
    for start in range(0, len(queries), query_rows):
        part = slice(start, start + query_rows)
        similarity[part], index[part] = _nearest_in_parts(bank, queries[part], k, bank_rows)
    return similarity, index


def _nearest_in_parts(bank: Tensor, queries: Tensor, k: int, rows: int) -> tuple[Tensor, Tensor]:
    best, where = queries.new_empty(len(queries), 0), None
    for start in range(0, len(bank), rows):
        similarity = queries @ bank[start : start + rows].T
        found, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
        best = torch.cat((best, found), dim=1)
        where = index if where is None else torch.cat((where, index + start), dim=1)
        best, place = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, place)
    # Two stable sorts, by row and then by similarity, put equal neighbours in order of their rows.
    where, order = where.sort(dim=1)
    best, again = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, where.gather(1, again)
