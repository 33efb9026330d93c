"""Attention maps, masks that keep a share of them, and the size at which images are looked at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms import functional as reference

from dino_kit.backbones.build import create_backbone
from dino_kit.errors import UserError
from dino_kit.evaluators import attention as evaluator
from dino_kit.evaluators.attention import (
    attention_maps,
    attention_rows,
    default_size,
    fit,
    require_attention,
    require_size,
    smaller_grid,
    threshold_mask,
    to_tensor,
)
from dino_kit.normalize import IMAGENET_MEAN, IMAGENET_STD


def test_golden_threshold_masks(golden):
    arrays = golden("attention_threshold")
    attention = torch.from_numpy(arrays.pop("attention"))
    assert arrays
    for name, mask in arrays.items():
        found = threshold_mask(attention, float(name.removeprefix("mask_")))
        assert np.array_equal(found.numpy(), mask), name


@st.composite
def masses(draw) -> torch.Tensor:
    """Rows of whole numbers, so with ties and zeros; none is empty."""
    heads, patches = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.integers(0, draw(st.sampled_from([1, 3, 1000])) + 1, (heads, patches))
    assume(rows.any(axis=1).all())
    return torch.from_numpy(rows.astype("f4"))


@settings(deadline=None)
@given(masses(), st.floats(0.01, 1.0))
def test_a_mask_holds_the_share_with_the_fewest_patches(rows, keep):
    for row, mask in zip(rows.numpy(), threshold_mask(rows, keep).numpy(), strict=True):
        kept, share = np.sort(row[mask]), row.astype("f8") / row.sum()
        assert share[mask].sum() >= keep - 1e-5
        assert share[mask].sum() - kept[0] / row.sum() < keep + 1e-5
        # The strongest of all, and of equal ones the later.
        assert set(np.flatnonzero(mask)) == set(np.argsort(row, kind="stable")[-mask.sum() :])


@settings(deadline=None)
@given(masses(), st.floats(0.01, 1.0))
def test_every_head_is_masked_by_itself(rows, keep):
    alone = torch.cat([threshold_mask(row[None], keep) for row in rows])
    assert torch.equal(threshold_mask(rows, keep), alone)


@settings(deadline=None)
@given(masses())
def test_to_keep_all_leaves_out_only_what_gets_nothing(rows):
    assert torch.equal(threshold_mask(rows, 1.0), rows > 0)


def test_masking_leaves_its_input_as_it_is():
    rows = torch.tensor([[3.0, 1.0, 2.0]])
    threshold_mask(rows, 0.5)
    assert rows.tolist() == [[3.0, 1.0, 2.0]]


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.001, 60.0, float("nan")])
def test_what_is_no_share_is_refused(keep):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        threshold_mask(torch.ones(1, 4), keep)


@pytest.fixture
def backbone():
    """A small network whose biases and norms are not at their trivial initial values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = create_backbone(
            "vit", image_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2
        )
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def picture(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(rows))


def full_maps(backbone, image: torch.Tensor) -> torch.Tensor:
    """(heads, T, T), from the queries and keys that the last block computes of all tokens."""
    seen = []
    hook = backbone.blocks[-1].attn.qkv.register_forward_hook(
        lambda module, inputs, output: seen.append(output[0])
    )
    with torch.no_grad():
        backbone.get_intermediate_layers(image[None])  # of all tokens
    hook.remove()
    (qkv,) = seen  # (T, 3 D)
    heads = backbone.num_heads
    q, k, _ = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)  # (heads, T, d) each
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)


