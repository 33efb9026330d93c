"""Checkpoints whose tensors lie in parts, one file of each process: equal to whole ones, and as safe."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import sharded_training
import torch
from processes import run_together, together
from safetensors import safe_open
from sharded_training import SHARDS, assert_close_run, save_images, train, train_an_epoch
from test_train import assert_same

import dino_kit
from dino_kit import cli, files, shards, weights
from dino_kit.errors import UserError
from dino_kit.sharding import _own_rows
from dino_kit.training import checkpoint

# Commands of two processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One run by one process."""
    root = tmp_path_factory.mktemp("shards")
    save_images(root / "pictures", 20)
    assert train(root, "whole") == 0
    return root


@pytest.fixture(scope="module")
def root(alone) -> Path:
    """Beside it the same in shards by two; from one process to two and back."""
    assert train_an_epoch(alone, "ended in shards") == 1
    runs = ("in shards", "begun in shards", "ended in shards")
    run_together(sharded_training.__file__, str(alone), *runs)
    shutil.copytree(alone / "begun in shards", alone / "ended by four")
    assert train(alone, "begun in shards") == 0
    return alone


def read(folder: Path, name: str = "checkpoint.pth") -> dict:
    return shards.read(folder / name, shards.whole)


def shard_files(folder: Path) -> list[Path]:
    return sorted((folder / "shards").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["in shards", "begun in shards", "ended in shards"])
def test_a_run_in_shards_is_the_run(root, name):
    assert_close_run(read(root / "whole"), read(root / name))
    newest = files.read_weights(root / name / "checkpoint.pth")
    is_whole = isinstance(newest["student"]["module.backbone.cls_token"], torch.Tensor)
    assert is_whole == (name == "begun in shards")  # which one process ended


def test_a_run_goes_on_by_another_number_of_processes(root):
    before = read(root / "ended by four")
    assert before["step"] == 2
    run_together(sharded_training.__file__, str(root), "ended by four", processes=4)
    assert_close_run(read(root / "whole"), read(root / "ended by four"))
    names = [path.name for path in shard_files(root / "ended by four")]
    assert [name for name in names if "of-00004" in name] == [
        f"0000{n}-of-00004.safetensors" for n in range(4)
    ]


@pytest.mark.slow
def test_moments_and_statistics_go_on_bit_for_bit(alone):
    """Of the last layer, frozen in the first epoch, there are none yet; batch norms' are whole."""
    run_together(sharded_training.__file__, str(alone), "norms", "norms, begun", "norms, ended")
    one, other = (read(alone / name) for name in ("norms", "norms in two"))
    assert_same(
        *({part: run[part] for part in ("student", "teacher", "optimizer", "dino_loss", "step")}
          for run in (one, other))
    )  # fmt: skip
    assert "module.head.mlp.1.running_mean" in one["teacher"]


def test_no_file_holds_all(root):
    """The main process never has it all, nor does the checkpoint: a few small tensors at most."""
    content = files.read_weights(root / "in shards/checkpoint.pth")
    places = [*content["student"].values(), *content["teacher"].values()]
    places += [place for state in content["optimizer"]["state"].values() for place in state.values()]
    whole = [place for place in places if isinstance(place, torch.Tensor)]
    assert sum(tensor.numel() for tensor in whole) < 100 < len(places) - len(whole)
    of_the_last = shard_files(root / "in shards")[-2:]
    rows = []
    for path in of_the_last:
        with safe_open(path, "pt") as file:
            rows.append(file.get_slice("teacher/backbone.pos_embed").get_shape()[0]
                        if "teacher/backbone.pos_embed" in file.keys() else 0)  # fmt: skip
    assert rows == [1, 0]  # (1, N, d) has one row


def test_each_checkpoint_has_its_shards_and_no_other_stays(root):
    folder = root / "in shards"
    names = ("checkpoint.pth", "checkpoint_previous.pth", "checkpoint0000.pth", "checkpoint0001.pth")
    assert [read(folder, name)["step"] for name in names] == [4, 2, 2, 4]
    steps = sorted(path.name.partition("-")[0] for path in (folder / "shards").iterdir())
    assert steps == ["step00000002", "step00000004"]


