"""`vmod bench routing`: what routing itself costs, as a share of a routed layer's time.

Routing is all that a routed layer does beside its block: scores, the choice of k tokens in each frame, the compaction's
indices, the gather and the add-back. The candidate is that alone, the block replaced by the identity; the baseline the
whole layer. Forward, and forward with gradient.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from vmod_jax.models import llama
from vmod_jax.models.layout import add_rows, compact, find_frames, take_rows
from vmod_jax.models.video_lm import DTYPES, VideoLMConfig
from vmod_jax.performance.harness import Rows, interleave, pair, print_table, row
from vmod_jax.performance.setup import Stream, add_model_arguments, make_batch, make_config, make_params
from vmod_jax.performance.train_step import QUICK, STREAMS, read_stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    about = f"tokens a frame x frames + text tokens ({' '.join(STREAMS)}; with --quick the first two)"
    parser.add_argument("--streams", nargs="+", metavar="NxF+X", type=read_stream, help=about)
    parser.add_argument("--rounds", type=int, default=15)


def run(args: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    args.layers = 1
    seconds = 90 if args.quick else float("inf")
    for stream in args.streams or [read_stream(text) for text in (QUICK if args.quick else STREAMS)]:
        config = make_config(args, "all", stream.tokens)
        for what, functions in contenders(config, stream).items():
            times = interleave(functions, args.rounds, warm_up=2, seconds=seconds, about=f"{stream} {what}")
            rows.append(
                row(
                    f"{stream} {what} routing/layer", "routing", **pair(times["routing"], times["layer"]),
                    dtype=config.dtype, remat=config.remat if what == "gradient" else None, **stream.row_keys(),
                )
            )  # fmt: skip
    print_table(rows, unit="s")
    return {}


def contenders(config: VideoLMConfig, stream: Stream) -> dict[str, dict[str, Any]]:
    """{"forward" | "gradient": {"layer", "routing": function without arguments}}"""
    params = make_params(config)["llama"]["layers"]
    batch = make_batch(config, stream)
    x = jax.random.normal(jax.random.key(0), (1, stream.size, config.llama.hidden_size), DTYPES[config.dtype])
    ids, length = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["length"])
    (spec,), k = config.policy, config.kept[0]

    # What is found once for all layers is given to both.
    layout = find_frames(ids, length, config.frame_token_id, stream.tokens, stream.frames)

    def layer(params, x, layout):
        more = config.policy, config.llama, config.routing, config.lora, config.remat, None, None, None
        return llama.run_layers(params, x, layout, *more, config.attention)[0]

    def routing(params, x, layout):
        slots = llama.compaction_slots(layout, stream.tokens, k)
        expert = params["expert"]["kernel"][0]
        routed: Any = llama._choose(spec, jax.lax.stop_gradient(x), expert, layout, config.routing, 0, k)
        packed = compact(layout, slots, routed.kept)
        return add_rows(x, take_rows(x, packed.index, packed.inverse), packed.index, packed.inverse)

    cotangent = jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    out: dict[str, dict[str, Any]] = {"forward": {}, "gradient": {}}
    for name, function in (("layer", layer), ("routing", routing)):

        def both(x, params, layout, cotangent, function=function):
            """The output and its pull-back: a loss on top would count as routing."""
            y, pull = jax.vjp(lambda x: function(params, x, layout), x)
            return y, *pull(cotangent)

        forward, gradient = jax.jit(function), jax.jit(both)
        out["forward"][name] = lambda f=forward: jax.block_until_ready(f(params, x, layout))
        out["gradient"][name] = lambda f=gradient: jax.block_until_ready(f(x, params, layout, cotangent))
    return out
