"""DeepViT: Re-Attention by hand, its batch norms in a DINO step, its weights and its pictures."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_learner import assert_same, batch, learner, poison_crop
from test_train import Stopped, assert_same_run, metrics, result, stop_after, train

import dino_kit
from dino_kit import cli, distributed
from dino_kit.assemble import with_total_batch
from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.deepvit import ReAttention
from dino_kit.backbones.interface import HasReAttention, HasSelfAttention
from dino_kit.backbones.recognition import recognize
from dino_kit.batch_norm import (
    SharedBatchNorm,
    batch_norms,
    statistics_unchanged,
    synchronised,
)
from dino_kit.config.train import TrainConfig
from dino_kit.errors import UserError
from dino_kit.evaluators.attention import is_made_for_one_size, require_attention
from dino_kit.weights import load

TINY = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}


def tiny(name="deepvit", **options):
    """Weights that are not the first ones, and norms that have seen a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_backbone(name, **{**TINY, "reattention_blocks": 2, **options})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            network(torch.randn(4, network.in_chans, 16, 16))
    return network


def images(*size: int, count: int = 3) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(sum(size))
    return torch.randn(count, 3, *(size or (16, 16)), generator=numbers)


def own(network) -> list[torch.Tensor]:
    """Copies of the running statistics."""
    return [buffer.clone() for norm in batch_norms(network) for buffer in norm.buffers()]


# The model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_reattention_is_what_the_equations_say(training, scale):
    torch.manual_seed(0)
    layer, (h, d, b, t) = ReAttention(12, 3, scale).double(), (3, 4, 2, 5)
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.var_norm.running_mean):
            tensor.add_(0.3 * torch.randn_like(tensor))
        layer.var_norm.running_var.mul_(1e-3)
    layer.train(training)
    x = torch.randn(b, t, h * d, dtype=torch.float64)
    norm = copy.deepcopy(layer.var_norm)
    found = layer(x)

    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(h * d, dim=-1)
    theta, bias = layer.reatten_matrix.weight[:, :, 0, 0], layer.reatten_matrix.bias
    maps = torch.zeros(b, h, t, t, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            part = slice(j * d, (j + 1) * d)
            scores = q[i, :, part] @ k[i, :, part].T / d**0.5
            for head in range(h):
                maps[i, head] += theta[head, j] * (scores.exp() / scores.exp().sum(1, keepdim=True))
    rows = []
    for head in range(h):
        mixed = maps[:, head] + bias[head]
        mean = mixed.mean() if training else norm.running_mean[head]
        var = mixed.var(unbiased=False) if training else norm.running_var[head]
        one = norm.weight[head] * (mixed - mean) / (var + 1e-5).sqrt() + norm.bias[head]
        rows.append(scale * one)
    maps = torch.stack(rows, dim=1)  # (b, h, t, t)
    heads = [maps[:, head] @ v[:, :, head * d : (head + 1) * d] for head in range(h)]
    expected = torch.cat(heads, dim=-1) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    layer.var_norm.load_state_dict(norm.state_dict())
    torch.testing.assert_close(layer.attention(x), maps, rtol=1e-10, atol=1e-10)
    assert (maps.sum(dim=-1) - 1).abs().min() > 1e-3


@pytest.mark.parametrize("case", ["plain", "scaled"])
def test_deepvit_golden(case):
    """Numbers that the authors' code computed in float64, by the names that it gives its tensors."""
    with np.load(Path(__file__).parent / "golden/deepvit.npz") as file:
        arrays = dict(file)
    state = {
        name.removeprefix("state/"): torch.from_numpy(value)
        for name, value in arrays.items()
        if name.startswith("state/")
    }
    options = {"num_heads": 3, "scale_reattention": case == "scaled"}
    network, pictures = tiny(**options).double(), torch.from_numpy(arrays["images"]).double()
    network.load_state_dict(state)

    def same(found, name):
        expected = torch.from_numpy(arrays[f"{case}/{name}"])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    network.eval()
    same(network(pictures), "eval")
    same(network.get_last_reattention(pictures), "maps")
    network.train()
    pooled = network(pictures)
    same(pooled, "train")
    pooled.square().sum().backward()
    same(network.pos_embed.grad, "gradient")
    same(network.blocks[1].attn.reatten_matrix.weight.grad, "gradient of matrix")
    for name in ("patch_embed.bn2", "blocks.2.attn.var_norm"):
        for kind in ("running_mean", "running_var"):
            same(getattr(network.get_submodule(name), kind), f"{kind}/{name}")


def test_a_block_works_at_half_the_scale():
    """As the published code writes it, with the epsilon that it has there."""
    network = tiny().double().eval()
    block, x = network.blocks[-1], torch.randn(2, 5, 24, dtype=torch.float64)

    def norm(layer, y):
        y = 0.5 * y
        centred = y - y.mean(-1, keepdim=True)
        var = centred.square().mean(-1, keepdim=True)
        return centred / (var + 1e-6).sqrt() * layer.weight + layer.bias

    y = x + block.attn(norm(block.norm1, x)) / 0.5
    y = y + block.mlp(norm(block.norm2, y)) / 0.5
    torch.testing.assert_close(block(x), y, rtol=1e-10, atol=1e-10)


def test_only_the_last_blocks_have_reattention():
    def kinds(**options):
        return [isinstance(block.attn, ReAttention) for block in tiny(**options).blocks]

    assert kinds(reattention_blocks=2) == [False, True, True]
    assert kinds(reattention_blocks=None) == [True, True, True]


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (24, 16)])
@pytest.mark.parametrize("training", [True, False])
def test_the_last_block_owes_the_class_token_alone_and_norms_see_all(size, training):
    network = tiny().train(training)
    short, whole = copy.deepcopy(network), copy.deepcopy(network)
    torch.testing.assert_close(short(images(*size)), whole.forward_features(images(*size)).pooled)
    for one, other, before in zip(own(short), own(whole), own(network), strict=True):
        torch.testing.assert_close(one, other)
        assert torch.equal(one, before) is not training


