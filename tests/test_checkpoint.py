"""A run's checkpoints: never half there, never none, and read back or refused."""

from __future__ import annotations

import pytest
import torch

from dino_kit import files
from dino_kit.errors import UserError
from dino_kit.training import checkpoint


def content(number: int) -> dict:
    return {"step": number, "student": {"weight": torch.full((50, 50), float(number))}}


def step_of(folder) -> int:
    return checkpoint.newest(folder)["step"]


def damage(path) -> None:
    data = bytearray(path.read_bytes())
    where = data.find(torch.full((50, 50), 1.0).numpy().tobytes()[:64])
    data[where + 3 if where >= 0 else len(data) // 2] ^= 1
    path.unlink()  # a second name for the same data keeps its own
    path.write_bytes(data)


def test_the_newest_the_one_before_and_copies_for_good(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for number in range(3):
        checkpoint.save(tmp_path, content(number), "checkpoint0001.pth" if number == 1 else None)
    names = ("checkpoint.pth", "checkpoint_previous.pth", "checkpoint0001.pth")
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert [files.read_weights(tmp_path / name)["step"] for name in names] == [2, 1, 1]
    assert step_of(tmp_path) == 2


def test_a_crash_while_writing_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, content(0))
    for place in ("torch.save", "os.replace", "pathlib.Path.replace"):

        def crash(*arguments, **options):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(place, crash)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path, content(1))
        assert step_of(tmp_path) == 0
    checkpoint.save(tmp_path, content(2))
    assert step_of(tmp_path) == 2


def test_a_damaged_one_is_noticed_and_the_one_before_is_used(tmp_path, capsys):
    checkpoint.save(tmp_path, content(0))
    checkpoint.save(tmp_path, content(1))
    damage(tmp_path / "checkpoint.pth")
    assert step_of(tmp_path) == 0
    said = capsys.readouterr().err
    assert "checkpoint.pth is damaged" in said and "checkpoint_previous.pth, is used" in said
    # The damaged one must not become the one before it.
    checkpoint.save(tmp_path, content(2))
    assert step_of(tmp_path) == 2
    damage(tmp_path / "checkpoint.pth")
    assert step_of(tmp_path) == 0


def test_what_a_run_wrote_is_removed_and_nothing_else(tmp_path):
    checkpoint.save(tmp_path, content(0), "checkpoint0000.pth")
    checkpoint.save(tmp_path, content(1), "checkpoint12345.pth")
    for name in ("checkpoint_mine.pth", "checkpoint00.pth", "weights.pth"):
        (tmp_path / name).touch()
    checkpoint.remove(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint_mine.pth", "checkpoint00.pth", "weights.pth"}


def test_where_none_can_be_read_nothing_begins_anew(tmp_path):
    checkpoint.save(tmp_path, content(0))
    checkpoint.save(tmp_path, content(1))
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="checkpoint_previous.pth is not a checkpoint"):
        checkpoint.newest(tmp_path)
