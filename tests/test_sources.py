"""Sources: what is found, in what order, with which labels, and what is refused."""

from __future__ import annotations

import os
import pickle
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal
from sklearn.datasets import load_digits
from torchvision.datasets.folder import IMG_EXTENSIONS

from dino_kit.data.sources.digits import DigitsSource
from dino_kit.data.sources.folder import FolderSource
from dino_kit.data.sources.opening import open_labelled_sources, open_training_source
from dino_kit.data.sources.source import EXTENSIONS, Subset, read_file


def fill(root: Path, *paths: str) -> Path:
    """Files that hold their own path: a source decodes nothing."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))
    return root


def contents(source) -> list[tuple]:
    return [(source.name(i), source.label(i), bytes(source.read(i))) for i in range(len(source))]


def test_a_flat_folder_has_images_and_no_labels(tmp_path):
    source = FolderSource(fill(tmp_path, "b.png", "a.jpg", "c.webp"))
    assert source.classes is None and len(source) == 3
    assert contents(source) == [
        (str(tmp_path / name), None, name.encode()) for name in ("a.jpg", "b.png", "c.webp")
    ]


def test_the_class_is_the_first_folder_at_any_depth(tmp_path):
    fill(tmp_path, "dog/deep/er/1.JPG", "cat/2.png", "dog/0.png", "ant/x/3.png")
    source = FolderSource(str(tmp_path))
    assert source.classes == ["ant", "cat", "dog"]
    assert [(source.names[i], source.label(i)) for i in range(4)] == [
        ("ant/x/3.png", 0), ("cat/2.png", 1), ("dog/0.png", 2), ("dog/deep/er/1.JPG", 2),
    ]  # fmt: skip
    assert source.read(3) == b"dog/deep/er/1.JPG"


def test_an_image_in_the_root_itself_takes_the_labels_away(tmp_path):
    source = FolderSource(fill(tmp_path, "a/1.png", "2.png", "b/3.png"))
    assert list(source.names) == ["2.png", "a/1.png", "b/3.png"]
    assert source.classes is None and {source.label(i) for i in range(3)} == {None}


def test_the_extensions_are_torchvisions_in_any_case(tmp_path):
    assert {*IMG_EXTENSIONS, ".avif", ".gif", ".npy"} == EXTENSIONS
    names = {f"1{extension}" for extension in EXTENSIONS}
    names |= {f"2{extension.upper()}" for extension in EXTENSIONS}
    fill(tmp_path, *names, "notes.txt", "png", "a.png.gz", "noextension")
    assert set(FolderSource(tmp_path).names) == names


def test_hidden_files_and_folders_are_left_out(tmp_path):
    fill(tmp_path, "a/1.png", ".2.png", ".trash/3.png", "a/.thumbs/4.png", "a/._1.png")
    assert list(FolderSource(tmp_path).names) == ["a/1.png"]


def test_a_folder_with_the_name_of_an_image_is_a_folder(tmp_path):
    assert list(FolderSource(fill(tmp_path, "a.png/1.png")).names) == ["a.png/1.png"]


PATHS = ["a/1.png", "a/b/1.png", "a b/1.png", "a-b/1.png", "B/1.png", "a/10.png", "a/9.png"]


def test_the_order_is_that_of_the_parts(tmp_path):
    assert list(FolderSource(fill(tmp_path, *PATHS)).names) == [
        "B/1.png", "a/1.png", "a/10.png", "a/9.png", "a/b/1.png", "a b/1.png", "a-b/1.png",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch, seed):
    expected = FolderSource(fill(tmp_path, *PATHS, "日本/1.png", "été/1.png"))
    listed = os.scandir
    shuffle = random.Random(seed).sample
    seen = []

    def shuffled(path):
        entries = sorted(listed(path), key=lambda entry: entry.name)
        entries = shuffle(entries, len(entries))
        seen.extend(entry.name for entry in entries)
        return entries

    monkeypatch.setattr(os, "scandir", shuffled)
    found = FolderSource(tmp_path)
    assert list(found.names) == list(expected.names) and found.classes == expected.classes
    assert seen != sorted(seen)


NAMES = ["zebra", "école", "e", "ångström", "собака", "犬", "한국어", "ƒ"]


def in_form(form: str, root: Path, number: int = 3) -> Path:
    names = [unicodedata.normalize(form, name) for name in NAMES]
    return fill(root, *(f"{name}/{name} {i}.png" for name in names for i in range(number)))


def test_composed_and_decomposed_names_give_one_order_and_the_same_classes(tmp_path):
    composed = FolderSource(in_form("NFC", tmp_path / "nfc"))
    decomposed = FolderSource(in_form("NFD", tmp_path / "nfd"))
    assert list(composed.names) != list(decomposed.names)
    assert list(composed.names) == [unicodedata.normalize("NFC", path) for path in decomposed.names]
    assert composed.classes == decomposed.classes == sorted(NAMES)
    labels = [decomposed.label(i) for i in range(len(decomposed))]
    assert labels == sorted(labels) == [composed.label(i) for i in range(len(composed))]
    assert decomposed.read(0) == os.fsencode(decomposed.names[0])


def test_a_class_in_both_forms_is_one_class(tmp_path):
    source = FolderSource(fill(tmp_path, "e\u0301/1.png", "é/2.png", "f/3.png"))
    assert source.classes == ["f", "é"]
    assert [source.label(i) for i in range(3)] == [0, 1, 1]


def undecodable(root: Path) -> Path:
    try:
        return fill(root, *(os.fsdecode(b"caf\xe9/\xff%d.png" % i) for i in range(20)))
    except OSError:
        pytest.skip("this file system knows Unicode names only")


def test_names_that_are_no_unicode_can_be_read_and_split(tmp_path):
    source = FolderSource(undecodable(tmp_path))
    assert source.read(0) == os.fsencode(source.names[0])
    bank, queries = open_labelled_sources(str(tmp_path), val_share=0.4)
    assert len(bank) + len(queries) == 20


def test_links_to_folders_and_files_are_followed(tmp_path):
    fill(tmp_path, "elsewhere/deep/1.png", "elsewhere/2.png", "data/own/3.png")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data/own/4.png").symlink_to(tmp_path / "elsewhere/2.png")
    source = FolderSource(tmp_path / "data")
    assert list(source.names) == ["linked/2.png", "linked/deep/1.png", "own/3.png", "own/4.png"]
    assert source.read(1) == b"elsewhere/deep/1.png" and source.read(3) == b"elsewhere/2.png"


@pytest.mark.parametrize(
    "link, target",
    [("data/a/up", "data/a"), ("data/a/top", "data"), ("data/a/same", "data/a/same"),
     ("data/a/root", "."), ("data/a/b/up", "data/a")],
)  # fmt: skip
def test_a_loop_of_links_ends_and_finds_each_image_once(tmp_path, link, target):
    fill(tmp_path, "data/a/1.png", "data/a/b/2.png")
    (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    assert list(FolderSource(tmp_path / "data").names) == ["a/1.png", "a/b/2.png"]


def test_a_loop_over_two_folders_ends(tmp_path):
    fill(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b/to_a").symlink_to(tmp_path / "a", target_is_directory=True)
    assert list(FolderSource(tmp_path).names) == [
        "a/1.png", "a/to_b/2.png", "b/2.png", "b/to_a/1.png",
    ]  # fmt: skip


def test_the_root_itself_may_be_a_link(tmp_path):
    fill(tmp_path, "data/a/1.png")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "data", target_is_directory=True)
    assert list(FolderSource(tmp_path / "link").names) == ["a/1.png"]


def test_a_link_that_leads_nowhere_is_named_when_it_is_read(tmp_path):
    (tmp_path / "1.png").symlink_to(tmp_path / "gone.png")
    source = FolderSource(tmp_path)
    sentence = refusal(source.read, 0)
    assert sentence == f"{tmp_path / '1.png'} cannot be opened: No such file or directory."


@pytest.mark.parametrize(
    "paths, found",
    [([], "found no files at all"), (["a/"], "found no files at all"),
     (["1.txt", "a/2.TXT", "3.txt", "b.psd", "b.PSD", "c"],
     "found only 3 × .txt, 2 × .psd, 1 × no extension"),
     ([".1.png"], "found no files at all")],
)  # fmt: skip
def test_a_folder_without_images_says_what_there_is_instead(tmp_path, paths, found):
    fill(tmp_path, *(path for path in paths if not path.endswith("/")))
    (tmp_path / "a").mkdir(exist_ok=True)
    sentence = refusal(FolderSource, tmp_path)
    assert sentence.startswith(f"There is no image in {tmp_path}: ") and ".jpeg, .jpg" in sentence
    assert sentence.endswith(f"{found}.")


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    fill(tmp_path, "a.png")
    for name, kind in (("a.png", "a file"), ("b", "nothing")):
        sentence = refusal(FolderSource, tmp_path / name)
        assert sentence == f"{tmp_path / name} should be a folder of images, and there is {kind}."


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    fill(tmp_path, "a/1.png", "b/2.png")
    listed = os.scandir

    def scandir(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    sentence = refusal(FolderSource, tmp_path)
    assert sentence == f"The folder {tmp_path / 'b'} cannot be read: Permission denied."


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    source = FolderSource(fill(tmp_path, "a/1.png", "a/2.png"))
    (tmp_path / "a/2.png").unlink()
    (tmp_path / "a/2.png").mkdir()
    name = str(tmp_path / "a/2.png")
    assert source.read(0) == b"a/1.png"
    assert refusal(source.read, 1).startswith(f"{name} cannot be opened: ")
    assert refusal(read_file, name) == refusal(source.read, 1)


@pytest.fixture(scope="module")
def digits() -> dict:
    return {(split, moved): DigitsSource(split, moved)
            for split in ("train", "test") for moved in (False, True)}  # fmt: skip


def rows(source: DigitsSource) -> list[int]:
    return [int(source.name(i).partition("[")[2].rstrip("]")) for i in range(len(source))]


@pytest.mark.parametrize("moved", [False, True])
def test_the_digits_are_split_once_and_for_all_class_by_class(digits, moved):
    _, labels = load_digits(return_X_y=True)
    train, test = (rows(digits[split, moved]) for split in ("train", "test"))
    assert sorted(train + test) == list(range(len(labels)))
    for digit in range(10):
        count = (labels == digit).sum()
        assert abs((labels[train] == digit).sum() - 0.8 * count) <= 0.5
    # Known numbers, so that a change of the draw is seen: results are compared over versions.
    assert len(train) == 1438 and test[:8] == [0, 7, 11, 12, 18, 19, 22, 26]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("moved", [False, True])
def test_digits_are_the_same_each_time(digits, split, moved):
    first, again = digits[split, moved], DigitsSource(split, moved)
    assert first.classes == again.classes == list("0123456789")
    assert contents(first) == contents(again)


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_are_scikit_learns_images_and_labels(digits, split):
    pixels, labels = load_digits(return_X_y=True)
    plain, moved = digits[split, False], digits[split, True]
    assert rows(plain) == rows(moved)
    for i, row in enumerate(rows(plain)):
        assert plain.label(i) == moved.label(i) == labels[row]
        image = plain.read(i)
        assert image.dtype == np.uint8 and image.shape == (8, 8, 3)
        exact = pixels[row].reshape(8, 8, 1) * 255 / 16
        assert np.abs(image - exact).max() <= 0.5
    assert plain.name(0) == f"digits[{rows(plain)[0]}]"
    assert moved.name(0) == f"digits:moved[{rows(plain)[0]}]"


def test_a_moved_digit_is_seen_through_a_window_at_a_place_of_its_own(digits):
    plain, moved = digits["test", False], digits["test", True]
    places = set()
    for i in range(len(plain)):
        found = {
            (top, left)
            for top, left in np.ndindex(3, 3)
            if np.array_equal(plain.read(i)[top : top + 6, left : left + 6], moved.read(i))
        }
        assert found
        places |= found if len(found) == 1 else set()
    assert places == set(np.ndindex(3, 3))


def test_a_subset_has_some_images_in_its_own_order(tmp_path):
    whole = FolderSource(fill(tmp_path, "a/1.png", "a/2.png", "b/3.png"))
    some = Subset(whole, [2, 0])
    assert len(some) == 2 and some.classes == ["a", "b"]
    assert contents(some) == [contents(whole)[2], contents(whole)[0]]


def test_training_reads_a_folder_with_all_its_images(tmp_path, capsys):
    fill(tmp_path, "a/1.png", "train/2.png")
    assert list(open_training_source(str(tmp_path)).names) == ["a/1.png", "train/2.png"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("queries", ["val", "test"])
def test_training_reads_train_of_a_split_folder_and_says_so(tmp_path, capsys, queries):
    fill(tmp_path, "train/a/1.png", f"{queries}/a/2.png")
    source = open_training_source(str(tmp_path))
    assert list(source.names) == ["a/1.png"] and source.classes == ["a"]
    said = capsys.readouterr().out
    assert said == f"{tmp_path} is split: training reads {tmp_path / 'train'}\n"


def test_digits_are_meant_where_there_is_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, moved = open_training_source("digits"), open_training_source("digits:moved")
    assert len(plain) == len(moved) == 1438
    assert contents(plain) == contents(moved) and plain.read(0).shape == (8, 8, 3)
    bank, queries = open_labelled_sources("digits:moved")
    assert contents(bank) == contents(plain) and queries.read(0).shape == (6, 6, 3)
    assert contents(queries) == contents(DigitsSource("test", moved=True))
    fill(tmp_path, "digits/a/1.png")
    assert list(open_training_source("digits").names) == ["a/1.png"]


@pytest.mark.parametrize("path", ["digit:moved", "digits:", "s3://images"])
def test_an_unknown_kind_of_data_is_refused(path):
    for sentence in (
        refusal(open_training_source, path),
        refusal(open_labelled_sources, path),
        refusal(open_labelled_sources, train_data="digits", val_data=path),
    ):
        assert sentence.startswith(f"{path} is neither a path nor a known kind of data")


@pytest.mark.parametrize("path", ["C:/images", "nowhere"])
def test_a_missing_folder_is_refused(path):
    for opened in (open_training_source, open_labelled_sources):
        assert refusal(opened, path).endswith("should be a folder of images, and there is nothing.")


@pytest.mark.parametrize(
    "folders, queries", [(("train", "val"), "val"), (("train", "test"), "test"),
                         (("train", "val", "test"), "val")],
)  # fmt: skip
def test_an_evaluation_reads_both_halves_of_a_split_folder(tmp_path, folders, queries):
    fill(tmp_path, *(f"{folder}/{name}/1.png" for folder in folders for name in "ab"))
    bank, found = open_labelled_sources(str(tmp_path))
    assert contents(bank) == contents(FolderSource(tmp_path / "train"))
    assert contents(found) == contents(FolderSource(tmp_path / queries))
    assert [found.label(i) for i in range(2)] == [0, 1]


@pytest.mark.parametrize("there", ["train", "val", "test"])
def test_half_a_split_is_refused(tmp_path, there):
    fill(tmp_path, f"{there}/a/1.png", "b/2.png")
    sentence = refusal(open_labelled_sources, str(tmp_path))
    assert f"has a folder {there}/ but not the other half of a split" in sentence


def names_of(source) -> set[str]:
    root = source.source.root
    return {Path(source.name(i)).relative_to(root).as_posix() for i in range(len(source))}


def many(root: Path, numbers) -> str:
    return str(fill(root, *(f"{name}/{i}.png" for name in "ab" for i in numbers)))


def test_one_labelled_folder_is_split_by_its_names(tmp_path):
    bank, queries = open_labelled_sources(many(tmp_path, range(200)))
    assert bank.classes == queries.classes == ["a", "b"]
    whole = FolderSource(tmp_path)
    assert sorted(contents(bank) + contents(queries)) == contents(whole)
    assert abs(len(queries) - 0.2 * 400) < 4 * (400 * 0.2 * 0.8) ** 0.5
    # Known names, so that another hash is seen: results are compared over versions.
    assert sorted(names_of(queries))[:4] == ["a/0.png", "a/111.png", "a/118.png", "a/123.png"]
    larger = open_labelled_sources(str(tmp_path), val_share=0.5)[1]
    assert abs(len(larger) - 0.5 * 400) < 4 * (400 * 0.5 * 0.5) ** 0.5
    assert names_of(queries) < names_of(larger)


def test_new_images_move_no_old_one_to_the_other_half(tmp_path):
    old = open_labelled_sources(many(tmp_path / "old", range(0, 200, 3)))
    new = open_labelled_sources(many(tmp_path / "new", range(200)))
    for before, after in zip(old, new, strict=True):
        assert names_of(before) < names_of(after)
    assert not names_of(new[0]) & names_of(new[1])


def test_the_form_of_the_names_moves_no_image_to_the_other_half(tmp_path):
    composed, decomposed = (
        open_labelled_sources(str(in_form(form, tmp_path / form, number=10)))
        for form in ("NFC", "NFD")
    )
    for one, other in zip(composed, decomposed, strict=True):
        assert names_of(one) == {unicodedata.normalize("NFC", name) for name in names_of(other)}


def test_train_and_val_data_may_lie_apart(tmp_path):
    fill(tmp_path, "x/a/1.png", "x/b/2.png", "y/b/3.png", "y/a/4.png")
    bank, queries = open_labelled_sources(
        train_data=str(tmp_path / "x"), val_data=str(tmp_path / "y")
    )
    assert list(bank.names) == ["a/1.png", "b/2.png"] and list(queries.names) == ["a/4.png", "b/3.png"]
    bank, queries = open_labelled_sources(train_data="digits", val_data="digits")
    assert (len(bank), len(queries)) == (1438, 359)


def test_queries_of_some_classes_are_labelled_in_the_banks(tmp_path):
    fill(tmp_path, *(f"train/{name}/1.png" for name in "abcd"), "val/d/1.png", "val/b/2.png")
    bank, queries = open_labelled_sources(str(tmp_path))
    assert bank.classes == queries.classes == list("abcd")
    assert [queries.label(i) for i in range(2)] == [1, 3]
    assert queries.read(0) == b"val/b/2.png" and queries.name(1).endswith("1.png")


def test_queries_of_a_class_that_the_bank_lacks_are_refused(tmp_path):
    fill(tmp_path, "train/a/1.png", *(f"val/{name}/1.png" for name in "abc"))
    sentence = refusal(open_labelled_sources, str(tmp_path))
    assert sentence.endswith("classes that the training images lack: b, c.")
    fill(tmp_path, *(f"val/{name}/1.png" for name in "defgh"))
    assert refusal(open_labelled_sources, str(tmp_path)).endswith("lack: b, c, d, e, f ….")


def test_classes_whose_names_differ_in_form_only_are_the_same(tmp_path):
    in_form("NFC", tmp_path / "train")
    in_form("NFD", tmp_path / "val")
    bank, queries = open_labelled_sources(str(tmp_path))
    assert bank.classes == queries.classes
    assert [bank.label(i) for i in range(len(bank))] == [
        queries.label(i) for i in range(len(queries))
    ]


@pytest.mark.parametrize(
    "flags",
    [{"train_data": "digits"}, {"val_data": "digits"}, {"data_path": "digits", "val_data": "x"},
     {"data_path": "digits", "train_data": "x", "val_data": "x"}],
)  # fmt: skip
def test_flags_that_do_not_fit_together_are_refused(flags):
    sentence = refusal(open_labelled_sources, **flags)
    assert sentence == "Give either --data_path, or both --train_data and --val_data."


def test_an_evaluation_without_data_is_refused():
    sentence = refusal(open_labelled_sources)
    assert sentence.startswith("There is no labelled data to evaluate on: give --data_path")


@pytest.mark.parametrize("split", [False, True])
def test_an_evaluation_without_labels_is_refused(tmp_path, split):
    fill(tmp_path, *(["train/a/1.png", "val/2.png"] if split else ["1.png", "a/2.png"]))
    where = tmp_path / "val" if split else tmp_path
    sentence = refusal(open_labelled_sources, str(tmp_path))
    assert sentence.startswith(f"{where} has no labels, which an evaluation needs")
    assert sentence.endswith("2.png among them." if split else "1.png among them.")


@pytest.mark.parametrize("share", [1e-9, 0.2, 1 - 1e-9])
def test_every_class_has_images_on_both_sides_of_a_split(tmp_path, share):
    fill(tmp_path, *(f"{name}/{i}.png" for name in "abc" for i in range(2)), "single/1.png")
    bank, queries = open_labelled_sources(str(tmp_path), val_share=share)
    labels = [[source.label(i) for i in range(len(source))] for source in (bank, queries)]
    assert labels == [[0, 1, 2, 3], [0, 1, 2]]


def test_a_class_may_be_called_train(tmp_path):
    names = [f"{name}/{i}.png" for name in ("bus", "train") for i in range(5)]
    bank, queries = open_labelled_sources(str(fill(tmp_path, *names)))
    assert bank.classes == queries.classes == ["bus", "train"]


def test_a_folder_of_single_images_cannot_be_split(tmp_path):
    sentence = refusal(open_labelled_sources, str(fill(tmp_path, "a/1.png", "b/2.png")))
    assert sentence.startswith(f"No class in {tmp_path} has two images")


def test_where_images_come_from_can_be_said(tmp_path, digits):
    one = FolderSource(many(tmp_path, range(2)))
    assert one.root == Subset(one, [1]).root == str(tmp_path)
    assert digits["test", True].root == "digits:moved"


def test_sources_can_be_sent_to_another_process(tmp_path, digits):
    labelled = FolderSource(many(tmp_path / "one", range(20)))
    fill(tmp_path, "two/train/a/1.png", "two/train/b/2.png", "two/val/b/3.png")
    for source in (
        labelled,
        FolderSource(fill(tmp_path / "flat", "1.png")),
        digits["test", True],
        *open_labelled_sources(str(tmp_path / "one")),
        *open_labelled_sources(str(tmp_path / "two")),
    ):
        fresh = pickle.loads(pickle.dumps(source))
        assert fresh.classes == source.classes
        assert contents(fresh) == contents(source)
        assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_a_list_is_kept_until_a_folder_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dino_kit.data.sources.store._WORTH_A_FILE", 4)
    monkeypatch.setattr("dino_kit.data.sources.folder._TOO_FRESH", 0)
    root, kept = fill(tmp_path / "in", "a/1.png", "b/c/2.png", "b/3.png"), tmp_path / "out" / "x.list"
    assert len(FolderSource(root, kept)) == 3 and not kept.exists()  # so few are not worth it
    fill(root, "b/c/4.png")
    first = FolderSource(root, kept)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", None)  # no folder is read again
        again = FolderSource(root, kept)
        sent = pickle.dumps(again)
        assert contents(again) == contents(first) == contents(pickle.loads(sent))
        assert again.classes == ["a", "b"] and len(sent) < 600
    fill(root, "b/c/5.png", "b/c/6.png")
    (root / "a" / "1.png").unlink()
    assert len(FolderSource(root, kept)) == 5
    assert capsys.readouterr().err == (
        f"notice: {root} has changed since it was listed: b/c/5.png, b/c/6.png are new; a/1.png is "
        "gone.\n"
    )
    (root / "b" / "c").rename(root / "d")  # a folder that is gone
    assert FolderSource(root, kept).classes == ["b", "d"]


def test_a_folder_that_changed_while_it_was_listed_is_listed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("dino_kit.data.sources.store._WORTH_A_FILE", 0)
    root, kept = fill(tmp_path / "in", "a/1.png"), tmp_path / "x.list"
    FolderSource(root, kept)
    before = os.stat(root / "a")
    fill(root, "a/2.png")
    os.utime(root / "a", ns=(before.st_atime_ns, before.st_mtime_ns))  # as coarse clocks do
    assert len(FolderSource(root, kept)) == 2


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"[1]\n", b"\0" * 99])
def test_a_damaged_list_is_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr("dino_kit.data.sources.store._WORTH_A_FILE", 0)
    root, kept = fill(tmp_path / "in", "a/1.png"), tmp_path / "x.list"
    kept.write_bytes(damage)
    assert contents(FolderSource(root, kept)) == contents(FolderSource(root))
    assert kept.read_bytes() != damage


def test_a_list_that_cannot_be_written_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("dino_kit.data.sources.store._WORTH_A_FILE", 0)
    (tmp_path / "file").write_bytes(b"")
    source = FolderSource(fill(tmp_path / "in", "a/1.png"), tmp_path / "file" / "x.list")
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


@pytest.mark.parametrize("half", ["train", "val", "test"])
def test_half_a_split_alone_is_one_for_training(tmp_path, half):
    source = open_training_source(str(fill(tmp_path, f"{half}/a/1.png", f"{half}/b/2.png", "x.txt")))
    assert source.classes == ["a", "b"] and source.key(0) == "a/1.png"
    fill(tmp_path, "3.png")
    assert open_training_source(str(tmp_path)).key(0) == "3.png"
