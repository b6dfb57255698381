"""The training step: what it takes and gives back, its loss, and the state that a run begins with."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vmod_jax import workdir as folder
from vmod_jax.data.conversation import IGNORE
from vmod_jax.errors import UserError
from vmod_jax.models.context import Beginning, over_context
from vmod_jax.models.experts import adapt, trained_layers
from vmod_jax.models.flops import step_flops
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, init_params
from vmod_jax.training import objective
from vmod_jax.training.checkpoint import load_params
from vmod_jax.training.config import Config
from vmod_jax.training.optimizer import flatten, merge, split, to_f32, unflatten
from vmod_jax.training.sharding import placements

Tree = Any


class State(NamedTuple):
    """What a step takes and gives back. The trained parameters are float32; the frozen ones never change."""

    trained: Tree
    optimizer: Tree
    rng: jax.Array  # key data u32[2], of LoRA's dropout


# --- the step ---------------------------------------------------------------------------------------------------------


def make_loss(model: VideoLM, mesh: Mesh) -> Any:
    """(trained, frozen, batch, rngs) -> (loss, {lm_loss, stream_loss, labels}), all f32[]: see `objective.loss`."""

    def labelled(variables: Tree, batch: dict[str, jax.Array], rngs: dict[str, jax.Array]) -> jax.Array:
        """Hidden states at the labelled positions: [B, M, d]."""
        begin = Beginning(batch["first_position"], batch["first_frame"]) if "first_frame" in batch else None
        hidden, _ = model.apply(
            variables, batch["input_ids"], batch["frames"], length=batch["length"], begin=begin, rngs=rngs,
            method="hidden",
        )  # fmt: skip
        return objective.gather_labelled(hidden, batch["label_pos"])

    def loss(
        trained: Tree, frozen: Tree, batch: dict[str, jax.Array], rngs: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        variables = {"params": merge(trained, frozen)}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the model places its activations by it
            hidden = (over_context(labelled) if "first_frame" in batch else labelled)(variables, batch, rngs)
        head: Any = functools.partial(model.apply, variables, method="logits")
        labels = batch["label"], batch["label_weight"], batch["label_is_stream"]
        return objective.head_loss(head, hidden, *labels, largest=objective.LARGEST * mesh.size)

    return loss


def make_step(
    model: VideoLM, optimizer: optax.GradientTransformation, state: State, mesh: Mesh, accumulate: int = 1
) -> Any:
    """(state, frozen, batch, step) -> (state, {loss, lm_loss, stream_loss, grad_norm: f32[]}); donates the state.

    accumulate: the batch goes through in so many parts, each with its share of the labels, so that losses and gradient
    are those of the whole batch, in the memory of one part.
    """
    dropout = model.config.lora.rank and model.config.lora.dropout
    gradient_of_loss = jax.value_and_grad(make_loss(model, mesh), has_aux=True)

    def one(state: State, frozen: Tree, batch: dict[str, jax.Array], key: jax.Array) -> tuple[dict, Tree]:
        (value, parts), gradient = gradient_of_loss(state.trained, frozen, batch, {"dropout": key} if dropout else {})
        return {"loss": value, "lm_loss": parts["lm_loss"], "stream_loss": parts["stream_loss"]}, gradient

    def in_parts(state: State, frozen: Tree, batch: dict[str, jax.Array], key: jax.Array) -> tuple[dict, Tree]:
        # Part i is rows i, i + accumulate, ...: every device keeps its own rows.
        parts = {name: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
        whole = label_counts(batch)

        def add(total: tuple[dict, Tree], item: tuple[dict, jax.Array]) -> tuple[tuple[dict, Tree], None]:
            part, index = item
            losses, gradient = one(state, frozen, part, jax.random.fold_in(key, index))
            share = {name: count / jnp.maximum(whole[name], 1) for name, count in label_counts(part).items()}
            losses = {name: value * share[name] for name, value in losses.items()}
            gradient = jax.tree.map(lambda x: x * share["loss"], gradient)
            return jax.tree.map(jnp.add, total, (losses, gradient)), None

        zero = dict.fromkeys(whole, jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.trained)
        return jax.lax.scan(add, zero, (parts, jnp.arange(accumulate)))[0]

    def step_function(state: State, frozen: Tree, batch: dict[str, jax.Array], step: jax.Array) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), step)
        losses, gradient = (one if accumulate == 1 else in_parts)(state, frozen, batch, key)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        new = State(optax.apply_updates(state.trained, updates), optimizer_state, state.rng)
        return new, {**losses, "grad_norm": optax.tree.norm(gradient)}

    where = placements(state, mesh)
    return jax.jit(step_function, donate_argnums=0, out_shardings=(where, None))


def label_counts(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """How many labels each loss is a mean over: {loss, lm_loss, stream_loss: i32[]}."""
    there, is_stream = batch["label"] != IGNORE, batch["label_is_stream"]
    return {
        "loss": jnp.sum(there),
        "lm_loss": jnp.sum(there & ~is_stream),
        "stream_loss": jnp.sum(there & is_stream),
    }


def make_evaluation(model: VideoLM, mesh: Mesh) -> Any:
    """(trained, frozen, batch) -> (loss f32[], labels f32[]) without dropout."""
    loss = make_loss(model, mesh)

    def evaluation(trained: Tree, frozen: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, parts = loss(trained, frozen, batch, {})
        return value, parts["labels"]

    return jax.jit(evaluation)


def mean_loss(batches: Iterable[tuple[jax.Array, jax.Array]]) -> float:
    """The mean over all labels of batches of (loss, labels)."""
    losses, labels = zip(*((float(loss), float(labels)) for loss, labels in batches), strict=True)
    return sum(a * b for a, b in zip(losses, labels, strict=True)) / max(sum(labels), 1)


def batch_flops(batch: dict[str, jax.Array], config: VideoLMConfig, train_base: bool) -> float:
    """What a step on this batch needs, recomputation, connector and vision tower not counted."""
    (rows, size), frames, n = batch["input_ids"].shape, batch["frames"].shape[1], config.tokens_per_frame
    text, labels = size - n * frames, batch["label"].shape[1]
    return rows * step_flops(config.llama, config.kept, frames, text, config.lora.rank, "none", train_base, labels)


# --- the state --------------------------------------------------------------------------------------------------------


def _init(model_config: VideoLMConfig, groups: set[str], key: jax.Array) -> tuple[Tree, Tree]:
    trained, frozen = split(init_params(model_config, key), groups)
    return to_f32(trained), frozen


def _stored(state: State) -> dict[str, Tree]:
    return {"optimizer": state.optimizer, "rng": state.rng}


def abstract_state(
    model_config: VideoLMConfig, groups: set[str], optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Tree, State]:
    """(frozen, state) of ShapeDtypeStructs with their placements: nothing is computed."""
    trained, frozen = jax.eval_shape(lambda key: _init(model_config, groups, key), jax.random.key(0))
    rng = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    tree = (frozen, State(trained, jax.eval_shape(optimizer.init, trained), rng))
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, tree, placements(tree, mesh))


def new_state(
    config: Config,
    model_config: VideoLMConfig,
    groups: set[str],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[State, Tree]:
    """(state, frozen) at step 0: parameters of init_from, those that it does not have initialised from config.seed.

    Raises UserError when init_from has other shapes, or lacks weights that are not trained.
    """
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    frozen_shapes, shapes = abstract_state(model_config, groups, optimizer, mesh)
    wanted = flatten(merge(shapes.trained, frozen_shapes))
    stored = flatten(_starting_params(Path(config.init_from), model_config, mesh)) if config.init_from else {}
    for path, x in stored.items():
        if path not in wanted or x.shape != wanted[path].shape:
            need = wanted[path].shape if path in wanted else "absent"
            raise UserError(f"init_from={config.init_from}: {path} is {x.shape} there and {need} in this run's model")
    missing = {path: x for path, x in wanted.items() if path not in stored}
    untrained = [path for path in missing if path in flatten(frozen_shapes)]
    if stored and untrained:
        raise UserError(f"init_from={config.init_from} lacks {untrained[0]}, which this run would leave untrained")

    def init_missing(key: jax.Array) -> dict[str, jax.Array]:
        everything = flatten(merge(*_init(model_config, groups, key)))
        return {path: everything[path] for path in missing}

    new = jax.jit(init_missing, out_shardings={path: x.sharding for path, x in missing.items()})(init_key)
    params = {path: new[path] if path in new else stored[path].astype(x.dtype) for path, x in wanted.items()}
    trained, frozen = split(unflatten(params), groups)
    where = jax.tree.map(lambda x: x.sharding, shapes.optimizer)
    optimizer_state = jax.jit(optimizer.init, out_shardings=where)(trained)
    rng = jax.device_put(jax.random.key_data(dropout_key), shapes.rng.sharding)
    return State(trained, optimizer_state, rng), frozen


def _starting_params(source: Path, model_config: VideoLMConfig, mesh: Mesh) -> Tree:
    """The parameters of init_from; LayerExperts that it never trained are put at the scale of this run's gate."""
    given = folder.read_model(source)
    params, line = adapt(load_params(source, mesh), given, model_config, trained_layers(given, source))
    if line and jax.process_index() == 0:
        print(f"init_from: {line}")
    return params
