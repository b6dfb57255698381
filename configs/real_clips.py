"""Two real clips (a car park, bottles on a table) with narrations: a small model learns to tell both by heart.

    vmod train --config configs/real_clips.py --workdir runs/real_clips
    vmod evaluate --workdir runs/real_clips

The clips lie in $VMOD_DATA/streams (default: ../shared/data/streams beside the checkout). There is nothing held out: it
shows that real video, decoded from files, goes through every part and can be learned.
"""

import os
from pathlib import Path

from vmod_jax.training.config import Config, defaults


def get_config() -> Config:
    data = Path(os.environ.get("VMOD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    config = defaults()
    config.steps = 100
    config.batch_size = 2
    config.checkpoint_every = 100
    config.log_every = 10
    config.gate = "tanh"

    config.model.hidden_size = 96
    config.model.intermediate_size = 256
    config.model.num_attention_heads = 2
    config.model.num_key_value_heads = 1
    config.model.vision.image_size = 96
    config.model.vision.patch_size = 8

    config.data.name = "narration"
    config.data.root = str(data / "streams")
    config.data.eval_split = "train"

    config.optimizer.learning_rate = 2e-3
    config.optimizer.train_base = True
    return config
