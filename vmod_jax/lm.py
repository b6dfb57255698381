"""The one door for Python code: load a model, look at its logits and its routing, stream with it, save it."""

import dataclasses
import logging
import string
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from vmod_jax import workdir
from vmod_jax.data import stills
from vmod_jax.data.conversation import StreamFormat, stream_format
from vmod_jax.errors import UserError, user_path
from vmod_jax.models import inference
from vmod_jax.models.depth import Policy, make_policy
from vmod_jax.models.experts import adapt, learned_layers, trained_layers
from vmod_jax.models.llama import Routed
from vmod_jax.models.video_lm import Output, VideoLM, VideoLMConfig, check_frames
from vmod_jax.streaming.engine import Programs
from vmod_jax.streaming.questions import Answer, Answerer, Question
from vmod_jax.streaming.session import Session
from vmod_jax.weights.folder import complete, load_tokenizer, open_folder

log = logging.getLogger(__name__)

LETTERS = string.ascii_uppercase
OPTIONS_PROMPT = "Answer with the option's letter from the given choices directly."


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
        c = self.config
        return stream_format(self.tokenizer, c.tokens_per_frame, c.interval, form=c.form)

    @cached_property
    def merged(self) -> "LanguageModel":
        """The same model as streams run on it: LoRA merged into its weights, each layer's arrays its own."""
        config, params = inference.merge_lora(self.config, self.params)
        return LanguageModel(config, inference.unstack(params), self.tokenizer)

    @cached_property
    def int8(self) -> "LanguageModel":
        """As `merged`, with decoder weights of 8 bits: for streams and logits; `save` refuses it."""
        config, params = inference.to_int8(self.config, self.params)
        return LanguageModel(config, inference.unstack(params), self.tokenizer)

    @property
    def image_size(self) -> int:
        """Side of the pictures that its vision tower takes, in pixels. Raises UserError for a model without one."""
        if self.config.vision is None:
            raise UserError(
                "this model has no vision tower: import one with it (vmod import --vision) to stream a video"
            )
        return self.config.vision.image_size

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
        # A stray id would be read as the last token there is, and never be noticed.
        vocabulary = self.config.llama.vocab_size
        for b, t in np.argwhere(((ids < 0) | (ids >= vocabulary)) & ~is_frame)[:1]:
            raise UserError(
                f"token {ids[b, t]} (row {b}, place {t}) is not in the vocabulary of {vocabulary}: "
                "was the text made with this model's tokenizer?"
            )
        if frames is not None:
            frames = check_frames(self.config, frames if hasattr(frames, "shape") else np.asarray(frames), lead=2)
            if len(frames) != batch:
                raise UserError(f"{batch} rows of input_ids, but frames for {len(frames)}")
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
        -> f32[B, T, V]. Raises UserError when the frame tokens do not fit the frames, and for an id that is neither in
        the vocabulary nor the frame token.
        """
        return self._run(input_ids, frames).logits[:, : np.shape(input_ids)[1]]

    def routing(self, input_ids, frames) -> dict[int, Routed]:
        """What each routed layer decides: {layer: (scores f32[B, F, n], kept i32[B, F, k])}; arguments as `logits`."""
        return self._run(input_ids, frames).routing

    def stream(self, threshold: float = 0.725, int8: bool = False, **options) -> Session:
        """A live session; options as in `streaming.session.Session` (system, max_frames, max_reply, announce...).

        Streams share weights of their own (`merged`, `int8`), made at the first one; where memory is short, keep
        those and let go of this model. int8: with decoder weights of 8 bits.
        """
        lm = self.int8 if int8 else self.merged
        return Session(lm._programs, lm.params, self.fmt, threshold, **options)

    def answer(
        self,
        question: str,
        images: Any = None,
        video: Any = None,
        options: Sequence[str] | None = None,
        by: str | None = None,
        **shown: Any,
    ) -> Answer:
        """What the model answers to a question about images or a video, offline: the whole of them is read first.

        images: one or a list of paths, PIL images or u8[H, W, 3]; video: a path, or frames as `logits` takes them,
        u8[F, S, S, 3] or f32[F, n, d_v]; neither: a question without frames. options: choices, which are put under the
        question with letters. by: "text", a greedy reply, or "likelihood", the likeliest letter, which is the default
        with options. shown: `frames`, at most so many of a video (32), and `span`, its (start, end) in seconds.
        -> Answer(text, scores): the reply or the letter, and each option's log P. Raises UserError for what does not
        fit.
        """
        by = by or ("likelihood" if options else "text")
        if options and not 2 <= len(options) <= len(LETTERS):
            raise UserError(f"{len(options)} options: give 2 to {len(LETTERS)}, or none")
        letters = tuple(LETTERS[: len(options or ())])
        lines = [f"{letter}. {option}" for letter, option in zip(letters, options or (), strict=True)]
        text = "\n".join([question, *lines, OPTIONS_PROMPT] if lines else [question])
        return self.answers([self.question(text, images, video, letters, **shown)], by)[0]

    def question(
        self,
        text: str,
        images: Any = None,
        video: Any = None,
        options: Sequence[str] = (),
        frames: int = 32,
        span: tuple[float, float] | None = None,
        begin: str = "",
    ) -> Question:
        """A question for `answers`; arguments as `answer` has them, but `text` is all that the user says, and `options`
        are whole replies, such as letters. begin: what the reply begins with.

        Images and videos are read when their turn comes, and once where several questions are about the same files.
        """
        if images is not None and video is not None:
            raise UserError("a question is about images or about a video, not both: give one of them")
        if video is not None:
            if not isinstance(video, str | Path):
                array = np.asarray(video)
                return Question(text, array, id(array), tuple(options), begin)
            read = partial(self._video_frames, Path(video), frames, span)
            return Question(text, read, (str(video), frames, span), tuple(options), begin)
        if images is None:
            return Question(text, None, None, tuple(options), begin)
        several = list(images) if isinstance(images, list | tuple) else [images]
        group = tuple(str(one) if isinstance(one, str | Path) else id(one) for one in several)
        read = lambda: np.stack([stills.image(one, self.image_size) for one in several])  # noqa: E731
        return Question(text, read if several else None, group or None, tuple(options), begin)

    def answers(
        self, questions: Sequence[Question], by: str = "text", rows: int = 8, max_reply: int = 64
    ) -> list[Answer]:
        """The answers to many questions, `rows` of them together; see `streaming.questions`.

        The frames of questions of one group are encoded and read once. by: "text" or "likelihood", as for `answer`.
        """
        if by not in ("text", "likelihood"):
            raise UserError(f"answers by '{by}' are unknown: use text or likelihood")
        key, lm = (rows, max_reply), self.merged
        if key not in self._answerers:
            self._answerers[key] = Answerer(lm.config, lm.params, self.fmt, rows, max_reply)
        answerer = self._answerers[key]
        return (answerer.by_text if by == "text" else answerer.by_likelihood)(questions)

    @cached_property
    def _answerers(self) -> dict[tuple[int, int], Answerer]:
        return {}

    def _video_frames(self, path: Path, most: int, span: tuple[float, float] | None) -> np.ndarray:
        start, end = span or (0.0, stills.duration(path))
        return stills.at(path, stills.spread(start, end, self.config.fps, most), self.image_size)

    def save(self, path: str | Path) -> None:
        """Writes a workdir that `load` and the commands open. Raises UserError where one already lies."""
        from vmod_jax.training.checkpoint import save_params

        path = user_path(path)
        if (path / "model.json").exists():
            raise UserError(f"{path} already holds a model: name another folder")
        params = inference.stack(self.params)
        if "scale" in params["llama"]["layers"]["q"]:
            raise UserError("weights of 8 bits are made from a loaded model and not saved: save that model")
        workdir.write(path, self.config, self.tokenizer)
        save_params(path, params)


def load(
    path: str | Path,
    policy: str | Policy | None = None,
    keep: float | None = None,
    gate: str | None = None,
    step: int | None = None,
    allow_nonfinite: bool = False,
    **changes: Any,
) -> LanguageModel:
    """Opens a workdir, an imported folder, a Hugging Face folder, or a GGUF file.

    policy, keep, gate: run the model under another depth policy than the one recorded (a name of `depth.POLICIES`, or
    one LayerSpec a layer); LayerExperts that this adds, at their initialisation, or leaves out are logged in one line.
    step: of the checkpoint (default: the last); allow_nonfinite: take a Hugging Face folder with NaN or infinity in its
    weights; changes: other fields of VideoLMConfig, such as grid=(24, 24): the weights do not depend on how many tokens
    a frame has. Raises UserError for a path that is none of these, and for a grid that its encoder does not give.
    """
    path = user_path(path)
    is_gguf = path.suffix == ".gguf" and path.is_file()
    if not (path.is_dir() or is_gguf):
        raise UserError(f"{path}: no such folder; give a workdir, a Hugging Face folder or a GGUF file")
    if (path / "model.json").exists():
        from vmod_jax.training.checkpoint import load_params

        config, params = workdir.read_model(path), load_params(path, step=step)
        folder = workdir.tokenizer_folder(path)
        tokenizer = load_tokenizer(folder) if folder else None
        trained = trained_layers(config, path)
    elif is_gguf or (path / "config.json").exists():
        config, params, tokenizer = _from_huggingface(path, allow_nonfinite)
        trained = learned_layers(config.policy)
    else:
        raise UserError(f"{path} is neither a workdir (no model.json) nor a Hugging Face folder (no config.json)")
    recorded = config
    if policy is not None or keep is not None:
        config = dataclasses.replace(config, policy=_policy(config, policy, keep))
    if gate is not None:
        changes["gate"] = gate
    config = dataclasses.replace(config, **changes)
    if config.grid != recorded.grid:
        _check_grid(config)
    params, line = adapt(params, recorded, config, trained)
    if line:
        log.warning("%s: %s", path, line)
    return LanguageModel(config, params, tokenizer)


def _check_grid(config: VideoLMConfig) -> None:
    """Raises UserError for a frame that is finer than the encoder's patches, or not made by an encoder at all."""
    if config.vision is None:
        raise UserError("grid: this model takes features, whose grid was chosen when they were made; give it a tower")
    if min(config.grid) < 1 or max(config.grid) > (side := config.vision.side):
        raise UserError(
            f"grid {config.grid[0]}x{config.grid[1]}: its encoder has {side} x {side} patches, give 1x1 up to that"
        )


def _policy(config: VideoLMConfig, policy: str | Policy | None, keep: float | None) -> Policy:
    """A named policy, a given one, or the recorded one with another keep ratio."""
    if isinstance(policy, str):
        return make_policy(policy, config.llama.num_hidden_layers, 0.2 if keep is None else keep)
    base = config.policy if policy is None else policy
    if keep is None:
        return base
    if not any(spec.selector for spec in base):
        raise UserError(f"keep={keep:g} has no layer to act on: the recorded policy chooses no tokens; name a policy")
    return tuple(dataclasses.replace(spec, keep=float(keep)) if spec.selector else spec for spec in base)


def _from_huggingface(path: Path, allow_nonfinite: bool = False) -> tuple[VideoLMConfig, Any, Any]:
    """A Hugging Face folder as `weights.folder.open_folder` has it, its arrays on the device."""
    from vmod_jax.weights import lazy

    config, arrays, folder, *_ = open_folder(path, allow_nonfinite=allow_nonfinite)
    tree, missing = complete(config, arrays)
    if missing:
        log.info("initialised what the checkpoint lacks: %s", ", ".join(missing))
    return config, lazy.place(tree), load_tokenizer(folder) if folder else None
