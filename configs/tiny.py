"""A model of 4 layers that trains in seconds on generated streams: for tests and for trying things out.

    vmod train --config configs/tiny.py --workdir runs/tiny

Cost: under a minute on two CPU cores, generating the 24 videos included. What to expect: the loss falls from about 6.5
to below 3; the model has learned how a reply is written, not yet what to say (`vmod demo` trains one that has).

Batch 8, 4 heads and 2 key/value heads, and buckets whose frames are a multiple of 4 fit any small mesh.
"""

from vmod_jax.training.config import Config, defaults


def get_config() -> Config:
    config = defaults()
    config.steps = 40
    config.batch_size = 8
    config.checkpoint_every = 20
    config.log_every = 1

    config.model.hidden_size = 32
    config.model.intermediate_size = 64
    config.model.vision.image_size = 24
    config.model.vision.patch_size = 4

    config.data.train_videos = 16
    config.data.val_videos = 4
    config.data.test_videos = 4

    config.optimizer.learning_rate = 1e-2
    config.optimizer.train_base = True
    return config