def test_the_last_maps_have_a_sign_and_are_no_attention():
    network = tiny().eval()
    maps = network.get_last_reattention(images())
    assert maps.shape == (3, 2, 17, 17) and (maps < 0).any()
    assert isinstance(network, HasReAttention) and not isinstance(network, HasSelfAttention)
    assert not hasattr(network, "get_last_selfattention") and is_made_for_one_size(network)
    with pytest.raises(UserError, match="no self-attention; --maps reattention shows"):
        require_attention(network)


@pytest.mark.parametrize("size", [16, 8])
def test_gradients_reach_every_parameter_that_wants_one(size):
    network = tiny()
    network(images(size, size)).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == [f"blocks.{block}.attn.reatten_matrix.bias" for block in (1, 2)]
    for name, parameter in network.named_parameters():
        assert name in without or parameter.grad.any(), name


@pytest.mark.parametrize("name, millions", [("deepvit_s", 27.3), ("deepvit_l", 58.9)])
def test_numbers_of_parameters_with_a_classifier_of_1000_classes(name, millions):
    with torch.device("meta"):
        network = create_backbone(name)
    count = sum(p.numel() for p in network.parameters()) + 1000 * (network.embed_dim + 1)
    assert round(count / 1e6, 1) == millions
    scaled = (network.embed_dim // 12) ** -0.5 if name == "deepvit_s" else 1.0
    assert {b.attn.map_scale for b in network.blocks if isinstance(b.attn, ReAttention)} == {scaled}


def test_its_tensors_have_the_names_of_the_published_code():
    found = {name for name in tiny(depth=2, reattention_blocks=1).state_dict()}
    block = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    linear = [f"blocks.{i}.{part}" for i in (0, 1) for part in block]
    linear += ["norm", "patch_embed.proj", "blocks.1.attn.reatten_matrix"]
    norms = ["patch_embed.bn1", "patch_embed.bn2", "blocks.1.attn.var_norm"]
    expected = {f"{part}.{kind}" for part in (*linear, *norms) for kind in ("weight", "bias")}
    tracked = ("running_mean", "running_var", "num_batches_tracked")
    expected |= {f"{norm}.{kind}" for norm in norms for kind in tracked}
    expected |= {"cls_token", "pos_embed", "patch_embed.conv1.weight", "patch_embed.conv2.weight"}
    assert found == expected


# Batch norms in a step of DINO


def test_norms_see_the_samples_that_stochastic_depth_drops():
    network = tiny(drop_path_rate=0.5)
    rates = len(network.drop_path_rates)
    counted = []
    for dropped in ([], [1], [0, 1, 2]):
        one = copy.deepcopy(network)
        keep = torch.ones(rates, 3, dtype=torch.bool)
        keep[-2, dropped] = False  # the last block's Re-Attention
        assert one(images(), keep).isfinite().all()
        counted.append(own(one.blocks[-1]))
    assert_same(counted[0], counted[1])
    assert_same(counted[0], counted[2])


@pytest.mark.parametrize("twice", [False, True])
def test_a_block_computed_twice_moves_its_statistics_once(twice):
    network = tiny()
    network.checkpoint_activations = twice
    network(images()).sum().backward()
    assert [norm.num_batches_tracked.item() for norm in batch_norms(network)] == [2] * 4
    plain = tiny()
    plain(images()).sum().backward()
    for one, other in zip(own(network), own(plain), strict=True):
        assert torch.equal(one, other)


def test_statistics_come_back_after_an_error_too():
    network = tiny()
    before = own(network)
    with pytest.raises(ValueError), statistics_unchanged(network):
        network(images())
        raise ValueError
    assert_same(own(network), before)


def test_a_step_moves_each_networks_own_statistics_by_what_it_saw():
    one = learner(arch="deepvit")
    student, teacher = one.student.backbone, one.teacher.backbone
    assert_same(dict(student.state_dict()), dict(teacher.state_dict()))
    assert one.teacher.training
    for step in range(3):
        assert one.step(step, [batch(step)]).committed
    counts = [{n.num_batches_tracked.item() for n in batch_norms(m)} for m in (student, teacher)]
    assert counts == [{6}, {3}]  # two sizes of crops, and the global ones alone


def test_a_step_that_is_not_finite_leaves_the_statistics():
    one, bad = learner(arch="deepvit"), batch(1)
    assert one.step(0, [batch(0)]).committed
    before = copy.deepcopy(one.state_dict())
    poison_crop(bad)
    assert not one.step(1, [bad]).committed
    assert_same(one.state_dict(), before)


def config(**changes):
    sizes = {"arch": "deepvit", "embed_dim": 24, "depth": 2, "num_heads": 2, **changes}
    return TrainConfig(data_path="digits", output_dir="x", patch_size=4, global_crops_size=16,
                       local_crops_size=8, batch_size_per_gpu=8, **sizes)  # fmt: skip


def test_accumulation_would_be_another_method(monkeypatch):
    sentence = "^--arch deepvit, which has batch norms, with a batch of 16 in parts of .* 8 would"
    with pytest.raises(UserError, match=sentence):
        with_total_batch(config(total_batch_size=16))
    assert with_total_batch(config()).total_batch_size == 8
    assert with_total_batch(config(arch="vit", total_batch_size=16)).total_batch_size == 16
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert with_total_batch(config()).total_batch_size == 16


@pytest.mark.parametrize("device, kind", [("cpu", SharedBatchNorm), ("cuda", torch.nn.SyncBatchNorm)])
def test_its_norms_are_of_all_processes_where_there_are_several(device, kind):
    network, before = tiny(), tiny().state_dict()
    norms = batch_norms(synchronised(network, torch.device(device)))
    assert len(norms) == 4 and all(isinstance(norm, kind) for norm in norms)
    assert_same(network.state_dict(), before)


# Names, flags and files


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"reattention_blocks": 3}, "--reattention_blocks 3 is more than --depth 2; it is at most"),
        ({"arch": "vit", "reattention_blocks": 1}, "--arch vit has no use for --reattention_blocks"),
        ({"num_heads": None}, "--arch deepvit needs its sizes: --num_heads missing."),
    ],
)
def test_flags_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        config(**changes)
    assert config(reattention_blocks=1).reattention_blocks == 1


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"reattention_blocks": 4}, "reattention_blocks is 4; of depth 3 that many"),
        ({"reattention_blocks": 0}, "reattention_blocks is 0; it is a whole number from 1"),
        ({"patch_size": 1}, "patch_size is 1; a DeepViT, .* takes an even one"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny(**options)


def test_an_odd_patch_is_refused_before_any_work():
    with pytest.raises(UserError, match="--patch_size 5 is odd; a DeepViT, .* takes an even one."):
        TrainConfig(data_path="x", output_dir="x", arch="deepvit_s", patch_size=5,
                    global_crops_size=20, local_crops_size=10)  # fmt: skip


GIVEN = dict.fromkeys(
    ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "mlp_grid")
)


