"""Lists of images in a file, Python objects, and datasets by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_kit.data.decode import decode
from dino_kit.data.sources.huggingface import HuggingFaceSource
from dino_kit.data.sources.lists import ListSource
from dino_kit.data.sources.objects import DatasetSource
from dino_kit.data.sources.opening import open_data, open_labelled_sources, open_training_source
from dino_kit.data.sources.source import Subset, require_labels
from dino_kit.errors import BadImage, UserError


def listed(tmp_path: Path, name: str, text: str) -> list[tuple[str, str | None]]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    source = open_training_source(str(path))
    assert isinstance(source, ListSource) and source.root == str(path)
    labels = [source.label(i) for i in range(len(source))]
    names = [None if label is None else source.classes[label] for label in labels]
    return list(zip(source.paths, names, strict=True))


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("x.txt", "b.png\na b.png\n\nc.png", [("b.png", None), ("a b.png", None), ("c.png", None)]),
        ("x.txt", "b.png\tdog\na.png\tcat\nc.png", [("b.png", "dog"), ("a.png", "cat"), ("c.png", None)]),
        ("x.txt", "b x.JPEG 65\na.JPEG 970\n", [("b x.JPEG", "65"), ("a.JPEG", "970")]),
        ("x.txt", "a 1.png\nb 2\n", [("a 1.png", None), ("b 2", None)]),
        ("x.csv", "b.png,dog\na.png,cat\n", [("b.png", "dog"), ("a.png", "cat")]),
        ("x.csv", "b.png\na.png\n", [("b.png", None), ("a.png", None)]),
        ("x.csv", "id,Label,Path\n7,x,b.png\n8,,a.png\n", [("b.png", "x"), ("a.png", None)]),
        ("x.csv", 'filename,w\n"a, b.png",3\r\n', [("a, b.png", None)]),
        ("x.tsv", "path\tclass\nb,1.png\té\n", [("b,1.png", "é")]),
        ("x.txt", "\ufeffa.png\n", [("a.png", None)]),
    ],
)
def test_a_list_is_read_in_its_order(tmp_path, name, text, expected):
    assert listed(tmp_path, name, text) == expected


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    (tmp_path / "x.csv").write_text("a,10\nb,9\nc,100\n")
    assert ListSource(tmp_path / "x.csv").classes == ["9", "10", "100"]


def test_paths_count_from_the_lists_folder(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"one")
    (tmp_path / "in" / "x.txt").write_text(f"a.png\n{tmp_path / 'in' / 'a.png'}\ngone.png\n")
    monkeypatch.chdir(tmp_path)
    source = pickle.loads(pickle.dumps(open_training_source("in/x.txt")))
    assert source.read(0) == source.read(1) == b"one"
    with pytest.raises(BadImage, match=r"in/gone\.png cannot be opened: No such file"):
        source.read(2)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("x.txt", b"\n \n", "lists no image"),
        ("x.csv", b"path,label\n", "lists no image"),
        ("x.csv", b"path,label\na,1\n,2\n", "names no image in its row 3"),
        ("x.csv", b"\xff\xfe", "is no text in UTF-8"),
        ("x.txt", b"a\n\tcat\n", "names no image in its line 2"),
        ("x.txt", b"a\0b", "holds characters of no text"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_data(str(tmp_path / name))


def test_a_labelled_list_is_split_by_its_names(tmp_path):
    rows = [f"{name}{i}.png,{name}" for name in "ab" for i in range(20)]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    bank, queries = open_labelled_sources(str(tmp_path / "x.csv"))
    assert bank.classes == ["a", "b"] and len(bank) + len(queries) == 40 and len(queries) > 1
    (tmp_path / "y.txt").write_text("a/1.png\nb/2.png\n")
    with pytest.raises(UserError, match="has no labels, which an evaluation needs"):
        open_labelled_sources(str(tmp_path / "y.txt"))


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")),
       suffix=st.sampled_from([".txt", ".csv", ".tsv"]))  # fmt: skip
def test_no_text_does_more_than_raise_the_named_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("list") / f"x{suffix}"
    path.write_bytes(content)
    try:
        source = ListSource(path)
    except UserError:
        return
    for index in range(len(source)):
        assert source.key(index).strip() and source.label(index) in (None, *range(len(source)))


class Pairs(torch.utils.data.Dataset):
    def __init__(self, images, labels=None, **more):
        self.images, self.given = images, labels
        vars(self).update(more)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return image if self.given is None else (image, self.given[index])


PIXELS = np.arange(2 * 5 * 4 * 3, dtype=np.uint8).reshape(2, 5, 4, 3)


@pytest.mark.parametrize(
    "images",
    [PIXELS, [Image.fromarray(p) for p in PIXELS], torch.from_numpy(PIXELS).permute(0, 3, 1, 2)],
    ids=["arrays", "pil", "tensors"],
)
def test_a_dataset_of_images_is_a_source(images):
    source = open_training_source(Pairs(images, [1, 0], classes=["cat", "dog"]))
    assert source.classes == ["cat", "dog"] and [source.label(i) for i in range(2)] == [1, 0]
    assert np.array_equal(np.asarray(source.read(1)), PIXELS[1])
    assert source.name(1) == "Pairs[1]" and source.key(1) == "1"


def test_labels_are_where_datasets_have_them():
    assert DatasetSource(Pairs(PIXELS)).classes is None
    assert DatasetSource(Pairs(PIXELS, targets=[0, 2])).classes == ["0", "1", "2"]
    assert DatasetSource(Pairs(PIXELS, labels=torch.tensor([0, 1]))).label(1) == 1
    assert DatasetSource([{"image": PIXELS[0], "label": 3}]).label(0) == 3
    with pytest.raises(UserError, match="A label is 'x'"):
        _ = DatasetSource([(PIXELS[0], "x")]).classes


def test_a_fault_in_a_dataset_is_told_of_its_item():
    with pytest.raises(BadImage, match=r"^Broken\[0\] cannot be read: a fault\.$"):
        DatasetSource(Broken()).read(0)
    with pytest.raises(BadImage, match=r"is a str, and should be an image"):
        DatasetSource(["x.png"]).read(0)
    with pytest.raises(UserError, match="is no dataset"):
        open_data(iter([]))
    with pytest.raises(UserError, match="holds no image"):
        open_data([])


class Patchy(list):
    """The items whose place is in ``lost`` cannot be read; all that were asked for are in ``asked``."""

    def __init__(self, items, lost=()):
        super().__init__(items)
        self.lost, self.asked = lost, []

    def __getitem__(self, index):
        self.asked.append(index)
        if index in self.lost:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


@pytest.mark.parametrize("lost", [0, 2])
def test_an_item_that_cannot_be_read_takes_no_labels_from_the_others(lost):
    source = DatasetSource(Patchy([(PIXELS[0], 1)] * 4, [lost]))
    assert source.classes == ["0", "1"]
    labels = [source.label(index) for index in range(4)]
    assert labels.pop(lost) is None and labels == [1, 1, 1]


def test_training_reads_no_item_for_its_label():
    dataset = Patchy([(PIXELS[0], 1)] * 4)
    assert len(Subset(open_training_source(dataset), [1, 2])) == 2
    assert dataset.asked == []


class Broken(list):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise RuntimeError("a\nfault")


def test_an_unknown_dataset_of_torchvision_names_the_nearest():
    with pytest.raises(UserError, match="names no dataset of torchvision .* CIFAR10"):
        open_data("torchvision:CIFAR")


def test_a_dataset_that_is_not_here_is_not_fetched(tmp_path):
    data = open_data(f"torchvision:cifar10:{tmp_path / 'none'}")
    assert data.parts == ("train", "test") and data.training == "train"
    with pytest.raises(UserError, match="cannot be read from .*; --download fetches it"):
        data.open("train")
    assert not (tmp_path / "none").exists()




def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(head + values.tobytes())


def test_a_dataset_of_torchvision_with_a_split(tmp_path):
    pixels = np.arange(6 * 28 * 28, dtype=np.uint8).reshape(6, 28, 28)
    for name, part in (("train", pixels[:4]), ("t10k", pixels[4:])):
        raw = tmp_path / "FashionMNIST" / "raw"
        write_idx(raw / f"{name}-images-idx3-ubyte", part)
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(len(part), dtype=np.uint8))
    path = f"torchvision:FashionMNIST:{tmp_path}"
    bank, queries = open_labelled_sources(path)
    assert (len(bank), len(queries)) == (4, 2) and bank.classes[1] == "Trouser"
    assert np.array_equal(np.asarray(queries.read(1)), pixels[5]) and queries.label(1) == 1
    assert queries.name(1) == "torchvision:FashionMNIST:test[1]"
    assert len(open_training_source(path)) == 4


def test_a_dataset_of_torchvision_without_a_split(tmp_path):
    for name in ("Forest", "River"):
        for number in range(5):
            path = tmp_path / "eurosat" / "2750" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS[number % 2]).save(path)
    path = f"torchvision:EuroSAT:{tmp_path}"
    assert len(open_training_source(path)) == 10
    bank, queries = open_labelled_sources(path)
    assert bank.classes == ["Forest", "River"] and len(bank) + len(queries) == 10


def test_labels_of_torchvisions_are_known_without_decoding_an_image(tmp_path):
    for part in ("train", "valid", "test"):
        for name in ("negative", "positive"):
            path = tmp_path / "rendered-sst2" / part / name / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(b"no image")
    source = open_data(f"torchvision:RenderedSST2:{tmp_path}").open("train")
    assert source.classes == ["negative", "positive"]
    assert [source.label(index) for index in range(2)] == [0, 1]
    with pytest.raises(BadImage):
        source.read(0)


def test_stl10_is_trained_on_its_images_without_labels():
    data = open_data("torchvision:STL10:nowhere")
    assert data.training == "unlabeled" and set(data.parts) == {"train", "test", "unlabeled"}


def write_parquet(path: Path, labels, column: str = "picture", **features) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(np.full((4, 5, 3), 20 * i, np.uint8)) for i in range(len(labels))]
    kinds = {column: datasets.Image(), **features}
    table = datasets.Dataset.from_dict(
        {column: images, **{name: labels for name in features}}, datasets.Features(kinds)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path))


def test_a_folder_of_parquet_is_read_by_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kind = datasets.ClassLabel(names=["dog", "cat"])
    write_parquet(tmp_path / "in" / "train-0.parquet", [1, 0, 1], kind=kind)
    write_parquet(tmp_path / "in" / "test-0.parquet", [0], kind=kind)
    bank, queries = open_labelled_sources(f"hf:{tmp_path / 'in'}")
    assert bank.classes == ["dog", "cat"] and [bank.label(i) for i in range(3)] == [1, 0, 1]
    assert (len(queries), queries.name(0)) == (1, f"hf:{tmp_path / 'in'}:test[0]")
    image = decode(bank.read(2), bank.name(2))
    assert np.array_equal(np.asarray(image), np.full((4, 5, 3), 40, np.uint8))
    assert contents_of(pickle.loads(pickle.dumps(bank))) == contents_of(bank)


def contents_of(source) -> list[tuple]:
    return [(source.read(i), source.label(i)) for i in range(len(source))]


def test_labels_of_datasets_that_are_plain_values(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "in" / "x.parquet", ["b", None, "a"], label=datasets.Value("string"))
    source = open_training_source(f"hf:{tmp_path / 'in'}")
    assert source.classes == ["a", "b"] and [source.label(i) for i in range(3)] == [1, None, 0]


def test_a_table_without_images_says_what_it_has(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "in").mkdir()
    datasets.Dataset.from_dict({"a": [1], "b": [2]}).to_parquet(str(tmp_path / "in" / "x.parquet"))
    with pytest.raises(UserError, match="has no column of images among a, b"):
        open_training_source(f"hf:{tmp_path / 'in'}")


def test_a_name_that_is_not_here_is_not_fetched(monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="cannot be read: .*; --download fetches it"):
        open_data("hf:nobody/nothing-of-this-name")


def test_other_columns_of_images_are_not_decoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = [{"bytes": b"no image", "path": None}]
    table = datasets.Dataset.from_dict({"image": rows, "mask": rows}, kinds)
    assert HuggingFaceSource(table, "hf:x").read(0) == b"no image"


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_folders_are_not_missed_where_they_are_no_classes(tmp_path, kind):
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    source = ListSource(tmp_path / "list.txt") if kind == "list" else DatasetSource([PIXELS[0]])
    with pytest.raises(UserError, match=r"has no labels, which an evaluation needs\.$"):
        require_labels(source)
