"""Pretrain vision backbones without labels by DINO; measure and show what they learnt.

``create_backbone(name, **options)``, ``load_backbone(path, which="teacher")`` and
``load_classifier(path)`` are the way in from Python. Importing the package imports no PyTorch; the
first use of one of them does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dino_kit.backbones.build import create_backbone
    from dino_kit.evaluators.classifier import load_classifier
    from dino_kit.weights import load_backbone

__all__ = ["__version__", "create_backbone", "load_backbone", "load_classifier"]

_HOMES = {
    "create_backbone": "dino_kit.backbones.build",
    "load_backbone": "dino_kit.weights",
    "load_classifier": "dino_kit.evaluators.classifier",
}


def __getattr__(name: str):
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("dino_kit")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
