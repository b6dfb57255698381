"""Ten training steps on meshes of eight fake devices, run by `test_mesh.py` in a process of its own.

    python mesh_runs.py CONFIG.json POLICY [AXIS=SIZE,...]...

prints one JSON line for each mesh, of which "data=1" is one device: its losses, the kept indices of the first and the
last batch with the gaps between the last kept and the first skipped score, and the collectives of the compiled step.
"""

import json
import os
import re
import sys
from collections import Counter

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vmod_jax.data.conversation import stream_format
from vmod_jax.data.pipeline import batches, make_buckets, open_streams
from vmod_jax.models.context import Beginning, over_context, zigzag
from vmod_jax.models.video_lm import VideoLM
from vmod_jax.training.config import complete, make_model, make_vision
from vmod_jax.training.optimizer import make_optimizer, merge, trained_groups
from vmod_jax.training.sharding import chunks_per_row, make_mesh, put_batch
from vmod_jax.training.step import make_step, new_state

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(text):
    """How many of the collectives in a compiled program belong to routing, to the gathering of keys and values over
    `context` (with its transpose), and to anything else, by the named scopes in their metadata."""
    count = Counter(routing=0, context=0, other=0)
    for line in text.splitlines():
        if re.search(rf" ({KINDS})(-start)?\(", line):
            (name,) = re.findall(r'op_name="([^"]*)"', line) or [""]
            count["routing" if "/routing/" in name else "context" if "gather_context" in name else "other"] += 1
    return dict(count)


def routing(model, mesh):
    """(params, batch) -> (kept i32[B, F, layers * k], gap f32[B, F, layers])"""

    def local(variables, batch, rngs):
        begin = Beginning(batch["first_position"], batch["first_frame"]) if "first_frame" in batch else None
        _, routed = model.apply(
            variables, batch["input_ids"], batch["frames"], length=batch["length"], begin=begin, method="hidden"
        )
        kept = [x.kept for x in routed.values()]
        gaps = []
        for x in routed.values():
            scores = jnp.sort(x.scores, descending=True)
            gaps.append(scores[..., x.kept.shape[-1] - 1] - scores[..., x.kept.shape[-1]])
        return jnp.concatenate([jnp.concatenate(kept, -1).astype(jnp.float32), jnp.stack(gaps, -1)], -1)

    def run(params, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return (over_context(local) if "first_frame" in batch else local)({"params": params}, batch, {})

    return jax.jit(run)


def by_frame(array, batch, frame_token, n, chunks):
    """[B, chunks * F, ...] in the order of devices -> the frames that each row has, in stream order."""
    rows, stream_order = len(array), np.argsort(zigzag(np.arange(chunks)[None], chunks)[0])
    array = np.asarray(array).reshape(rows, chunks, -1, array.shape[-1])
    array = array[:, stream_order] if chunks > 1 else array
    counts = (batch["input_ids"].reshape(rows, chunks, -1) == frame_token).sum(-1) // n
    return np.concatenate([array[b, c, : counts[b, c]] for b in range(rows) for c in range(chunks)])


def run(config, sizes, steps=10):
    config = config.copy_and_resolve_references()
    config.mesh = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes
    mesh = make_mesh(config.mesh, config.batch_size, 4, 2, jax.devices()[: int(np.prod(list(config.mesh.values())))])
    chunks, vision = chunks_per_row(mesh), make_vision(config)
    streams = open_streams(config.data, "train", vision.image_size)
    fmt = stream_format(streams.tokenizer, 10, config.data.interval)
    model_config = make_model(config, fmt.frame_token_id, vision, vision.hidden_size)
    model = VideoLM(model_config)
    buckets = make_buckets((), streams, fmt, config.data.max_frames, chunks)
    load = batches(
        streams, fmt, buckets, config.batch_size, seed=0, parts=chunks, max_frames=config.data.max_frames, prefetch=1
    )
    groups, optimizer = trained_groups(config.optimizer), make_optimizer(config.optimizer, steps)
    state, frozen = new_state(config, model_config, groups, optimizer, mesh)
    step, decide = make_step(model, optimizer, state, mesh), routing(model, mesh)
    routes, losses, decided, compiled = any(spec.selector for spec in model_config.policy), [], [], None
    for number in range(steps):
        local = next(load)
        batch = put_batch(local, mesh, config.batch_size)
        if routes and number in (0, steps - 1):
            both = decide(merge(state.trained, frozen), batch)
            decided.append(by_frame(both, local, fmt.frame_token_id, 10, chunks))
        compiled = compiled or step.lower(state, frozen, batch, number).compile()
        state, parts = compiled(state, frozen, batch, number)
        losses.append([float(parts[name]) for name in ("loss", "lm_loss", "stream_loss", "grad_norm")])
    layers = sum(spec.selector is not None for spec in model_config.policy)
    decided = np.concatenate(decided) if routes else np.zeros((0, 1))
    return {
        "losses": losses,
        "kept": decided[:, :-layers].astype(int).tolist() if routes else [],
        "gap": decided[:, -layers:].min(1).tolist() if routes else [],
        "collectives": collectives(compiled.as_text()),
    }


def naive(config):
    """The collectives where the token axis of a plain row is split, and XLA's partitioner does the rest."""
    vision = make_vision(config)
    model_config = make_model(config, 475, vision, vision.hidden_size)
    model, mesh = VideoLM(model_config), make_mesh({"data": 1, "fsdp": 2, "context": 4, "tensor": 1}, 8, 4, 2)
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 0, 24, 24, 3)))
    )
    place = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    ids, frames = place((8, 320), jnp.int32, "fsdp", "context"), place((8, 16, 24, 24, 3), jnp.uint8, "fsdp", "context")
    forward = jax.jit(lambda params, ids, frames: model.apply(params, ids, frames, method="hidden")[0])
    return {"collectives": collectives(forward.lower(params, ids, frames).compile().as_text())}


def main():
    file, policy, *meshes = sys.argv[1:]
    jax.config.update("jax_default_matmul_precision", "highest")
    with open(file) as text:
        config = complete(ConfigDict(json.load(text)))
    config.policy, config.optimizer.learning_rate = policy, 1e-3
    for mesh in meshes:
        sizes = {name: int(size) for name, size in (axis.split("=") for axis in mesh.split(",") if mesh != "naive")}
        result = naive(config) if mesh == "naive" else run(config, sizes)
        print(json.dumps({"policy": policy, "mesh": mesh, **result}), flush=True)


if __name__ == "__main__":
    main()
