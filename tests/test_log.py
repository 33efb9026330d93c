"""What is said on the terminal: only by the main process, and in lines that fit."""

from __future__ import annotations

import io
import sys

import pytest

from dino_kit import distributed, log


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_paragraph_is_broken_between_words(narrow, capsys):
    path = "folder/with-a-hyphen/and-a-name-longer-than-forty-characters.html"
    log.paragraph(f"{'word ' * 20}{path} end")
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if line != path) <= 40
    assert path in lines
    assert " ".join(lines).split() == [*["word"] * 20, path, "end"]


def test_a_line_is_never_broken(narrow, capsys):
    log.say("x " * 60 + "[bold] :smile:")
    assert capsys.readouterr().out == "x " * 60 + "[bold] :smile:\n"


def test_a_table_without_a_title_begins_with_its_columns(capsys):
    log.table("", ["name", "%"], [["[b]one :smile:", "1.0"]])
    said = capsys.readouterr().out
    assert "[b]one :smile:" in said
    first, second = said.splitlines()[:2]
    assert "name" in second and first.strip("┏━┳┓") == ""


def test_what_a_terminal_cannot_write_is_escaped(monkeypatch):
    bytes_ = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_, encoding="ascii"))
    log.say("é")
    log.table("", ["é–", "%"], [["–", "1.0"]])
    sys.stdout.flush()
    assert rb"\xe9\u2013" in bytes_.getvalue() and rb"\u2013 " in bytes_.getvalue()


def test_plain_lines_tell_progress_where_there_is_no_terminal(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with log.progress(10, "training", start=4) as advance:
        for text in ("loss 2", "loss 1", "", "", "", "last"):
            now[0] += 6.0
            advance(text=text)
    assert capsys.readouterr().out.splitlines() == [
        "training 6/10  loss 1  0:24 left",
        "training 8/10  loss 1  0:12 left",
        "training 10/10  last  took 0:36",
    ]


def test_a_bar_shows_count_and_text_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with log.progress(3, "training") as advance:
        for _ in range(3):
            advance(text="loss 1.25")
    shown = sys.stdout.getvalue()
    assert "training" in shown and "3/3" in shown and "loss 1.25" in shown


def test_without_a_description_there_is_no_progress(capsys):
    with log.progress(2, "") as advance:
        advance()
        advance()
    assert capsys.readouterr().out == ""


def test_other_processes_are_silent(capsys, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    log.say("a")
    log.paragraph("b")
    log.notice("c of another process")
    log.table("d", ["e"], [["f"]])
    with log.progress(1, "g") as advance:
        advance()
    said = capsys.readouterr()
    assert said.out == said.err == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65, "1:05"), (3725.4, "1:02:05")])
def test_durations(seconds, text):
    assert log.duration(seconds) == text
