"""CSWin Transformer: stripes and LePE by hand, the authors' numbers, grids that no width divides."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import Stopped, assert_same_run, metrics, stop_after
from torch.utils.flop_counter import FlopCounterMode

import dino_kit
from dino_kit import cli
from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.cswin import CrossShapedAttention, CSWin, stripe_widths
from dino_kit.backbones.interface import Backbone, HasReAttention, HasSelfAttention, HasTokenMixing
from dino_kit.backbones.recognition import recognize
from dino_kit.config.train import TrainConfig
from dino_kit.errors import UserError
from dino_kit.evaluators.attention import is_made_for_one_size, require_attention
from dino_kit.training.compiling import compile_blocks
from dino_kit.weights import load

TINY = {
    "image_size": 64,
    "embed_dim": 4,
    "depths": [1, 1, 2, 2],
    "heads": [2, 4, 8, 16],
    "split_sizes": [1, 2, 2, 2],
    "mlp_ratio": 2.0,
}


def tiny(**options) -> CSWin:
    """Weights that are not the first ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CSWin(**{**TINY, **options})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def images(*size: int, count: int = 2) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(sum(size))
    return torch.randn(count, 3, *(size or (64, 64)), generator=numbers)


# The model


def test_cswin_golden(golden):
    """Numbers that the authors' code computed in float64, by the names that it gives its tensors.

    Square images by that for classification, oblong ones by that for segmentation; weights are in
    64ths, pixels in 32nds.
    """
    arrays = {name: torch.from_numpy(value) for name, value in golden("cswin").items()
              if value.dtype.kind != "U"}  # fmt: skip
    network = CSWin(**{**TINY, "depths": [1, 1, 2, 1]}).double()
    network.load_state_dict(
        {name: arrays[f"state/{name}"].double() / 64 for name in network.state_dict()}
    )
    assert sum(name.startswith("state/") for name in arrays) == len(network.state_dict())

    def same(found, name):
        torch.testing.assert_close(found, arrays[name], rtol=1e-9, atol=1e-9)

    outputs = []
    for stage in (network.stage1, network.stage2, network.stage3, network.stage4):
        stage[-1].register_forward_hook(lambda block, inputs, output: outputs.append(output))
    for case in ("square", "oblong"):
        outputs.clear()
        pooled = network(arrays[f"{case}/images"].double() / 32)
        for stage, output in zip((1, 2, 3, 4), outputs, strict=True):
            same(output, f"{case}/stage{stage}")
        if case == "square":
            same(pooled, "square/pooled")
            pooled.square().sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    sums = {name: torch.stack((g.sum(), g.norm())) for name, g in gradients.items()}
    names = golden("cswin")["square/names"].tolist()
    same(torch.stack([sums[name] for name in names]), "square/gradients")
    whole = [name for name in arrays if name.startswith("square/gradient/")]
    assert len(names) == len(gradients) and len(whole) == 5
    for name in whole:
        same(gradients[name.removeprefix("square/gradient/")], name)


