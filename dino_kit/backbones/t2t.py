"""T2T-ViT: a deep and narrow vision transformer whose tokens are gathered step by step.

Source: Yuan et al. 2021, "Tokens-to-Token ViT: Training Vision Transformers from Scratch on
ImageNet" (arXiv:2101.11986), with the Performer of its main table, and the sizes, the scales and
the first weights of its published code, whose names the weights have.

A ViT cuts an image into patches of 16 × 16 and maps each by itself, so lines and edges that cross a
border are lost to it. T2T begins with small overlapping pieces and joins neighbours (section 3.1).
A soft split SS lists, for every place of a map, the k × k values around it, every s-th place:

    SS:  (B, c, h, w)  to  (B, T, c k²),    T = ⌊(h + 2p - k)/s + 1⌋ · ⌊(w + 2p - k)/s + 1⌋

and a step of the T2T process lets its tokens see each other, reads them as a map again and splits
that, so that a token comes to hold what nine overlapping ones held:

    T_0 = SS(image),  k 7, s 4, p 2            (B, HW/16, 49 C)
    T_1 = SS(map of Performer_1(T_0)),  k 3, s 2, p 1     (B, HW/64, 9 e)
    T_2 = SS(map of Performer_2(T_1)),  k 3, s 2, p 1     (B, N, 9 e)
    patches = T_2 W + b                        (B, N, D),  N = HW/256: a patch is 16 × 16 pixels

A Performer is a block of one head, narrower than what goes in, hence with v as its shortcut:

    k, q, v = LN(T) W + b                      (B, T, e) each
    x = v + proj(attended);   x ← x + MLP(LN(x))

For the 3,136 tokens of a crop of 224 pixels maps of softmax attention would be too large. Positive
random features φ (Choromanski et al. 2021, "Rethinking attention with Performers", lemma 1) take
their place, so that keys and values are summed up once for all queries:

    φ(x) = exp(ω x - |x|²/2) / √m              ω (m, e), m = e/2
    attended_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / (φ(q_i)ᵀ Σ_j φ(k_j) + 1e-8)

The rows of ω are drawn once, with the first weights, at right angles to each other, and are never
trained. If they were of length √e, φ(q)ᵀφ(k) would estimate exp(qᵀk), the kernel of softmax; as
published they are of length √m, and it estimates about exp(-|q - k|²/4): who is near is seen.

After that comes a ViT (:mod:`~dino_kit.backbones.vit`) with fixed positions instead of learnt ones,
without biases of queries, keys and values, and with an MLP that is two or three times as wide. The
published code also drops a tenth of the numbers of both branches of a Performer at random in
training. Here no backbone draws numbers of its own, so that a resumed run is the uninterrupted one,
and a teacher, which is in training mode, gives the same features twice; so that is left out.

Legend: B batch, C channels, H and W pixels, N patches, T tokens, e width of a token in the T2T
process (64), m random features, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kit.backbones import vit
from dino_kit.backbones.layers import check_sizes, run_block
from dino_kit.backbones.products import Linear
from dino_kit.config.architectures import T2T
from dino_kit.errors import UserError

_PATCH_SIZE = T2T.patch_size  # 4 · 2 · 2, the strides of the soft splits
_FIRST_SPLIT = {"kernel_size": 7, "stride": 4, "padding": 2}
_LATER_SPLIT = {"kernel_size": 3, "stride": 2, "padding": 1}
_EPSILON = 1e-8  # beside the sum that attention is divided by


class T2TViT(vit.SelfAttentionTransformer):
    """Images ``(B, C, H, W)``, sides multiples of 16, to class tokens ``(B, D)``.

    Any such sides will do: the positions of the patches, fixed for ``image_size``, are interpolated
    as a ViT's are. They count the patches row by row, so that computed anew for another number of
    columns the same numbers would be those of another place; and where the published code meets
    another size, it interpolates them too.

    Args:
        image_size: side in pixels for which positions are made.
        in_chans: C, channels of an image.
        embed_dim: D, width of a token.
        depth: number of blocks after the T2T process.
        num_heads: attention heads of such a block.
        mlp_ratio: width of its hidden layer, as a multiple of D.
        token_dim: e, width of a token in the T2T process; even.
        drop_path_rate: the last block's rate of stochastic depth; it grows linearly from 0. The T2T
            process has none.
        norm_eps: epsilon of every LayerNorm.

    Raises:
        UserError: the sizes do not fit together.
    """

    embedding = "tokens_to_token"

    def __init__(
        self,
        image_size: int = 224,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        token_dim: int = 64,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ):
        check_sizes(
            drop_path_rate,
            image_size=image_size,
            patch_size=_PATCH_SIZE,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            token_dim=token_dim,
        )
        if token_dim % 2:
            raise UserError(
                f"token_dim is {token_dim}; it is even, as there are half as many random features."
            )
        hidden = int(embed_dim * mlp_ratio)
        super().__init__(
            TokensToToken(in_chans, token_dim, embed_dim, norm_eps),
            [vit.Block(embed_dim, num_heads, hidden, False, norm_eps) for _ in range(depth)],
            image_size=image_size,
            patch_size=_PATCH_SIZE,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_heads=num_heads,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
        )
        # Among the weights all the same: files are published with those of another image size.
        self.pos_embed.requires_grad_(False).copy_(sinusoids(self.pos_embed.shape[1], embed_dim))

    def no_weight_decay(self) -> set[str]:
        """Parameters that the authors keep from weight decay, beside biases and one-dimensional ones."""
        return {"cls_token"}

    def _patches(self, images: Tensor) -> Tensor:
        # On a sixteenth as many places as there are pixels it holds as much as several blocks.
        return run_block(self.tokens_to_token, self.checkpoint_activations, images)


class TokensToToken(nn.Module):
    """The T2T process: images ``(B, C, H, W)``, sides multiples of 16, to patches ``(B, N, D)``."""

    def __init__(self, in_chans: int, token_dim: int, embed_dim: int, norm_eps: float):
        super().__init__()
        pieces = [split["kernel_size"] ** 2 for split in (_FIRST_SPLIT, _LATER_SPLIT)]
        self.attention1 = Performer(in_chans * pieces[0], token_dim, norm_eps)
        self.attention2 = Performer(token_dim * pieces[1], token_dim, norm_eps)
        self.project = Linear(token_dim * pieces[1], embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        x = F.unfold(images, **_FIRST_SPLIT).mT  # (B, HW/16, 49 C)
        x = self.attention1(x).mT.unflatten(2, (height // 4, width // 4))  # (B, e, H/4, W/4)
        x = F.unfold(x, **_LATER_SPLIT).mT  # (B, HW/64, 9 e)
        x = self.attention2(x).mT.unflatten(2, (height // 8, width // 8))  # (B, e, H/8, W/8)
        return self.project(F.unfold(x, **_LATER_SPLIT).mT)  # (B, N, D)


class Performer(nn.Module):
    """Attention by random features, then an MLP: ``(B, T, dim)`` to ``(B, T, token_dim)``."""

    def __init__(self, dim: int, token_dim: int, norm_eps: float):
        super().__init__()
        features = token_dim // 2
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.kqv = Linear(dim, 3 * token_dim)
        self.proj = Linear(token_dim, token_dim)
        self.norm2 = nn.LayerNorm(token_dim, eps=norm_eps)
        self.mlp = nn.Sequential(
            Linear(token_dim, token_dim), nn.GELU(), Linear(token_dim, token_dim)
        )
        # A parameter, so that it goes wherever weights go; what is the same in student and teacher
        # a moving average leaves as it is.
        self.w = nn.Parameter(torch.empty(features, token_dim), requires_grad=False)
        nn.init.orthogonal_(self.w, gain=features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)  # (B, T, e) each
        x = v + self.proj(self.attend(q, k, v))
        return x + self.mlp(self.norm2(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys and values, each ``(B, T, e)``, to what is attended, the same."""
        # A feature may be exp(|w|²/2), 9 million, which fp16 does not hold; to an exponent of 16
        # bfloat16 rounds by up to 1/16, six percent of its exponential; and sums are over all tokens.
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (each.to(self.w.dtype) for each in (q, k, v))
            q, k = self.random_features(q), self.random_features(k)  # (B, T, m)
            sums = q @ k.sum(dim=1).unsqueeze(2)  # (B, T, 1)
            return q @ (k.mT @ v) / (sums + _EPSILON)  # (B, T, e)

    def random_features(self, x: Tensor) -> Tensor:
        """φ of ``(..., e)``, ``(..., m)``."""
        exponents = x @ self.w.mT - x.square().sum(dim=-1, keepdim=True) / 2
        return exponents.exp() / len(self.w) ** 0.5


def sinusoids(count: int, dim: int) -> Tensor:
    """Positions 0 to ``count`` - 1 as sines and cosines, in turns, ``(count, dim)``.

    Numbers 2i and 2i+1 are the sine and the cosine of position · 10000^(-2i/dim). Source: Vaswani et
    al. 2017, section 3.5.
    """
    channels = torch.arange(dim)
    rates = 10000.0 ** -(2 * (channels // 2).double() / dim)
    angles = torch.arange(count).double()[:, None] * rates
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).float()
