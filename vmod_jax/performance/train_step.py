"""`vmod bench train-step`: a training step of the method beside full computation and beside PyTorch, taken in turn.

Rows, for each stream: the forward pass and the training step MoD / full beside their formula; both steps over the
seconds that the machine takes for bare matrix products of as many FLOPs; what is carried from the forward to the
backward pass, and all temporary memory of the compiled steps, beside the share of tokens that layers compute; both
steps over PyTorch's dense one (`peer.py`). Every step is checked to give the same bits again.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vmod_jax.errors import UserError
from vmod_jax.models.depth import FULL, segments
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig
from vmod_jax.performance.harness import Rows, interleave, pair, print_table, row
from vmod_jax.performance.jaxprs import stacked
from vmod_jax.performance.peer import Peer, available, unless_full
from vmod_jax.performance.setup import (
    Stream,
    add_model_arguments,
    carried_ratio,
    flops_of_step,
    make_batch,
    make_config,
    make_params,
    ratio_of_formula,
)
from vmod_jax.training import config as configuration
from vmod_jax.training.optimizer import make_optimizer, split, to_f32, trained_groups
from vmod_jax.training.sharding import make_mesh
from vmod_jax.training.step import State, make_loss, make_step

STREAMS = ("10x150+2000", "10x400+2000", "10x1000+2000")
QUICK = STREAMS[:2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    about = f"tokens a frame x frames + text tokens ({' '.join(STREAMS)}; with --quick the first two)"
    parser.add_argument("--streams", nargs="+", metavar="NxF+X", type=read_stream, help=about)
    parser.add_argument("--policy", default="interleaved", help="beside full (%(default)s)")
    about = "at most, each of one step of each; at most 3 beside PyTorch (%(default)s)"
    parser.add_argument("--rounds", type=int, default=5, help=about)
    parser.add_argument("--no-peer", action="store_true", help="leave PyTorch out")


def read_stream(text: str) -> Stream:
    """ "10x600+2000": tokens a frame, frames, text tokens."""
    tokens, _, rest = text.partition("x")
    frames, _, words = rest.partition("+")
    if not (tokens.isdecimal() and frames.isdecimal() and words.isdecimal() and int(tokens) and int(frames)):
        raise UserError(f"--streams {text}: write tokens a frame x frames + text tokens, such as 10x600+2000")
    return Stream(int(frames), int(tokens), int(words))


class Step:
    """A compiled training step and forward pass of one policy, with its state."""

    def __init__(self, config: VideoLMConfig, params: Any, batch: dict[str, np.ndarray]):
        settings = configuration.defaults()
        groups = trained_groups(settings.optimizer)
        optimizer = make_optimizer(settings.optimizer, 1000)
        llama = config.llama
        mesh = make_mesh(
            {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, 1, llama.num_attention_heads, llama.num_key_value_heads,
            jax.devices()[:1],
        )  # fmt: skip
        trained, frozen = split(params, groups)
        # A copy: the step donates what it is given, and the parameters are shared.
        trained = jax.tree.map(lambda x: x + 0, to_f32(trained))
        self.state = State(trained, optimizer.init(trained), jax.random.key_data(jax.random.key(0)))
        self.frozen, self.batch = frozen, jax.device_put(batch)
        model = VideoLM(config)
        self.compiled = make_step(model, optimizer, self.state, mesh).lower(self.state, frozen, self.batch, 0).compile()
        loss = make_loss(model, mesh)
        self.scalar = lambda trained, frozen, batch: loss(trained, frozen, batch, {})[0]
        self.loss = jax.jit(self.scalar)

    def step(self) -> float:
        """One step, to its end: -> the loss before it."""
        self.state, parts = self.compiled(self.state, self.frozen, self.batch, 0)
        return float(jax.block_until_ready(parts)["loss"])

    def forward(self) -> float:
        return float(self.loss(self.state.trained, self.frozen, self.batch))

    def repeats(self) -> bool:
        """Whether the step from here gives the same bits twice. The state stays as it was."""
        copy = lambda: jax.tree.map(lambda x: x + 0, self.state)  # noqa: E731
        (one, _), (two, _) = (self.compiled(copy(), self.frozen, self.batch, 0) for _ in range(2))
        bits = lambda x: np.asarray(x).tobytes()  # noqa: E731
        return all(bits(a) == bits(b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))

    @property
    def temporary_bytes(self) -> int:
        analysis: Any = self.compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    @property
    def carried_bytes(self) -> int:
        """Bytes that the forward pass keeps for the backward one, layer by layer: what its scans stack of floats."""
        jaxpr = jax.make_jaxpr(jax.grad(self.scalar))(self.state.trained, self.frozen, self.batch).jaxpr
        return sum(a.size * a.dtype.itemsize for a in stacked(jaxpr) if jnp.issubdtype(a.dtype, jnp.floating))


class MatrixProducts:
    """The machine's own rate: products of the shapes of the model's MLP at T tokens, and nothing else."""

    def __init__(self, config: VideoLMConfig, tokens: int):
        llama, dtype = config.llama, jnp.dtype(config.dtype)
        d, hidden = llama.hidden_size, llama.intermediate_size
        keys = jax.random.split(jax.random.key(0), 3)
        sizes = ((tokens, d), (d, hidden), (hidden, d))
        x, up, down = (
            jax.random.normal(key, size, dtype) * size[0] ** -0.5 for key, size in zip(keys, sizes, strict=True)
        )
        turns = max(1, llama.num_hidden_layers // 4)  # little beside a step
        self.flops = turns * 4 * tokens * d * hidden
        products = jax.jit(lambda x, up, down: lax.fori_loop(0, turns, lambda _, x: (x @ up) @ down, x))
        self.run = lambda: jax.block_until_ready(products(x, up, down))


def bytes_in_units_of(config: VideoLMConfig, dense: VideoLMConfig, params: Any, batch: dict[str, np.ndarray]) -> int:
    """Temporary bytes of the full step, scanned in units of as many layers as `config`'s.

    XLA for CPUs orders what is independent for speed, not for memory: it computes one layer of a unit again before the
    other's way back is done, and holds what both need. Full computation by itself is scanned layer by layer.
    """
    units = [dataclasses.replace(s, unit=(FULL,) * len(s.unit)) for s in segments(config.policy)]
    with mock.patch("vmod_jax.models.llama.segments", return_value=tuple(units)):
        return Step(dense, params, batch).temporary_bytes


def run(args: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """Rows and, for each stream, losses of all contenders and whether steps repeat to the bit."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch
    streams = args.streams or [read_stream(text) for text in (QUICK if args.quick else STREAMS)]
    peer_wanted = not args.no_peer
    if peer_wanted and not available():
        raise UserError("the peer needs PyTorch: pip install 'vmod_jax[torch]', or leave it out with --no-peer")
    checks = []
    for stream in streams:
        with rows.attempt(f"{stream} MoD/full", "train_step"):
            checks.append(compare(args, stream, peer_wanted, rows))
    print_table(rows, unit="s or MiB")
    return {"checks": checks}


