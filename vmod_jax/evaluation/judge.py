"""A judge of open answers: another model, behind any endpoint that speaks OpenAI's chat completions.

The protocol is Video-ChatGPT's: question, right answer and prediction go in, {"pred": "yes" | "no", "score": 0 to 5}
comes back. The wording of the prompt is our own and judges differ, so that no score here compares with a published one.
Every reply is kept, a line each, and no answer is judged twice.
"""

import ast
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vmod_jax.errors import UserError
from vmod_jax.evaluation.documents import Document, Responses, read_lines

TRIES = 3
PROMPT = (
    "You compare a predicted answer to a question about a video with the right answer. Synonyms and paraphrases count "
    'as right; what contradicts the right answer does not. Reply with one JSON object and nothing else: {{"pred": '
    '"yes" or "no", whether the prediction is right, "score": an integer from 0 to 5, how well it matches}}.\n'
    "Question: {question}\nRight answer: {answer}\nPredicted answer: {prediction}"
)
_UNREADABLE = (ValueError, SyntaxError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError)


class Verdict(NamedTuple):
    """yes: whether the answer was judged right; score: 0 to 5; judged: whether a reply could be read at all."""

    yes: bool
    score: float
    judged: bool


# --- replies ----------------------------------------------------------------------------------------------------------


def official(reply: str) -> dict[str, Any]:
    """{yes, no, score} as Video-ChatGPT reads a reply, or {error: the name of what it stops at}.

    The whole reply must be a Python literal. 4.8 becomes 4; "maybe" is neither yes nor no, but its score counts.
    """
    try:
        literal = _literal(reply)
        said, score = literal["pred"].lower(), int(literal["score"])
    except _UNREADABLE as error:
        return {"error": type(error).__name__}
    return {"yes": "yes" in said, "no": "yes" not in said and "no" in said, "score": score}


def strict(reply: str) -> Verdict | None:
    """The first {...} of a reply, as JSON or else as a literal; None unless pred is yes or no and score is 0 to 5."""
    found = re.search(r"\{.*?\}", reply, re.DOTALL)
    try:
        value = _json_or_literal(found[0]) if found else {}
        said, score = value["pred"], float(value["score"])
    except _UNREADABLE:
        return None
    return Verdict(said == "yes", score, True) if said in ("yes", "no") and 0 <= score <= 5 else None


def _json_or_literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return _literal(text)


def _literal(text: str) -> Any:
    with warnings.catch_warnings():  # of escapes that are none
        warnings.simplefilter("ignore")
        return ast.literal_eval(text)


def official_scores(replies: Iterable[str]) -> dict[str, float]:
    """{accuracy in percent of yes and no, score: mean}, over the replies that the public script can read."""
    read = [found for reply in replies if "error" not in (found := official(reply))]
    answered = sum(found["yes"] or found["no"] for found in read)
    return {
        "accuracy": 100 * sum(found["yes"] for found in read) / answered if answered else 0.0,
        "score": sum(found["score"] for found in read) / len(read) if read else 0.0,
    }


def strict_scores(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """{accuracy, score, unjudged}: over all questions; what was not judged is wrong and scores 0."""
    count = max(1, len(verdicts))
    return {
        "accuracy": 100 * sum(one.yes for one in verdicts) / count,
        "score": sum(one.score for one in verdicts) / count,
        "unjudged": 100 * sum(not one.judged for one in verdicts) / count,
    }


# --- the endpoint -----------------------------------------------------------------------------------------------------


class Judge(NamedTuple):
    """url: of the endpoint, up to /v1; its key is read from OPENAI_API_KEY at each call and never kept."""

    url: str
    model: str
    timeout: float = 60.0

    def ask(self, prompt: str) -> str:
        """One reply. Raises UserError where the endpoint does not give one."""
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        try:
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return str(json.load(response)["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            with error:  # it holds the connection
                raise UserError(f"the judge at {address} does not answer ({error})") from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"the judge at {address} does not answer ({error})") from error


def judge_all(judge: Judge, documents: Sequence[Document], responses: Responses, kept: Path) -> dict[str, Verdict]:
    """Judges every response, at most `TRIES` times each; -> {id: verdict}, of nothing said without asking.

    kept: a line {id, judge, prompt: hash, tried, reply, parsed} a reply, flushed as they come, read again at the next
    run. Raises UserError where the judge stops answering: what it said so far is kept, and the same command goes on.
    """
    before: dict[tuple, list[str]] = {}
    for row in read_lines(kept) if kept.is_file() else []:
        before.setdefault((row["id"], row["judge"], row["prompt"]), []).append(row["reply"])
    verdicts = {}
    with kept.open("a", encoding="utf-8") as file:
        for one in documents:
            if not (responses.get(one.id) or "").strip():
                verdicts[one.id] = Verdict(False, 0.0, False)
                continue
            question = one.extra.get("question", one.prompt)
            prompt = PROMPT.format(question=question, answer=one.gold, prediction=responses[one.id])
            key = (one.id, judge.model, hashlib.sha256(prompt.encode()).hexdigest()[:16])
            replies = before.get(key, [])
            while not (verdict := next(filter(None, map(strict, replies)), None)) and len(replies) < TRIES:
                try:
                    replies = [*replies, judge.ask(prompt)]
                except UserError as error:
                    raise UserError(f"{error}; {kept} keeps what it said so far, the same command goes on") from error
                row = dict(zip(("id", "judge", "prompt"), key, strict=True)) | {"reply": replies[-1]}
                file.write(json.dumps(row | {"parsed": strict(replies[-1])}) + "\n")
                file.flush()
            verdicts[one.id] = verdict or Verdict(False, 0.0, False)
    return verdicts


def judged(
    url: str, model: str | None, documents: Sequence[Document], responses: Responses, kept: Path
) -> dict[str, Any]:
    """{model, official, strict}: what a judge says of open answers. Raises UserError without a model."""
    if not model:
        raise UserError("--judge needs --judge-model, the name of the model behind that endpoint")
    verdicts = judge_all(Judge(url, model), documents, responses, kept)
    replies = [row["reply"] for row in read_lines(kept) if row["judge"] == model] if kept.is_file() else []
    return {"model": model, "official": official_scores(replies), "strict": strict_scores(list(verdicts.values()))}
