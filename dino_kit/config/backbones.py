"""Settings of the command that lists backbones."""

from __future__ import annotations

from dataclasses import dataclass

from dino_kit.config.fields import Checked, option


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Listing"""

    pattern: str | None = option(
        None,
        "A name, or a pattern as in a shell (in quotes), of names such as --arch takes: 'vit*', "
        "'timm:*swin*', 'torchvision:*'.",
        positional=True,
        nothing="all that are built here",
    )
    json: bool = option(False, "Print what is found as JSON.", switch=True)


@dataclass(frozen=True, kw_only=True)
class BackbonesConfig(Listing, Checked):
    pass
