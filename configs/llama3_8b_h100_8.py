"""Llama-3-8B on a node of 8 H100 (80 GB): streams of up to 600 frames x 10 tokens.

    bash launch/gpu.sh vmod train --config configs/llama3_8b_h100_8.py --workdir runs/h100_8

The imported weights and the features are those of configs/ego4d_v5e_16.py, and so are batch, schedule and expected
scores: it is the same run on other chips.

Cost by the formula: 13.1 PFLOP a step, 46 EFLOP in all; at 40% of the chips' peak 4.0 hours, full 5.9. Nothing of
this was measured on a GPU; `vmod bench train-step --llama-3-8b` measures a step on one.

It fits: `vmod bench aot 8b-h100-8-600x10` says 9.0 of 79 GiB a GPU (full: 9.9) for its longest streams
(docs/results/aot-8b-h100-8-600x10.json), of which 2.4 GiB are parameters and the optimiser's state; the gradients that
are accumulated come on top. 1200 x 50 would fit, too (8b-h100-8-1200x50: 39.5, full 49.6).
"""

from vmod_jax.training.config import Config
from vmod_jax.training.recipes import llama3_8b


def get_config() -> Config:
    config = llama3_8b("imported/llama3_8b", "prepared/ego4d")
    config.mesh.update({"data": 1, "fsdp": 8})
    config.accumulate = 8  # one row a GPU at a time
    config.data.max_frames = 600
    config.data.buckets = ((150, 640, 520), (300, 1024, 840), (600, 2000, 1600))
    return config
