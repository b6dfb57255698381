"""vmod's models in lmms-eval: `python -m lmms_eval --model vmod --model_args workdir=RUN --tasks mme`.

lmms-eval finds this by the package's entry point and imports it in use only. Images of a request become one stream of
as many frames, a video at most `frames` of its frames; replies are `lm.answers`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

from vmod_jax.evaluation.shown import shown
from vmod_jax.lm import load
from vmod_jax.streaming.questions import Question

LIMIT = 64  # new tokens, where a task does not say


class VMod(lmms):
    """workdir: what `vmod_jax.load` opens; rows: requests that are answered together; frames: of a video, at most."""

    is_simple = True

    def __init__(self, workdir: str, batch_size: int | str = 8, frames: int | str = 32, **_: Any):
        super().__init__()
        self.lm, self.rows, self.frames = load(workdir), max(1, int(batch_size)), int(frames)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy replies, in the order of the requests, each cut at its first stop text."""
        by_limit: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            by_limit.setdefault(int(request.args[1].get("max_new_tokens") or LIMIT), []).append(i)
        replies: dict[int, str] = {}
        for limit, own in by_limit.items():
            questions = [self._question(requests[i].args[0], *requests[i].args[2:]) for i in own]
            answers = self.lm.answers(questions, "text", self.rows, limit)
            replies |= {i: answer.text for i, answer in zip(own, answers, strict=True)}
        return [_cut(replies[i], request.args[1].get("until")) for i, request in enumerate(requests)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log P of the continuation and the reply's end, whether it is the greedy reply) of each request."""
        questions = []
        for request in requests:
            context, continuation, visual, doc_id, task, split = request.args
            told = continuation(self._document(doc_id, task, split)) if callable(continuation) else continuation
            question = self._question(context, visual, doc_id, task, split)
            questions.append(question._replace(options=(str(told).strip(),)))
        if not questions:
            return []
        greedy = self.lm.answers(questions, "text", self.rows, LIMIT)
        likely = self.lm.answers(questions, "likelihood", self.rows, LIMIT)
        return [(b.scores[0], a.text == b.text) for a, b in zip(greedy, likely, strict=True)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("vmod answers one round at a time")

    def _document(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _question(self, context: str, visual: Callable | None, doc_id: int, task: str, split: str) -> Question:
        seen = visual(self._document(doc_id, task, split)) if visual else None
        return shown(self.lm, context.replace("<image>", "").strip(), list(seen or ()), self.frames)


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text


def manifest() -> Any:
    """What the entry point `lmms_eval.models` gives."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id="vmod", simple_class_path=f"{__name__}.VMod")
