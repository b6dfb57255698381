"""Llama-3.1-8B on a TPU v5p-8 (4 chips): streams of up to 1200 frames x 50 tokens, rows of 62 thousand tokens.

    vmod import LLAMA --vision SIGLIP --grid 7x7 --out imported/llama3.1_8b_7x7       # Llama-3.1: 131072 positions
    vmod data narration --root EGO4D --encoder SIGLIP --grid 7 7 --out prepared/ego4d_7x7
    bash launch/tpu.sh run v5p --zone ZONE --type v5p-8 --bucket BUCKET --delete -- \
      vmod train --config configs/llama3_8b_v5p_8.py --workdir '~/bucket/runs/v5p_8' \
      --config.init_from='~/bucket/imported/llama3.1_8b_7x7' --config.data.path='~/bucket/prepared/ego4d_7x7'

Ten minutes of video at five times the paper's tokens a frame; the paper has no such run, and no score is expected.

Cost by the formula (rows of 1200 frames and 2000 text tokens): 192 PFLOP a step, 671 EFLOP in all; at 40% of the chips'
peak 254 hours, full 456: take a larger slice, whose mesh.fsdp is its chips, for the whole of it. Nothing of this was
measured on a TPU.

It fits: `vmod bench aot --quick 8b-v5p-8-1200x50` says 55.0 of 95 GiB a chip (full: 62.0) for its longest streams
(docs/results/aot-quick-8b-v5p-8-1200x50.json).
"""

from vmod_jax.training.config import Config
from vmod_jax.training.recipes import llama3_8b


def get_config() -> Config:
    config = llama3_8b("imported/llama3.1_8b_7x7", "prepared/ego4d_7x7")
    config.mesh.update({"data": 1, "fsdp": 4})
    config.accumulate = 16  # one row a chip at a time
    config.data.max_frames = 1200
    config.data.buckets = ((300, 640, 520), (600, 1024, 920), (1200, 2000, 2200))
    return config
