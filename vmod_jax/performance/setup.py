"""The models and streams that several benchmarks run on: random weights and features of given shapes."""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np

from vmod_jax.data.conversation import IGNORE
from vmod_jax.models.depth import make_policy
from vmod_jax.models.flops import formula_ratio, step_flops
from vmod_jax.models.llama import REMAT, LlamaConfig, LoraConfig
from vmod_jax.models.video_lm import DTYPES, VideoLMConfig, init_params


@dataclasses.dataclass(frozen=True)
class Stream:
    """The shape of one row: T = frames * tokens + text."""

    frames: int
    tokens: int
    text: int

    @property
    def size(self) -> int:
        return self.frames * self.tokens + self.text

    def __str__(self) -> str:
        """As --streams takes it: tokens a frame x frames + text tokens."""
        return f"{self.tokens}x{self.frames}+{self.text}"

    def row_keys(self) -> dict[str, int]:
        """As a row of results names them."""
        return {"tokens_per_frame": self.tokens, "frames": self.frames, "text_tokens": self.text}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of a Llama (8 layers of 512 by default), its policy and its precision."""
    for name, value, about in (
        ("hidden", 512, "width d"),
        ("intermediate", 1792, "width of the MLP"),
        ("layers", 8, "layers"),
        ("heads", 8, "attention heads"),
        ("kv-heads", 2, "key/value heads"),
        ("vocab", 4096, "tokens of the vocabulary"),
        ("features", 1024, "width of the frames' features"),
        ("lora", 128, "rank of the adapters"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{about} (%(default)s)")
    parser.add_argument("--llama-3-8b", action="store_true", help="the sizes of Llama-3-8B instead")
    parser.add_argument("--keep", type=float, default=0.2, help="share of tokens that routed layers keep (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the computation (%(default)s)")
    parser.add_argument("--attention", default="auto", help="back end: see models/attention.py (%(default)s)")
    parser.add_argument("--remat", default="attention", choices=REMAT, help="in training (%(default)s)")


def make_config(args: argparse.Namespace, policy: str, tokens: int, **changes: Any) -> VideoLMConfig:
    """The model that the arguments describe under a named policy, with frames of `tokens` tokens, CLS and a row."""
    if args.llama_3_8b:
        llama = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 500000.0)
    else:
        llama = LlamaConfig(
            args.vocab, args.hidden, args.intermediate, args.layers, args.heads, args.kv_heads,
            args.hidden // args.heads, 500000.0,
        )  # fmt: skip
    llama = dataclasses.replace(llama, max_position_embeddings=1 << 20)
    config = VideoLMConfig(
        llama=llama,
        policy=make_policy(policy, llama.num_hidden_layers, args.keep),
        frame_token_id=llama.vocab_size,
        vision_hidden_size=args.features,
        grid=(1, tokens - 1),
        lora=LoraConfig(rank=args.lora),
        remat=args.remat,
        attention=args.attention,
        dtype=args.dtype,
        param_dtype=args.dtype,
    )
    return dataclasses.replace(config, **changes)


def make_params(config: VideoLMConfig, seed: int = 0) -> Any:
    """Random parameters, adapters that change something included; made on the device in one program."""

    @jax.jit
    def make(key):
        def draw(path, leaf):
            if path[-1].key == "lora_b":  # zero at the start of training
                name = "".join(str(part) for part in path)
                return jax.random.normal(jax.random.fold_in(key, hash_of(name)), leaf.shape) * 1e-3
            return leaf

        return jax.tree_util.tree_map_with_path(draw, init_params(config, key))

    return make(jax.random.key(seed))


def hash_of(name: str) -> int:
    """A number for a name that is the same in every process, as `hash` is not."""
    return sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 2**31


def make_batch(config: VideoLMConfig, stream: Stream, seed: int = 0) -> dict[str, np.ndarray]:
    """One row: frames with a text token between them, text in four places; labels on frames and on half of the text."""
    rng = np.random.default_rng(seed)
    n, vocabulary = stream.tokens, config.llama.vocab_size
    is_frame = np.zeros(stream.frames + stream.text, bool)  # one place a frame, one a text token
    between = min(stream.text, max(stream.frames - 1, 0))
    talk = stream.text - between
    order = [False] * (talk // 4)
    for i in range(stream.frames):
        order += [True] + [False] * (i < between) + [False] * (talk // 4) * (i in _thirds(stream.frames))
    order += [False] * (stream.text - order.count(False))
    is_frame[:] = order
    ids = np.concatenate(
        [np.full(n, config.frame_token_id) if frame else rng.integers(0, vocabulary, 1) for frame in is_frame]
    ).astype(np.int32)
    ends = np.flatnonzero(np.diff(np.append(ids == config.frame_token_id, False).astype(int)) == -1)
    text = np.flatnonzero(ids != config.frame_token_id)[::2]
    label_pos = np.sort(np.concatenate([ends, text])).astype(np.int32)[None]
    return {
        "input_ids": ids[None],
        "frames": rng.normal(size=(1, stream.frames, n, config.vision_hidden_size)).astype(np.float32),
        "length": np.array([len(ids)], np.int32),
        "label_pos": label_pos,
        "label": np.where(label_pos < len(ids), rng.integers(0, vocabulary, label_pos.shape), IGNORE).astype(np.int32),
        "label_weight": np.ones(label_pos.shape, np.float32),
        "label_is_stream": np.isin(label_pos, ends),
    }


def _thirds(frames: int) -> tuple[int, ...]:
    return (frames // 3, 2 * frames // 3)


def ratio_of_formula(config: VideoLMConfig, stream: Stream, passes: str) -> float:
    """The formula's ratio of this model under its policy to the full one; passes: "forward" or a rematerialisation."""
    c = config
    return formula_ratio(c.llama, c.kept, stream.frames, stream.tokens, stream.text, c.lora.rank, passes)


def flops_of_step(config: VideoLMConfig, stream: Stream, labels: int) -> float:
    """FLOPs that a step does by the formula: what it computes again and the head included, the connector left out."""
    c = config
    return step_flops(c.llama, c.kept, stream.frames, stream.text, c.lora.rank, c.remat, labels=labels)


def carried_ratio(config: VideoLMConfig, stream: Stream) -> float:
    """Tokens of all layers, each its own, over those of full ones: what is kept for the backward pass, or cached."""
    return sum(stream.text + k * stream.frames for k in config.kept) / (len(config.kept) * stream.size)
