"""Tar archives as sources: what is found in them, how it is read, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tarfile
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from tars import write_tar

from dino_kit import log
from dino_kit.data.sources.archive import Archive
from dino_kit.data.sources.folder import FolderSource
from dino_kit.data.sources.opening import open_data, open_labelled_sources, open_training_source
from dino_kit.data.sources.tar import TarSource, shards_of
from dino_kit.errors import UserError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def contents(source) -> list[tuple]:
    rows = range(len(source))
    return [(source.key(i), source.label(i), bytes(source.read(i))) for i in rows]


def named(*names: str) -> dict[str, bytes]:
    """Members that hold their own name, and by it have sizes of their own."""
    return {name: name.encode() * (len(name) % 90 + 1) for name in names}


LONG = "x" * 90 + "/" + "y" * 90 + "/" + "z" * 120
NAMES = ["b/2.png", "a/1.jpg", "a/10.JPG", "a b/1.png", "a/deep/er/3.webp", "日本/été.png", "B/1.png"]


@pytest.mark.parametrize("form", FORMATS)
def test_an_archive_is_the_folder_it_was_made_of(tmp_path, form):
    members = named(*NAMES, *([] if form == tarfile.USTAR_FORMAT else [LONG + ".png"]))
    path = write_tar(tmp_path / "x.tar", members, form)
    for name, content in members.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(content)
    folder, archive = FolderSource(tmp_path / "x"), TarSource(str(path))
    assert contents(archive) == contents(folder) and archive.classes == folder.classes
    assert archive.name(0) == f"{path}/B/1.png"


@pytest.mark.parametrize("seed", range(3))
def test_the_order_does_not_depend_on_that_of_the_archive(tmp_path, seed):
    names = [*NAMES, unicodedata.normalize("NFD", "é/1.png"), "é/2.png", "e/1.png", "f/1.png"]
    expected = contents(TarSource(str(write_tar(tmp_path / "a.tar", named(*names)))))
    shuffled = random.Random(seed).sample(names, len(names))
    assert contents(TarSource(str(write_tar(tmp_path / "b.tar", named(*shuffled))))) == expected


def test_shards_are_one_tree(tmp_path):
    write_tar(tmp_path / "0.tar", named("a/1.png", "b/4.png"))
    write_tar(tmp_path / "1.tar", named("a/0.png", "c/1.png"))
    for pattern in ("", "*.tar", "{0..1}.tar", "{1,0}.tar"):
        source = TarSource(str(tmp_path / pattern))
        assert [key for key, _, _ in contents(source)] == ["a/0.png", "a/1.png", "b/4.png", "c/1.png"]
        assert source.classes == ["a", "b", "c"]
        assert source.name(0) == f"{tmp_path / '1.tar'}/a/0.png"


def test_a_range_in_braces_keeps_its_zeros(tmp_path):
    for number in range(8, 12):
        write_tar(tmp_path / f"x-{number:03}.tar", named(f"{number}.png"))
    found = shards_of(str(tmp_path / "x-{008..011}.tar"))
    assert [os.path.basename(path) for path in found] == [f"x-{n:03}.tar" for n in range(8, 12)]
    sentence = refusal(shards_of, str(tmp_path / "x-{008..013}.tar"))
    assert "x-012.tar is missing" in sentence
    assert "nothing fits it" in refusal(shards_of, str(tmp_path / "y-*.tar"))


@pytest.mark.parametrize("there", [["train", "test"], ["train", "val", "test"]])
def test_a_leading_half_is_the_split(tmp_path, there, capsys):
    names = [f"{half}/{name}/{i}.png" for half in there for name in "ab" for i in range(2)]
    path = str(write_tar(tmp_path / "x.tar", named(*names)))
    source = open_training_source(path)
    assert [source.key(i) for i in range(4)] == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert source.read(3) == named("train/b/1.png")["train/b/1.png"]
    assert "training reads" in capsys.readouterr().out
    bank, queries = open_labelled_sources(path)
    assert contents(bank) == contents(source)
    assert queries.name(2) == f"{path}/{there[1]}/b/0.png" and queries.label(2) == 1


@pytest.mark.parametrize("half", ["train", "val", "test"])
def test_a_half_alone_is_the_split_too(tmp_path, half):
    path = str(write_tar(tmp_path / "x.tar", named(f"{half}/a/0.png", f"{half}/b/1.png")))
    source = open_training_source(path)
    assert [source.key(0), source.label(1), source.classes] == ["a/0.png", 1, ["a", "b"]]
    assert f"has a folder {half}/ but not the other half" in refusal(open_labelled_sources, path)


def test_halves_in_archives_of_their_own(tmp_path):
    write_tar(tmp_path / "x-train.tar", named("train/a/0.png", "train/b/1.png"))
    write_tar(tmp_path / "x-test.tar", named("test/b/3.png"))
    together = open_labelled_sources(str(tmp_path / "x-*.tar"))
    apart = open_labelled_sources(
        train_data=str(tmp_path / "x-train.tar"), val_data=str(tmp_path / "x-test.tar")
    )
    for bank, queries in (together, apart):
        assert [key for key, _, _ in contents(bank)] == ["a/0.png", "b/1.png"]
        assert [(key, label) for key, label, _ in contents(queries)] == [("b/3.png", 1)]


def test_a_split_folder_of_archives(tmp_path):
    write_tar(tmp_path / "train" / "0.tar", named("a/0.png", "b/1.png"))
    write_tar(tmp_path / "val" / "0.tar", named("a/2.png", "b/3.png"))
    bank, queries = open_labelled_sources(str(tmp_path))
    assert bank.name(0) == f"{tmp_path}/train/0.tar/a/0.png" and queries.label(1) == 1


def test_labels_beside_the_images_win_over_folders(tmp_path):
    members = {}
    for number, (label, kind) in enumerate([("10", "cls"), ("9", "cls"), ("cat", "json")]):
        text = '{"width": 3, "label": "%s"}' % label if kind == "json" else f" {label}\n"
        members |= {f"x/{number}.{kind}": text.encode(), f"x/{number}.jpg": b"picture"}
    members["x/3.jpg"] = b"without"
    source = TarSource(str(write_tar(tmp_path / "x.tar", members)))
    assert source.classes == ["10", "9", "cat"]
    assert [source.label(i) for i in range(4)] == [0, 1, 2, None]
    numbers = {name: content for name, content in members.items() if "2." not in name}
    assert TarSource(str(write_tar(tmp_path / "y.tar", numbers))).classes == ["9", "10"]


@pytest.mark.parametrize("text", ["", "[1]", '{"width": 3}', "{", '{"label": [1]}'])
def test_a_json_without_a_label_is_none(tmp_path, text):
    path = write_tar(tmp_path / "x.tar", {"a/1.json": text.encode(), "a/1.jpg": b"x"})
    assert TarSource(str(path)).classes == ["a"]


def test_the_last_member_of_a_name_is_meant(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a/1.png": b"old", "b/1.png": b"other"})
    write_tar(path, {"a/1.png": b"newer"}, mode="a")
    assert [content for _, _, content in contents(TarSource(str(path)))] == [b"newer", b"other"]


def test_names_are_told_without_what_says_nothing(tmp_path):
    path = write_tar(tmp_path / "x.tar", named("./a/1.png", "/b//2.png", "./.hidden/3.png", "a/._1.png"))
    assert list(TarSource(str(path)).names) == ["a/1.png", "b/2.png"]


def test_a_second_name_has_the_same_bytes(tmp_path, capsys):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a/1.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
        for name, kind, target in (
            ("b/2.png", tarfile.LNKTYPE, "a/1.png"), ("b/3.png", tarfile.LNKTYPE, "gone.png"),
            ("b/4.png", tarfile.SYMTYPE, "../a/1.png"), ("c", tarfile.DIRTYPE, ""),
        ):  # fmt: skip
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    assert contents(TarSource(str(path))) == [("a/1.png", 0, b"one"), ("b/2.png", 1, b"one")]
    err = capsys.readouterr().err
    assert "1 × .png" in err and "1 × link that leads nowhere" in err


def test_an_archive_without_images_says_what_it_holds(tmp_path):
    path = write_tar(tmp_path / "x.tar", named("a.txt", "b.txt", "c.npz"))
    assert refusal(TarSource, str(path)).endswith("found only 2 × .txt, 1 × .npz.")
    assert refusal(TarSource, str(write_tar(tmp_path / "y.tar", {}))).endswith("no files at all.")


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"<html>" * 200)
    assert refusal(TarSource, str(tmp_path / "x.tar")).endswith("x.tar is no tar archive.")
    with tarfile.open(tmp_path / "y.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a/1.png"), io.BytesIO(b""))
    assert "is compressed by gzip" in refusal(TarSource, str(tmp_path / "y.tar"))
    (tmp_path / "z.tar.gz").write_bytes(b"")
    assert "is compressed, so" in refusal(open_data, str(tmp_path / "z.tar.gz"))
    assert "is missing" in refusal(open_data, str(tmp_path / "gone.tar"))


@pytest.mark.parametrize("form", FORMATS)
def test_an_archive_cut_off_anywhere_is_named(tmp_path, form, capsys, monkeypatch):
    whole = write_tar(tmp_path / "x.tar", named("a/1.png", "a/2.png", "b/1.png"), form).read_bytes()
    images = contents(TarSource(str(tmp_path / "x.tar")))
    end = len(whole.rstrip(b"\0"))
    for length in random.Random(0).sample(range(1, end), 40):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        try:
            found = contents(TarSource(str(tmp_path / "cut.tar")))
        except UserError as error:
            assert f"{tmp_path}/cut.tar" in str(error)
        else:  # behind the last byte of a member, where only what fills it up is missing
            assert found == images[: len(found)]
            assert "cut.tar has no end marker" in capsys.readouterr().err
            monkeypatch.setattr(log, "_noticed", set())


def test_the_member_in_which_an_archive_ends_is_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a/1.png": bytes(3000), "b/2.png": bytes(3000)},
                     tarfile.GNU_FORMAT)  # fmt: skip
    path.write_bytes(path.read_bytes()[:6000])
    assert refusal(TarSource, str(path)) == (
        f"The archive {path} is cut off: it ends at byte 6,000, in b/2.png, after 3,584 bytes that "
        "are whole."
    )


def test_an_archive_without_an_end_is_told(tmp_path, capsys):
    path = write_tar(tmp_path / "x.tar", named("a/1.png", "b/2.png"), tarfile.GNU_FORMAT)
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip(b"\0").ljust(2048, b"\0"))
    assert len(TarSource(str(path))) == 2
    assert f"{path} has no end marker" in capsys.readouterr().err


def test_a_damaged_header_is_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", named("a/1.png", "b/2.png"), tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[1024 + 5] ^= 1
    path.write_bytes(data)
    assert "is damaged at byte 1,024" in refusal(TarSource, str(path))


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157] = name, size.ljust(12, b"\0"), kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("size", [b"-1", b"99", b"x", b"\xff" * 12, b"\x80" + b"\xff" * 11])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    (tmp_path / "x.tar").write_bytes(header(b"a/1.png", size) + bytes(1024))
    refusal(TarSource, str(tmp_path / "x.tar"))


def test_a_size_in_base_256_is_read(tmp_path):
    size = b"\x80" + struct.pack(">QI", 0, 5)[1:]
    (tmp_path / "x.tar").write_bytes(header(b"a/1.png", size) + b"hello".ljust(1536, b"\0"))
    assert contents(TarSource(str(tmp_path / "x.tar"))) == [("a/1.png", 0, b"hello")]


def test_an_archive_that_changed_since_is_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", named("a/1.png", "b/2.png"))
    for change, said in (
        (lambda: write_tar(path, named("a/1.png", "b/2.png", "c/3.png")), "has changed since"),
        (path.unlink, "cannot be opened: No such file"),
    ):
        source = pickle.loads(pickle.dumps(TarSource(str(path))))
        change()
        sentence = refusal(source.read, 0)
        assert str(path) in sentence and said in sentence


def test_an_open_archive_that_is_cut_is_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a/1.png": b"x", "b/2.png": bytes(9000)})
    source = TarSource(str(path))
    source.read(0)
    os.truncate(path, 4000)
    assert "has become shorter" in refusal(source.read, 1)


def test_an_index_is_kept_and_made_again_when_an_archive_changes(tmp_path, monkeypatch, capsys):
    path, kept = tmp_path / "x.tar", tmp_path / "out" / "x.list"
    write_tar(path, named("a/1.png", "b/2.png") | {"b/2.cls": b"7"})
    assert len(TarSource(str(path), kept)) == 2 and not kept.exists()  # so few are not worth it
    monkeypatch.setattr("dino_kit.data.sources.store._WORTH_A_FILE", 2)
    first = TarSource(str(path), kept)
    with monkeypatch.context() as patched:
        patched.setattr(Archive, "members", None)  # nothing is read again
        again = TarSource(str(path), kept)
        sent = pickle.dumps(again)
        assert contents(again) == contents(first) == contents(pickle.loads(sent))
        assert again.classes == first.classes == ["7"] and len(sent) < 400
    write_tar(path, named("a/1.png", "b/2.png", "b/3.png"))
    assert len(TarSource(str(path), kept)) == 3
    assert f"since then {path} has changed" in capsys.readouterr().err
    kept.write_bytes(kept.read_bytes()[:-1])  # a damaged list is made again, without a word
    assert len(TarSource(str(path), kept)) == 3
    assert "indexed before" not in capsys.readouterr().err


def test_more_archives_than_a_process_keeps_open(tmp_path, monkeypatch):
    monkeypatch.setattr("dino_kit.data.sources.tar._OPEN", 2)
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", named(f"a/{number}.png"))
    source = TarSource(str(tmp_path))
    for _ in range(2):
        assert [content for *_, content in contents(source)] == [
            named(f"a/{n}.png")[f"a/{n}.png"] for n in range(5)
        ]
    assert len(source._archives) == 2


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_bytes_do_more_than_raise_the_named_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    members = named("a/1.png", LONG + ".png", "b/2.png") | {"b/2.json": b'{"label": 1}'}
    form = data.draw(st.sampled_from(FORMATS[1:]))
    whole = bytearray(write_tar(folder / "x.tar", members, form).read_bytes())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=6)
    ):
        whole[place] = value
        if data.draw(st.booleans()):  # as if it were meant: with the sum that belongs to it
            begin = place // 512 * 512
            block = whole[begin : begin + 512]
            block[148:156] = b" " * 8
            whole[begin + 148 : begin + 156] = b"%06o\0 " % sum(block)
    (folder / "y.tar").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        contents(TarSource(str(folder / "y.tar")))
    except UserError:
        pass
