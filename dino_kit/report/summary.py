"""The few numbers of a run that stand beside its verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dino_kit.report.paper import width
from dino_kit.report.record import Record, number
from dino_kit.report.results import Result, newest


class Number(NamedTuple):
    label: str
    value: str
    note: str


def numbers(record: Record, results: Sequence[Result]) -> list[Number]:
    """The newest of each, as far as it was measured."""
    config = record.config
    own = config and width(config)
    found = [
        _accuracy(record, results),
        _newest(record, "loss", "loss", "{:.2f}",
                f"of ln K = {math.log(config.out_dim):.2f}" if config else "nats"),
        _newest(record, "prototypes_used", "prototypes in use", "{:,.0f}",
                f"of {config.out_dim:,}" if config else ""),
        _newest(record, "effective_rank", "effective rank", "{:.1f}",
                f"of at most {min(own, 2 * record.total_batch):,}" if own else ""),
        _newest(record, "view_retrieval", "view retrieval", "{:.0f} %",
                "of the crops find their twin", 100),
        _newest(record, "images_per_second", "speed", "{:.3g}", "images a second"),
    ]  # fmt: skip
    return [one for one in found if one]


def _newest(
    record: Record, key: str, label: str, form: str, note: str, times: float = 1.0
) -> Number | None:
    values = record.column(key) * times
    known = values[~np.isnan(values)]
    return Number(label, form.format(float(known[-1])), note) if len(known) else None


def _accuracy(record: Record, results: Sequence[Result]) -> Number | None:
    probed = [(probe, number(probe.get("knn_top1"))) for probe in record.probes]
    probed = [(probe, value) for probe, value in probed if not math.isnan(value)]
    if probed:
        probe, value = probed[-1]
        k = probe.get("knn_k")
        return Number("k-NN", f"{value:.1f} %", f"by the probe, k {k}" if k else "by the probe")
    one = newest(results)
    return one and Number(
        one.evaluator,
        f"{one.value:.1f} %",
        ", ".join(filter(None, (one.setting, one.data))),
    )
