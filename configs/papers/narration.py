"""The paper's recipe for Ego4D's narration stream: Llama-3-8B, interleaved r = 0.2, 10 tokens a frame.

    vmod import LLAMA --vision SIGLIP --out imported/llama3_8b        # Meta-Llama-3-8B-Instruct, SigLIP-L/16-384
    vmod data features data/ego4d/v2/full_scale --encoder SIGLIP --out features/ego4d
    vmod train --config configs/papers/narration.py --workdir runs/narration
    vmod evaluate --workdir runs/narration --benchmark narration

Eight A100 in the paper. A stream is cut at 600 frames, which with their text are Llama-3's 8192 positions.

Expected, the paper's figures (not reproduced here):

                          LM-PPL   TimeDiff (s)   Fluency   LM-Correctness
    interleaved r = 0.2     2.41       2.04         45.2         48.9
    full                    2.40       2.05         45.3         49.0
"""

from vmod_jax.training.config import Config
from vmod_jax.training.recipes import paper


def get_config() -> Config:
    config = paper("data", "features", 2, 2e-4)
    config.data.name = "ego4d_narration"
    return config
