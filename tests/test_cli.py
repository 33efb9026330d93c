"""The command line: words to configurations, help, errors and exit statuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from dino_kit import cli
from dino_kit.config import command_line, fields
from dino_kit.config.commands import COMMANDS
from dino_kit.config.train import TrainConfig
from dino_kit.errors import RunFailed, UserError

PATHS = "--data_path images --output_dir out"
PYTHON = [sys.executable, "-m", "dino_kit"]


def parse(line: str):
    return cli.parse(*command_line.named(shlex.split(line)))


def refusal(line: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(line)
    return str(caught.value)


@pytest.fixture
def command(monkeypatch):
    """Replace what ``dino-kit quickstart`` calls, so that a test may see it end in any way."""

    def replace(function):
        monkeypatch.setattr(sys.modules[__name__], "called", function, raising=False)
        row = COMMANDS["quickstart"]
        changed = type(row)(row.schema, f"{__name__}:called", row.summary, row.examples)
        monkeypatch.setitem(COMMANDS, "quickstart", changed)

    return replace


# Published command lines

REFERENCE = {
    "vanilla": "train --arch vit_small --data_path /path/to/imagenet/train --output_dir /path/out",
    "launched": f"train --local_rank=3 --arch vit_small {PATHS}",
    "boosted": "train --arch vit_small --epochs 300 --teacher_temp 0.07 "
    f"--warmup_teacher_temp_epochs 30 --norm_last_layer false {PATHS}",
    "resnet": "train --arch resnet50 --optimizer sgd --lr 0.03 --weight_decay 1e-4 "
    "--weight_decay_end 1e-4 --global_crops_scale 0.14 1 --local_crops_scale 0.05 0.14 "
    "--data_path /path/to/imagenet/train --output_dir /path/out",
    "every flag": "train --arch deit_small --patch_size 8 --out_dim 4096 --norm_last_layer False "
    "--momentum_teacher 0.9995 --use_bn_in_head 1 --warmup_teacher_temp 0.03 --teacher_temp 0.06 "
    "--warmup_teacher_temp_epochs 5 --use_fp16 false --weight_decay 0.1 --weight_decay_end 0.2 "
    "--clip_grad 0.3 --batch_size_per_gpu 32 --epochs 7 --freeze_last_layer 3 --lr 0.001 "
    "--warmup_epochs 2 --min_lr 1e-5 --optimizer lars --drop_path_rate 0 "
    "--global_crops_scale 0.25 1. --local_crops_number 10 --local_crops_scale 0.05 0.25 "
    f"{PATHS} --saveckp_freq 5 --seed 3 --num_workers 4 --dist_url env:// --local_rank 0",
    "knn": "knn --pretrained_weights w.pth --checkpoint_key student --data_path d --arch vit_base "
    "--batch_size_per_gpu 64 --nb_knn 10 20 --temperature 0.1 --use_cuda off --patch_size 8 "
    "--num_workers 2 --dist_url env:// --local_rank 0 --dump_features f",
    "linear": "linear --n_last_blocks 1 --avgpool_patchtokens true --arch deit_small --patch_size 16 "
    "--pretrained_weights w.pth --checkpoint_key teacher --epochs 100 --lr 0.001 "
    "--batch_size_per_gpu 128 --dist_url env:// --local_rank 0 --data_path /path/to/imagenet "
    "--num_workers 10 --val_freq 1 --output_dir . --num_labels 1000 --evaluate",
    "attention": "attention --arch vit_small --patch_size 8 --pretrained_weights w.pth "
    "--checkpoint_key teacher --image_path p.png --image_size 480 480 --output_dir o "
    "--threshold 0.6",
}


@pytest.mark.parametrize("line", REFERENCE.values(), ids=REFERENCE)
def test_a_published_command_line_is_understood(line):
    assert parse(line)


def test_a_published_command_line_means_what_it_meant():
    resnet = parse(REFERENCE["resnet"])
    assert (resnet.arch, resnet.optimizer, resnet.lr) == (
        "torchvision:resnet50", "sgd", 0.03
    )
    assert (resnet.global_crops_scale, resnet.local_crops_scale) == ((0.14, 1), (0.05, 0.14))
    full = parse(REFERENCE["every flag"])
    assert (full.arch, full.norm_last_layer, full.use_bn_in_head) == ("vit_small", False, True)
    assert (full.use_fp16, full.min_lr, full.clip_grad) == (False, 1e-5, 0.3)
    vanilla = parse(REFERENCE["vanilla"])
    plain = fields.from_plain(TrainConfig, {"data_path": "x", "output_dir": "x"})
    changed = {name for name, _, _ in fields.differences(plain, vanilla)}
    assert changed == {"data_path", "output_dir"}
    assert parse(REFERENCE["knn"]).nb_knn == (10, 20)
    assert parse(REFERENCE["attention"]).image_size == (480, 480)
    linear, usual = parse(REFERENCE["linear"]), parse("linear w.pth --data_path d")
    assert (linear.avgpool_patchtokens, linear.evaluate, linear.num_labels) == (True, True, 1000)
    for name in ("epochs", "lr", "batch_size_per_gpu", "val_freq", "checkpoint_key"):
        assert getattr(linear, name) == getattr(usual, name)


def test_flags_without_effect_are_accepted_with_a_notice(capsys):
    parse(f"train --local-rank=1 --dist_url tcp://host:1 {PATHS}")
    parse("knn weights.pth --use_cuda false --data_path images")
    assert capsys.readouterr().err.splitlines() == [
        "notice: --local_rank has no effect: torchrun's environment says which process this is.",
        "notice: --dist_url has no effect: torchrun's environment says which process this is.",
        "notice: --use_cuda has no effect: --device says where to compute.",
    ]


# How flags are written


@pytest.mark.parametrize(
    "words", ["--out-dim 64", "--out_dim=64", "--out-dim=64", "--out_dim 8 --out_dim 64"]
)
def test_ways_of_writing_a_flag(words):
    assert parse(f"train {PATHS} {words}").out_dim == 64


@pytest.mark.parametrize(
    ("words", "expected"),
    [("true", True), ("TRUE", True), ("on", True), ("1", True), ("yes", True), ("", True),
     ("false", False), ("Off", False), ("0", False), ("no", False)],
)  # fmt: skip
def test_ways_of_writing_a_boolean(words, expected):
    assert parse(f"train --use_bn_in_head {words} {PATHS}").use_bn_in_head is expected
    assert parse(f"train {PATHS} --use_bn_in_head {words}").use_bn_in_head is expected


def test_a_switch_does_not_take_a_word_that_is_no_boolean():
    assert parse("attention --html OUT --image_path p.png").weights == "OUT"
    assert parse("attention --html OUT --image_path p.png").html is True
    assert parse("attention --html off OUT --image_path p.png").html is False
    assert refusal(f"train --use_bn_in_head flase {PATHS}") == (
        "--use_bn_in_head is 'flase'; it takes true or false."
    )


def test_one_number_stands_for_every_view_and_none_for_not_set(tmp_path):
    assert parse(f"train --blur_prob 0 {PATHS}").blur_prob == (0, 0, 0)
    assert parse(f"train --blur_prob 1 0.5 0 {PATHS}").blur_prob == (1, 0.5, 0)
    (tmp_path / "mine.yaml").write_text("total_batch_size: 512")
    assert parse(f"train {tmp_path}/mine.yaml {PATHS}").total_batch_size == 512
    line = f"train {tmp_path}/mine.yaml {PATHS} --total_batch_size none"
    assert parse(line).total_batch_size is None


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 7\nlr: 5e-3\nout-dim: 32\n")
    config = parse(f"train --lr 0.1 {tmp_path}/mine.yaml {PATHS}")
    assert (config.epochs, config.lr, config.out_dim, config.patch_size) == (7, 0.1, 32, 16)
    shipped = parse(f"train vitb8 {PATHS} --epochs 1")
    assert (shipped.arch, shipped.patch_size, shipped.epochs) == ("vit_base", 8, 1)


# What is refused


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (f"train {PATHS} --ephocs 3", ("dino-kit train has no flag --ephocs; did you mean "
                                      "--epochs?")),
        (f"train {PATHS} --batch 3", ("dino-kit train has no flag --batch; did you mean "
                                     "--batch_size_per_gpu?")),
        (f"train {PATHS} --epoch 3", "dino-kit train has no flag --epoch; did you mean --epochs?"),
        (f"train {PATHS} --zzz 3", "dino-kit train has no flag --zzz; see dino-kit train --help."),
        (f"train {PATHS} -e 3", "dino-kit train has no flag -e; see dino-kit train --help."),
        ("knn w.pth --data_path d --lr 3", ("dino-kit knn has no flag --lr; see dino-kit knn "
                                            "--help.")),
        (f"train {PATHS} --lr", "--lr needs a value: a number from 0."),
        (f"train {PATHS} --lr --epochs 3", "--lr needs a value: a number from 0."),
        (f"train {PATHS} --lr=", "--lr is ''; it takes a number from 0."),
        (f"train {PATHS} --lr -1", "--lr is '-1'; it takes a number from 0."),
        (f"train {PATHS} --embed_dim 1.5", "--embed_dim is '1.5'; it takes a whole number from 1."),
        ("train --data_path '' --output_dir out", "--data_path is ''; it takes text."),
        (f"train {PATHS} --global_crops_scale 0.4", ("--global_crops_scale takes 2 numbers, and "
                                                    "got 1: 0.4.")),
        ("train --data_path images", "--output_dir is missing."),
        ("train vits8", "--data_path and --output_dir are missing."),
        ("knn", "A checkpoint is missing: give a file, or the folder of a run."),
        ("linear w.pth --evaluate", "Labelled images are needed: give either --data_path, or both "
         "--train_data and --val_data."),
        ("linear w.pth --val_data d", "Labelled images are needed: give either --data_path, or "
         "both --train_data and --val_data."),
        ("knn a b", "'b' belongs to no flag; see dino-kit knn --help."),
        (f"train vits8 vitb8 {PATHS}", "'vitb8' belongs to no flag; see dino-kit train --help."),
        (f"train {PATHS} --global_crops_size 225", ("--global_crops_size 225 is not a multiple of "
         "--patch_size 16; the nearest are 224 and 240.")),
    ],
)  # fmt: skip
def test_a_faulty_command_line_is_refused_in_one_sentence(line, sentence):
    assert refusal(line) == sentence


def test_a_fault_ends_with_status_2_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--data_path", "images", "--output_dir", "out", "--lr", "x"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "dino-kit: error: --lr is 'x'; it takes a number from 0.\n")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "dino-kit: error: 'trian' is no command; there are quickstart, train, check-data, recipe, "
        "knn, linear, attention, report, launch, config, backbones, bench; did you mean train?\n"
    )


# How a command ends


def test_a_command_gets_its_configuration(command):
    got = []
    command(got.append)
    assert cli.main(["quickstart", "--seed", "3"]) == 0
    assert (got[0].seed, got[0].output_dir) == (3, "dino_kit_quickstart")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("No."), 2, "dino-kit: error: No."),
        (RunFailed("Too many."), 1, "dino-kit: stopped: Too many."),
        (KeyboardInterrupt(), 130, "dino-kit: interrupted."),
    ],
)
def test_exit_statuses(command, capsys, error, status, line):
    def fail(config):
        raise error

    command(fail)
    assert cli.main(["quickstart"]) == status
    assert capsys.readouterr().err.strip() == line


def test_a_fault_of_ours_keeps_its_traceback(command):
    def fail(config):
        raise ZeroDivisionError

    command(fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["quickstart"])


def test_a_reader_that_goes_away_is_no_error():
    # Short enough to wait in the buffer until the end, where the interpreter would flush it.
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    for words in (["--help"], ["train", "--help"]):
        with subprocess.Popen(
            [*PYTHON, *words], env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as run:
            run.stdout.close()
            assert (run.stderr.read(), run.wait()) == (b"", 0)


# Help


def test_help_and_errors_do_not_import_torch():
    program = (
        "import sys; from dino_kit import cli; "
        "status = cli.main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'PIL', 'rich'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    for words, status in [
        (["train", "--help"], 0),
        (["train", "--lr", "x"], 2),
        (["train", "vits8"], 2),
        (["train", "--arch", "resnet-50", "--data_path", "x", "--output_dir", "y"], 2),
        (["train", "vits8", "--use_fp16", "1", "--precision", "bf16"], 2),
        (["knn", "--zzz"], 2),
        (["config", "vits8"], 0),
        (["recipe", "--help"], 0),
        (["recipe", "images", "--hours", "0"], 2),
    ]:
        run = subprocess.run(
            [sys.executable, "-c", program, *words], check=False, capture_output=True, text=True
        )
        assert run.returncode == status, run.stderr


@pytest.mark.parametrize("own", [None, "active"])
def test_threads_sleep_while_they_wait_unless_told_otherwise(monkeypatch, own):
    program = (
        "import os, sys; from dino_kit import cli; from dino_kit.commands import config; "
        "assert 'torch' not in sys.modules; cli.main(['config']); "
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == (own or "passive")


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch's own."""


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")],
)  # fmt: skip
def test_memory_that_does_not_suffice_is_said_in_a_sentence(error, capsys, monkeypatch):
    def fail(words):
        raise error

    monkeypatch.setattr(cli, "_main", fail)
    assert cli.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("dino-kit: stopped: the memory does not suffice (")
    assert "--batch_size_per_gpu" in said and said.count("\n") == 1