def test_the_scale_of_its_maps_goes_by_its_name():
    with torch.device("meta"):
        state = create_backbone("deepvit_s").state_dict()
    found = recognize(state, {}, None, GIVEN, "it")
    assert found.name == "deepvit_s" and found.options["scale_reattention"] is True
    found = recognize(state, {"arch": "deepvit"}, None, GIVEN, "it")
    assert found.name == "deepvit" and found.options["scale_reattention"] is False
    with torch.device("meta"):
        state = create_backbone("deepvit_s", reattention_blocks=4).state_dict()
    assert recognize(state, {}, None, GIVEN, "it").name == "deepvit"
    with pytest.raises(UserError, match=r"deepvit_s has reattention_blocks 5, .* 4; leave --arch out\."):
        recognize(state, {}, "deepvit_s", GIVEN, "it")
    with pytest.raises(UserError, match="--num_heads 6 contradicts it, whose .* num_heads 12"):
        recognize(state, {}, None, {**GIVEN, "num_heads": 6}, "it")


def test_bare_tensors_with_a_classifier_need_no_flags(tmp_path):
    network = tiny(in_chans=1, num_heads=3).eval()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    state["module.head.weight"] = torch.zeros(10, 24)
    torch.save(state, tmp_path / "bare.pth")
    loaded = load(tmp_path / "bare.pth")
    assert loaded.architecture == {
        "name": "deepvit", **TINY, "num_heads": 3, "in_chans": 1, "mlp_ratio": 3.0,
        "reattention_blocks": 2, "scale_reattention": False,
    }  # fmt: skip
    assert loaded.matched == len(network.state_dict())
    picture = images(8, 24)[:, :1]
    with torch.inference_mode():
        assert torch.equal(loaded.backbone(picture), network(picture))


