"""Training: config -> data -> model -> mesh -> batches -> state -> restore -> loop -> save."""

import dataclasses
import functools
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vmod_jax import workdir as folder
from vmod_jax.data.conversation import stream_format
from vmod_jax.data.pipeline import batches, make_buckets, open_streams, tokenizer_of
from vmod_jax.errors import UserError, user_path
from vmod_jax.models.depth import doublings_at, loosened
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, num_params
from vmod_jax.training import config as configuration
from vmod_jax.training import processes
from vmod_jax.training.checkpoint import Checkpoints
from vmod_jax.training.config import Config
from vmod_jax.training.metrics import MetricsLog, Trace, mfu
from vmod_jax.training.optimizer import make_optimizer, merge, split, trained_groups
from vmod_jax.training.sharding import chunks_per_row, local_rows, make_mesh, put_batch
from vmod_jax.training.step import (
    State,
    _stored,
    abstract_state,
    batch_flops,
    make_evaluation,
    make_step,
    mean_loss,
    new_state,
)


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
    config, workdir = configuration.complete(config), user_path(workdir)
    say = print if jax.process_index() == 0 else lambda *_: None

    # --- data ---------------------------------------------------------------------------------------------------------
    given = folder.read_model(config.init_from) if config.init_from else None
    vision = given.vision if given else configuration.make_vision(config)
    image_size = vision.image_size if vision else 0
    with processes.first_alone():
        streams = open_streams(config.data, "train", image_size)
        held_out = open_streams(config.data, "val", image_size) if config.eval_every else None
    if config.epochs:
        config.steps = max(1, round(config.epochs * len(streams.samples) / config.batch_size))
    tokenizer = (
        config.data.tokenizer
        or (config.init_from and folder.tokenizer_folder(config.init_from))
        or tokenizer_of(streams)
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
    iterator = load(streams, corrections=config.data.corrections)

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


def train_to_the_end(config: Config, workdir: str | Path) -> Summary:
    """`train`; a signal that stops it stops the whole job, which the same command takes up again."""
    summary = train(config, workdir)
    if summary.exit_code:
        raise SystemExit(summary.exit_code)
    return summary
