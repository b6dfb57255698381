"""`vmod train`: config -> data -> model -> mesh -> batches -> state -> restore -> loop -> save."""

import dataclasses
import functools
import itertools
import json
import re
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from vmod_jax import workdir as folder
from vmod_jax.data.conversation import IGNORE, stream_format
from vmod_jax.data.pipeline import batches, cache_folder, make_buckets, open_streams
from vmod_jax.errors import UserError
from vmod_jax.models.context import Beginning, over_context
from vmod_jax.models.depth import doublings_at, loosened
from vmod_jax.models.flops import step_flops
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, init_params, num_params
from vmod_jax.training import config as configuration
from vmod_jax.training import objective, processes
from vmod_jax.training.checkpoint import Checkpoints, load_params
from vmod_jax.training.config import Config
from vmod_jax.training.metrics import MetricsLog, Trace, mfu
from vmod_jax.training.optimizer import flatten, make_optimizer, merge, split, to_f32, trained_groups, unflatten
from vmod_jax.training.sharding import chunks_per_row, local_rows, make_mesh, placements, put_batch
from vmod_jax.weights.experts import adapt, trained_layers

Tree = Any


USAGE = """usage: vmod train --config FILE --workdir DIR [--config.KEY=VALUE ...]

Trains into DIR, or goes on from its last checkpoint. FILE is one of configs/; the keys are explained in
vmod_jax/training/config.py, for instance --config.policy=full --config.optimizer.learning_rate=1e-3

On several hosts the same command runs in every process, with DIR in a folder that all of them see. On Cloud TPU and
under Slurm's srun they find each other; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID. launch/tpu.sh and launch/gpu.sh do all this.

exit codes: 0 done; 2 a mistake, said in one line; 75 stopped by SIGTERM (pre-emption), saved: run the same command
again; 130 stopped by SIGINT (Ctrl-C), saved

Compiled programs are kept in ~/.cache/vmod_jax/compiled: JAX_COMPILATION_CACHE_DIR moves them,
JAX_ENABLE_COMPILATION_CACHE=false keeps none."""


class State(NamedTuple):
    """What a step takes and gives back. The trained parameters are float32; the frozen ones never change."""

    trained: Tree
    optimizer: Tree
    rng: jax.Array  # key data u32[2], of LoRA's dropout


class Summary(NamedTuple):
    """What a run did. seconds: of the loop, compilation and saving included; step_seconds: the median, without.

    exit_code: 0, or what `training/processes.py` says of a run that a signal stopped before its end.
    """

    step: int
    loss: float | None
    seconds: float
    step_seconds: float | None
    compile_seconds: float
    trained_params: int
    frozen_params: int
    exit_code: int = 0


