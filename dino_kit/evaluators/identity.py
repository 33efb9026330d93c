"""What makes the training of a linear layer another than any other, as its file says it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino_kit import files
from dino_kit.data.sources.names import composed
from dino_kit.data.sources.source import Source
from dino_kit.errors import UserError
from dino_kit.evaluators.linear import LinearFeatures
from dino_kit.features import labels_of
from dino_kit.weights import EvalTransform, Loaded


class Identity(NamedTuple):
    """A training: the backbone and what was said of it, the images, and how they are learnt from."""

    loaded: Loaded
    flags: dict[str, Any]  # of its architecture, as dino_kit.weights.load takes them
    features: LinearFeatures
    transform: EvalTransform
    train: Source
    val: Source
    protocol: dict[str, Any]  # by name; plain data

    def plain(self) -> dict[str, Any]:
        return {
            "classes": self.train.classes,
            "features": {
                "n_last_blocks": self.features.n_last_blocks,
                "avgpool_patchtokens": self.features.avgpool_patchtokens,
            },
            "transform": self.transform.plain(),
            "protocol": self.protocol,
            "backbone": {
                "path": str(Path(self.loaded.path).absolute()),
                "sha256": self.loaded.sha256,
                "network": self.loaded.which,
                "architecture": self.loaded.architecture,
                "flags": self.flags,
            },
            "images": {"train": _fingerprint(self.train), "val": _fingerprint(self.val)},
        }

    def saved(self, path: Path, needed: Sequence[str]) -> dict[str, Any] | None:
        """What this training left in ``path``; None where there is no such file.

        Args:
            needed: what the file has to have beside what tells trainings apart.

        Raises:
            UserError: it is of another training, the sentence says by what; or of none of ours.
        """
        if not path.is_file():
            return None
        saved, now = files.read_weights(path), self.plain()
        if any(name not in saved for name in (*needed, *now)):
            raise UserError(
                f"{path} was not written by dino-kit linear, so a training cannot go on from "
                "it; give another --output_dir."
            )
        saved["transform"] = EvalTransform.from_plain(saved["transform"]).plain()
        changed = [
            f"{name} was {saved[group].get(name)} and is now {value}"
            for group in ("features", "transform", "protocol")
            for name, value in now[group].items()
            if saved[group].get(name) != value
        ]
        before, after = saved["backbone"], now["backbone"]
        if any(before.get(key) != after[key] for key in ("sha256", "network", "architecture")):
            changed.append(f"the weights of {self.loaded.path} were others")
        for name, source in {"train": self.train, "val": self.val}.items():
            if saved["images"].get(name) != now["images"][name]:
                changed.append(f"the images of {source.root} were others")
        if changed:
            raise UserError(
                f"{path} was trained with other settings: {'; '.join(changed)}. Give another "
                "--output_dir, or --resume never to begin again in its place."
            )
        return saved


def _fingerprint(source: Source) -> str:
    """A hash of the images' names and labels, which does not depend on where the images lie."""
    digest = hashlib.sha256()
    for index, label in enumerate(labels_of(source).tolist()):
        name = composed(source.key(index)).encode("utf-8", "surrogatepass")
        digest.update(name + f"\0{label}\n".encode())
    return digest.hexdigest()
