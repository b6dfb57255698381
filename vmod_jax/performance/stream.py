"""`vmod bench stream`: seconds a frame at a given context, the method beside full computation and PyTorch, in turn.

Every contender first takes in the context; then, round by round, each is shown the same new frames: one by one, all M
in one call, or one by one with weights of 8 bits. LoRA is merged everywhere. PyTorch is transformers' Llama with its
own growing cache, one call a frame.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from vmod_jax.models.inference import merge_lora, to_int8, unstack
from vmod_jax.models.video_lm import VideoLMConfig
from vmod_jax.performance.harness import Rows, interleave, pair, print_table, row
from vmod_jax.performance.peer import Peer, unless_full
from vmod_jax.performance.setup import Stream, add_model_arguments, carried_ratio, make_config, make_params
from vmod_jax.streaming.engine import Engine, Programs

INTERVAL = [7]  # any token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=int, default=10, help="tokens a frame (%(default)s)")
    parser.add_argument("--context", type=int, help="frames before the first that is timed (600; 150 with --quick)")
    parser.add_argument("--at-once", type=int, default=8, metavar="M", help="frames in one call (%(default)s)")
    parser.add_argument("--policy", default="interleaved", help="beside full (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of M frames each (%(default)s)")
    parser.add_argument("--no-peer", action="store_true", help="leave PyTorch out")


class Ours:
    """An engine at a context; `show` takes `width` frames a call and reads the logits after each."""

    def __init__(self, config: VideoLMConfig, params: Any, width: int, frames: int):
        self.width = width
        self.engine = Engine(Programs(config), params, frames, first_frames=frames, first_text=frames + 64)

    def show(self, frames: np.ndarray) -> np.ndarray:
        logits = []
        for start in range(0, len(frames), self.width):
            part = frames[start : start + self.width]
            logits.append(self.engine.feed_frames(INTERVAL, part, INTERVAL, self.width))
        return np.concatenate(logits)


class Theirs:
    """PyTorch at a context, one call a frame."""

    def __init__(self, peer: Peer):
        from transformers import DynamicCache

        self.peer, self.cache = peer, DynamicCache()

    def feed(self, frames: np.ndarray) -> Any:
        """Shows frames in one call: -> f32[V], the logits after the last."""
        ids = np.concatenate([[INTERVAL[0], *[self.peer.config.frame_token_id] * frames.shape[1]]] * len(frames))
        with self.peer.torch.inference_mode():
            embeds = self.peer.embed(self.peer.put(ids[None].astype(np.int64)), self.peer.put(frames[None]))
            out = self.peer.model(inputs_embeds=embeds, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, 0].float().cpu().numpy()

    def show(self, frames: np.ndarray) -> np.ndarray:
        return np.stack([self.feed(frame[None]) for frame in frames])


def run(args: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """Rows, and how far the dense logits of ours and PyTorch's lie apart after the last frame."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch
    at_once = args.at_once
    context = -(-(args.context or (150 if args.quick else 600)) // at_once) * at_once  # in whole calls
    total = context + at_once * (args.rounds + 1)
    method = make_config(args, args.policy, args.tokens)
    dense = make_config(args, "full", args.tokens)
    params = make_params(method)
    theirs: Theirs | None = None
    left_out: list[str] = []
    if not args.no_peer:
        with unless_full(left_out):
            theirs = Theirs(Peer(dense, params, training=False))
    # Policies share their weights: of a large model there is no room for many copies.
    (config, merged), (_, small) = merge_lora(method, params), to_int8(method, params)
    plain, merged = dataclasses.replace(config, policy=dense.policy), unstack(merged)
    engines = {
        "MoD": Ours(config, merged, 1, total),
        "full": Ours(plain, merged, 1, total),
        "MoD int8": Ours(config, unstack(small), 1, total),
        f"MoD {at_once} at once": Ours(config, merged, at_once, total),
        f"full {at_once} at once": Ours(plain, merged, at_once, total),
    }
    del params, small
    shown: dict[str, Callable[[np.ndarray], np.ndarray]] = {name: engine.show for name, engine in engines.items()}
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(total, args.tokens, args.features)).astype(np.float32)

    for engine in engines.values():  # the context, in calls of many frames
        width, engine.width = engine.width, at_once
        engine.show(frames[:context])
        engine.width = width
    if theirs:
        with unless_full(left_out):
            theirs.feed(frames[:context])
            shown["PyTorch"] = theirs.show
        if left_out:
            theirs.peer.close()

    at = dict.fromkeys(shown, context)
    last: dict[str, np.ndarray] = {}
    stream = Stream(context, args.tokens, context)
    common: dict[str, Any] = {"dtype": method.dtype, "remat": None} | stream.row_keys()

    def more(name: str) -> None:
        last[name] = shown[name](frames[at[name] : at[name] + at_once])[-1]
        at[name] += at_once

    with rows.attempt("frame by frame", "stream"):
        contenders = {name: (lambda name=name: more(name)) for name in shown}
        times = {name: [t / at_once for t in each] for name, each in interleave(contenders, args.rounds).items()}
        for name, kind, candidate, baseline in (
            ("frame by frame MoD/full", "stream", "MoD", "full"),
            ("frame by frame int8/float MoD", "int8", "MoD int8", "MoD"),
            (f"{at_once} at once/one by one MoD", "prefill", f"MoD {at_once} at once", "MoD"),
            (f"{at_once} at once MoD/full", "prefill", f"MoD {at_once} at once", f"full {at_once} at once"),
            ("frame by frame full/PyTorch", "peer", "full", "PyTorch"),
            ("frame by frame MoD/PyTorch", "peer", "MoD", "PyTorch"),
        ):
            if baseline in times:
                measured = pair(times[candidate], times[baseline])
                rows.append(row(name, kind, **measured, fps=1 / measured["candidate"], **common))
    cache = {name: engines[name].engine.cache_bytes / 2**20 for name in ("MoD", "full")}
    rows.append(
        row(
            "cache (MiB) MoD/full", "cache", cache["MoD"], cache["full"],
            formula_ratio=carried_ratio(method, Stream(total, args.tokens, total + 64)), **common,
        )
    )  # fmt: skip
    apart = None
    if "PyTorch" in last:
        apart = float(np.abs(last["full"] - last["PyTorch"]).max() / np.abs(last["PyTorch"]).max())
    print_table(rows, unit="s/frame")
    return {"dense_logits_apart": apart, "left_out": left_out}
