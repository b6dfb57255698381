"""The paper's recipe for COIN: step, next, task, procedure and procedure with goal, mixed evenly: Llama-3-8B,
interleaved r = 0.2, 10 tokens a frame.

    vmod import LLAMA --vision SIGLIP --out imported/llama3_8b        # Meta-Llama-3-8B-Instruct, SigLIP-L/16-384
    vmod data features data/coin/videos --encoder SIGLIP --out features/coin
    vmod train --config configs/papers/coin.py --workdir runs/coin
    vmod evaluate --workdir runs/coin --benchmark coin_step

Eight A100 in the paper. A stream is cut at 600 frames, which with their text are Llama-3's 8192 positions.

Expected, the paper's figures (not reproduced here):

                          step   task   next   procedure   procedure_goal
    interleaved r = 0.2   63.4   92.8   49.7     49.8          53.3
    full                  63.1   92.7   49.1     49.8          54.1
"""

from vmod_jax.data.sources.coin import TASKS
from vmod_jax.training.config import Config
from vmod_jax.training.recipes import paper


def get_config() -> Config:
    config = paper("data", "features", 5, 1e-4)
    for task in TASKS:
        config.data.mix[f"coin_{task}"] = 1.0
    return config
