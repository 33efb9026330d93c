"""Files appear whole or not at all; weights are read without running code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_kit import files, log
from dino_kit.errors import UserError


def test_a_write_that_fails_leaves_the_old_content_and_no_leftover(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.atomic_write(path, "w") as file:
        file.write("half of the n")
        file.flush()
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_old_content_stands_until_the_new_is_whole(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with files.atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("fault", [None, OSError, PermissionError])
def test_same_content_replaces_and_stays_when_the_source_is_rewritten(tmp_path, monkeypatch, fault):
    if fault:
        monkeypatch.setattr(os, "link", _no_links(fault))
    source, target = tmp_path / "a", tmp_path / "b"
    files.write_text(source, "one")
    files.write_text(target, "zero")
    for _ in range(2):
        files.same_content(source, target)
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    files.write_text(source, "two")
    assert target.read_text() == "one"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("place", ["shutil.copyfileobj", "os.fsync"])
def test_a_copy_that_fails_leaves_the_old_content(tmp_path, monkeypatch, place):
    """A copy that is not on the disk may be lost after the name was given to it."""
    files.write_text(tmp_path / "a", "one")
    files.write_text(tmp_path / "b", "zero")
    for function in ("os.link", place):
        monkeypatch.setattr(function, _no_links(OSError))
    with pytest.raises(OSError, match="has no links"):
        files.same_content(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "zero" and sorted(os.listdir(tmp_path)) == ["a", "b"]


def _no_links(fault):
    def refuse(*_):
        raise fault("this file system has no links")

    return refuse


def test_cut_lines_keeps_what_fits_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    files.cut_lines(path, lambda line: line["step"] <= 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_weights_come_back_with_plain_data_and_numpy_scalars(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"x": torch.arange(3), "epoch": 2, "best": np.float64(0.5)}, path)
    content = files.read_weights(path)
    assert content["x"].tolist() == [0, 1, 2] and content["epoch"] == 2 and content["best"] == 0.5


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_does_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": _RunsCode()}, "weights.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="run code" if zipped else "not a checkpoint"):
        files.read_weights("weights.pth")
    assert not (tmp_path / "ran").exists()


def test_a_flipped_byte_is_found(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"x": torch.full((1000,), 7.0)}, path)
    content = bytearray(path.read_bytes())
    place = content.find(np.full(8, 7.0, np.float32).tobytes())
    content[place + 100] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["x"].ne(7).any(), "torch alone reads it silently"
    with pytest.raises(UserError, match="checksum"):
        files.read_weights(path)


def deflated_and_damaged() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(range(256)) * 20)
    damaged = bytearray(file.getvalue())
    damaged[30 + len("archive/data.pkl")] = 0xFF  # where the compressed bytes begin
    return bytes(damaged)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>404</html>", b"PK\x03\x04 cut off", b"junk", b"run", b"GPU", b"\x80\x02.",
     deflated_and_damaged()],
)  # fmt: skip
def test_what_is_no_checkpoint_is_said_in_one_sentence(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint") as error:
        files.read_weights(path)
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_damage_gives_the_content_or_a_sentence(data):
    file = io.BytesIO()
    torch.save({"x": torch.arange(5), "n": 3}, file)
    damaged = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
        with contextlib.suppress(UserError):
            files.read_weights(path)


def test_what_killed_processes_left_is_removed_and_what_is_in_use_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone, in_use, other = (
        tmp_path / name
        for name in (f".a.{ended.pid}.tmp", f".a.{os.getpid()}.tmp", ".mine.tmp")
    )
    for path in (gone, in_use, other):
        path.touch()
    files.remove_leftovers(tmp_path)
    assert [path.exists() for path in (gone, in_use, other)] == [False, True, True]


def test_a_folder_below_a_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "a.yaml").write_text("")
    files.require_folder("output_dir", str(tmp_path / "new/folder"))
    files.require_folder("output_dir", None)
    for place, said in [("a.yaml", "a.yaml is a file"), ("a.yaml/x/y", "a.yaml, which is a file")]:
        with pytest.raises(UserError, match=f"--output_dir .*{said}; a folder is needed"):
            files.require_folder("output_dir", str(tmp_path / place))


def test_a_truncated_checkpoint_is_found(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="not a checkpoint"):
        files.read_weights(path)


def test_a_bare_tensor_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="holds a Tensor"):
        files.read_weights(tmp_path / "weights.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*weights\.pth"):
        files.read_weights(tmp_path / "weights.pth")


def test_names_that_are_no_valid_text_can_be_written_down(tmp_path, capsys):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    files.write_json(tmp_path / "names.json", {name: name})
    assert json.loads((tmp_path / "names.json").read_text("utf-8")) == {name: name}
    log.say(name)
    assert capsys.readouterr().out == "caf\\udce9.png\n"


@pytest.mark.parametrize("limit", [0, 64, 5000, 40_000])
def test_a_full_disk_is_what_a_write_of_weights_tells(tmp_path, limit):
    # torch.save itself would end in a RuntimeError about a position, or in an abort.
    code = f"""
import errno, resource, sys, torch
from dino_kit import files
content = {{str(n): torch.zeros(1000) for n in range(20)}}
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    files.write_weights("weights.pth", content)
except OSError as error:
    sys.exit(42 if error.errno == errno.EFBIG else 1)
"""
    (tmp_path / "weights.pth").write_bytes(b"old")
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 42, ran.stderr
    assert os.listdir(tmp_path) == ["weights.pth"]
    assert (tmp_path / "weights.pth").read_bytes() == b"old"


@pytest.fixture
def interruptible():
    """A shell's background jobs ignore an interruption, and Python then has no handler for it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_waits_until_the_weights_are_written(tmp_path, monkeypatch):
    def interrupted(content, target):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)  # it would be raised here, at the latest
        real(content, target)

    real = torch.save
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_weights(tmp_path / "weights.pth", {"x": torch.arange(3)})
    assert files.read_weights(tmp_path / "weights.pth")["x"].tolist() == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_weights_are_written_in_a_thread_too(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(files.write_weights, tmp_path / "weights.pth", {"x": torch.arange(3)}).result()
    assert files.read_weights(tmp_path / "weights.pth")["x"].tolist() == [0, 1, 2]