def stripe(place: int, length: int, width: int) -> int:
    """Which stripe that place is in: stripes stand out over both ends equally far, to a token."""
    outside = (width - length % width) % width
    return (place + outside // 2) // width


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1), (7, 4)])
@pytest.mark.parametrize("width", [1, 2, 3, None])
def test_attention_is_what_the_equations_say(grid, width):
    torch.manual_seed(0)
    (n, m), h, d = grid, 4, 3
    layer = CrossShapedAttention(h * d, h, width).double()
    x = torch.randn(2, n * m, 3 * h * d, dtype=torch.float64)
    q, k, v = x.unflatten(2, (3, h, d)).unflatten(1, grid).unbind(3)  # (B, n, m, h, d)
    tokens = [(row, column) for row in range(n) for column in range(m)]
    expected = torch.zeros(2, n, m, h, d, dtype=torch.float64)
    for head in range(h):
        if width is None:
            kind, own = 0, [0] * len(tokens)  # all tokens are one stripe
        elif head < h // 2:  # vertical: as high as the grid
            kind, own = 0, [stripe(column, m, width) for _, column in tokens]
        else:
            kind, own = 1, [stripe(row, n, width) for row, _ in tokens]
        heads = h if width is None else h // 2
        for (row, column), mine in zip(tokens, own, strict=True):
            seen = [token for token, other in zip(tokens, own, strict=True) if other == mine]
            keys = torch.stack([k[:, r, c, head] for r, c in seen], dim=1)  # (B, T, d)
            values = torch.stack([v[:, r, c, head] for r, c in seen], dim=1)
            scores = (keys * q[:, row, column, head][:, None]).sum(-1) / d**0.5
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            expected[:, row, column, head] = (weights[..., None] * values).sum(1)
            lepe = layer[kind].get_v
            channels = slice((head % heads) * d, (head % heads + 1) * d)
            expected[:, row, column, head] += lepe.bias[channels]
            for r, c in seen:
                if abs(r - row) <= 1 and abs(c - column) <= 1:
                    weight = lepe.weight[channels, 0, 1 + r - row, 1 + c - column]
                    expected[:, row, column, head] += weight * v[:, r, c, head]
    found = layer(x, grid)
    torch.testing.assert_close(found, expected.reshape(2, n * m, h * d), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "length, width, widths",
    [(14, 7, [7, 7]), (6, 7, [6]), (12, 7, [6, 6]), (16, 7, [5, 7, 4]), (8, 7, [4, 4]),
     (5, 2, [2, 2, 1]), (3, 1, [1, 1, 1]), (1, 12, [1])],
)  # fmt: skip
def test_stripes_are_centred_and_end_where_the_grid_does(length, width, widths):
    assert stripe_widths(length, width) == widths and sum(widths) == length


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (3, 5), (8, 16)])
def test_what_stands_out_takes_no_attention(grid):
    """Equal values come out as they are, whatever the scores."""
    layer = CrossShapedAttention(8, 2, 7)
    for part in layer:
        torch.nn.init.zeros_(part.get_v.weight)
        torch.nn.init.zeros_(part.get_v.bias)
    qkv = torch.randn(1, grid[0] * grid[1], 24) - 3.0
    qkv[..., 16:] = torch.arange(8.0)
    torch.testing.assert_close(layer(qkv, grid), qkv[..., 16:], rtol=1e-5, atol=1e-5)


def test_a_block_shows_a_token_a_cross():
    block = tiny().stage2[0]  # sw 2
    x = images(count=1).new_zeros(1, 48, 8).requires_grad_()
    block((x + torch.linspace(-1, 1, 8)), (6, 8))[0, 8 * 3 + 5].sum().backward()
    seen = x.grad.abs().sum(dim=2).reshape(6, 8) > 0
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[2:4], expected[:, 4:6] = True, True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(
    "name, millions, macs",
    [("cswin_tiny", 22.3, 4.3), ("cswin_small", 34.6, 6.9), ("cswin_base", 77.4, 15.0),
     ("cswin_large", 173.3, 31.5)],
)  # fmt: skip
def test_published_numbers_of_parameters_and_of_multiplications(name, millions, macs):
    """With a classifier of 1,000 classes; half of what PyTorch's FlopCounterMode counts."""
    with torch.device("meta"):
        network = create_backbone(name)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 224, 224))
    count = sum(p.numel() for p in network.parameters()) + 1000 * (network.embed_dim + 1)
    assert round(count / 1e6, 1) == millions
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.06)


def test_its_tensors_have_the_names_of_the_published_code():
    found = set(tiny(depths=[1, 1, 1, 1]).state_dict())
    parts = ["stage1_conv_embed.0", "stage1_conv_embed.2", "norm", "stage4.0.attns.0.get_v"]
    for stage in (1, 2, 3, 4):
        own = ["qkv", "proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2"]
        parts += [f"stage{stage}.0.{part}" for part in own]
    for stage in (1, 2, 3):
        parts += [f"stage{stage}.0.attns.{i}.get_v" for i in (0, 1)]
        parts += [f"merge{stage}.conv", f"merge{stage}.norm"]
    assert found == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def test_first_weights():
    torch.manual_seed(0)
    network = CSWin(embed_dim=32)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2), name
            assert not module.bias.any() and module.weight.abs().max() < 0.12
        elif isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-5 and (module.weight == 1).all() and not module.bias.any()


# As every backbone


