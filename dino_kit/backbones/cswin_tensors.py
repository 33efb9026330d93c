"""Which CSWin Transformer a backbone's tensors are of: what shows in them, and what does not.

Widths and numbers of blocks show. How many heads share a width does not, nor how wide stripes are:
the 384-pixel models of the authors have the same tensors as those for 224, and other stripes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_kit.config import arch_options
from dino_kit.config.architectures import CSWIN
from dino_kit.errors import UserError

EMBEDDING, HIDDEN = "stage1_conv_embed.0.weight", "stage1.0.mlp.fc1.weight"
_UNSEEN = ("heads", "split_sizes")


def shown(state: Mapping[str, Any]) -> dict[str, Any]:
    """Every size that shows in tensors among which are EMBEDDING and HIDDEN."""
    embed_dim, in_chans = state[EMBEDDING].shape[:2]
    hidden = len(state[HIDDEN])
    found = [re.match(r"stage([1-4])\.(\d+)\.", name) for name in state]
    blocks = {match.groups() for match in found if match}
    ratio = hidden / embed_dim
    return {
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depths": [sum(stage == number for stage, _ in blocks) for number in "1234"],
        # Half a unit more where rounding would lose one.
        "mlp_ratio": ratio if int(embed_dim * ratio) == hidden else (hidden + 0.5) / embed_dim,
    }


def unseen(
    name: str,
    fits: bool,
    given: Mapping[str, Any],
    said: Mapping[str, Any],
    sizes: Mapping[str, Any],
    path: Path,
) -> dict[str, Any]:
    """What does not show: as the caller or the file says it, else as it goes by ``name``.

    Args:
        name: the architecture's; ``fits``, whether the tensors have the sizes that go by it.
        given, said: settings of the caller and of the file.
        sizes: those that show.
        path: what a sentence calls the file.

    Raises:
        UserError: what is given contradicts what is said or shows, or a size is not known.
    """
    saved, own = (arch_options.pairs(words.get("arch_options")) for words in (said, given))
    for key, value in own.items():
        known = {**saved, **sizes}
        if known.get(key, value) != value:
            raise UserError(
                f"--arch_options {key}={value} contradicts {path}, which has {key} {known[key]}."
            )
    table = CSWIN.sizes.get(name, {}) if fits else {}
    if said.get("arch"):
        # A run that does not say a size had its name's; cswin alone has those of the tiny one.
        table = CSWIN.sizes.get(name, CSWIN.sizes["cswin_tiny"])
    found = {**{size: table[size] for size in _UNSEEN if table}, **saved, **own}
    missing = [size for size in _UNSEEN if size not in found]
    if missing:
        raise UserError(
            f"The {' and '.join(missing)} of {path} are not known: its tensors have embed_dim "
            f"{sizes['embed_dim']} and depths {sizes['depths']}, which go by no name; give "
            f"--arch_options {' '.join(f'{size}=[…]' for size in missing)}."
        )
    return {size: value for size, value in found.items() if size not in sizes}
