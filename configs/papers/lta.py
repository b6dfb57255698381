"""The paper's recipe for Ego4D's long-term anticipation (version 2): Llama-3-8B, interleaved r = 0.2, 10 tokens a
frame.

    vmod import LLAMA --vision SIGLIP --out imported/llama3_8b        # Meta-Llama-3-8B-Instruct, SigLIP-L/16-384
    vmod data features data/ego4d/v2/full_scale --encoder SIGLIP --out features/ego4d
    vmod train --config configs/papers/lta.py --workdir runs/lta
    vmod evaluate --workdir runs/lta --benchmark lta

Eight A100 in the paper. A stream is cut at 600 frames, which with their text are Llama-3's 8192 positions.

Expected, the paper's figures (not reproduced here):

    ED@20 of verb / noun / action, less is better: 0.689 / 0.676 / 0.884
"""

from vmod_jax.training.config import Config
from vmod_jax.training.recipes import paper


def get_config() -> Config:
    config = paper("data", "features", 6, 3e-4)
    config.data.name = "ego4d_lta"
    return config
