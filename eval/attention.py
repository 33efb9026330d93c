"""Attention maps of a checkpoint: the same as `dino-kit attention`, as a file to start by path.

    python eval/attention.py CHECKPOINT --image_path PICTURE_OR_FOLDER --html
    python eval/attention.py --pretrained_weights CHECKPOINT --image_path PICTURE --threshold 0.6
    python eval/attention.py CHECKPOINT --image_path PICTURE --maps rollout

Protocol: the image is resized to 480 × 480 (bilinear; --image_size), cut to whole patches and
normalised; shown is the class token's attention to the patches in the last block of the frozen
teacher (another by --block), for each head and for their mean. There is no number to expect, but a
sight: after a full pretraining heads pick out the objects of a photograph, each its own parts;
after a few epochs, or without any, the maps are noise, or show only where the picture is dark or
light. --maps rollout follows the mean of the heads through all blocks.
"""

import sys

from dino_kit.cli import main

if __name__ == "__main__":
    sys.exit(main(["attention", *sys.argv[1:]]))
