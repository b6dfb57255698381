"""A model of 4 layers that learns to answer questions about generated pictures.

vmod data image-qa --out data/image_qa
vmod train --config configs/image_qa.py --workdir runs/image_qa --config.data.root=data/image_qa
vmod evaluate --workdir runs/image_qa --benchmark pope --root data/image_qa/pope      (gqa, mme alike)
"""

from vmod_jax.training.config import Config, defaults


def get_config() -> Config:
    config = defaults()
    config.steps = 2500
    config.batch_size = 24
    config.checkpoint_every = 500
    config.keep = 0.5
    config.gate = "tanh"

    config.model.hidden_size = 64
    config.model.intermediate_size = 128
    config.model.num_hidden_layers = 4
    config.model.num_key_value_heads = 4
    config.model.max_position_embeddings = 1024
    config.model.cls = False  # one token a place of the picture
    config.model.vision.patch_size = 16

    config.data.name = "llava"
    config.data.buckets = ((1, 128, 32),)

    config.optimizer.learning_rate = 2e-3
    config.optimizer.train_base = True
    return config
