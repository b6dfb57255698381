"""A small model on generated videos in the schema of COIN, Ego4D or Ego-Exo4D: the whole way in minutes, on two cores.

    vmod data steps --schema coin --out data/coin
    vmod data features data/coin/videos --image-size 24 --out features/coin
    vmod train --config configs/steps.py --workdir runs/coin \\
        --config.data.name=coin_step --config.data.root=data/coin --config.data.features=features/coin
    vmod evaluate --workdir runs/coin --benchmark coin_step

Cost: two to four minutes on two shared cores. Expected: 100 of 100 steps named, where the best constant answer names 13
(docs/ego4d.md has all of them).
"""

from vmod_jax.training.config import Config, defaults


def get_config() -> Config:
    config = defaults()
    config.steps = 300
    config.batch_size = 16
    config.checkpoint_every = 300
    config.keep_checkpoints = 1
    config.log_every = 20
    config.gate = "straight_through"

    config.model.hidden_size = 64
    config.model.intermediate_size = 128
    config.model.num_attention_heads = 2
    config.model.num_key_value_heads = 1
    config.model.grid = (3, 3)
    config.model.vision.image_size = 24
    config.model.vision.patch_size = 4

    config.data.name = "coin_step"

    config.optimizer.learning_rate = 2e-3
    config.optimizer.train_base = True
    return config
