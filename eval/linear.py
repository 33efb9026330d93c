"""Linear classification of frozen features: the same as `dino-kit linear`, as a file to start by path.

    python eval/linear.py CHECKPOINT --data_path IMAGENET
    torchrun --nproc_per_node=8 eval/linear.py --pretrained_weights CHECKPOINT --data_path IMAGENET
    python eval/linear.py CHECKPOINT --data_path IMAGENET --evaluate --linear_weights HEAD

    python eval/linear.py CHECKPOINT --data_path IMAGENET --fast

Protocol: a linear layer is trained on the frozen teacher's class tokens of the last 4 blocks, by SGD
for 100 epochs, at rate 0.001 × batch / 256 falling by half a cosine, on a random crop (8 to 100 % of
the image) and flip of each image in each epoch; it classifies the centre 224 × 224 of val/, shorter
side resized to 256. ViT-B: --n_last_blocks 1 --avgpool_patchtokens true. The number to expect on
ImageNet, of the reference's published weights: ViT-S/16 77.0 %, ViT-S/8 79.7 %, ViT-B/16 78.2 %,
ViT-B/8 80.1 %; like the reference's, the number "at its best" is chosen on the images of val/.
With --fast 13 rates are trained on features of the centre alone, extracted once, and the rate is
chosen on images of train/ that are held out: another protocol, whose numbers do not compare.
"""

import sys

from dino_kit.cli import main

if __name__ == "__main__":
    sys.exit(main(["linear", *sys.argv[1:]]))
