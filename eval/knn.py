"""Weighted k-nearest-neighbour accuracy: the same as `dino-kit knn`, as a file to start by path.

    python eval/knn.py CHECKPOINT --data_path IMAGENET
    python eval/knn.py --pretrained_weights CHECKPOINT --data_path IMAGENET --nb_knn 10 20 100 200

Protocol: features of the frozen teacher, shorter side resized to 256 and the centre 224 × 224 cut
out, L2-normalised; each image of val/ is classified by its k nearest images of train/, which vote
with exp(similarity / 0.07). The number to expect on ImageNet with k 20, of the reference's published
weights: ViT-S/16 74.5 %, ViT-S/8 78.3 %, ViT-B/16 76.1 %, ViT-B/8 77.4 %.
"""

import sys

from dino_kit.cli import main

if __name__ == "__main__":
    sys.exit(main(["knn", *sys.argv[1:]]))