FLAGS = ["--arch", "deepvit", "--reattention_blocks", 1, "--batch_size_per_gpu", 128, "--epochs", 1,
         "--warmup_epochs", 0, "--total_batch_size", 128]  # fmt: skip


def test_it_is_pretrained_evaluated_and_looked_into(tmp_path, capsys):
    for name in ("one", "other"):
        assert train("digits", tmp_path / name, *FLAGS, "--checkpoint_activations",
                     name == "other") == 0  # fmt: skip
    losses = [line["loss"] for line in metrics(tmp_path / "one")]
    again = [line["loss"] for line in metrics(tmp_path / "other")]
    assert losses[-1] < losses[0] and again == pytest.approx(losses, abs=1e-4)
    content = result(tmp_path / "one")
    assert all(name.startswith("module.") for name in content["teacher"])

    backbone = dino_kit.load_backbone(tmp_path / "one")
    assert isinstance(backbone, HasReAttention) and not backbone.training
    assert cli.main(["knn", str(tmp_path / "one"), "--data_path", "digits"]) == 0
    record = json.loads((tmp_path / "one/knn.json").read_text("utf-8"))
    assert record["architecture"]["reattention_blocks"] == 1

    capsys.readouterr()
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(picture)
    words = ["attention", str(tmp_path / "one"), "--image_path", str(picture)]
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert "DeepViT has no self-attention" in said
    assert "instead: the signed maps of its last Re-Attention and the similarity of each" in said
    folder = tmp_path / "one/attention/picture"
    heads = record["architecture"]["num_heads"]
    with np.load(folder / "patches.npz") as arrays:
        shown, similarity = arrays["reattention"], arrays["similarity"]
    assert shown.shape == (heads, *similarity.shape) and (shown < 0).any()
    assert len(list(folder.glob("reattention-head*.png"))) == heads
    assert json.loads((folder / "attention.json").read_text("utf-8"))["maps"] == [
        "reattention", "similarity",
    ]  # fmt: skip
    assert cli.main([*words, "--maps", "attention"]) == 2
    assert "it takes reattention or similarity here" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "one")]) == 0


def test_it_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 7)
        train("digits", tmp_path / "parts", *FLAGS, "--save_every_steps", 5)
    for name in ("parts", "whole"):
        assert train("digits", tmp_path / name, *FLAGS) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