def train(config: Config, workdir: str | Path, *, stop_at: int | None = None) -> Summary:
    """Trains into `workdir`, or goes on with what is there; see `training/config.py` for the keys.

    stop_at: save and stop after this step, as an interruption (SIGINT, SIGTERM) would; the schedule stays that of
    config.steps. Raises UserError for whatever does not fit.
    """
    if str(workdir).startswith("gs:/"):
        raise UserError(f"--workdir {workdir}: give a folder in which that bucket is mounted (launch/tpu.sh --bucket)")
    config, workdir = configuration.complete(config), Path(workdir).expanduser()
    if config.init_from:
        config.init_from = str(Path(config.init_from).expanduser())
    say = print if jax.process_index() == 0 else lambda *_: None

    # --- data ---------------------------------------------------------------------------------------------------------
    given = folder.read_model(config.init_from) if config.init_from else None
    vision = given.vision if given else configuration.make_vision(config)
    image_size = vision.image_size if vision else 0
    with processes.first_alone():
        streams = open_streams(config.data, "train", image_size)
        held_out = open_streams(config.data, "val", image_size) if config.eval_every else None
    tokenizer = (
        config.data.tokenizer or (config.init_from and folder.tokenizer_folder(config.init_from)) or streams.tokenizer
    )
    if tokenizer is None:
        raise UserError(f"data.name='{config.data.name}' brings no tokenizer: name its folder in data.tokenizer")
    h, w = config.model.grid
    n = given.tokens_per_frame if given else int(config.model.cls) + h * w
    form = config.data.form or (given.form if given else "plain")
    fmt = stream_format(tokenizer, n, config.data.interval, form=form)

    # --- model --------------------------------------------------------------------------------------------------------
    sample = streams.samples[0]
    frame = streams.frames(sample._replace(stop=sample.start + 1))[0]
    features = frame.dtype != "uint8"
    wanted = given.features_per_frame if given else n
    if features and frame.shape[0] != wanted:
        raise UserError(f"the data's frames have {frame.shape[0]} tokens, model.cls and model.grid say {wanted}")
    if given:
        chosen = configuration.method(config, given.llama.num_hidden_layers)
        model_config = dataclasses.replace(given, form=form, **chosen)
        if given.frame_token_id != fmt.frame_token_id:
            raise UserError(
                f"the tokenizer's {fmt.frame_token} is {fmt.frame_token_id}, init_from's is {given.frame_token_id}"
            )
    else:
        tower = None if features else vision
        width = frame.shape[-1] if tower is None else tower.hidden_size
        model_config = configuration.make_model(config, fmt.frame_token_id, tower, width)
    model = VideoLM(model_config)
    if (workdir / "model.json").exists():
        folder.check_same_model(workdir, model_config)
    elif any((workdir / "checkpoints").glob("[0-9]*")):
        raise UserError(f"{workdir} has checkpoints but no model.json: use another --workdir")

    # --- mesh ---------------------------------------------------------------------------------------------------------
    llama = model_config.llama
    mesh = make_mesh(config.mesh, config.batch_size, llama.num_attention_heads, llama.num_key_value_heads)

    # --- batches ------------------------------------------------------------------------------------------------------
    chunks = chunks_per_row(mesh)
    buckets = make_buckets(config.data.buckets, streams, fmt, config.data.max_frames, chunks)
    for bucket in buckets:
        if (tokens := bucket.tokens(fmt.tokens_per_frame)) > llama.max_position_embeddings:
            raise UserError(
                f"rows of {tokens} tokens are longer than the model's {llama.max_position_embeddings} positions: "
                "lower data.max_frames, or give smaller data.buckets"
            )
    if config.batch_size % (shares := mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate):
        raise UserError(
            f"batch_size={config.batch_size} does not divide over mesh.data x mesh.fsdp x accumulate = {shares}"
        )
    load = functools.partial(
        batches, fmt=fmt, buckets=buckets, batch_size=config.batch_size,
        seed=config.seed, rows=local_rows(mesh, config.batch_size), stream_weight=config.data.stream_weight,
        prefetch=config.data.prefetch, parts=chunks, max_frames=config.data.max_frames,
    )  # fmt: skip
    iterator = load(streams)

    # --- state, new or restored ---------------------------------------------------------------------------------------
    groups = trained_groups(config.optimizer)
    optimizer = make_optimizer(config.optimizer, config.steps)
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    latest = checkpoints.latest()
    start = latest or 0
    if latest is not None:
        processes.seen_by_all(workdir / "checkpoints" / str(latest))
        params, state = abstract_state(model_config, groups, optimizer, mesh)
        params, saved, position = checkpoints.restore(start, merge(state.trained, params), _stored(state))
        trained, frozen = split(params, groups)
        state = State(trained, saved["optimizer"], saved["rng"])
        if (there := position.pop("streams", len(streams.samples))) != len(streams.samples):
            raise UserError(f"the run began with {there} streams, now there are {len(streams.samples)}: other data")
        iterator.set_state(position)
        say(f"going on from step {start} of {config.steps} in {workdir}")
        if changed := configuration.check_same_run(folder.read_config(workdir) or {}, config):
            say(f"with changes: {'; '.join(changed)}")
            if jax.process_index() == 0:
                folder.write(workdir, model_config, None, config.to_dict())
    else:
        state, frozen = new_state(config, model_config, groups, optimizer, mesh)
        with processes.first_alone():
            if jax.process_index() == 0:
                folder.write(workdir, model_config, fmt.tokenizer, config.to_dict())
            processes.seen_by_all(workdir / "model.json")
    sizes = num_params(state.trained), num_params(frozen)
    say(f"{config.policy}, {llama.num_hidden_layers} layers: {sizes[0]:,} parameters trained, {sizes[1]:,} frozen")
    say(f"{len(streams.samples)} streams, buckets {[tuple(b) for b in buckets]} of (frames, text tokens, labels)")

    # --- loop ---------------------------------------------------------------------------------------------------------

    @functools.cache
    def stage(doublings: int) -> tuple[Any, VideoLMConfig]:
        """The step under a policy so much looser, which config.keep_warmup begins with, and the model that it runs."""
        loose = dataclasses.replace(model_config, policy=loosened(model_config.policy, doublings))
        return make_step(VideoLM(loose), optimizer, state, mesh, config.accumulate), loose

    evaluate = make_evaluation(model, mesh)
    step, values, pace = start, {}, []
    began = last = time.perf_counter()
    tokens = flops = compile_seconds = 0.0
    compiled: dict[tuple, Any] = {}  # one a bucket, of the step and of the evaluation

    def run(function: Any, *arguments: Any) -> Any:
        """function(*arguments), compiled before for arguments[2], a batch; its time is not the step's."""
        nonlocal compile_seconds, last
        key = (function, *(x.shape for x in arguments[2].values()))
        if key not in compiled:
            paused = time.perf_counter()
            compiled[key] = function.lower(*arguments).compile()
            processes.meet()  # collectives would give up on a process that compiles much longer
            compile_seconds += time.perf_counter() - paused
            last += time.perf_counter() - paused
        return compiled[key](*arguments)

    end = min(config.steps, stop_at or config.steps)
    with (
        checkpoints,
        MetricsLog(workdir, start, config.steps) as log,
        Trace(workdir / "profile", config.profile) as trace,
        processes.Interruptions(start) as interruptions,
    ):
        while step < end:
            trace.before(step + 1)
            local = next(iterator)
            batch = put_batch(local, mesh, config.batch_size)
            step_function, stepped = stage(doublings_at(step, config.keep_warmup * config.steps, model_config.policy))
            state, parts = run(step_function, state, frozen, batch, step)
            step += 1
            tokens += float(local["length"].sum()) * config.batch_size / len(local["length"])
            flops += batch_flops(batch, stepped, "base" in groups)
            log.advance()
            trace.after(step, state)

            line: dict[str, float] = {}
            if step % config.log_every == 0 or step == config.steps:
                values = {name: float(value) for name, value in parts.items()}
                now = time.perf_counter()
                done = config.log_every if step % config.log_every == 0 else step % config.log_every
                pace.append(seconds := (now - last) / min(done, step - start))
                speed = {"step_seconds": seconds, "tokens_per_second": tokens / (now - last)}
                used = mfu(flops, now - last)
                line = values | speed | ({} if used is None else {"mfu": used})
                last, tokens, flops = now, 0.0, 0.0
            val_loss = None
            if held_out and (step % config.eval_every == 0 or step == config.steps):
                since = time.perf_counter() - last
                count = min(config.eval_batches, -(-len(held_out.samples) // config.batch_size))
                some = (put_batch(x, mesh, config.batch_size) for x in itertools.islice(load(held_out), count))
                line["val_loss"] = val_loss = mean_loss(run(evaluate, state.trained, frozen, batch) for batch in some)
                last = time.perf_counter() - since
            if line:
                log.write(step, line)

            # Metrics are on disk before the checkpoint that follows from them; the iterator is at the batch that comes
            # next. A run that is killed here or anywhere goes on from the last whole checkpoint.
            stopping = interruptions.stop(step) or step == end
            if step % config.checkpoint_every == 0 or val_loss is not None or stopping:
                log.flush()
                position = {**iterator.get_state(), "streams": len(streams.samples)}
                checkpoints.save(step, merge(state.trained, frozen), _stored(state), position, val_loss)
            if stopping:
                break
        checkpoints.wait()

    # --- the end ------------------------------------------------------------------------------------------------------
    best = checkpoints.best()
    seconds = time.perf_counter() - began
    say(f"step {step} of {config.steps} after {seconds:.1f} s ({compile_seconds:.1f} s of them compiling)")
    say(f"wrote {workdir}/checkpoints/{step}, {workdir}/metrics.jsonl and {workdir}/tensorboard")
    if best:
        say(f"the best val_loss, {best[1]:.4f}, is that of {workdir}/checkpoints/{best[0]}")
    if step < config.steps:
        say("next: the same command goes on from here")
    else:
        say(f"next: vmod evaluate --workdir {workdir}, or vmod stream VIDEO --workdir {workdir}")
    median = sorted(pace)[len(pace) // 2] if pace else None
    code = interruptions.exit_code if step < config.steps else 0
    return Summary(step, values.get("loss"), seconds, median, compile_seconds, *sizes, code)


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


# --- the command line -------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> tuple[Config, Path]:
    """`--config FILE [--config.key=value ...] --workdir DIR` -> (configuration, workdir); UserError for a mistake."""
    values = flags.FlagValues()
    arguments = ["vmod", *argv]
    config_flags.DEFINE_config_file("config", None, "a file of configs/", flag_values=values, sys_argv=arguments)
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    try:
        with warnings.catch_warnings():  # ml_collections 1.1 still loads files by a deprecated method of importlib
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            rest = values(arguments)[1:]
        config = values["config"].value
        if config is not None:
            file = config_flags.get_config_filename(values["config"])
            if not Path(file).is_file():
                raise UserError(f"--config {file}: no such file")
            config.to_dict()  # a file that could not be read says so when its values are asked for
    except flags.Error as error:
        raise UserError(f"{_reason(error)}") from error
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        raise _config_error(argv, error) from error
    if rest:
        raise UserError(f"unexpected {' '.join(rest)}; values are given as --config.key=value")
    if config is None or values["workdir"].value is None:
        raise UserError("needs --config FILE (one of configs/) and --workdir DIR")
    return config, Path(values["workdir"].value)


def _reason(error: Exception) -> str:
    """One line of an error that may hold a traceback: the line that names the exception, else the first."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named[-1] if named else lines[0]).split(" Other fields present")[0]


def _config_error(argv: Sequence[str], error: Exception) -> UserError:
    known = json.loads(configuration.defaults().to_json())
    for argument in argv:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config."):
            node: Any = known
            for part in name.split(".")[1:]:
                node = node.get(part, ...) if isinstance(node, dict) else ...
            if node is ...:
                return configuration.unknown_key(name.removeprefix("config."))
    return UserError(f"the configuration cannot be read: {_reason(error)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code. UserErrors are the caller's to print."""
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    config, workdir = parse(arguments)
    with processes.ended_by_sigterm():
        processes.join()
        if not jax.config.values["jax_compilation_cache_dir"]:
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        return train(config, workdir).exit_code
