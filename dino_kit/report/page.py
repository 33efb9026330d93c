"""A run as one page of HTML that holds everything and asks for nothing.

Its size is bounded: the film keeps to :data:`~dino_kit.report.pictures.FILM_BYTES`, every curve to
so many points, and of the other pictures there are few; six megabytes in all.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib import resources
from typing import Any

from dino_kit.config import fields
from dino_kit.config.train import TrainConfig
from dino_kit.report import curves, paper, results, summary
from dino_kit.report.look import Looks, Neighbours, Seen, Tile
from dino_kit.report.pictures import Film, film
from dino_kit.report.record import Record
from dino_kit.report.results import Result
from dino_kit.report.verdict import Verdict, judge

LARGEST = 6 << 20  # bytes of a page


def page(record: Record, looks: Looks, origin: str) -> str:
    """The page as HTML.

    Args:
        record: the run.
        looks: what evaluators show of its newest checkpoint.
        origin: a sentence on what made the page.
    """
    faults = list(record.faults)
    rows = results.read(record.folder, faults)
    shown = film(record)
    verdict = judge(record, rows)
    drawn = curves.draw(record, rows)
    frames = shown.frames if shown else []
    data = drawn | {"film": [{"source": f.source, "step": f.step} | f.facts for f in frames]}
    name = record.folder.resolve().name
    filling = {
        "title": _text(f"{name}: a run of dino-kit"),
        "name": _text(name),
        "facts": _text(" · ".join(_facts(record))),
        "verdict": _verdict(verdict, summary.numbers(record, rows)),
        "curves": _curves(drawn),
        "film": _film(shown),
        "attention": _attention(looks),
        "neighbours": _neighbours(looks),
        "results": _results(rows, record),
        "recipe": _recipe(record),
        "faults": _faults(faults),
        "origin": _text(f"{origin} {datetime.now():%Y-%m-%d %H:%M}."),
        # A name with "</script>" in it must not end the element that it stands in.
        "data": json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c"),
        "style": _file("page.css"),
        "script": _file("page.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filling[found[1]], _file("page.html"))


def _file(name: str) -> str:
    return resources.files("dino_kit.report").joinpath(name).read_text("utf-8")


def _text(value: object) -> str:
    # What is no Unicode in a file's name stands in it as surrogates, which no page can hold.
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def _prose(text: str) -> str:
    """Sentences in which no command, flag or percentage is broken in two."""
    text = _text(text.replace(" %", "\u00a0%"))
    words = r"dino-kit [a-z-]+|--[a-z_]+(?: (?:true|fp32))?"
    return re.sub(words, r"<code>\g<0></code>", text)


def _paragraphs(*sentences: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return "".join(f"<p{mark}>{_prose(one)}</p>" for one in sentences if one)


def _facts(record: Record) -> list[str]:
    """The run in a few words."""
    config = record.config
    if config is None:
        return []
    size = [f"patch {config.known_patch_size}"] if config.known_patch_size else []
    size += [f"{config.embed_dim} wide"] if config.embed_dim else []
    size += [f"{config.depth} blocks"] if config.depth else []
    size += [f"{config.num_heads} heads"] if config.num_heads else []
    crops = f"crops of {config.global_crops_size}"
    if config.local_crops_number:
        crops += f" and {config.local_crops_number} × {config.local_crops_size}"
    return [
        ", ".join([config.arch, *size]),
        f"{crops} pixels",
        f"{config.out_dim:,} prototypes",
        f"{config.epochs:,} epochs of {config.data_path}" if config.data_path
        else f"{config.epochs:,} epochs",
        f"batch {record.total_batch:,}",
    ]  # fmt: skip


def _verdict(verdict: Verdict, shown: Sequence[summary.Number]) -> str:
    state = f'<p class="state">{_text(verdict.state)}</p>' if verdict.state else ""
    advice = verdict.advice and f'<p class="advice"><b>To mend it:</b> {_prose(verdict.advice)}</p>'
    numbers = "".join(
        f"<div><dt>{_text(one.label)}</dt><dd>{_text(one.value)}"
        f"<small>{_text(one.note)}</small></dd></div>"
        for one in shown
    )
    return (
        f'<section id="verdict" class="card {verdict.tone}">{state}<h2>{_text(verdict.headline)}'
        f"</h2><p>{_prose(' '.join(verdict.sentences))}</p>{advice}"
        f'{numbers and f"<dl>{numbers}</dl>"}</section>'
    )


def _curves(drawn: dict[str, Any]) -> str:
    parts = []
    for group in drawn["groups"]:
        figures = "".join(_figure(one) for one in group["figures"])
        missing = group["missing"]
        lacks = ""
        if missing:
            names = ", ".join(missing)
            verb = "is not shown: its" if len(missing) == 1 else "are not shown: their"
            lacks = f"{names} {verb} numbers are not in the run's files."
        kind = "figures" if group["title"] in curves.MAIN else "figures small"
        body = (figures and f'<div class="{kind}">{figures}</div>') + _paragraphs(
            lacks, kind="note"
        )
        parts.append(f"<h3>{_text(group['title'])}</h3>{body}")
    return "".join(parts)


def _figure(figure: dict[str, Any]) -> str:
    key = _text(figure["key"])
    return (
        f'<figure class="card chart" id="chart-{key}" tabindex="0" data-key="{key}">'
        f'<figcaption><b>{_text(figure["title"])}</b><output></output></figcaption>'
        f'<div class="plot"></div><p>{_text(figure["about"])}</p></figure>'
    )


def _film(shown: Film | None) -> str:
    if shown is None:
        return _paragraphs(
            "There are no sheets: a run with a probe draws one every --probe_freq epochs, of eight "
            "fixed images, what the network looks at in them, and their nearest neighbours.",
            kind="note",
        )
    lost = f"{shown.missing:,} of the sheets cannot be read." if shown.missing else ""
    if not shown.frames:
        return _paragraphs(lost, kind="note")
    some = f"{len(shown.frames)} of {shown.taken:,} sheets, evenly chosen; the first and the last "
    some = f"{some} are among them." if shown.taken > len(shown.frames) else ""
    width, height = shown.size
    first = _text(shown.frames[-1].source)
    return (
        '<figure class="card" id="movie" tabindex="0" aria-label="Sheets over training">'
        f'<img id="frame" src="{first}" width="{width}" height="{height}" alt="A sheet: images, '
        'what the network looks at in them, and their nearest neighbours">'
        '<div class="controls"><button type="button" id="play" aria-label="Play">▶</button>'
        f'<input type="range" id="seek" min="0" max="{len(shown.frames) - 1}" '
        f'value="{len(shown.frames) - 1}" aria-label="Sheet"></div>'
        '<figcaption id="caption" aria-live="polite"></figcaption></figure>'
        + _paragraphs(some, lost, kind="note")
    )


def _attention(looks: Looks) -> str:
    cards = "".join(map(_seen, looks.seen))
    note = _paragraphs(looks.seen_note, kind="note")
    return note + (cards and f'<div id="seen">{cards}</div>')


def _seen(one: Seen) -> str:
    pictures = [("image", one.picture), ("overlay", one.overlay), *one.maps]
    shown = "".join(
        f'<figure><img src="{_text(source)}" alt="{_text(f"{one.name}, {label}")}">'
        f"<figcaption>{_text(label)}</figcaption></figure>"
        for label, source in pictures
    )
    # In one line, or in two of nearly equal length.
    columns = len(pictures) if len(pictures) <= 8 else -(-len(pictures) // 2)
    row = f'<div class="row" style="--columns: {columns}">{shown}</div>'
    return f'<div class="card seen"><h4>{_text(one.name)}</h4>{row}</div>'


def _neighbours(looks: Looks) -> str:
    rows = "".join(map(_row, looks.neighbours))
    table = f'<div class="card" id="nearest">{rows}</div>' if rows else ""
    return _paragraphs(looks.neighbours_note, kind="note") + table


def _row(one: Neighbours) -> str:
    def tile(it: Tile, kind: str) -> str:
        near = "" if it.similarity is None else f"{it.similarity:.3f}"
        words = "<br>".join(_text(one) for one in (near, it.label) if one)
        title = f' title="{_text(it.name)}"'
        return (
            f'<figure class="{kind}"{title}><img src="{_text(it.source)}" alt="{_text(it.name)}">'
            f"<figcaption>{words}</figcaption></figure>"
        )

    label = one.query.label
    same = [tile(it, "same" if label and it.label == label else "found") for it in one.found]
    return f'<div class="row">{tile(one.query, "query")}{"".join(same)}</div>'


def _results(rows: Sequence[Result], record: Record) -> str:
    if not rows:
        return _paragraphs(
            "No evaluator has written results here yet; dino-kit knn does, with labelled images.",
            kind="note",
        )
    metrics = list(dict.fromkeys(row.metric for row in rows))
    lines: dict[tuple, dict[str, float]] = {}
    for row in rows:
        key = (row.evaluator, row.setting, row.data, _age(row, record), row.file)
        lines.setdefault(key, {})[row.metric] = row.value
    body = [
        [*key[:2], *(f"{values[m]:.2f}" if m in values else "–" for m in metrics), *key[2:]]
        for key, values in lines.items()
    ]
    # On a phone the right of the table has to be scrolled to: the numbers stand on the left.
    heads = ["evaluator", "setting", *metrics, "data", "weights", "file"]
    return _table(heads, body, numbers=range(2, 2 + len(metrics)))


def _age(row: Result, record: Record) -> str:
    if row.epoch is not None:
        return f"epoch {row.epoch:,}"
    return f"step {row.step:,}" if row.step is not None else "–"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if place in right else ''}>{_text(cell)}</{tag}>"
            for place, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="card wide"><table><thead><tr>{cells("th", heads)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _recipe(record: Record) -> str:
    config = record.config
    if config is None:
        return _paragraphs("The recipe is not known.", kind="note")
    found = paper.compare(config)
    said = (
        f"Of the paper's recipes {found.recipe} is the nearest: {found.same} settings are as "
        f"there, and {len(found.differences)} differ."
    )
    if not found.differences:
        said = f"This is the paper's recipe {found.recipe}, setting for setting."
    body, group = "", ""
    for one in found.differences:
        if one.group != group:
            group = one.group
            title = group.partition(" (")[0]
            body += f'<tr class="group"><th colspan="3">{_text(title)}</th></tr>'
        body += (
            f"<tr><td><code>{_text(one.name)}</code><small>{_text(one.help)}</small></td>"
            f"<td>{_text(one.ours)}</td><td>{_text(one.theirs)}</td></tr>"
        )
    table = body and (
        '<div class="card wide"><table id="differences"><thead><tr><th>setting</th><th>this run'
        f"</th><th>{_text(found.recipe)}</th></tr></thead><tbody>{body}</tbody></table></div>"
    )
    return _paragraphs(said, kind="note") + table + _whole(config)


def _whole(config: TrainConfig) -> str:
    lines = "".join(
        f"<tr><td><code>{_text(name)}</code></td><td>{_text(paper.shown(value))}</td></tr>"
        for name, value in fields.to_plain(config).items()
    )
    return (
        '<details><summary>The whole recipe</summary><div class="card wide"><table id="whole">'
        f"<tbody>{lines}</tbody></table></div></details>"
    )


def _faults(faults: Sequence[str]) -> str:
    if not faults:
        return ""
    return f'<section id="faults" class="card">{_paragraphs(*faults)}</section>'
