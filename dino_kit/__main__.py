"""``python -m dino_kit`` is ``dino-kit``."""

import sys

from dino_kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