def test_a_runtime_error_of_another_kind_keeps_its_traceback(monkeypatch):
    def fail(words):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(cli, "_main", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main([])


@pytest.mark.parametrize(
    ("flag", "other"), [("use_fp16", "precision"), ("precision", "use_fp16")]
)
def test_a_flag_wins_over_the_same_thing_in_a_recipe(tmp_path, flag, other):
    written = {"precision": "fp32", "use_fp16": "false"}[other]
    given = {"precision": "bf16", "use_fp16": "true"}[flag]
    (tmp_path / "one.yaml").write_text(f"{other}: {written}\n")
    paths = ["--data_path", "x", "--output_dir", "y"]
    config = cli.parse("train", [str(tmp_path / "one.yaml"), f"--{flag}", given, *paths])
    assert getattr(config, other) == {"precision": "auto", "use_fp16": None}[other]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_flag_with_its_text_and_default(name, capsys, monkeypatch):
    schema = COMMANDS[name].schema
    for columns in ("40", "80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main([*name.split(), "--help"]) == 0
        shown = capsys.readouterr().out
        assert shown.isascii()
        limit = min(max(int(columns), 60), 100)
        examples = [f"  {example}" for example in COMMANDS[name].examples]
        assert all(len(line) <= limit or line in examples for line in shown.splitlines())
        flat = re.sub(r"\s+", " ", shown)
        for title, declared in fields.groups(schema):
            assert f"{title}:" in flat
            for field in declared:
                positional = field.metadata["positional"]
                head = f"{field.name.upper()} " if positional else f"--{field.name} "
                assert head in flat
                assert field.metadata["help"] in flat
        for flag in COMMANDS[name].without_effect:
            assert f"--{flag}" in flat
    assert cli.main([*name.split(), "-h"]) == 0
    assert cli.main([*name.split(), "--epochs", "x", "--help"]) == 0


def test_help_tells_defaults(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--lr FLOAT Highest learning rate" in shown
    for default in ("Default: 0.0005.", "Default: 0.4 1.", "Default: 1 0.1 0.5.", "Required.",
                    "Default: usable cores, 10 at most.", "Default: true."):
        assert default in shown


def test_the_overview_lists_every_command(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    rows = capsys.readouterr().out.splitlines()
    columns = set()
    for name, command in COMMANDS.items():
        (row,) = {row for row in rows if row.endswith(f"  {command.summary}")}
        assert row.removesuffix(command.summary).strip() == name
        columns.add(row.index(command.summary))
    assert len(columns) == 1


def test_a_command_of_several_parts_lists_them(capsys):
    shown = []
    for words in (["bench"], ["bench", "--help"], ["bench", "-h"]):
        assert cli.main(words) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    for name, command in COMMANDS.items():
        assert (command.summary in shown[0]) == name.startswith("bench ")
    assert cli.main(["bench", "dta", "FOLDER"]) == 2
    told = capsys.readouterr().err
    assert "dino-kit bench takes one of data, step, knn, fit, and got 'dta'" in told
    assert "did you mean data?" in told
    assert cli.main(["bnch"]) == 2
    assert "did you mean bench?" in capsys.readouterr().err


def test_every_example_in_the_help_is_a_command_line_that_works():
    for command in COMMANDS.values():
        for example in command.examples:
            program, line = example.split(" > ")[0].split(" ", 1)
            assert program == "dino-kit"
            if "mine.yaml" not in line:
                parse(line)


def test_the_module_is_the_command():
    run = subprocess.run([*PYTHON, "--version"], check=True, capture_output=True, text=True)
    assert re.fullmatch(r"dino-kit \d+\.\d+\.\d+\S*\n", run.stdout)
    run = subprocess.run([*PYTHON, "train", "--help"], check=True, capture_output=True, text=True)
    assert run.stdout.startswith("usage: dino-kit train [RECIPE] [flags]\n")


# dino-kit config


def test_config_prints_a_recipe_that_reads_back_to_the_same(capsys, tmp_path):
    assert cli.main(["config", "vits8", "--epochs", "3", "--blur_prob", "0"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    again = parse(f"train {tmp_path}/mine.yaml {PATHS}")
    assert again == parse(f"train vits8 --epochs 3 --blur_prob 0 {PATHS}")
    assert cli.main(["config", "--arch", "resnet50"]) == 0
    assert "arch: torchvision:resnet50\n" in capsys.readouterr().out


def test_config_shows_what_differs(capsys, tmp_path):
    assert cli.main(["config", "vits8", "--epochs", "3", "--diff", "vits8"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"epochs\W+800\W+3\b", shown)
    assert "lr" not in shown
    mine = ["--arch", "vit", "--embed_dim", "64", "--depth", "12", "--num_heads", "4"]
    mine += ["--blur_radius_max", "0.5", "--data_path", "images"]
    assert cli.main(["config", *mine, "--diff", "vits16_100ep"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"embed_dim\W+384\W+64\b", shown)  # a named network's own
    assert re.search(r"blur_radius_max\W+2\W+0\.5\b", shown)  # once for all views
    assert re.search(r"data_path\W+not set\W+images\b", shown)
    assert "none" not in shown
    (tmp_path / "giant.yaml").write_text("arch: vit_giant\n")
    words = ["config", *mine, "--mlp_ratio", "3", "--diff", str(tmp_path / "giant.yaml")]
    assert cli.main(words) == 0
    assert re.search(r"mlp_ratio\W+4\.92308\W+3\b", capsys.readouterr().out)
    assert cli.main(["config", "vits8", "--diff", "vits8"]) == 0
    assert capsys.readouterr().out == "no difference from vits8\n"
    (tmp_path / "mine.yaml").write_text("diff: vits8\n")
    assert "'diff', which is no setting" in refusal(f"config {tmp_path}/mine.yaml")
    assert cli.main(["config", "--diff", "vits9"]) == 2
    assert "did you mean vits8?" in capsys.readouterr().err
