"""Llama-3-8B on a TPU v6e-8: streams of up to 600 frames x 10 tokens.

    bash launch/tpu.sh run v6e --zone ZONE --type v6e-8 --bucket BUCKET --delete -- \
      vmod train --config configs/llama3_8b_v6e_8.py --workdir '~/bucket/runs/v6e_8' \
      --config.init_from='~/bucket/imported/llama3_8b' --config.data.path='~/bucket/prepared/ego4d'

The imported weights and the features are those of configs/ego4d_v5e_16.py, and so are batch, schedule and expected
scores: it is the same run on other chips.

Cost by the formula: 13.1 PFLOP a step, 46 EFLOP in all; at 40% of the chips' peak 4.4 hours, full 6.4. Nothing of this
was measured on a TPU.

It fits: `vmod bench aot --quick 8b-v6e-8-600x10` says 10.0 of 32 GiB a chip (full: 11.2) for its longest streams
(docs/results/aot-quick-8b-v6e-8-600x10.json).
"""

from vmod_jax.training.config import Config
from vmod_jax.training.recipes import llama3_8b


def get_config() -> Config:
    config = llama3_8b("imported/llama3_8b", "prepared/ego4d")
    config.mesh.update({"data": 1, "fsdp": 8})
    config.accumulate = 8  # one row a chip at a time
    config.data.max_frames = 600
    config.data.buckets = ((150, 640, 520), (300, 1024, 840), (600, 2000, 1600))
    return config