def test_it_is_what_the_interface_says():
    network = tiny()
    assert isinstance(network, Backbone) and not isinstance(
        network, HasSelfAttention | HasTokenMixing | HasReAttention
    )
    assert (network.embed_dim, network.patch_size, network.num_prefix_tokens) == (32, 32, 0)
    assert network.depth == 2 and len(network.blocks) == 6
    assert not is_made_for_one_size(network) and not hasattr(network, "get_last_selfattention")
    with pytest.raises(UserError, match="^CSWin has no self-attention .*--maps similarity shows"):
        require_attention(network)
    with pytest.raises(UserError, match="^CSWin has no self-attention .*--maps similarity shows"):
        network.get_last_selfattention(images())
    assert network.no_weight_decay() == set()


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (96, 96), (64, 160)])
def test_it_meets_crops_of_any_multiple_of_32(size):
    network = tiny(split_sizes=[1, 2, 7, 7])
    grid = (size[0] // 32, size[1] // 32)
    features = network.forward_features(images(*size))
    assert features.grid == grid and features.patches.shape == (2, grid[0] * grid[1], 32)
    torch.testing.assert_close(features.patches.mean(dim=1), features.pooled)
    torch.testing.assert_close(network(images(*size)), features.pooled)
    first, last = network.get_intermediate_layers(images(*size), n=2)
    torch.testing.assert_close(last, features.patches)
    assert first.shape == last.shape and not torch.allclose(first, last, atol=1e-3)
    assert len(network.get_intermediate_layers(images(*size))) == 1


@pytest.mark.parametrize(
    "shape, sentence",
    [((1, 3, 100, 64), "100 × 64 pixels cannot .* multiples of 32, such as 96 × 64"),
     ((1, 3, 16, 16), "multiples of 32, such as 32 × 32"), ((1, 1, 64, 64), "in_chans")],
)  # fmt: skip
def test_images_that_do_not_fit_are_refused(shape, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"depths": [1, 2, 21]}, r"depths is \[1, 2, 21\]; it is four whole numbers from 1"),
        ({"depths": 12}, "depths is 12; it is four whole"),
        ({"split_sizes": [1, 2, 0, 7]}, r"split_sizes is \[1, 2, 0, 7\]; it is four"),
        ({"heads": [2, 4, 8, "16"]}, "heads is .*; it is four"),
        ({"heads": [1, 4, 8, 16]}, "heads is .* that of stage 1 is even"),
        ({"heads": [2, 4, 6, 16]}, "embed_dim 4 makes stage 3 16 wide, .* among 6 heads"),
        ({"image_size": 100}, "image_size 100 is not a multiple of patch_size 32; .*: 96"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny(**options)


@pytest.mark.parametrize("size", [64, 32])
def test_gradients_reach_every_parameter(size):
    network = tiny()
    network(images(size, size)).square().sum().backward()
    for name, parameter in network.named_parameters():
        # At 32 pixels stage 4 has one token, whose attention is 1: of qkv the value's rows learn.
        assert parameter.grad.any(), name


def test_rates_of_stochastic_depth_grow_over_all_blocks():
    rates = tiny(drop_path_rate=0.5).drop_path_rates
    assert rates == pytest.approx([rate for i in range(6) for rate in 2 * [i * 0.1]])


def test_dropped_branches_are_not_computed():
    network, plain = tiny(drop_path_rate=0.5), tiny()
    keep = torch.ones(12, 2, dtype=torch.bool)
    torch.testing.assert_close(plain(images(), keep), plain(images()))
    keep[:, 1] = False
    dropped = network(images(), keep)
    keep[:, 0] = False
    nothing = network(images(), keep)
    nothing.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    for block in network.blocks:
        block.forward = lambda x, *arguments: x
    torch.testing.assert_close(nothing, network(images()))
    torch.testing.assert_close(dropped[1], nothing[1])
    assert not torch.allclose(dropped[0], nothing[0], atol=1e-3)


def test_blocks_computed_twice_give_the_same_gradients():
    plain, twice = tiny(drop_path_rate=0.5), tiny(drop_path_rate=0.5)
    twice.checkpoint_activations = True
    keep = torch.arange(24).reshape(12, 2) % 5 != 0
    calls = []
    twice.blocks[2].attns.register_forward_pre_hook(lambda *_: calls.append(1))
    for network in (plain, twice):
        network(images(), keep).square().sum().backward()
    assert len(calls) == 2
    for one, other in zip(plain.parameters(), twice.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_under_autocast_blocks_add_to_the_weights_precision():
    network = tiny(depths=[1, 1, 1, 1])
    seen = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = network(images(96, 96))
    assert seen == 4 * [torch.float32] and found.dtype == torch.float32
    torch.testing.assert_close(found, network(images(96, 96)), rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_under_the_same_names():
    network = tiny()
    compiled = copy.deepcopy(network)
    compile_blocks(compiled, torch.device("cpu"))
    for size in (64, 96):
        torch.testing.assert_close(compiled(images(size, size)), network(images(size, size)))
    assert list(compiled.state_dict()) == list(network.state_dict())


# Names, flags and files


def config(**changes):
    options = {"arch": "cswin", "embed_dim": 8, "global_crops_size": 64, "local_crops_size": 32}
    return TrainConfig(data_path="digits", output_dir="x", **{**options, **changes})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"embed_dim": None}, "--arch cswin needs its sizes: --embed_dim missing"),
        ({"depth": 4}, "--arch cswin has no use for --depth; leave it out"),
        ({"num_heads": 2}, "--arch cswin has no use for --num_heads"),
        ({"patch_size": 8}, "--arch cswin has patches of its own"),
        ({"local_crops_size": 48}, "--local_crops_size 48 is not a multiple of .* 32; .* 32 and 64"),
        ({"arch": "cswin_tiny"}, "--embed_dim cannot be given; use --arch cswin"),
    ],
)
def test_flags_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        config(**changes)
    assert config(arch_options=("heads=[2,4,4,4]",)).known_patch_size == 32