# The first is the size it was made for.
@pytest.mark.parametrize("rows, columns", [(16, 16), (24, 12), (4, 40), (8, 4), (32, 36)])
def test_rows_and_maps_are_what_the_last_block_attends_to(backbone, rows, columns):
    image, grid = picture(rows, columns), (rows // 4, columns // 4)
    expected = full_maps(backbone, image)
    found = attention_rows(backbone, image)
    assert found.shape == (2, 1 + grid[0] * grid[1], grid[0] * grid[1])
    torch.testing.assert_close(found, expected[:, :, 1:], rtol=0, atol=1e-6)
    maps = attention_maps(backbone, image)
    assert maps.shape == (2, *grid)
    assert torch.equal(maps.flatten(1), found[:, 0])


def test_a_row_lacks_what_goes_to_the_class_token(backbone):
    image = picture(20, 12)
    sums = attention_rows(backbone, image).sum(dim=-1)
    assert (sums > 0).all() and (sums < 1).all()
    torch.testing.assert_close(1 - sums, full_maps(backbone, image)[:, :, 0], rtol=0, atol=1e-6)


def test_the_maps_are_not_trivial(backbone):
    maps = attention_maps(backbone, picture(16, 16))
    assert maps.std() > 0.01 and not torch.allclose(maps[0], maps[1], atol=0.01)


def test_maps_are_float32_under_autocast_too(backbone):
    expected = attention_rows(backbone, picture(16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_rows(backbone, picture(16, 16)), expected)


class Recorded(nn.Module):
    """A network of two prefix tokens with given maps, which notes how it was called."""

    patch_size, num_prefix_tokens, depth = 2, 2, 4

    def __init__(self, maps: torch.Tensor, error: Exception | None = None):
        super().__init__()
        self.inner, self.maps, self.error, self.calls = nn.Dropout(), maps, error, []

    def get_last_selfattention(self, images):
        return self.get_selfattention(images, -1)

    def get_selfattention(self, images, block):
        self.calls.append((self.training, self.inner.training, torch.is_grad_enabled()))
        if self.error:
            raise self.error
        self.block = block
        return self.maps[None]


def test_every_prefix_token_is_told_from_the_patches():
    maps = torch.arange(3 * 8 * 8).reshape(3, 8, 8).float()
    network = Recorded(maps)
    assert torch.equal(attention_rows(network, picture(4, 6)), maps[:, :, 2:])
    expected = maps[:, 0, 2:].reshape(3, 2, 3)
    assert torch.equal(attention_maps(network, picture(4, 6)), expected)


def test_the_last_block_s_attention_is_asked_for_unless_another_is_named():
    for look in (attention_rows, attention_maps):
        network = Recorded(torch.ones(3, 8, 8))
        look(network, picture(4, 6))
        assert network.block == -1
        look(network, picture(4, 6), 2)
        assert network.block == 2


@pytest.mark.parametrize("modes", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("error", [None, ValueError("none of ours")])
def test_a_network_looks_in_eval_mode_and_is_left_in_its_own(modes, error):
    network = Recorded(torch.ones(1, 6, 6), error)
    network.training, network.inner.training = modes
    try:
        attention_maps(network, picture(4, 4))
    except ValueError:
        assert error
    assert network.calls == [(False, False, False)]
    assert (network.training, network.inner.training) == modes


def test_gradients_are_left_as_they_are(backbone):
    backbone.train()
    backbone(picture(16, 16)[None]).sum().backward()
    before = [(p.requires_grad, p.grad.clone()) for p in backbone.parameters()]
    assert not attention_rows(backbone, picture(16, 16)).requires_grad
    for parameter, (required, gradient) in zip(backbone.parameters(), before, strict=True):
        assert parameter.requires_grad == required and torch.equal(parameter.grad, gradient)


def test_too_many_patches_are_refused_before_the_network_sees_them(monkeypatch):
    monkeypatch.setattr(evaluator, "_MOST_PATCHES", 11)
    network = Recorded(torch.ones(1, 14, 14))
    message = "^8 × 6 pixels are 12 patches of 2 × 2, .* 11 at most; give a smaller --image_size.$"
    with pytest.raises(UserError, match=message):
        attention_rows(network, picture(8, 6))
    with pytest.raises(UserError, match=message):
        fit(Image.new("RGB", (30, 40)), (8, 6), 2)
    assert not network.calls
    attention_maps(Recorded(torch.ones(1, 13, 13)), picture(2, 22))  # 11 are not too many


def test_an_image_beyond_all_measure_is_refused_before_it_is_resized():
    with pytest.raises(UserError, match="patches of 16 × 16"):
        fit(Image.new("RGB", (4, 3)), (10**9,), 16)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate …"),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
)
def test_maps_that_do_not_fit_into_memory_are_a_sentence(error):
    network = Recorded(torch.ones(1, 6, 6), error)
    with pytest.raises(UserError, match="^4 × 4 pixels are 4 patches .* smaller --image_size.$"):
        attention_maps(network, picture(4, 4))


def test_other_errors_of_the_network_are_not_explained_away():
    network = Recorded(torch.ones(1, 6, 6), RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        attention_maps(network, picture(4, 4))


@pytest.mark.parametrize(
    "call", [require_attention, lambda network: attention_maps(network, picture(4, 4))]
)
def test_a_network_without_attention_is_refused(call):
    with pytest.raises(UserError, match="^Conv2d has no self-attention among all .*to the pooled feature.$"):
        call(nn.Conv2d(3, 3, 1))


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize("width, height", [(30, 20), (20, 30), (25, 25), (101, 7), (64, 48)])
@pytest.mark.parametrize("image_size", [(8,), (23,), (8, 20), (17, 9), (48, 64)])
def test_an_image_is_resized_as_by_torchvision_and_cut_to_whole_patches(width, height, image_size):
    image = noise(width, height)
    whole = reference.resize(image, list(image_size))
    found = fit(image, image_size, 4)
    expected = whole.crop((0, 0, whole.width // 4 * 4, whole.height // 4 * 4))
    assert found.size == expected.size
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_one_number_is_the_shorter_side_and_two_are_height_and_width():
    assert fit(noise(30, 20), (16,), 4).size == (24, 16)
    assert fit(noise(20, 30), (16,), 4).size == (16, 24)
    assert fit(noise(30, 20), (16, 8), 4).size == (8, 16)


def test_an_image_of_the_right_size_keeps_its_pixels():
    assert np.array_equal(np.asarray(fit(noise(24, 16), (16, 24), 8)), np.asarray(noise(24, 16)))


@pytest.mark.parametrize(
    "image_size, message",
    [
        ((3,), "^--image_size 3 makes the image 3 × 6 pixels, .* patch of 4 × 4; give 4 or more.$"),
        ((40, 3), "^--image_size 40 3 makes the image 40 × 3 pixels"),
        ((3, 40), "^--image_size 3 40 makes the image 3 × 40 pixels"),
    ],
)
def test_an_image_smaller_than_a_patch_is_refused(image_size, message):
    with pytest.raises(UserError, match=message):
        fit(noise(20, 10), image_size, 4)


def refusal(act, *arguments) -> bool:
    try:
        act(*arguments)
    except UserError:
        return True
    return False


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    image_size=st.lists(st.integers(1, 40), min_size=1, max_size=2),
)
def test_a_size_is_refused_beforehand_where_no_image_would_fit(shape, image_size):
    most = evaluator._MOST_PATCHES
    evaluator._MOST_PATCHES = 25
    try:
        refused = refusal(require_size, image_size, 4)
        square = Image.new("RGB", (9, 9))
        assert refused == refusal(fit, square, image_size, 4)
        assert not refused or refusal(fit, Image.new("RGB", shape), image_size, 4)
    finally:
        evaluator._MOST_PATCHES = most


def test_an_image_becomes_what_torchvision_makes_of_it():
    image = noise(9, 7)
    for mean, std in [(IMAGENET_MEAN, IMAGENET_STD), ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))]:
        expected = reference.normalize(reference.to_tensor(image), mean, std)
        assert torch.equal(to_tensor(image, mean, std), expected)
    assert to_tensor(Image.new("L", (3, 2))).shape == (3, 2, 3)


@pytest.mark.parametrize(
    "training_size, patch_size, side",
    [(224, 16, 480), (224, 8, 480), (224, 14, 476), (96, 16, 208), (64, 8, 64), (32, 4, 32)],
)
def test_the_size_to_look_at_grows_with_that_trained_at(training_size, patch_size, side):
    assert default_size(training_size, patch_size) == (side, side)


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_size_to_look_at_has_whole_patches(patch_size, patches):
    side, other = default_size(patch_size * patches, patch_size)
    assert side == other >= patch_size and side % patch_size == 0


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 3000))
def test_a_smaller_grid_fits_and_keeps_the_proportion(rows, columns, most):
    fewer = smaller_grid((rows, columns), most)
    assert 1 <= fewer[0] <= rows and 1 <= fewer[1] <= columns and fewer[0] * fewer[1] <= most
    if rows * columns <= most:
        assert fewer == (rows, columns)
    elif min(fewer) > 1:
        scale = (most / (rows * columns)) ** 0.5
        assert scale * rows - fewer[0] < 1 and scale * columns - fewer[1] < 1


@pytest.mark.parametrize(
    "grid, most, expected",
    [((30, 40), 1024, (27, 36)), ((1, 5000), 1024, (1, 1024)), ((5000, 2), 1000, (1000, 1))],
)
def test_a_smaller_grid_of_a_photo_and_of_a_strip(grid, most, expected):
    assert smaller_grid(grid, most) == expected
