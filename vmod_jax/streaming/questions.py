"""Questions about what has been shown, as texts: `Answers` with the stream's format around it.

group     opening "\\n[" frame , frame ...            read once
question  "]" "\\nUser: ..." "\\nAssistant:"
reply     token by token, or the likeliest of some options
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vmod_jax.data.conversation import DEFAULT_SYSTEM_PROMPT, StreamFormat
from vmod_jax.errors import UserError
from vmod_jax.models.video_lm import VideoLMConfig, check_frames
from vmod_jax.streaming.answers import Answers, Prompt


class Question(NamedTuple):
    """text: the user's whole message; frames: u8[F, S, S, 3] pixels or f32[F, n, d_v] features, or a function that
    reads them when their turn comes, or None; group: questions of equal groups show the same frames, None: its own;
    options: whole replies, of which `by_likelihood` takes one; begin: what the reply begins with, not said again.
    """

    text: str
    frames: np.ndarray | Callable[[], np.ndarray] | None = None
    group: Hashable = None
    options: tuple[str, ...] = ()
    begin: str = ""


class Answer(NamedTuple):
    """text: what is said, or the likeliest option; scores: log P of each option, none where not asked for."""

    text: str
    scores: tuple[float, ...] = ()


class Answerer:
    """Answers batches of questions with one model.

    params: as `Answers` takes them; rows: questions that are answered together; limit: new tokens of a reply.
    """

    def __init__(
        self,
        config: VideoLMConfig,
        params: Any,
        fmt: StreamFormat,
        rows: int = 8,
        limit: int = 64,
        system: str = DEFAULT_SYSTEM_PROMPT,
    ):
        if min(rows, limit) < 1:
            raise UserError(f"rows {rows} and limit {limit} must be at least 1")
        self.config, self.fmt, self.rows, self.limit, self.system = config, fmt, rows, limit, system
        self.answers = Answers(config, params, fmt.eos_id, rows)

    def by_text(self, questions: Sequence[Question]) -> list[Answer]:
        """Greedy replies, cut at eos or after `limit` tokens, without blanks around them."""
        return self._answer(questions, self._texts)

    def by_likelihood(self, questions: Sequence[Question]) -> list[Answer]:
        """The option whose tokens and eos are likeliest as the reply; of equally likely ones the first."""
        if not all(question.options for question in questions):
            raise UserError("a question without options: by likelihood one of them is taken, name some")
        return self._answer(questions, self._options)

    def _answer(self, questions: Sequence[Question], answer: Callable) -> list[Answer]:
        """Reads the frames of a few groups, enough for `rows` questions, and answers all that show them."""
        groups: dict[Hashable, list[int]] = {}
        for i, question in enumerate(questions):
            groups.setdefault(("alone", i) if question.group is None else ("group", question.group), []).append(i)
        found: dict[int, Answer] = {}
        together: list[tuple[int, np.ndarray]] = []  # (question, its frames)
        last = next(reversed(groups), None)
        for name, members in groups.items():
            frames = self._frames(questions[members[0]])
            together += [(i, frames) for i in members]
            if len(together) >= self.rows or name == last:
                asked = [(questions[i], shown) for i, shown in together]
                found |= dict(zip((i for i, _ in together), answer(asked), strict=True))
                together = []
        return [found[i] for i in range(len(questions))]

    def _frames(self, question: Question) -> np.ndarray:
        frames = question.frames() if callable(question.frames) else question.frames
        if frames is None:
            return np.zeros((0, self.config.features_per_frame, self.config.vision_hidden_size), np.float32)
        return np.asarray(check_frames(self.config, np.asarray(frames), lead=1))

    def _told(self, question: Question, frames: int) -> str:
        """All text up to the reply."""
        fmt = self.fmt
        shown = fmt.open_stream + fmt.frames(frames) + fmt.close_stream if frames else ""
        begin = f" {fmt.plain(question.begin)}" if question.begin else ""
        return fmt.opening(self.system) + shown + fmt.user_text(question.text) + fmt.assistant_prefix + begin

    def _prompt(self, question: Question, frames: np.ndarray) -> Prompt:
        return Prompt(self.fmt.tokenize(self._told(question, len(frames))), frames, id(frames))

    def _texts(self, asked: list[tuple[Question, np.ndarray]]) -> list[Answer]:
        prompts = [self._prompt(*one) for one in asked]
        self._check(prompts, self.limit)
        decode = self.fmt.tokenizer.decode
        replies = self.answers(prompts, self.limit)
        texts = [decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in replies]
        return [Answer(text.strip()) for text in texts]

    def _options(self, asked: list[tuple[Question, np.ndarray]]) -> list[Answer]:
        prompts, tails = [], []
        for question, frames in asked:
            told, prompt = self._told(question, len(frames)), self._prompt(question, frames)
            ends = [f"{told} {self.fmt.plain(option)}{self.fmt.tokenizer.eos_token}" for option in question.options]
            whole = [self.fmt.tokenize(text) for text in ends]
            # Where an option merges with what is before it, the prompt ends earlier: where they first differ.
            prompts.append(prompt._replace(ids=_shared([prompt.ids, *whole])))
            tails.append([ids[len(prompts[-1].ids) :] for ids in whole])
        self._check(prompts, max(len(ids) for own in tails for ids in own))
        scores = self.answers.score(prompts, tails)
        best = [question.options[int(np.argmax(own))] for (question, _), own in zip(asked, scores, strict=True)]
        return [Answer(text, tuple(own)) for text, own in zip(best, scores, strict=True)]

    def _check(self, prompts: list[Prompt], more: int) -> None:
        """Raises UserError for more tokens than the model knows positions."""
        longest = max(prompts, key=lambda prompt: len(prompt.ids))
        if (size := len(longest.ids) + more) > (known := self.config.llama.max_position_embeddings):
            raise UserError(
                f"{len(longest.frames)} frames of {self.config.tokens_per_frame} tokens, a question and its reply take "
                f"up to {size} positions of the model's {known}: show fewer frames, or give them a smaller grid"
            )


def _shared(lists: Sequence[Sequence[int]]) -> list[int]:
    """What all of them begin with."""
    same = [len(set(tokens)) == 1 for tokens in zip(*lists, strict=False)]
    return list(lists[0][: [*same, False].index(False)])
