"""The one door for Python code: load a model, look at its logits and its routing, stream with it, save it."""

import dataclasses
import logging
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vmod_jax import workdir
from vmod_jax.data.conversation import StreamFormat, stream_format
from vmod_jax.errors import UserError
from vmod_jax.models.depth import Policy, make_policy
from vmod_jax.models.llama import LlamaConfig, Routed
from vmod_jax.models.video_lm import Output, VideoLM, VideoLMConfig, init_params
from vmod_jax.streaming.engine import Programs
from vmod_jax.streaming.session import Session

log = logging.getLogger(__name__)


class LanguageModel:
    """A video language model: configuration, parameters and, where it has one, its tokenizer."""

    def __init__(self, config: VideoLMConfig, params: Any, tokenizer: Any = None):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.model = VideoLM(config)

    @cached_property
    def fmt(self) -> StreamFormat:
        """How its conversations are written. Raises UserError for a model without a tokenizer."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer: put its tokenizer files beside its config.json")
        return stream_format(self.tokenizer, self.config.tokens_per_frame, self.config.interval)

    @cached_property
    def _programs(self) -> Programs:
        return Programs(self.config)

    @cached_property
    def _forward(self) -> Callable[..., Output]:
        return jax.jit(partial(self.model.apply, mutable=False))

    def _run(self, input_ids, frames) -> Output:
        ids = np.asarray(input_ids, np.int32)
        if ids.ndim != 2:
            raise UserError(f"input_ids has shape {list(ids.shape)}: give a batch of rows, i32[B, T]")
        batch, size = ids.shape
        n, is_frame = self.config.tokens_per_frame, ids == self.config.frame_token_id
        given = 0 if frames is None else frames.shape[1]
        if (most := int(is_frame.sum(1).max())) > given * n:
            raise UserError(f"a row has {most} frame tokens, but {given} frames of {n} tokens were given")
        if (is_frame.sum(1) % n).any():
            raise UserError(f"the frame tokens of a row must be whole frames of {n} tokens each")
        # A row with fewer frames than the batch holds may have more text than the static shapes leave room for.
        room = int((~is_frame).sum(1).max()) + given * n
        padded = np.zeros((batch, max(room, size)), np.int32)
        padded[:, :size] = ids
        return self._forward({"params": self.params}, padded, frames, np.full(batch, size, np.int32))

    def logits(self, input_ids, frames=None) -> Array:
        """Logits at every position of whole sequences.

        input_ids: i32[B, T]; frames: f32[B, F, n, d_v] features, u8[B, F, S, S, 3] pixels, or None for text alone
        -> f32[B, T, V]. Raises UserError when the frame tokens do not fit the frames.
        """
        return self._run(input_ids, frames).logits[:, : np.shape(input_ids)[1]]

    def routing(self, input_ids, frames) -> dict[int, Routed]:
        """What each routed layer decides: {layer: (scores f32[B, F, n], kept i32[B, F, k])}; arguments as `logits`."""
        return self._run(input_ids, frames).routing

    def stream(self, threshold: float = 0.725, **options) -> Session:
        """A live session; options as in `streaming.session.Session` (system, max_frames, max_reply, announce...)."""
        return Session(self._programs, self.params, self.fmt, threshold, **options)

    def save(self, path: str | Path) -> None:
        """Writes a workdir that `load` and the commands open. Raises UserError where one already lies."""
        from vmod_jax.training.checkpoint import save_params

        path = Path(path)
        if (path / "model.json").exists():
            raise UserError(f"{path} already holds a model: name another folder")
        workdir.write(path, self.config, self.tokenizer)
        save_params(path, self.params)


def load(
    path: str | Path,
    policy: str | Policy | None = None,
    keep: float | None = None,
    gate: str | None = None,
    step: int | None = None,
    **changes: Any,
) -> LanguageModel:
    """Opens a workdir, an imported folder, or a Hugging Face folder.

    policy, keep, gate: run the model under another depth policy than the one recorded (a name of `depth.POLICIES`, or
    one LayerSpec a layer); step: of the checkpoint (default: the last); changes: other fields of VideoLMConfig.
    Raises UserError for a path that is none of these.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a workdir or a Hugging Face folder")
    if (path / "model.json").exists():
        from vmod_jax.training.checkpoint import load_params

        config, params = workdir.read_model(path), load_params(path, step=step)
        folder = workdir.tokenizer_folder(path)
        tokenizer = _tokenizer(folder) if folder else None
    elif (path / "config.json").exists():
        config, params, tokenizer = _from_huggingface(path)
    else:
        raise UserError(f"{path} is neither a workdir (no model.json) nor a Hugging Face folder (no config.json)")
    if policy is not None or keep is not None:
        config = dataclasses.replace(config, policy=_policy(config, policy, keep))
    if gate is not None:
        changes["gate"] = gate
    return LanguageModel(dataclasses.replace(config, **changes), params, tokenizer)