def compare(args: argparse.Namespace, stream: Stream, with_peer: bool, rows: Rows) -> dict[str, Any]:
    """Adds the rows of one stream, the most wanted first; -> {stream, losses, bit_equal, left_out}."""
    config = make_config(args, args.policy, stream.tokens)
    dense = make_config(args, "full", stream.tokens)
    params, batch = make_params(config), make_batch(config, stream)
    steps = {"mod": Step(config, params, batch), "full": Step(dense, params, batch)}
    losses = {name: step.forward() for name, step in steps.items()}
    seconds = 80 if args.quick else float("inf")
    common: dict[str, Any] = {"dtype": config.dtype, "tokens": stream.size} | stream.row_keys()
    left_out: list[str] = []
    check = {"stream": str(stream), "losses": losses, "left_out": left_out}

    with rows.attempt(f"{stream} forward MoD/full", "forward"):
        forwards = {name: step.forward for name, step in steps.items()}
        forward = interleave(forwards, args.rounds, seconds=seconds, about=f"{stream} forward")
        formula = ratio_of_formula(config, stream, "forward")
        measured = pair(forward["mod"], forward["full"])
        rows.append(row(f"{stream} forward MoD/full", "forward", **measured, formula_ratio=formula, **common))

    contenders: dict[str, Callable[[], Any]] = {name: step.step for name, step in steps.items()}
    with rows.attempt(f"{stream} train step MoD/full", "train_step"):
        products = MatrixProducts(dense, stream.size)
        beside_products = contenders | {"products": products.run}
        times = interleave(beside_products, args.rounds, seconds=seconds, about=f"{stream} train step")
        formula = ratio_of_formula(config, stream, config.remat)
        measured = pair(times["mod"], times["full"]) | {"formula_ratio": formula, "remat": config.remat}
        rows.append(row(f"{stream} train step MoD/full", "train_step", **measured, **common))
        for name, about, model in (("full", "dense", dense), ("mod", "MoD", config)):
            # Over the seconds of its FLOPs at the rate of the products beside it: 2 is half of that rate.
            flops = flops_of_step(model, stream, batch["label"].size)
            measured = pair(times[name], [each * flops / products.flops for each in times["products"]])
            rate = flops / measured["baseline"] / 1e12
            named = f"{stream} {about}/matrix products"
            rows.append(row(named, "limit", **measured, matmul_tflops=rate, remat=config.remat, **common))

    check["bit_equal"] = {name: step.repeats() for name, step in steps.items()}
    mib = {name: step.temporary_bytes / 2**20 for name, step in steps.items()}
    share: dict[str, Any] = {"formula_ratio": carried_ratio(config, stream), "remat": config.remat}
    held: list[tuple[str, str, Callable[[], list[float]]]] = [
        ("carried MoD/full", "carried", lambda: [steps[name].carried_bytes / 2**20 for name in ("mod", "full")]),
        ("memory MoD/full", "memory", lambda: [mib["mod"], mib["full"]]),
        (
            "memory MoD/full in the same units", "memory_same_units",
            lambda: [mib["mod"], bytes_in_units_of(config, dense, params, batch) / 2**20],
        ),
    ]  # fmt: skip
    for about, kind, both in held:
        with rows.attempt(f"{stream} {about}", kind):
            mod, full = both()
            rows.append(row(f"{stream} {about}", kind, mod, full, **share, **common))

    if with_peer:  # at the end, in fewer rounds: the two above lie closer together
        with (
            rows.attempt(f"{stream} dense/PyTorch", "peer"),
            unless_full(left_out),
            Peer(dense, params, training=True) as peer,
        ):
            # PyTorch's checkpoints compute attention again; they are what its users have.
            theirs: dict[str, Any] = {"peer": f"PyTorch, {peer.attention} attention, dense", "remat": config.remat}
            placed = peer.place(batch)
            losses["peer"] = peer.step(placed)
            contenders["peer"] = lambda: peer.step(placed)
            beside = interleave(contenders, min(args.rounds, 3), seconds=seconds, about=f"{stream} beside PyTorch")
            for name, about in (("full", "dense"), ("mod", "MoD")):
                measured = pair(beside[name], beside["peer"])
                rows.append(row(f"{stream} {about}/PyTorch", "peer", **measured, **common, **theirs))
    return check
