"""What evaluators wrote into a run's folder, as rows of one form.

A file of results is JSON and has one of two keys:

- ``results``: numbers by the name of a metric, or such by the name of a setting (of ``knn``, the
  number of neighbours); beside an accuracy, numbers of another kind are no results. ``data`` or ``read`` say what was classified, ``command`` by which command,
  ``checkpoint`` of which weights.
- ``top1_percent``: the quickstart's, percents by data by network.

Whatever else lies there as JSON is passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino_kit.report.record import number

_NAMES = {"knn": "k-NN", "linear": "linear probe"}  # how people call a command
_METRICS = {"top1": "top-1, %", "top5": "top-5, %"}
_SETTINGS = {"last": "at the end", "best": "at its best", "fast": "--fast"}  # of linear
UNTRAINED = "untrained backbone"
_BASELINES = {"pixels": "raw pixels", "untrained": UNTRAINED}
_LARGEST = 1 << 24  # bytes of a file that is worth looking into


class Result(NamedTuple):
    """One number."""

    evaluator: str
    setting: str  # such as "k 20"; empty where there is only one
    data: str
    metric: str
    value: float
    file: str
    step: int | None  # that the weights are of, where the file says so
    epoch: int | None  # epochs done by then
    floor: float | None  # what answering always with the largest class gives, likewise


def read(folder: Path, faults: list[str]) -> list[Result]:
    """The results in ``folder``, file by file; a file that is no JSON adds a sentence to ``faults``."""
    rows: list[Result] = []
    for path in sorted(folder.glob("*.json")):
        if not path.is_file() or path.stat().st_size > _LARGEST:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except (ValueError, RecursionError):
            faults.append(f"{path.name} is damaged, so its results are missing here.")
            continue
        if isinstance(content, dict):
            rows += _rows(content, path)
    return rows


def newest(rows: Sequence[Result]) -> Result | None:
    """The accuracy that stands for a run in a sentence: of its newest weights, k 20 if there is one."""
    found = [row for row in rows if row.metric == _METRICS["top1"] and row.step is not None]
    return max(
        found,
        key=lambda row: (row.step, row.file == "quickstart.json", row.setting == "k 20"),
        default=None,
    )


def _rows(content: dict[str, Any], path: Path) -> Iterator[Result]:
    checkpoint = _mapping(content.get("checkpoint"))
    age = (_whole(checkpoint.get("step")), _whole(checkpoint.get("epoch")))
    if isinstance(of_networks := content.get("top1_percent"), dict):
        k = f"k {content['k']}" if isinstance(content.get("k"), int) else ""
        for network, by_data in of_networks.items():
            trained = age if network == "teacher" else (None, None)
            words = ", ".join(filter(None, (k, _BASELINES.get(network, ""))))
            for data, value in _numbers(by_data):
                yield Result(
                    "k-NN", words, data, _METRICS["top1"], value, path.name, *trained, None
                )
        return
    results = _mapping(content.get("results"))
    command = _command(content, path)
    floor = number(content.get("largest_class_percent"))
    rest = (path.name, *age, None if math.isnan(floor) else floor)
    name, data = _NAMES.get(command, command), _data(content)
    network = checkpoint.get("network")
    beside = "" if network in (None, "teacher") else f"of the {network}"
    for metric, value in _metrics(results):
        yield Result(name, beside, data, _METRICS.get(metric, metric), value, *rest)
    for setting, values in results.items():
        label = f"k {setting}" if command == "knn" else _SETTINGS.get(setting, setting)
        for metric, value in _metrics(values):
            words = ", ".join(filter(None, (label, beside)))
            yield Result(name, words, data, _METRICS.get(metric, metric), value, *rest)


def _command(content: dict[str, Any], path: Path) -> str:
    words = content.get("command")
    if isinstance(words, str) and words.startswith("dino-kit ") and len(words.split()) > 1:
        return words.split()[1]
    return path.stem.partition("_")[0]


def _data(content: dict[str, Any]) -> str:
    """What was classified, in as few words as tell it."""
    given = _mapping(content.get("data"))
    read = _mapping(content.get("read"))
    for name in (given.get("data_path"), given.get("val_data"), read.get("queries")):
        if isinstance(name, str) and name:
            return name
    return ""


def _numbers(values: Any) -> list[tuple[str, float]]:
    found = [(name, number(value)) for name, value in _mapping(values).items()]
    return [(name, value) for name, value in found if not math.isnan(value)]


def _metrics(values: Any) -> list[tuple[str, float]]:
    numbers = _numbers(values)
    accuracies = [(name, value) for name, value in numbers if name in _METRICS]
    return accuracies or numbers


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
