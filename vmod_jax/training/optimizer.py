"""Which parameters are trained, and how: AdamW by groups.

    lora       lora_a, lora_b of every linear layer             always trained
    connector  vision features -> the language model's width    always trained
    expert     the LayerExperts' rows                           always trained
    base       the language model's own weights                 optimizer.train_base   (tiny models)
    vision     the vision tower                                 optimizer.train_vision

Parameters outside the trained groups are kept apart from the trained ones (`split`), so that they get neither gradients
nor optimiser state: the step differentiates the trained part only.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

Tree = dict[str, Any]

GROUPS = ("lora", "connector", "expert", "base", "vision")


def flatten(tree: Tree) -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}"""
    return dict(traverse_util.flatten_dict(tree, sep="/"))


def unflatten(flat: dict[str, Any]) -> Tree:
    return traverse_util.unflatten_dict(flat, sep="/")


def group(path: str) -> str:
    """The group of the parameter at a path such as `llama/layers/q/lora_a`."""
    names = path.split("/")
    if "vision" in names:
        return "vision"
    if names[-1] in ("lora_a", "lora_b"):
        return "lora"
    if "expert" in names:
        return "expert"
    return "connector" if "connector" in names else "base"


def trained_groups(config: Any) -> set[str]:
    """The groups that a config's `optimizer` section trains."""
    extra = {"base": config.train_base, "vision": config.train_vision}
    return {"lora", "connector", "expert"} | {name for name, wanted in extra.items() if wanted}


def split(params: Tree, groups: set[str]) -> tuple[Tree, Tree]:
    """A parameter tree -> (trained, frozen), two trees without a path in common; `merge` is its inverse."""
    flat = flatten(params)
    trained = {path: x for path, x in flat.items() if group(path) in groups}
    frozen = {path: x for path, x in flat.items() if group(path) not in groups}
    return unflatten(trained), unflatten(frozen)


def merge(trained: Tree, frozen: Tree) -> Tree:
    """The whole parameter tree again."""
    return unflatten(flatten(trained) | flatten(frozen))


def decayed(path: str) -> bool:
    """Weight decay is for matrices: not for norms, biases or experts (which, stacked over layers, look like some)."""
    return path.split("/")[-1] in ("kernel", "embedding", "lora_a", "lora_b") and group(path) != "expert"


def schedule(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Linear warm-up over the first `warmup` of the steps (none at rate 0), then half a cosine down to 0 at `steps`."""
    first = max(1, round(warmup * steps))

    def rate(step: Any) -> Any:
        done = jnp.clip((step - first) / max(1, steps - first), 0, 1)
        return peak * jnp.minimum((step + 1) / first, 0.5 * (1 + jnp.cos(jnp.pi * done)))

    return rate


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """AdamW on the trained parameters: clip by their global norm, Adam, decay, each group's rate, the schedule.

    config: learning_rate, warmup, weight_decay, clip, b1, b2, eps and rates.{lora,connector,expert,base,vision}, the
    multipliers of the learning rate.
    """

    def by_path(function: Any) -> Any:
        def apply(tree: Tree) -> Tree:
            flat = flatten(tree)
            return unflatten({path: function(path, x) for path, x in flat.items()})

        return apply

    scale = by_path(lambda path, update: update * config.rates[group(path)])
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=by_path(lambda path, _: decayed(path))),
        optax.stateless(lambda updates, _: scale(updates)),
        optax.scale_by_learning_rate(schedule(config.learning_rate, steps, config.warmup)),
    )


def to_f32(tree: Tree) -> Tree:
    """Trained parameters are kept in float32, whatever the model computes in: bf16 would swallow small updates."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
