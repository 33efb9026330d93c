"""Runs that are made to collapse: named soon after their warm-up, and ended where that is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dino_kit import cli
from dino_kit.assemble import assemble
from dino_kit.training.diagnosis import COLLAPSED, ONE_POINT, UNIFORM, WARMING_UP

SMALL = (
    "--data_path digits --arch vit --embed_dim 24 --depth 2 --num_heads 2 --patch_size 4 "
    "--global_crops_size 8 --local_crops_number 0 --out_dim 64 --head_hidden_dim 32 "
    "--head_bottleneck_dim 16 --batch_size_per_gpu 16 --num_workers 0 --epochs 2 --device cpu "
    "--warmup_epochs 0 --freeze_last_layer 0 --lr 0.05 --log_every_steps 5 --probe_freq 0"
).split()
EVEN = ["--teacher_temp", "50", "--warmup_teacher_temp", "50"]


def lines(out) -> list[dict]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_a_collapse_ends_the_run_with_a_status_where_that_is_asked(tmp_path, capsys):
    words = ["train", *SMALL, *EVEN, "--output_dir", str(tmp_path / "run"), "--stop_on_collapse", "true"]
    assert cli.main(words) == 1
    told = capsys.readouterr().err
    assert "by --stop_on_collapse" in told and "Uniform collapse" in told and "Traceback" not in told
    written = lines(tmp_path / "run")
    assert written[-1]["state"] == UNIFORM and written[-1]["step"] < 178
    assert [line["state"] for line in written[:-1]].count(UNIFORM) == 0  # the first such line


def test_else_a_collapse_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    assert cli.main(["train", *SMALL, *EVEN, "--output_dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count("Uniform collapse") == 1
    assert lines(tmp_path / "run")[-1]["step"] == 178


def test_a_run_that_collapsed_may_go_on_with_another_stop_on_collapse(tmp_path):
    words = ["train", *SMALL, *EVEN, "--output_dir", str(tmp_path / "run"), "--save_every_steps", "1"]
    assert cli.main([*words, "--stop_on_collapse", "true"]) == 1
    assert cli.main([*words, "--epochs", "2"]) == 0


def tampered(fault: str, out, seed: int, epochs: int):
    flags = ["--output_dir", str(out), "--seed", str(seed), "--epochs", str(epochs),
             "--num_workers", "0", "--log_every_steps", "10", "--probe_freq", "0"]  # fmt: skip
    if fault == "temperature 1":
        flags += ["--teacher_temp", "1", "--warmup_teacher_temp", "1"]
    if fault == "no centre":
        flags += ["--teacher_temp", "0.001", "--warmup_teacher_temp", "0.001"]
    run = assemble(cli.parse("train", ["quickstart", *flags]))
    if fault == "one module":
        run.learner.teacher = run.learner.student
    if fault == "no centre":
        run.learner.centering.commit = lambda candidate: None
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kinds", "seed"),
    [("one module", COLLAPSED, 1), ("no centre", (ONE_POINT,), 2), ("temperature 1", (UNIFORM,), 3)],
)
def test_a_forced_fault_is_named_within_fifty_steps_after_the_warm_up(
    tmp_path, capsys, fault, kinds, seed
):
    run = tampered(fault, tmp_path / "run", seed, epochs=7)
    warmup = run.learner.plan.warmup_steps
    assert warmup == 5 * 44 and run.loader.total_steps >= warmup + 50
    run.train()
    written = lines(tmp_path / "run")
    assert {line["state"] for line in written if line["step"] <= warmup} == {WARMING_UP}
    named = [line for line in written if line["state"] in kinds]
    assert named and named[0]["step"] <= warmup + 50
    assert "collapse" in capsys.readouterr().err
