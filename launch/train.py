"""Pretrain a backbone: the same as `dino-kit train`, as a file that launchers can start.

    python launch/train.py --arch vit_small --data_path FOLDER --output_dir OUT
    torchrun --nproc_per_node=8 launch/train.py vits16_100ep --data_path FOLDER --output_dir OUT

The second command is the reference's vanilla run (ViT-S/16, 100 epochs of ImageNet, batch 512 on
8 GPUs there): 69.3 % k-NN and 74.0 % linear accuracy are to be expected.
"""

import sys

from dino_kit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
