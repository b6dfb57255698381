"""What an answer about the steps of a video is worth: COIN, Ego-Exo4D's keysteps, Ego4D's long-term anticipation.

Each `judge_*` looks at one answer, each score at the rows that hold what judges found; percent unless said otherwise.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vmod_jax.data.sources.lta import COMING, Taxonomy
from vmod_jax.evaluation.nearest import Nearest, edit_distance

Row = Mapping[str, Any]


def plain(text: str) -> str:
    """Lower case, without white space around it or full stops at its end."""
    return text.strip().lower().rstrip(".").rstrip()


# --- one step ---------------------------------------------------------------------------------------------------------


def judge_step(gold: str, response: str, nearest: Nearest) -> dict[str, Any]:
    """{exact, nearest: right or not; took: the category that the answer was taken for}."""
    exact = plain(response) == plain(gold)
    took = plain(gold) if exact else nearest.texts[nearest(plain(response))]
    return {"exact": exact, "nearest": took == plain(gold), "took": took}


def score_steps(rows: Sequence[Row]) -> dict[str, float | None]:
    """The share of steps named exactly, and by the nearest category."""
    return {name: percent([row[name] for row in rows]) for name in ("nearest", "exact")}


def judge_procedure(gold: Sequence[str], response: str, nearest: Nearest) -> dict[str, Any]:
    """{right: steps that are the true one at their place, compared: answered places, steps: true ones}."""
    said = [plain(line.rsplit(". ", 1)[-1]) for line in response.split("\n")]
    pairs = list(zip(said, map(plain, gold), strict=False))
    right = sum(line == true or nearest.texts[nearest(line)] == true for line, true in pairs)
    return {"right": right, "compared": len(pairs), "steps": len(gold)}


def score_procedures(rows: Sequence[Row]) -> dict[str, float | None]:
    """accuracy: of the answered places, as published; strict: of the true steps, so that a short answer loses."""
    right, compared, steps = (sum(row[name] for row in rows) for name in ("right", "compared", "steps"))
    return {"accuracy": ratio(right, compared), "strict": ratio(right, steps)}


# --- anticipation -----------------------------------------------------------------------------------------------------


class Actions:
    """Reads numbered answers as actions of a taxonomy: the nearest "verb noun"."""

    def __init__(self, names: Taxonomy):
        self.names = names
        self.pairs = [(v, n) for v in range(len(names.verbs)) for n in range(len(names.nouns))]
        said = [names.action(*pair) for pair in self.pairs]
        self.nearest = Nearest(said)
        counts = {text: said.count(text) for text in said} if len(set(said)) < len(said) else {}
        # Of names that two pairs share, the pair that stands first.
        self.most_common = self.pairs[said.index(max(counts, key=lambda text: counts[text]))] if counts else (0, 0)

    def __call__(self, response: str) -> list[tuple[int, int]]:
        """The (verb, noun) labels of its first 20 numbered lines; a short answer goes on with its last action."""
        said = [match[1] for line in response.split("\n") if (match := re.match(r"\s*\d+\.\s*(.+)", line))]
        found = [self.pairs[self.nearest(plain(text))] for text in said[:COMING]] or [self.most_common]
        return found + found[-1:] * (COMING - len(found))


def judge_anticipation(
    verbs: Sequence[int], nouns: Sequence[int], responses: Sequence[str], actions: Actions
) -> dict[str, Any]:
    """{verb, noun: [[20 labels] a candidate], ed_verb, ed_noun, ed_action: [ED@1 ... ED@20]}.

    ED@Z is the smallest edit distance of any candidate's first Z actions to the true ones, over Z.
    """
    said = [actions(response) for response in responses]
    true = list(zip(verbs, nouns, strict=True))
    parts = {
        "verb": (verbs, [[v for v, _ in candidate] for candidate in said]),
        "noun": (nouns, [[n for _, n in candidate] for candidate in said]),
        "action": (true, said),
    }
    distances = {
        f"ed_{part}": [min(edit_distance(c[:z], gold[:z]) for c in candidates) / z for z in range(1, len(gold) + 1)]
        for part, (gold, candidates) in parts.items()
    }
    return {part: parts[part][1] for part in ("verb", "noun")} | distances


def score_anticipation(rows: Sequence[Row]) -> dict[str, float | None]:
    """ED@20 and AUED (the area below ED@1 ... ED@20, over its width) of verb, noun and action: shares, less is
    better."""
    scores: dict[str, float | None] = {}
    for part in ("verb", "noun", "action"):
        at = np.mean([row[f"ed_{part}"] for row in rows], axis=0) if rows else None
        scores[f"{part}_ed20"] = None if at is None else float(at[-1])
        scores[f"{part}_aued"] = None if at is None else float(np.trapezoid(at) / (len(at) - 1))
    return scores


# --- shared -----------------------------------------------------------------------------------------------------------


def percent(right: Sequence[bool]) -> float | None:
    """The share of what is right; None of nothing."""
    return ratio(sum(right), len(right))


def ratio(part: float, whole: float) -> float | None:
    return 100 * part / whole if whole else None
