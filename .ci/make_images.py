"""Write sixteen small pictures, in folders of two classes, to the folder given."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

root = Path(sys.argv[1])
numbers = np.random.default_rng(0)
for place in range(16):
    folder = root / f"class{place % 2}"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = numbers.integers(0, 256, (48, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{place}.png")
