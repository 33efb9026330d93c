"""A ResMLP from its training to its numbers and its pictures."""

from __future__ import annotations

import json

import pytest
import torch
from test_train import Stopped, assert_same_run, metrics, result, stop_after, train, words

import dino_kit
from dino_kit import cli
from dino_kit.assemble import assemble, untrained_backbone

FLAGS = ["--arch", "resmlp", "--num_heads", "none", "--total_batch_size", 128,
         "--batch_size_per_gpu", 64, "--epochs", 1, "--warmup_epochs", 0]  # fmt: skip


@pytest.mark.parametrize("mlp_grid", ["mix", "resize"])
def test_a_resmlp_is_pretrained_resumed_bit_for_bit_and_evaluated(tmp_path, monkeypatch, mlp_grid):
    flags = [*FLAGS, "--mlp_grid", mlp_grid]
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 7)
        train("digits", tmp_path / "parts", *flags, "--save_every_steps", 5)
    assert result(tmp_path / "parts")["step"] == 5
    for name in ("parts", "whole"):
        assert train("digits", tmp_path / name, *flags) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    losses = [line["loss"] for line in metrics(tmp_path / "whole")]
    assert losses[-1] < losses[0] - 0.1

    backbone = dino_kit.load_backbone(tmp_path / "whole")
    assert (backbone.embed_dim, backbone.depth, backbone.mlp_grid) == (24, 2, mlp_grid)
    assert backbone(torch.randn(2, 3, 8, 24)).shape == (2, 24)

    assert cli.main(["knn", str(tmp_path / "whole"), "--data_path", "digits"]) == 0
    record = json.loads((tmp_path / "whole/knn.json").read_text("utf-8"))
    assert record["architecture"]["mlp_grid"] == mlp_grid
    assert "resmlp" in json.dumps(record["architecture"])


def test_the_rule_of_grids_is_written_down_though_it_was_not_given(tmp_path, capsys):
    assert train("digits", tmp_path, *FLAGS) == 0
    assert result(tmp_path)["config"]["mlp_grid"] == "mix"
    assert "mlp_grid: mix\n" in (tmp_path / "config.yaml").read_text("utf-8")
    said = capsys.readouterr().out
    assert f"  dino-kit attention {tmp_path} --image_path IMAGE\n" in said
    assert train("digits", tmp_path, *FLAGS, "--mlp_grid", "mix") == 0  # finished, and the same
    assert train("digits", tmp_path, *FLAGS, "--mlp_grid", "resize") == 2
    assert "mlp_grid was mix and is now resize" in capsys.readouterr().err


@pytest.mark.parametrize("mlp_grid", ["mix", "resize"])
def test_student_teacher_and_untrained_backbone_follow_the_rule(tmp_path, mlp_grid):
    flags = [str(flag) for flag in words("digits", tmp_path, *FLAGS, "--mlp_grid", mlp_grid)]
    run = assemble(cli.parse("train", flags[1:]))
    backbones = [run.learner.student.backbone, run.learner.teacher.backbone]
    for backbone in (*backbones, untrained_backbone(run.config)):
        assert backbone.mlp_grid == mlp_grid and backbone.grid == (4, 4)


def test_one_flag_too_many_is_a_sentence(tmp_path, capsys):
    assert train("digits", tmp_path, *FLAGS, "--num_heads", 2) == 2
    error = capsys.readouterr().err
    assert error == "dino-kit: error: --arch resmlp has no use for --num_heads; leave it out.\n"
    assert not list(tmp_path.iterdir())