def test_an_evaluator_reads_it(root):
    loaded, whole = (dino_kit.load_backbone(root / name) for name in ("in shards", "whole"))
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), whole(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fault", ["flipped", "cut", "missing"])
def test_a_damaged_shard_is_noticed_and_the_checkpoint_before_is_used(root, tmp_path, capsys, fault):
    shutil.copytree(root / "in shards", tmp_path / "run")
    damaged = shard_files(tmp_path / "run")[-1]
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    if fault == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(data if fault == "flipped" else data[: len(data) // 2])
    assert checkpoint.newest(tmp_path / "run")["step"] == 2
    said = capsys.readouterr().err
    assert damaged.name in said and "checkpoint_previous.pth, is used" in said
    shutil.rmtree(tmp_path / "run/shards")
    with pytest.raises(UserError, match="There is no file"):
        checkpoint.newest(tmp_path / "run")
    with pytest.raises(UserError, match="There is no file"):
        dino_kit.load_backbone(tmp_path / "run")


# What each of two processes does: the disk is full for the second of them in its first attempt, or
# the first is killed when all shards are written and the checkpoint is not.
PROGRAM = """
import os, resource, signal, sys
from dino_kit import cli, files
from dino_kit.training import checkpoint

write, save = files.write_tensors, checkpoint.save
fault, attempts = os.environ["FAULT"], []

def limited(*what):
    attempts.append(what)
    full = fault == "full" and os.environ["RANK"] == "1" and len(attempts) == 1
    if not full:
        return write(*what)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        return write(*what)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def killed(folder, content, *rest):
    if fault == "killed" and content["step"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(folder, content, *rest)

files.write_tensors, checkpoint.save = limited, killed
sys.exit(cli.main(sys.argv[1:]))
"""


def start(root: Path, out: Path, fault: str) -> list:
    places = ["--data_path", str(root / "pictures"), "--output_dir", str(out)]
    flags = [*sharded_training.FLAGS, *SHARDS, "--save_every_steps", "1"]
    return together("-c", PROGRAM, "train", *places, *flags, FAULT=fault)


def test_a_disk_that_is_full_for_one_process(alone, tmp_path):
    pytest.importorskip("resource")
    ended = start(alone, tmp_path, "full")
    assert [one.status for one in ended] == [0, 0], ended
    told = "The checkpoint of step 1 could not be written (File too large); there is none so far."
    assert told in ended[0].said
    assert_close_run(read(alone / "whole"), read(tmp_path))
    steps = {path.name.partition("-")[0] for path in (tmp_path / "shards").iterdir()}
    assert steps == {"step00000002", "step00000003", "step00000004"}  # the first epoch is kept


@pytest.mark.slow
def test_a_kill_between_the_shards_and_their_checkpoint(alone, tmp_path):
    killed = start(alone, tmp_path, "killed")
    assert killed[0].status == -9 and killed[1].status == 1
    steps = sorted(path.name.partition("-")[0] for path in (tmp_path / "shards").iterdir())
    assert steps == ["step00000001", "step00000002"] and read(tmp_path)["step"] == 1
    assert [one.status for one in start(alone, tmp_path, "none")] == [0, 0]
    assert_close_run(read(alone / "whole"), read(tmp_path))
    assert len(list((tmp_path / "shards").iterdir())) == 3  # the first epoch is kept


def test_the_flag_is_of_use_with_fsdp_only(root, capsys):
    assert train(root, "nothing", "--checkpoint_shards", "true") == 2
    assert "--checkpoint_shards true is of use with --fsdp true only" in capsys.readouterr().err
    assert not (root / "nothing").exists()


def test_one_process_writes_it_whole(root):
    assert train(root, "alone", *SHARDS) == 0
    assert not (root / "alone/shards").exists()
    assert_same(read(root / "alone")["student"], read(root / "whole")["student"])


# The second of two processes cannot read the newest checkpoint, reads one that has taken its place,
# or is given another folder. Each ends with the step that it goes on from.
READING = """
import os, sys, torch
from pathlib import Path
from dino_kit import distributed, files
from dino_kit.errors import RunFailed, UserError
from dino_kit.training import checkpoint

folder, fault = Path(sys.argv[1]), sys.argv[2]
distributed.start(torch.device("cpu"), 1.0)
if distributed.rank():
    read = files.read_weights
    def refuse(path, *rest):
        if path.name == checkpoint.NEWEST:
            raise UserError("It is in a bad mood.")
        return read(path, *rest)
    if fault == "unreadable":
        files.read_weights = refuse
    elif fault == "replaced":
        files.read_weights = lambda path: {**read(path), "step": 3}
    else:
        folder = folder / "elsewhere"
try:
    step = checkpoint.newest(folder)["step"]
except (RunFailed, UserError) as error:
    sys.exit(str(error))
distributed.stop()
os._exit(10 + step)
"""


@pytest.mark.parametrize("in_parts", [False, True])
def test_processes_go_on_from_the_same_checkpoint(tmp_path, in_parts):
    for step in (1, 2):
        if in_parts:
            save(tmp_path, step)
        else:
            checkpoint.save(tmp_path, {"step": step})
    ended = together("-c", READING, str(tmp_path), "unreadable")
    assert [one.status for one in ended] == [11, 11], ended
    assert "It is in a bad mood. The one before it" in ended[0].said


@pytest.mark.parametrize(
    ("fault", "told"),
    [("elsewhere", "all need the same --output_dir"), ("replaced", "another run is training there")],
)
def test_processes_with_different_checkpoints_do_not_begin(tmp_path, fault, told):
    for step in (1, 2):
        save(tmp_path, step)
    for one in together("-c", READING, str(tmp_path), fault):
        assert one.status == 1 and told in one.said
    assert read(tmp_path)["step"] == 2


# Parts alone


class InParts:
    """What a process holds of a tensor, all of it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.shape = tensor, tensor.shape

    def to_local(self) -> torch.Tensor:
        return self.tensor


def save(folder: Path, step: int, also_as: str | None = None) -> torch.Tensor:
    tensor = torch.arange(12.0).view(6, 2) + step
    state = shards.write(folder, step, {"student": {"weight": InParts(tensor)}})
    checkpoint.save(folder, {"step": step, **state}, also_as)
    return tensor


def test_what_is_read_is_what_was_written(tmp_path):
    state = {
        "list": [InParts(torch.arange(5))], "bf16": InParts(torch.ones(2, 3).bfloat16()), "plain": 7,
        "whole": torch.ones(2), "none": None,
    }  # fmt: skip
    files.write_weights(tmp_path / "x.pth", shards.write(tmp_path, 3, state))
    found = shards.read(tmp_path / "x.pth", shards.whole)
    assert_same(found.pop("list")[0], torch.arange(5))
    assert_same(found, {
        "bf16": torch.ones(2, 3).bfloat16(), "plain": 7, "whole": torch.ones(2), "none": None
    })  # fmt: skip


def test_a_tensor_under_two_names(tmp_path):
    """As a model that ties weights has it."""
    tied = InParts(torch.arange(6.0))
    state = {"student": {"a.weight": tied, "b.weight": tied}}
    files.write_weights(tmp_path / "x.pth", shards.write(tmp_path, 1, state))
    found = shards.read(tmp_path / "x.pth", shards.whole)["student"]
    assert_same(found, {"a.weight": torch.arange(6.0), "b.weight": torch.arange(6.0)})


def test_shards_are_on_the_disk_with_the_folders_that_are_new(tmp_path, monkeypatch):
    folders, handles = [], []
    monkeypatch.setattr(files, "_sync_folder", folders.append)
    monkeypatch.setattr(os, "fsync", lambda handle: handles.append(os.write(handle, b"")))
    shards.write(tmp_path, 1, {"weight": InParts(torch.ones(2))})
    (inside,) = (tmp_path / "shards").iterdir()
    assert {inside, tmp_path / "shards", tmp_path} == set(folders)
    # Windows refuses a handle that cannot be written by, as would the write above.
    assert handles == [0]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
def test_whoever_may_read_a_checkpoint_may_read_its_shards(tmp_path):
    save(tmp_path, 1)
    (shard,) = shard_files(tmp_path)
    assert shard.stat().st_mode == (tmp_path / "checkpoint.pth").stat().st_mode


def test_processes_on_different_disks_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "write_tensors", lambda path, tensors: None)
    with pytest.raises(OSError, match="is on another disk; all need the same --output_dir"):
        shards.write(tmp_path, 1, {"weight": InParts(torch.ones(2))})


def stored(folder: Path, cuts: list[int], rows: int) -> tuple[shards.StoredTensor, torch.Tensor]:
    """A tensor whose parts end at ``cuts``, each in a file of its own."""
    tensor = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    parts = []
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, rows], strict=True)):
        part = tensor[start:stop].contiguous()
        files.write_tensors(folder / f"{number}.safetensors", {"w": part})
        parts.append([f"{number}.safetensors", "w", start, stop, shards._sha256(part)])
    return shards.StoredTensor({"shape": [rows, 3], "parts": parts}, folder), tensor


def test_any_rows_can_be_read(tmp_path):
    found, tensor = stored(tmp_path, [2, 3, 7], 9)
    for start in range(10):
        for stop in range(start, 10):
            rows = found.rows(start, stop)
            assert torch.equal(rows, tensor[start:stop]) and rows.dtype is tensor.dtype
    assert torch.equal(found.whole(), tensor)


def test_of_no_rows_no_file_stays_open(tmp_path):
    found, _ = stored(tmp_path, [2], 9)
    assert found.rows(9, 9).untyped_storage().nbytes() == 0


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    found, _ = stored(tmp_path, [2, 3, 7], 9)
    opened, read_tensor = [], files.read_tensor
    monkeypatch.setattr(
        files, "read_tensor", lambda path, name: opened.append(path.stem) or read_tensor(path, name)
    )
    found.rows(2, 4)
    assert opened == ["1", "2"]
    opened.clear()
    for turn in range(3):
        found.check(turn, 3)
    assert sorted(opened) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_each_process_takes_the_rows_that_pytorch_gives_it(processes):
    for rows in range(1, 13):
        chunks = [len(part) for part in torch.arange(rows).chunk(processes)]
        own = [_own_rows(rows, rank, processes) for rank in range(processes)]
        assert [stop - start for start, stop in own] == [*chunks, *[0] * (processes - len(chunks))]
        assert [start for start, _ in own[1:]] == [stop for _, stop in own[:-1]]


def test_a_shard_that_a_checkpoint_refers_to_stays(tmp_path):
    kept = save(tmp_path, 1, "checkpoint0000.pth")
    for step in range(2, 6):
        last = save(tmp_path, step)
    steps = sorted(path.name[:12] for path in (tmp_path / "shards").iterdir())
    assert steps == ["step00000001", "step00000004", "step00000005"]
    assert torch.equal(read(tmp_path, "checkpoint0000.pth")["student"]["weight"], kept)
    assert torch.equal(checkpoint.newest(tmp_path)["student"]["weight"].whole(), last)


def test_of_a_best_one_that_made_way_no_shard_stays(tmp_path):
    """A run may end with it, after its last save."""
    save(tmp_path, 1)
    checkpoint.keep_as_best(tmp_path)
    for step in range(2, 5):
        save(tmp_path, step)
    checkpoint.keep_as_best(tmp_path)
    steps = sorted(path.name[:12] for path in (tmp_path / "shards").iterdir())
    assert steps == ["step00000003", "step00000004"]


def replace_once_read(monkeypatch, replace) -> None:
    """Let ``replace()`` come when a checkpoint was read for the first time, and its shards were not."""
    read, left = files.read_weights, [replace]

    def reading(*arguments, **options):
        content = read(*arguments, **options)
        if left:
            left.pop()()
        return content

    monkeypatch.setattr(files, "read_weights", reading)


def test_a_run_that_saves_meanwhile_is_no_damage(tmp_path, monkeypatch):
    """The one before it would take its place, while another process trains."""
    save(tmp_path, 1)
    replace_once_read(monkeypatch, lambda: [save(tmp_path, step) for step in (2, 3)])
    assert checkpoint.newest(tmp_path)["step"] == read(tmp_path)["step"] == 3


def test_an_evaluator_reads_a_run_that_saves_meanwhile(root, tmp_path, monkeypatch):
    shutil.copytree(root / "in shards", tmp_path / "run")

    def replace():
        files.same_content(tmp_path / "run/checkpoint0000.pth", tmp_path / "run/checkpoint.pth")
        for folder in (tmp_path / "run/shards").glob("step00000004*"):
            shutil.rmtree(folder)

    replace_once_read(monkeypatch, replace)
    assert weights.load(tmp_path / "run").step == 2


def test_a_copy_under_another_name_keeps_its_shards(tmp_path):
    kept = save(tmp_path, 1)
    shutil.copy(tmp_path / "checkpoint.pth", tmp_path / "liked.pth")
    torch.save(torch.ones(2), tmp_path / "features.pth")  # no checkpoint, and none of ours
    for step in range(2, 5):
        save(tmp_path, step)
    assert torch.equal(read(tmp_path, "liked.pth")["student"]["weight"], kept)
    steps = sorted(path.name[:12] for path in (tmp_path / "shards").iterdir())
    assert steps == ["step00000001", "step00000003", "step00000004"]


def test_what_a_killed_save_left_is_gone_when_the_run_goes_on(root, tmp_path):
    shutil.copytree(root / "whole", tmp_path / "run")
    left = tmp_path / "run/shards/step00000004-0123abcd"
    left.mkdir(parents=True)
    (left / "00000-of-00002.safetensors").write_bytes(b"half")
    places = ["--data_path", str(root / "pictures"), "--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", *places, *sharded_training.FLAGS]) == 0
    assert not (tmp_path / "run/shards").exists()


def test_nothing_is_removed_where_a_checkpoint_cannot_be_read(tmp_path, capsys):
    save(tmp_path, 1)
    (tmp_path / "checkpoint0007.pth").write_bytes(b"damaged")
    for step in (2, 3, 4):
        save(tmp_path, step)
    assert len(list((tmp_path / "shards").iterdir())) == 4
    assert "checkpoint0007.pth is not a checkpoint" in (said := capsys.readouterr().err)
    assert "no shards are removed" in said


def test_a_second_attempt_at_a_step_leaves_the_first_alone(tmp_path):
    save(tmp_path, 1, "checkpoint0000.pth")
    before = {path: path.read_bytes() for path in shard_files(tmp_path)}
    save(tmp_path, 1)
    assert len(shard_files(tmp_path)) == 2
    assert {path: path.read_bytes() for path in before} == before


def test_shards_of_a_checkpoint_that_found_no_room_make_way(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_weights", refuse)
    with pytest.raises(OSError):
        save(tmp_path, 2)
    checkpoint.remove_unused_shards(tmp_path)
    assert [path.name[:12] for path in (tmp_path / "shards").iterdir()] == ["step00000001"]


def test_a_run_that_makes_way_takes_its_shards_with_it(tmp_path):
    save(tmp_path, 1)
    checkpoint.remove(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_no_run_wrote_stays(tmp_path):
    """A folder of that name may have been there before, as one of tar archives."""
    (tmp_path / "shards/cats").mkdir(parents=True)
    for name in ("train-000.tar", "cats/1.png", "step1"):
        (tmp_path / "shards" / name).write_bytes(b"mine")
    before = sorted((tmp_path / "shards").rglob("*"))
    checkpoint.save(tmp_path, {"step": 1, "student": {"weight": torch.ones(2)}})
    assert sorted((tmp_path / "shards").rglob("*")) == before
    save(tmp_path, 2)
    checkpoint.remove(tmp_path)
    assert sorted((tmp_path / "shards").rglob("*")) == before


@pytest.mark.parametrize(
    "place",
    [
        {"shape": [4], "parts": [["f", "w", 0, 2, ""], ["f", "w", 3, 4, ""]]},  # a gap
        {"shape": [4], "parts": [["f", "w", 0, 3, ""], ["f", "w", 2, 4, ""]]},  # twice
        {"shape": [4], "parts": [["f", "w", 0, 3, ""]]},
        {"shape": [4], "parts": []},
        {"shape": [], "parts": []},
        {"shape": ["x"], "parts": [["f", "w", 0, 4, ""]]},
        {"shape": [4], "parts": [["f", "w"]]},
        {"shape": [4], "parts": 3},
        {"shape": None, "parts": [["f", "w", 0, 4, ""]]},
    ],
)
def test_parts_that_make_no_tensor_are_refused(tmp_path, place):
    files.write_weights(tmp_path / "checkpoint.pth", {"step": 1, "student": {"a.weight": place}})
    with pytest.raises(UserError, match="it has a tensor in parts that make none"):
        checkpoint.newest(tmp_path)
