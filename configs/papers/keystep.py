"""The paper's recipe for Ego-Exo4D's keysteps: Llama-3-8B, interleaved r = 0.2, 10 tokens a frame.

    vmod import LLAMA --vision SIGLIP --out imported/llama3_8b        # Meta-Llama-3-8B-Instruct, SigLIP-L/16-384
    vmod data features data/egoexo4d --encoder SIGLIP --out features/egoexo4d
    vmod train --config configs/papers/keystep.py --workdir runs/keystep
    vmod evaluate --workdir runs/keystep --benchmark keystep

Eight A100 in the paper. A stream is cut at 600 frames, which with their text are Llama-3's 8192 positions.

Expected, the paper's figures (not reproduced here):

    accuracy 44.85 (v1), 42.62 (v2)
"""

from vmod_jax.training.config import Config
from vmod_jax.training.recipes import paper


def get_config() -> Config:
    config = paper("data", "features", 10, 2e-4)
    config.data.name = "egoexo4d_keystep"
    return config
