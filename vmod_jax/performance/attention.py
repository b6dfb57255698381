"""`vmod bench attention`: causal attention of a sequence to itself, and of frames to a cache, by back end.

The device's own back end beside the plain reference and beside PyTorch's scaled-dot-product attention, in turn, forward
and with its gradient; what it computes is compared with the reference, also on packed and padded rows. On a GPU, give
`--dtype bfloat16`: cuDNN has 16 bits only.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vmod_jax.machine import cores
from vmod_jax.models.attention import BACKENDS, apart, cache_attention, causal_attention, choose
from vmod_jax.models.video_lm import DTYPES
from vmod_jax.performance.harness import Rows, interleave, pair, print_table, row
from vmod_jax.performance.peer import available

SIZES = (1536, 3072, 6144)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, value, about in (("heads", 8, "heads"), ("kv-heads", 2, "key/value heads"), ("width", 64, "of a head")):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{about} (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="T", help=f"{SIZES}; with --quick the first two")
    parser.add_argument("--chunk", type=int, default=11, help="tokens against a cache of T (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="the candidate (%(default)s: the device's)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cache-only", action="store_true", help="leave out a sequence's attention to itself")
    parser.add_argument("--no-peer", action="store_true", help="leave PyTorch out")


def run(args: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    dtype = DTYPES[args.dtype]
    backend = choose(args.backend, args.heads, args.kv_heads, args.width, dtype)
    seconds = 60 if args.quick else float("inf")
    for size in args.sizes or (SIZES[:2] if args.quick else SIZES):
        for what, functions in contenders(args, size, dtype, backend).items():
            with rows.attempt(f"{size} {what}", "attention"):
                outs = {name: function() for name, function in functions.items()}
                times = interleave(functions, args.rounds, seconds=seconds, about=f"{size} {what}")
                off = max(map(_off, jax.tree.leaves(outs[backend]), jax.tree.leaves(outs["reference"])))
                for name in functions:
                    if name != backend:
                        kind = "peer" if name == "PyTorch" else "attention"
                        common = {"dtype": args.dtype, "size": size, "apart_from_reference": off}
                        rows.append(
                            row(f"{size} {what} {backend}/{name}", kind, **pair(times[backend], times[name]), **common)
                        )
    print_table(rows, unit="s")
    check = apart(backend, args.heads, args.kv_heads, args.width, dtype)
    print("packed and padded rows, and a chunk against a cache, from the reference in float32:", end=" ")
    print(", ".join(f"{name} {value:.1e}" for name, value in check.items()))
    return {"backend": backend, "apart_on_packed_and_padded": check}


def _off(x: Any, y: Any) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def contenders(args: argparse.Namespace, size: int, dtype: Any, backend: str) -> dict[str, dict[str, Any]]:
    """{what: {name: function without arguments}} of one size."""
    rng = np.random.default_rng(0)
    shapes = [(1, size, heads, args.width) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    names = dict.fromkeys((backend, "reference"))
    used, chunk = jnp.array([size - args.chunk]), slice(-args.chunk, None)

    def loss(attention, *qkv):
        return jnp.sum(jnp.square(attention(*qkv).astype(jnp.float32)))

    ready = jax.block_until_ready
    out: dict[str, dict[str, Any]] = {"forward": {}, "gradient": {}, "against a cache": {}}
    for name in names:
        attention = functools.partial(causal_attention, backend=name)
        forward = jax.jit(attention)
        gradient = jax.jit(jax.grad(functools.partial(loss, attention), (0, 1, 2)))
        cached = jax.jit(functools.partial(cache_attention, backend=name))
        out["forward"][name] = lambda f=forward: ready(f(q, k, v))
        out["gradient"][name] = lambda f=gradient: ready(f(q, k, v))
        against = q[:, chunk], k[:, chunk], v[:, chunk], k, v, used
        out["against a cache"][name] = lambda f=cached, x=against: ready(f(*x))
    if available() and not args.no_peer:
        for what, function in _torch(args, (q, k, v)).items():
            out[what]["PyTorch"] = function
    return {"against a cache": out["against a cache"]} if args.cache_only else out


def _torch(args: argparse.Namespace, qkv: tuple[Any, ...]) -> dict[str, Any]:
    """Scaled-dot-product attention, [1, H, T, h], causal, with grouped heads."""
    import torch

    torch.set_num_threads(cores())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = (torch.from_numpy(np.array(x, np.float32)) for x in qkv)
    dtype = getattr(torch, args.dtype)
    q, k, v = (x.transpose(1, 2).contiguous().to(device, dtype).requires_grad_() for x in arrays)

    def attend() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.inference_mode():
            attend()
        wait()

    def gradient() -> None:
        torch.autograd.grad(attend().float().square().sum(), (q, k, v))
        wait()

    return {"forward": forward, "gradient": gradient}