def _policy(config: VideoLMConfig, policy: str | Policy | None, keep: float | None) -> Policy:
    """A named policy, a given one, or the recorded one with another keep ratio."""
    if isinstance(policy, str):
        return make_policy(policy, config.llama.num_hidden_layers, 0.2 if keep is None else keep)
    base = config.policy if policy is None else policy
    if keep is None:
        return base
    return tuple(dataclasses.replace(spec, keep=float(keep)) if spec.selector else spec for spec in base)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def _from_huggingface(path: Path) -> tuple[VideoLMConfig, Any, Any]:
    """A Llama folder; with the frame keys and `connector.*` of VideoLLM-online where it has them."""
    from vmod_jax.weights import huggingface as hf

    raw = hf.read_config(path)
    llama = LlamaConfig.from_hf_config(raw)
    reader = hf.TensorReader(path)
    names = [name for name in reader.names() if name.startswith("connector.")]
    connector = hf.connector_params(reader) if names else None
    width = connector["in"]["kernel"].shape[0] if connector else raw.get("vision_hidden_size", 1024)
    folder = next((f for f in (path / "tokenizer", path) if (f / "tokenizer.json").exists()), None)
    tokenizer = _tokenizer(folder) if folder else None
    config = VideoLMConfig(
        llama=llama,
        policy=make_policy("full", llama.num_hidden_layers),
        frame_token_id=raw.get("v_placeholder_id", len(tokenizer) if tokenizer else llama.vocab_size),
        vision_hidden_size=width,
        cls=raw.get("frame_token_cls", True),
        grid=tuple(raw.get("frame_token_pooled") or (0, 0)) if "frame_token_cls" in raw else (3, 3),
        interval=raw.get("frame_token_interval", ","),
        fps=raw.get("frame_fps", 2.0),
    )
    params = init_params_beside(config, {"llama": hf.llama_params(reader, llama), "connector": connector})
    return config, params, tokenizer


def init_params_beside(config: VideoLMConfig, given: dict[str, Any]) -> Any:
    """`given` parameters, and the documented initialisation for every array that they lack."""
    fresh = jax.eval_shape(partial(init_params, config), jax.random.key(0))

    def fill(path, shape, tree):
        if isinstance(shape, dict):
            return {name: fill((*path, name), sub, (tree or {}).get(name)) for name, sub in shape.items()}
        if tree is None:
            missing.append("/".join(path))
            return None
        return jnp.asarray(tree)

    missing: list[str] = []
    params = fill((), fresh, {name: tree for name, tree in given.items() if tree is not None})
    if missing:
        new = init_params(config, jax.random.key(0))
        for name in missing:
            *path, leaf = name.split("/")
            source, target = new, params
            for part in path:
                source, target = source[part], target[part]
            target[leaf] = source[leaf]
        log.info("initialised what the checkpoint lacks: %s", ", ".join(missing))
    return params
