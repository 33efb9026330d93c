"""What other systems do otherwise, as far as it can be had here: spawned workers, names in other
forms and cases, folders listed in another order, no links, no reading by place."""

from __future__ import annotations

import functools
import io
import os
import pickle
import random
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tars import write_tar
from tiny_run import TINY
from torch import nn
from torch.utils import data as torch_data

from dino_kit import cli, features
from dino_kit.data.crops import View
from dino_kit.data.loader import Loader
from dino_kit.data.sources.digits import DigitsSource
from dino_kit.data.sources.folder import FolderSource
from dino_kit.data.sources.huggingface import HuggingFaceSource
from dino_kit.data.sources.lists import ListSource
from dino_kit.data.sources.objects import DatasetSource
from dino_kit.data.sources.opening import open_labelled_sources
from dino_kit.data.sources.single import OneImage
from dino_kit.data.sources.source import Relabelled, Subset, fingerprint
from dino_kit.data.sources.tar import TarSource
from dino_kit.evaluators.identity import _fingerprint

NAMES = ["école/été.png", "école/a.png", "犬/1.png", "한국어/é 2.png", "z/ñ.png", "z/1.png"]


def form(name: str, kind: str) -> str:
    return unicodedata.normalize(kind, name)


def picture(name: str) -> bytes:
    """A file's bytes; the pixels are the name's."""
    seed = zlib.crc32(form(name, "NFC").encode())
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def fill(root: Path, names) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(name))
    return root


# Workers that are spawned


class Numbers:
    """A dataset that could be anybody's."""

    classes, targets = ["even", "odd"], [0, 1, 0]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.full((3, 8, 9), 40 * index, dtype=torch.uint8), index % 2


class Joined:
    """Several sources as one, so that all of them travel to one worker, whose start takes long."""

    classes = None

    def __init__(self, sources):
        self.sources = sources
        self.places = [(one, i) for one, source in enumerate(sources) for i in range(len(source))]

    def __len__(self):
        return len(self.places)

    def __getattr__(self, name):
        if name not in ("read", "key", "name", "label"):
            raise AttributeError(name)
        return functools.partial(self._ask, name)

    def _ask(self, what, index):
        one, place = self.places[index]
        return getattr(self.sources[one], what)(place)


@pytest.fixture
def every_source(tmp_path, monkeypatch) -> Joined:
    monkeypatch.setattr("dino_kit.data.sources.store._WORTH_A_FILE", 1)
    folder = fill(tmp_path / "folder", NAMES)
    tar = write_tar(tmp_path / "x.tar", {name: picture(name) for name in NAMES})
    write_tar(tmp_path / "y.tar", {f"train/{name}": picture(name) for name in NAMES})
    (folder / "x.csv").write_text("\n".join(f"{name},label" for name in NAMES), encoding="utf-8")
    kept = FolderSource(folder, tmp_path / "folder.list"), TarSource(str(tar), tmp_path / "x.list")
    assert all(path.exists() for path in tmp_path.glob("*.list"))
    return Joined(
        [
            FolderSource(folder), TarSource(str(tar)), *kept, ListSource(folder / "x.csv"),
            TarSource(str(tmp_path / "y.tar")).below("train"), OneImage(str(folder / NAMES[0])),
            Subset(DigitsSource("test"), range(3)), Subset(DigitsSource("test", moved=True), [5]),
            DatasetSource(Numbers()), Relabelled(FolderSource(folder), list("abc")
                                                 + FolderSource(folder).classes),
        ]
    )  # fmt: skip


def batches(source, **options) -> list[tuple]:
    views = [[View(6, (0.4, 1.0))] * 2, [View(4, (0.05, 0.4))]]
    loader = Loader(source, views, seed=0, epochs=1, total_batch_size=16, batch_size_per_gpu=16,
                    **options)  # fmt: skip
    return [
        (batch.indices.tolist(), *(group.numpy().tobytes() for group in batch.groups))
        for step in loader
        for batch in step
    ]


def test_spawned_workers_make_the_same_crops_of_every_source(every_source):
    expected = batches(every_source)
    spawned = batches(every_source, num_workers=1, multiprocessing_context="spawn")
    assert len(expected) == len(every_source) // 16 >= 2 and spawned == expected


class Pixels(nn.Module):
    embed_dim = 3 * 8 * 8

    def forward(self, images):
        return images.flatten(1)


