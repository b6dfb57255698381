"""`vmod bench flops`: the paper's FLOPs column for any model and policy, computed, not measured."""

import argparse
import json
from pathlib import Path
from typing import Any

from vmod_jax.errors import UserError, user_path
from vmod_jax.models import flops
from vmod_jax.models.depth import POLICIES, kept_counts, make_policy
from vmod_jax.models.llama import LlamaConfig
from vmod_jax.performance.harness import Rows, print_table, row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf-config", type=user_path, metavar="C", help="a Llama's config.json or its folder (Llama-3-8B)"
    )
    parser.add_argument("--frames", type=int, default=600, help="frames of the stream (%(default)s)")
    parser.add_argument("--tokens", type=int, default=10, help="tokens a frame, CLS included (%(default)s)")
    parser.add_argument("--text", type=int, default=146, help="text tokens (%(default)s)")
    parser.add_argument("--lora", type=int, default=128, help="LoRA rank, 0 for none (%(default)s)")
    parser.add_argument("--keep", type=float, default=0.2, help="share of tokens that routed layers keep (%(default)s)")


def run(args: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """TFLOPs of every named policy as the paper counts them (tables 1 and 3), computed, not measured.

    The rows' `formula_ratio` is that of a training step without rematerialisation, attention included.
    """
    for option, least in (("frames", 0), ("tokens", 1), ("text", 0), ("lora", 0)):
        if getattr(args, option) < least:
            raise UserError(f"--{option} is {getattr(args, option)}: give a whole number of at least {least}")
    if args.frames == args.text == 0:
        raise UserError("--frames and --text are both 0: there is nothing to count")
    config = flops.LLAMA_3_8B if args.hf_config is None else read_llama_config(args.hf_config)

    stream = (args.frames, args.tokens, args.text, args.lora)
    layers = config.num_hidden_layers
    kept = {name: kept_counts(make_policy(name, layers, args.keep), args.tokens) for name in POLICIES}
    tflops = {name: flops.linear_flops(config, counts, *stream) / 1e12 for name, counts in kept.items()}
    rows.extend(
        row(
            name,
            "flops",
            tflops[name],
            tflops["full"],
            formula_ratio=flops.formula_ratio(config, counts, *stream),
            tokens_per_frame=args.tokens,
            frames=args.frames,
            text_tokens=args.text,
            kept_per_layer=counts,
        )
        for name, counts in kept.items()
    )
    print(f"{layers} layers, {args.frames} frames x {args.tokens} tokens, {args.text} text tokens, LoRA {args.lora}")
    print_table(rows, unit="TFLOPs")
    return {"policies": tflops}


def read_llama_config(path: Path) -> LlamaConfig:
    """A Hugging Face config.json, or its folder, as the decoder's configuration; UserError where it is neither."""
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no file {path}: --hf-config takes a Hugging Face config.json or its folder") from None
    except (ValueError, RecursionError):  # what is not UTF-8 is a ValueError too
        raise UserError(f"{path} is not JSON: --hf-config takes a Hugging Face config.json or its folder") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object: --hf-config takes a Hugging Face config.json or its folder")
    return LlamaConfig.from_hf_config(config)
