"""The benchmark of depth policies: one world, one base model, and rows that differ in what is named and nothing else.

The base plays the part of the pretrained language model from which the paper starts; every row begins with its
parameters and trains for the same steps on the same streams. A row's seed is that of its routers and of the order of
its data. A row of another input (CLS only) has a base of its own, trained for the same steps.
"""

from typing import Any, NamedTuple

from vmod_jax.demo import demo_config
from vmod_jax.training.config import Config


class Row(NamedTuple):
    """One line of a table.

    changes: {dotted key of the configuration: value}; base: the row whose end it starts from, "" for none
    seeds: how many of them, from 0
    """

    changes: dict[str, Any]
    base: str = "base"
    seeds: int = 1


def benchmark_config() -> Config:
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


def bases(name: str, **changes: Any) -> dict[str, Row]:
    """Full computation from nothing, in three runs: what to say, then when, then both for longer.

    Weighed more from the start, *when* keeps *what* from being learned.
    """
    recipe = {"policy": "full", "optimizer.learning_rate": 2e-3, "steps": 2000, **changes}
    return {
        f"{name}_what": Row(recipe | {"data.stream_weight": 1.0}, base=""),
        f"{name}_when": Row(recipe, base=f"{name}_what"),
        name: Row(recipe | {"steps": 2500}, base=f"{name}_when"),
    }


BASES = bases("base")
