"""Ego4D's long-term anticipation (version 2): after eight actions seen, which are the next twenty?

fho_lta_{split}.json    {"clips": [{"clip_uid", "video_uid", "clip_parent_start_sec", "action_clip_start_sec",
                         "action_clip_end_sec", "action_idx", "verb_label", "noun_label"}]}, an entry an action
fho_lta_taxonomy.json   {"verbs": [name], "nouns": [name]}, by label
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vmod_jax.data.conversation import Sample
from vmod_jax.data.sources.annotations import NUMBER, get, read_json, texts
from vmod_jax.data.sources.coin import NUMBERED, ask, numbered
from vmod_jax.errors import UserError, short

SEEN, COMING = 8, 20  # actions
# Names that their brackets tell apart; every other bracket is left out.
SPOKEN = {
    "pot_(planter)": "flowerpot",
    "bat_(sports)": "sport bat",
    "bat_(tool)": "bat",
    "nut_(food)": "nuts",
    "nut_(tool)": "nut",
    "chip_(food)": "snack",
    "chip_(wood,_metal)": "chip",
}


class Taxonomy(NamedTuple):
    """What each verb's and each noun's label is called."""

    verbs: list[str]
    nouns: list[str]

    def action(self, verb: int, noun: int) -> str:
        return f"{self.verbs[verb]} {self.nouns[noun]}"


class Window(NamedTuple):
    """One question: what was seen, and the labels of what comes."""

    sample: Sample
    clip: str
    last: int  # action_idx of the last action that is seen
    verbs: list[int]
    nouns: list[int]

    @property
    def key(self) -> str:
        """Its name in the file that Ego4D's server takes."""
        return f"{self.clip}_{self.last}"


def taxonomy(file: str | Path) -> Taxonomy:
    """Verbs and nouns as they are said: "turn_on" -> "turn on", "cut_(trim,_slice)" -> "cut"."""
    raw = read_json(Path(file))
    verbs, nouns = (texts(raw, key, list, str(file)) for key in ("verbs", "nouns"))
    return Taxonomy([spoken(name) for name in verbs], [spoken(name) for name in nouns])


def spoken(name: str) -> str:
    return SPOKEN.get(name) or re.sub(r"\(.*", "", name).replace("_", " ").strip()


def windows(file: str | Path, names: Taxonomy, durations: Mapping[str, float], fps: float) -> Iterator[Window]:
    """Every run of 8 + 20 actions of each clip, in order of clip and action; times go to the nearest frame.

    Raises UserError for a file that is not LTA's, naming entry and key.
    """
    file = Path(file)
    clips: dict[str, list[dict]] = {}
    for number, action in enumerate(get(read_json(file), "clips", list, str(file))):
        where = f"{file.name}: action {number}"
        clips.setdefault(get(action, "clip_uid", str, where), []).append(_checked(action, names, where))
    for clip, actions in clips.items():
        video = actions[0]["video_uid"]
        if video not in durations:
            continue
        actions.sort(key=lambda action: action["action_idx"])
        end = math.floor(durations[video] * fps + 1e-9)
        for first in range(len(actions) - SEEN - COMING + 1):
            seen, coming = actions[first : first + SEEN], actions[first + SEEN : first + SEEN + COMING]
            start, stop = (
                min(round((action["clip_parent_start_sec"] + action[key]) * fps), end)
                for action, key in ((seen[0], "action_clip_start_sec"), (seen[-1], "action_clip_end_sec"))
            )
            verbs, nouns = ([action[key] for action in coming] for key in ("verb_label", "noun_label"))
            answer = numbered([names.action(*pair) for pair in zip(verbs, nouns, strict=True)])
            shown = (start, max(start, stop) + 1)
            question = f"After {shown[1] - shown[0]} video frames, anticipate the next {COMING} actions. {NUMBERED}"
            yield Window(ask(question, answer, video, shown), clip, seen[-1]["action_idx"], verbs, nouns)


def _checked(action: Any, names: Taxonomy, where: str) -> dict:
    for key in ("clip_parent_start_sec", "action_clip_start_sec", "action_clip_end_sec"):
        get(action, key, NUMBER, where)
    get(action, "video_uid", str, where)
    get(action, "action_idx", int, where)
    for key, known in (("verb_label", names.verbs), ("noun_label", names.nouns)):
        if not 0 <= (label := get(action, key, int, where)) < len(known):
            raise UserError(f"{where}: '{key}' is {short(label)}, the taxonomy has {len(known)}")
    return action
