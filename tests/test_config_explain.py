"""``dino-kit config --explain``: how the student's parameters begin, and which of them decay."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from dino_kit import cli
from dino_kit.assemble import build_learner, untrained_student
from dino_kit.commands import config as command
from dino_kit.config import command_line
from dino_kit.training import parameters
from dino_kit.training.optim import split_by_decay

TINY = "--arch vit --embed_dim 16 --depth 3 --num_heads 2 --out_dim 32 --head_hidden_dim 8"


def explained(capsys, line: str) -> tuple[str, dict[str, list[str]]]:
    """All that is printed, and of each parameter, its part before its name, the cells behind it."""
    assert cli.main(["config", *line.split(), "--explain"]) == 0
    text = capsys.readouterr().out
    rows, part = {}, ""
    for shown in text.splitlines():
        if re.fullmatch(r"# (backbone|head)", shown):
            part = shown[2:]
        elif shown.startswith("#   "):
            name, *cells = re.split(r"\s{2,}", shown[4:])
            rows[f"{part} {name}"] = cells
    return text, rows


def test_blocks_are_folded_and_our_own_vit_has_the_reference_s_groups(capsys):
    text, rows = explained(capsys, TINY)
    assert rows["backbone cls_token"] == ["1×1×16", "decays", "0 ± 0.02"]
    assert rows["backbone pos_embed"][1] == "decays"
    assert rows["backbone blocks.*.attn.qkv.weight ×3"] == ["48×16", "decays", "0 ± 0.02"]
    assert rows["backbone blocks.*.attn.qkv.bias ×3"] == ["48", "–", "0"]
    assert rows["backbone blocks.*.norm1.weight ×3"] == ["16", "–", "1"]
    assert rows["head last_layer.weight_g"] == ["32×1", "not trained", "1"]
    assert max(map(len, text[text.index("# Student") :].splitlines())) <= 100


def test_it_still_is_a_recipe(capsys, tmp_path):
    text, _ = explained(capsys, TINY)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    paths = ["--data_path", "x", "--output_dir", "y"]
    again = command_line.parse("train", [str(tmp_path / "mine.yaml"), *paths])
    assert again == command_line.parse("train", [*TINY.split(), *paths])
    assert cli.main(["config", *TINY.split()]) == 0
    assert text.startswith(capsys.readouterr().out)


@pytest.mark.parametrize("line", [TINY, "--arch torchvision:resnet18 --out_dim 32 --norm_last_layer false"])
def test_every_number_is_counted_once_as_the_optimiser_groups_it(capsys, line):
    text, _ = explained(capsys, line)
    config = command_line.parse("train", [*line.split(), "--data_path", "x", "--output_dir", "y"])
    student = untrained_student(config)
    decayed, others = split_by_decay(student)
    all_of_it = sum(p.numel() for p in student.parameters())
    sums = [sum(p.numel() for p in group.values()) for group in (decayed, others)]
    shown = re.findall(r"([\d.]+) M", text.splitlines()[-1])
    assert shown == [f"{n / 1e6:.2f}" for n in (*sums, all_of_it - sum(sums))]
    found = parameters.groups(student)
    assert sum(group.numel for group in found) == all_of_it
    assert sum(group.count for group in found if group.decay == parameters.DECAYS) == len(decayed)


def test_the_student_is_the_one_that_a_run_begins_with():
    line = f"{TINY} --total_batch_size 4 --data_path x --output_dir y"
    config = command_line.parse("train", line.split())
    own = untrained_student(config).state_dict()
    student = build_learner(config, 3, torch.device("cpu"), "fp32").student.state_dict()
    assert own.keys() == student.keys()
    assert all(torch.equal(own[name], student[name]) for name in own)


def test_a_library_s_model_follows_its_authors_and_is_called_as_it_calls_its_tensors(capsys):
    _, rows = explained(capsys, "--arch timm:swin_tiny_patch4_window7_224 --out_dim 32 --arch_options "
                        "embed_dim=12 depths=[1,1,1,2] num_heads=[1,2,4,8]")  # fmt: skip
    table = "backbone layers.*.blocks.*.attn.relative_position_bias_table ×5"
    assert rows[table][1] == "–"
    assert rows["backbone layers.*.blocks.*.mlp.fc1.weight ×5"][:2] == ["several", "decays"]


def test_of_a_very_large_network_no_values_are_drawn(capsys, monkeypatch):
    monkeypatch.setattr(command, "_MANY", 1000)
    _, rows = explained(capsys, TINY)
    assert rows["backbone blocks.*.attn.qkv.weight ×3"] == ["48×16", "decays"]


def test_what_begins_unlike_its_like_is_said():
    torch.manual_seed(0)
    network = nn.Module()
    network.backbone = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50), nn.Linear(50, 50))
    with torch.no_grad():
        for number, layer in enumerate(network.backbone):
            layer.weight.normal_(3 * (number == 0), 0.1 * (1 + 4 * (number == 2)))
            layer.bias.fill_(number // 2)
    weight, bias = parameters.groups(network)
    assert (weight.name, weight.count, weight.shape) == ("backbone.*.weight", 3, "50×50")
    assert weight.begins == "1 ± 0.1 to 0.5"
    assert bias.begins == "several"


def test_diff_and_explain_are_two_things(capsys):
    assert cli.main(["config", "vits8", "--diff", "vits8", "--explain"]) == 2
    assert "give one of the flags" in capsys.readouterr().err