GIVEN = dict.fromkeys(
    ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "mlp_grid",
     "arch_options")
)  # fmt: skip


@pytest.mark.parametrize("name", ["cswin_tiny", "cswin_small", "cswin_base", "cswin_large"])
def test_a_name_is_known_by_its_tensors(name):
    with torch.device("meta"):
        state = create_backbone(name).state_dict()
    found = recognize(state, {}, None, GIVEN, "it")
    assert (found.name, found.built_as) == (name, "cswin")
    with torch.device("meta"):
        again = create_backbone("cswin", **found.options)
    heads = [block.attns[0].num_heads * len(block.attns) for block in again.blocks]
    with torch.device("meta"):
        own = create_backbone(name)
    assert heads == [block.attns[0].num_heads * len(block.attns) for block in own.blocks]
    assert again.stage3[0].attns[0].width == 7


def test_what_no_tensor_shows_is_said_by_options():
    with torch.device("meta"):
        state = create_backbone("cswin_base").state_dict()
    given = {**GIVEN, "arch_options": ("split_sizes=[1,2,12,12]",)}
    found = recognize(state, {}, None, given, "it")
    assert found.name == "cswin_base" and found.options["split_sizes"] == [1, 2, 12, 12]
    assert found.options["heads"] == [4, 8, 16, 32]


@pytest.mark.parametrize(
    "said, arch, options, sentence",
    [
        ({}, None, None, r"The heads and split_sizes of it are not known: .* depths \[1, 1, 2, 2\]"),
        ({}, None, ["heads=[2,4,8,16]"], r"The split_sizes of it are .* --arch_options split_sizes="),
        ({}, "cswin_tiny", None, "cswin_tiny has embed_dim 64, depths .*; leave --arch out"),
        ({}, "vit_tiny", None, "vit_tiny contradicts it, whose tensors are those of a CSWin"),
        ({"arch": "cswin", "arch_options": ["heads=[2,2,2,2]"]}, None, ["heads=[2,4,8,16]"],
         r"--arch_options heads=\[2, 4, 8, 16\] contradicts it, which has heads \[2, 2, 2, 2\]"),
        ({"arch": "cswin"}, None, ["depths=[1,2,3,4]"], "contradicts it, which has depths"),
    ],
)
def test_what_is_not_known_or_contradicts_is_refused(said, arch, options, sentence):
    with pytest.raises(UserError, match=sentence):
        recognize(tiny().state_dict(), said, arch, {**GIVEN, "arch_options": options}, "it")