def test_spawned_workers_give_the_same_features_of_every_source(every_source, monkeypatch):
    expected = features.embed(Pixels(), every_source, image_size=8, description="").features
    spawning = functools.partial(torch_data.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(features, "DataLoader", spawning)
    found = features.embed(Pixels(), every_source, image_size=8, num_workers=1, description="")
    assert torch.equal(found.features, expected) and not found.left_out


def test_every_source_says_the_same_after_its_travel(every_source):
    for source in every_source.sources:
        sent = pickle.loads(pickle.dumps(source))
        for index in range(len(source)):
            assert np.array_equal(sent.read(index), source.read(index))
            for what in ("key", "name", "label"):
                assert getattr(sent, what)(index) == getattr(source, what)(index)
        assert sent.classes == source.classes and sent.root == source.root


# Names, composed (NFC) and decomposed (NFD), as macOS hands them out


def write(root: Path, kind: str, where: str) -> str:
    """The images of NAMES with names of that form, in a folder, an archive or a list."""
    names = [form(f"{name[:-4]}{number}.png", kind) for name in NAMES for number in range(4)]
    random.Random(kind).shuffle(names)
    if where == "tar":
        return str(write_tar(root / kind / "x.tar", {name: picture(name) for name in names}))
    if where == "labelled tar":
        members = {}
        for number, name in enumerate(sorted(names, key=lambda name: form(name, "NFC"))):
            members[f"{number:02}.png"] = picture(name)
            members[f"{number:02}.cls"] = name.split("/")[0].encode()
        return str(write_tar(root / kind / "x.tar", members))
    fill(root / kind, names)
    if where == "folder":
        return str(root / kind)
    names.sort(key=lambda name: form(name, "NFC"))
    rows = "\n".join(f"{name},{name.split('/')[0]}" for name in names)
    (root / kind / "x.csv").write_text(rows, encoding="utf-8")
    return str(root / kind / "x.csv")


WHERE = ["folder", "tar", "labelled tar", "list"]


def told(source) -> list[tuple]:
    rows = range(len(source))
    return [(form(source.key(i), "NFC"), source.label(i), source.read(i)) for i in rows]


@pytest.mark.parametrize("where", WHERE)
def test_the_form_of_names_changes_neither_order_nor_classes_nor_share(tmp_path, where):
    one, other = (open_labelled_sources(write(tmp_path, kind, where)) for kind in ("NFC", "NFD"))
    for composed, decomposed in zip(one, other, strict=True):
        assert composed.classes == decomposed.classes == sorted({n.split("/")[0] for n in NAMES})
        assert told(composed) == told(decomposed) and len(composed) > 1
        assert fingerprint(composed) == fingerprint(decomposed)
        assert _fingerprint(composed) == _fingerprint(decomposed)
    if where != "labelled tar":  # or nothing would be tried
        assert any(one[0].key(i) != other[0].key(i) for i in range(len(one[0])))


@pytest.mark.parametrize("train", WHERE)
@pytest.mark.parametrize("val", WHERE)
def test_classes_are_matched_whichever_forms_the_two_sets_have(tmp_path, train, val):
    bank, queries = open_labelled_sources(
        train_data=write(tmp_path / "1", "NFD", train), val_data=write(tmp_path / "2", "NFC", val)
    )
    assert bank.classes == queries.classes
    one, other = (
        {source.read(i): source.classes[source.label(i)] for i in range(len(source))}
        for source in (bank, queries)
    )
    assert one == other and len(one) == 24


def test_names_of_classes_of_a_dataset_are_composed():
    dataset = Numbers()
    dataset.classes = [form("été", "NFD"), "b"]
    assert DatasetSource(dataset).classes == ["été", "b"]


def test_names_of_classes_of_hugging_face_are_composed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    names = [form("été", "NFD"), "b"]
    rows = {"image": [None, None], "label": names}
    for kind, labels in (
        (datasets.Value("string"), names), (datasets.ClassLabel(names=names), [0, 1]),
    ):  # fmt: skip
        kinds = datasets.Features({"image": datasets.Image(), "label": kind})
        table = datasets.Dataset.from_dict({**rows, "label": labels}, kinds)
        source = HuggingFaceSource(table, "hf:x")
        assert sorted(source.classes) == ["b", "été"]
        assert [source.classes[source.label(i)] for i in range(2)] == ["été", "b"]


# Upper and lower case


def test_names_that_differ_only_by_case_are_two(tmp_path):
    """In an archive; a file system that does not tell them apart cannot hold both."""
    names = ["Cat/A.png", "Cat/a.png", "cat/a.PNG", "cat/a.png"]
    path = write_tar(tmp_path / "x.tar", {name: picture(str(n)) for n, name in enumerate(names)})
    source = TarSource(str(path))
    assert list(source.names) == names and source.classes == ["Cat", "cat"]
    assert [source.read(n) for n in range(4)] == [picture(str(n)) for n in range(4)]
    fill(tmp_path / "folder", names)
    if len(list((tmp_path / "folder").rglob("*.*"))) == len(names):
        assert list(FolderSource(tmp_path / "folder").names) == names


# Folders that are listed in another order


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("archives", [False, True])
def test_a_split_does_not_depend_on_how_a_folder_is_listed(tmp_path, monkeypatch, seed, archives):
    for half in ("val", "train", "test"):
        if archives:
            for name in NAMES:
                member = {name: picture(half + name)}
                write_tar(tmp_path / half / f"{NAMES.index(name)}.tar", member)
        else:
            fill(tmp_path / half, NAMES)
    expected = [told(source) for source in open_labelled_sources(str(tmp_path))]
    shuffle, scandir, listdir = random.Random(seed).sample, os.scandir, os.listdir
    seen = []

    def shuffled(entries, key=str):
        entries = sorted(entries, key=key)
        entries = shuffle(entries, len(entries))
        seen.append(list(map(key, entries)))
        return entries

    monkeypatch.setattr(os, "scandir", lambda x: shuffled(scandir(x), lambda entry: entry.name))
    monkeypatch.setattr(os, "listdir", lambda path: shuffled(listdir(path)))
    assert [told(source) for source in open_labelled_sources(str(tmp_path))] == expected
    assert any(names != sorted(names) for names in seen)


# What a system lacks


def test_a_run_needs_no_links(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    for name in ("link", "symlink"):
        monkeypatch.setattr(os, name, refuse)
    fill(tmp_path / "in", [f"{kind}/{n}.png" for kind in "ab" for n in range(8)])
    flags = ["--epochs", "2", "--saveckp_freq", "1", "--probe_data", str(tmp_path / "in")]
    out = tmp_path / "out"
    line = ["train", "--data_path", str(tmp_path / "in"), "--output_dir", str(out), *TINY, *flags]
    assert cli.main(line) == 0
    kept = {path.name for path in out.glob("*.pth")}
    names = {"checkpoint.pth", "checkpoint_previous.pth", "checkpoint0000.pth", "checkpoint0001.pth"}
    assert names <= kept and not list(out.glob(".*.tmp"))
    assert (out / "checkpoint.pth").read_bytes() == (out / "checkpoint0001.pth").read_bytes()
    assert (out / "checkpoint.pth").stat().st_nlink == 1  # or links were there after all


def test_archives_are_read_where_no_place_can_be_read_from(tmp_path, monkeypatch):
    path = str(write_tar(tmp_path / "x.tar", {name: picture(name) for name in NAMES}))
    expected = told(TarSource(path))
    monkeypatch.delattr(os, "pread", raising=False)
    source = TarSource(path)
    assert told(source) == expected
    assert [source.read(index) for index in reversed(range(6))] == [
        content for *_, content in reversed(expected)
    ]


def test_a_list_that_another_process_has_open_cannot_be_replaced_and_is_no_fault(
    tmp_path, monkeypatch
):
    """On Windows a file that is mapped stays as it is."""
    monkeypatch.setattr("dino_kit.data.sources.store._WORTH_A_FILE", 1)
    monkeypatch.setattr("dino_kit.data.sources.folder._TOO_FRESH", 0)
    root, kept = fill(tmp_path / "in", NAMES), tmp_path / "x.list"
    FolderSource(root, kept)

    def refuse(*_):
        raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr(os, "replace", refuse)
    fill(root, ["z/2.png"])
    for _ in range(2):
        source = FolderSource(root, kept)
        assert len(source) == 7 and told(pickle.loads(pickle.dumps(source))) == told(source)
    assert sorted(os.listdir(tmp_path)) == ["in", "x.list"]
