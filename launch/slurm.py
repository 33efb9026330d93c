"""Start a job of a Slurm cluster: the same as `dino-kit launch slurm`, by a path.

    python launch/slurm.py --nodes 2 --ngpus 8 --arch vit_small --data_path FOLDER --output_dir OUT
    python launch/slurm.py --profile launch/clusters/mine.yaml -- knn OUT --data_path FOLDER

The first line is the reference's: without -- the command is train. To be expected is what the
command gives by itself.
"""

import sys

from dino_kit.cli import main

if __name__ == "__main__":
    sys.exit(main(["launch", "slurm", *sys.argv[1:]]))