def test_flags_of_other_families_are_refused_for_its_files():
    with pytest.raises(UserError, match="--patch_size 16 .* a CSWin Transformer and has no use"):
        recognize(tiny().state_dict(), {"arch": "cswin"}, None, {**GIVEN, "patch_size": 16}, "it")


def test_what_a_run_does_not_say_goes_by_its_name():
    state = tiny().state_dict()
    found = recognize(state, {"arch": "cswin"}, None, GIVEN, "it")
    assert found.options == {
        "in_chans": 3, "embed_dim": 4, "depths": [1, 1, 2, 2], "mlp_ratio": 2.0,
        "heads": [2, 4, 8, 16], "split_sizes": [1, 2, 7, 7],
    }  # fmt: skip


@pytest.mark.parametrize("key", [None, "state_dict_ema"])
def test_published_files_load_as_they_are(tmp_path, key):
    network = tiny(in_chans=1).eval()
    state = {**network.state_dict(), "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    torch.save(state if key is None else {key: state}, tmp_path / "it.pth")
    said = [f"{size}={TINY[size]}" for size in ("heads", "split_sizes")]
    loaded = load(tmp_path / "it.pth", arch_options=said)
    assert loaded.matched == len(network.state_dict()) and loaded.which == key
    picture = images(96, 160)[:, :1]
    with torch.inference_mode():
        assert torch.equal(loaded.backbone(picture), network(picture))


def test_of_two_networks_in_a_file_none_is_taken_for_the_other(tmp_path):
    state = tiny().state_dict()
    torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "it.pth")
    with pytest.raises(UserError, match="it holds state_dict, state_dict_ema: choose one"):
        load(tmp_path / "it.pth")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(16):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (48, 48, 3), np.uint8) // (1 + number % 2)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def train(pictures, out, *flags) -> int:
    words = (
        "--arch cswin --embed_dim 4 --mlp_ratio 2 --arch_options depths=[1,1,1,2] heads=[2,4,8,16] "
        "split_sizes=[1,2,3,3] --global_crops_size 64 --local_crops_size 32 --local_crops_number 2 "
        "--out_dim 32 --head_hidden_dim 32 --head_bottleneck_dim 16 --total_batch_size 8 --epochs 3 "
        "--batch_size_per_gpu 4 --num_workers 0 --device cpu --warmup_epochs 1 --lr 0.05 "
        "--probe_freq 0 --log_every_steps 1"
    ).split()
    words = ["train", *words, "--data_path", pictures, "--output_dir", out, *flags]
    return cli.main([str(word) for word in words])


def test_it_is_pretrained_evaluated_and_looked_into(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path / "run") == 0
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))
    said = capsys.readouterr()
    assert f"attention {tmp_path / 'run'} --image_path IMAGE\n" in said.out + said.err
    backbone = dino_kit.load_backbone(tmp_path / "run")
    assert isinstance(backbone, CSWin) and backbone.stage3[0].attns[0].width == 3

    run, data = str(tmp_path / "run"), ["--data_path", str(pictures), "--val_share", "0.5"]
    assert cli.main(["knn", run, *data]) == 0
    record = json.loads((tmp_path / "run/knn.json").read_text("utf-8"))
    assert record["architecture"]["depths"] == [1, 1, 1, 2]
    assert cli.main(["linear", run, *data, "--epochs", "1", "--n_last_blocks", "3"]) == 2
    assert "is more than the 2 blocks that the backbone has" in capsys.readouterr().err

    picture = str(next(pictures.glob("*/*.png")))
    words = ["attention", run, "--image_path", picture]
    assert cli.main(words) == 0
    assert "CSWin has no self-attention" in capsys.readouterr().err
    assert list((tmp_path / "run/attention").rglob("similarity*.png"))
    assert cli.main([*words, "--maps", "attention"]) == 2
    assert "it takes similarity here" in capsys.readouterr().err
    assert cli.main(["report", run]) == 0


def test_it_is_resumed_bit_for_bit(pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 3)
        train(pictures, tmp_path / "parts", "--save_every_steps", 2)
    for name in ("parts", "whole"):
        assert train(pictures, tmp_path / name) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
