"""Responses that are texts: a model's greedy (or drawn) replies, many documents at a time."""

import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vmod_jax.data.conversation import StreamFormat, prompt_ids
from vmod_jax.evaluation.documents import Document
from vmod_jax.evaluation.table import Respond, Task
from vmod_jax.streaming.answers import Answers, Prompt


class Shown(NamedTuple):
    """What a document shows and asks.

    conversation: messages up to the reply (`data/conversation.py`); frames: () -> u8[F, S, S, 3] pixels or f32[F, n,
    d_v] features, read when its batch is answered; key: documents of one key show the same frames, which are read once.
    """

    conversation: list[dict]
    frames: Callable[[], np.ndarray]
    key: Hashable


def texts(
    show: Callable[[Task], Callable[[Document], Shown]], limit: int = 64, candidates: int = 1
) -> Callable[[Task], Respond]:
    """The `respond` of a benchmark whose responses are texts of at most `limit` tokens.

    show(task): called once a run, -> document -> what it shows. candidates: with more than one a response is a list: a
    greedy reply, then replies that are drawn, always the same ones for the same document.
    """

    def respond(task: Task) -> Respond:
        lm, look = task.lm.merged, show(task)
        ask = Answers(lm.config, lm.params, task.lm.fmt.eos_id)

        def batch(documents: Sequence[Document]) -> Sequence[Any]:
            shown = [look(document) for document in documents]
            frames = {}
            for one in shown:
                if one.key not in frames:
                    frames[one.key] = one.frames()
            prompts = [
                Prompt(prompt_ids(one.conversation, task.lm.fmt), frames[one.key], one.key, seed)
                for document, one in zip(documents, shown, strict=True)
                for seed in _seeds(document, candidates)
            ]
            said = [_text(reply, task.lm.fmt) for reply in ask(prompts, limit)]
            if candidates == 1:
                return said
            return [said[i : i + candidates] for i in range(0, len(said), candidates)]

        return batch

    return respond


def _seeds(document: Document, candidates: int) -> list[int | None]:
    return [None, *(zlib.crc32(f"{document.id} {number}".encode()) for number in range(1, candidates))]


def _text(ids: list[int], fmt: StreamFormat) -> str:
    return fmt.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
