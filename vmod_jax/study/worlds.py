"""The small worlds and recipes of the studies: the demo's, and the cluttered one of the tables."""

import json
from pathlib import Path
from typing import Any

from vmod_jax.training.config import Config, defaults


def demo_config() -> Any:
    """4 layers, d = 96, all of it trained; 1024 videos of 8 to 12 seconds."""
    config: Any = defaults()
    config.steps = 900
    config.batch_size = 4
    config.checkpoint_every = 300
    config.keep_checkpoints = 1
    config.log_every = 10
    config.gate = "straight_through"

    config.model.hidden_size = 96
    config.model.intermediate_size = 256
    config.model.num_attention_heads = 2
    config.model.num_key_value_heads = 1
    config.model.vision.image_size = 48
    config.model.vision.patch_size = 6

    config.data.train_videos = 1024
    config.data.val_videos = 8
    config.data.test_videos = 64
    config.data.eval_split = "test"
    config.data.stream_weight = 3.0  # *when* to speak is the harder half of this world

    config.optimizer.learning_rate = 1e-3
    config.optimizer.train_base = True
    config.optimizer.rates.expert = 20.0  # all else has learned before; the router has not
    return config


def cluttered_config() -> Config:
    """The demo's model and recipe in the cluttered world."""
    config = demo_config()
    config.steps = 900
    config.checkpoint_every = 1000
    config.optimizer.learning_rate = 5e-4  # at twice that, what a base has learned of *when* is lost or not, by chance
    config.data.world = "cluttered"
    config.data.train_videos = 1536
    config.data.test_videos = 96
    config.model.vision.image_size = 72
    config.model.vision.patch_size = 8
    return config


def truth(root: Path, name: str) -> list[dict[str, Any]]:
    """What should be said: the narrations of a video, without their tags."""
    from vmod_jax.data.sources.ego4d import clean_text

    narrations = json.loads((root / "narrations.json").read_text())["videos"][name]["narrations"]
    return [{"time": entry["time"], "text": clean_text(entry["text"])} for entry in narrations]
