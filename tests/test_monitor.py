"""What a run writes down about itself."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dino_kit.training.diagnosis import Diagnosis
from dino_kit.training.monitor import Monitor


def monitor(folder, start=0, log_every_steps=2) -> Monitor:
    folder.mkdir(exist_ok=True)
    one = Monitor(
        folder,
        steps_per_epoch=3,
        total_steps=9,
        images_per_step=4,
        log_every_steps=log_every_steps,
        diagnosis=Diagnosis(out_dim=8, warmup_steps=0),
        start=start,
    )
    one.open()
    return one


def take(one: Monitor, steps, waited=0.0, dropped=()) -> None:
    for step in steps:
        measured = {} if step in dropped else {"loss": torch.tensor(float(step))}
        one.record(step, measured, {"lr": step / 10, "weight_decay": 0.5}, waited, skipped=7)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_the_means_since_the_last_one_and_the_newest_settings(tmp_path):
    one = monitor(tmp_path)
    take(one, range(9))
    one.close()
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in written] == [2, 4, 6, 8, 9]
    assert [line["loss"] for line in written] == [0.5, 2.5, 4.5, 6.5, 8.0]
    assert [line["lr"] for line in written] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.8])
    assert [line["epoch"] for line in written] == [0, 1, 1, 2, 2]
    assert all(line["images_per_second"] > 0 and line["skipped"] == 7 for line in written)


def test_log_txt_has_the_references_keys_and_the_means_of_each_epoch(tmp_path):
    one = monitor(tmp_path)
    take(one, range(9))
    written = lines(tmp_path / "log.txt")
    assert [set(line) for line in written] == 3 * [{"train_loss", "train_lr", "train_wd", "epoch"}]
    assert [line["epoch"] for line in written] == [0, 1, 2]
    assert [line["train_loss"] for line in written] == [1, 4, 7]
    assert [line["train_lr"] for line in written] == pytest.approx([0.1, 0.4, 0.7])


def test_dropped_steps_have_no_part_in_a_mean(tmp_path):
    one = monitor(tmp_path)
    take(one, range(4), dropped=(0, 2, 3))
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first["loss"] == 1 and "loss" not in second
    assert lines(tmp_path / "log.txt")[0]["train_loss"] == 1


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_a_resumed_run_writes_the_lines_of_an_uninterrupted_one(tmp_path, stop):
    whole = monitor(tmp_path / "whole", log_every_steps=4)
    take(whole, range(9))
    first = monitor(tmp_path / "parts", log_every_steps=4)
    take(first, range(stop))
    state = first.state_dict()
    take(first, range(stop, 8))  # written after the checkpoint, and lost with the process
    (tmp_path / "parts/metrics.jsonl").open("a").write('{"step": 9, "loss"')
    second = monitor(tmp_path / "parts", start=stop, log_every_steps=4)
    second.load_state_dict(state, torch.device("cpu"))
    take(second, range(stop, 9))
    for name in ("metrics.jsonl", "log.txt"):
        ours, theirs = lines(tmp_path / "parts" / name), lines(tmp_path / "whole" / name)
        for line in (*ours, *theirs):
            line.pop("images_per_second", None), line.pop("data_wait", None)
        assert ours == theirs


def test_tensorboard_holds_the_same_numbers(tmp_path):
    one = monitor(tmp_path)
    take(one, range(9))
    one.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    losses = {event.step: event.value for event in board.Scalars("train/loss")}
    assert losses == {line["step"]: line["loss"] for line in lines(tmp_path / "metrics.jsonl")}


def test_waiting_for_data_is_logged_and_said_once(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    one = monitor(tmp_path)
    for step in range(8):
        now[0] += 10
        take(one, [step], waited=1 if step < 4 else 6)
        if step == 3:
            assert capsys.readouterr().err == ""
    shares = [line["data_wait"] for line in lines(tmp_path / "metrics.jsonl")]
    assert shares == pytest.approx([0.1, 0.1, 0.6, 0.6])
    said = capsys.readouterr().err
    assert said.count("held back by its data: 60% of the time") == 1


@pytest.mark.parametrize("start", [0, 4])
def test_the_start_of_the_workers_is_no_waiting(tmp_path, capsys, monkeypatch, start):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    one = monitor(tmp_path, start=start)
    for step in range(start, start + 4):
        now[0] += 10
        take(one, [step], waited=9 if step < start + 2 else 1)
    assert "held back" not in capsys.readouterr().err


def test_the_summary_is_short_and_empty_before_the_first_line(tmp_path):
    one = monitor(tmp_path)
    take(one, [0])
    assert one.summary() == ""
    take(one, [1])
    assert one.summary().startswith("warming up  loss 0.5000  lr 1.00e-01  ")


HEALTH = {
    "loss_ratio": 1.0, "teacher_entropy": 2.07, "kl": 1e-4, "prototypes_used": 8.0,
    "teacher_information": 1e-4, "student_information": 1e-5, "spread": 0.1,
    "effective_rank": 3.0, "view_retrieval": 0.25,
}  # fmt: skip


def observe(one: Monitor, steps, health) -> None:
    observed = {name: torch.tensor(value) for name, value in health.items()}
    for step in steps:
        at_a_line = observed if one.writes_at(step) else {}
        one.record(step, {"loss": torch.tensor(2.0)}, {"lr": 0.1, "weight_decay": 0.0}, 0.0, at_a_line)


def test_a_line_holds_the_health_of_its_step_and_the_runs_state(tmp_path, capsys):
    one = monitor(tmp_path)
    observe(one, range(9), HEALTH)
    one.close()
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["state"] for line in written] == 2 * ["warming up"] + 3 * ["uniform collapse"]
    for line in written:
        assert {name: line[name] for name in HEALTH} == pytest.approx(HEALTH, rel=1e-6)
    told = capsys.readouterr().err
    assert told.count("Uniform collapse") == 1 and "Step 6: " in told and "--teacher_temp" in told
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/kl", "train/effective_rank"} <= set(events.Tags()["scalars"])


def test_a_line_is_due_every_so_many_steps_and_at_the_end(tmp_path):
    one = monitor(tmp_path)
    assert [one.writes_at(step) for step in range(9)] == 4 * [False, True] + [True]


def test_the_end_of_a_collapse_is_told(tmp_path, capsys):
    one = monitor(tmp_path, log_every_steps=1)
    observe(one, range(4), HEALTH)
    observe(one, range(4, 9), HEALTH | {"kl": 1.0, "teacher_information": 1.0})
    assert "the uniform collapse is over" in capsys.readouterr().err


def test_a_resumed_run_writes_the_state_of_an_uninterrupted_one(tmp_path):
    whole, first = monitor(tmp_path / "a"), monitor(tmp_path / "b")
    observe(whole, range(9), HEALTH)
    observe(first, range(5), HEALTH)
    first.close()
    second = Monitor(
        tmp_path / "b", steps_per_epoch=3, total_steps=9, images_per_step=4, log_every_steps=2,
        diagnosis=Diagnosis(out_dim=8, warmup_steps=0), start=5,
    )  # fmt: skip
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    second.open()
    observe(second, range(5, 9), HEALTH)
    states = [[line["state"] for line in lines(tmp_path / run / "metrics.jsonl")] for run in "ab"]
    assert states[0] == states[1] and states[0][-1] == "uniform collapse"
