"""The smallest run that has everything: a transformer of a few thousand weights, on the CPU."""

from __future__ import annotations

TINY = (
    "--arch vit --embed_dim 24 --depth 2 --num_heads 2 --patch_size 4 --global_crops_size 16 "
    "--local_crops_size 8 --local_crops_number 2 --out_dim 32 --head_hidden_dim 32 "
    "--head_bottleneck_dim 16 --total_batch_size 8 --num_workers 0 --device cpu"
).split()
