"""A checkpoint made by an attacker: whoever reads it, none of its code runs."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import importlib
import io
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from test_train import assert_same, pictures, result, train, whole  # noqa: F401

import dino_kit
from dino_kit import cli, files
from dino_kit.errors import UserError

MARK = "ran"  # the folder that the code makes where it runs


class Calls:
    """Pickled as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Spelled:
    """Pickled as a call of a function by the name that is given, whatever that may be."""

    def __init__(self, module: str, name: str, *arguments):
        self.spelling, self.arguments = (module, name), arguments


def _pickled(value) -> bytes:
    """Protocol 2, as torch.save writes it."""
    file = io.BytesIO()

    class Pickler(pickle._Pickler):  # the one in Python lets a name be written as it is given
        def save(self, obj, save_persistent_id=True):
            if isinstance(obj, Spelled):
                self.write(b"c%s\n%s\n" % tuple(part.encode() for part in obj.spelling))
                self.save(obj.arguments)
                return self.write(pickle.REDUCE)
            return super().save(obj, save_persistent_id)

    Pickler(file, 2).dump(value)
    return file.getvalue()


def _nested() -> bytes:
    file = io.BytesIO()
    torch.save(Calls(os.mkdir, MARK), file)
    return file.getvalue()


ATTACKS = {
    "a call": lambda: Calls(os.mkdir, MARK),
    "a shell": lambda: Calls(os.system, f"mkdir {MARK}"),
    "exec": lambda: Calls(builtins.exec, f"import os; os.mkdir({MARK!r})"),
    "import": lambda: Calls(importlib.import_module, "this"),
    "in the arguments": lambda: argparse.Namespace(arch="vit_small", x=Calls(os.mkdir, MARK)),
    "a scalar's value": lambda: Spelled(
        "numpy.core.multiarray", "scalar", np.dtype("O"), Calls(os.mkdir, MARK)
    ),
    "a scalar, new": lambda: Spelled(
        "numpy._core.multiarray", "scalar", np.dtype("O"), Calls(os.mkdir, MARK)
    ),
    "beside the scalar": lambda: Spelled("numpy._core.multiarray", "os.mkdir", MARK),
    "numpy's own": lambda: Spelled(
        "numpy.testing._private.utils", "runstring", f"import os; os.mkdir({MARK!r})", {}
    ),
    "a storage": lambda: Spelled("torch.storage", "_load_from_bytes", _nested()),
    "torch.load": lambda: Spelled("torch.serialization", "load", io.BytesIO(_nested())),
    "torch.hub": lambda: Spelled("torch.hub", "load", ".", "x"),
}


def attack(path, kind: str, rest: dict, zipped: bool = True) -> None:
    """A checkpoint at ``path`` that holds the attack beside what a reader looks for."""
    data = _pickled({"x": ATTACKS[kind](), **rest})
    if not zipped:
        path.write_bytes(data)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ATTACKS)
def test_no_code_runs(tmp_path, monkeypatch, kind, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pth"
    attack(path, kind, {"epoch": 3}, zipped)
    with pytest.raises(UserError, match="could run code" if zipped else "not a checkpoint"):
        files.read_weights(path)
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_the_attacks_are_ones(tmp_path, monkeypatch):
    """Read without care they run; a test of a harmless file would show nothing."""
    for kind in ("a call", "a shell", "exec", "in the arguments", "a storage", "a scalar's value"):
        (tmp_path / kind).mkdir()
        monkeypatch.chdir(tmp_path / kind)
        attack(tmp_path / kind / "x.pth", kind, {})
        with contextlib.suppress(TypeError):  # such a scalar is none, but by then the code has run
            torch.load("x.pth", weights_only=False)
        assert os.path.isdir(MARK), kind


def test_every_command_that_reads_one_refuses_it(pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    attack(tmp_path / "checkpoint.pth", "a call", {})
    image = next(pictures.rglob("*.png"))
    for line in (
        f"knn . --data_path {pictures}",
        f"linear . --data_path {pictures}",
        f"attention . --image_path {image}",
        "report .",
    ):
        status = cli.main([*line.split(), *([] if line == "report ." else ["--device", "cpu"])])
        assert status == 2 or line == "report ."
    assert train(pictures, tmp_path) == 2
    assert "could run code" in capsys.readouterr().err
    with pytest.raises(UserError, match="could run code"):
        dino_kit.load_backbone(tmp_path)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("core", ["core", "_core"])
def test_what_published_files_hold_is_read(tmp_path, core):
    scalar = np.float64(0.75).__reduce__()[1]
    data = _pickled({
        "args": argparse.Namespace(arch="vit_small", patch_size=16, lr=0.1),
        "best": Spelled(f"numpy.{core}.multiarray", "scalar", *scalar),
    })  # fmt: skip
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    content = files.read_weights(tmp_path / "x.pth")
    assert content["best"] == 0.75 and content["args"].patch_size == 16


# Damage of a run's own checkpoint


@pytest.mark.parametrize("damage", ["cut off", "flipped", "empty"])
def test_a_run_goes_on_from_the_one_before_and_says_so(
    pictures, whole, tmp_path, capsys, damage  # noqa: F811
):
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / "run/checkpoint.pth"
    data = bytearray(newest.read_bytes())
    if damage == "flipped":
        weights = result(whole)["teacher"]["backbone.pos_embed"].numpy().tobytes()
        data[data.index(weights[:64]) + 5] ^= 0x10
    newest.unlink()
    newest.write_bytes({"cut off": data[: len(data) * 2 // 3], "empty": b"", "flipped": data}[damage])
    assert train(pictures, tmp_path / "run", "--saveckp_freq", 2) == 0
    said = capsys.readouterr()
    assert "The one before it, checkpoint_previous.pth, is used." in said.err
    assert "going on after step 4 of 6" in said.out
    for name in ("student", "teacher", "optimizer"):
        assert_same(result(whole)[name], result(tmp_path / "run")[name])


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path):
    path = tmp_path / "x.pth"
    content = {"step": 3, "x": torch.arange(200.0), "y": torch.arange(50)}
    torch.save(content, path)
    good = path.read_bytes()
    numbers = np.random.default_rng(0)
    found = 0
    for place in numbers.integers(0, len(good), 300):
        data = bytearray(good)
        data[place] ^= 1 << int(numbers.integers(8))
        path.write_bytes(data)
        try:
            read = files.read_weights(path)
        except UserError:
            found += 1
        else:
            assert read["step"] == 3 and set(read) == set(content)
            assert torch.equal(read["x"], content["x"]) and torch.equal(read["y"], content["y"])
    assert found > 100
