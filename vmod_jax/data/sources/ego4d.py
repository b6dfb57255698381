"""Ego4D's annotations as streaming dialogues: the narration stream.

A narration's text is what the model should say at the first frame at or after the narration's time. The source is
VideoLLM-online (CVPR 2024), section 3.3; file layout and edge cases are the data set's own:

    all_narrations_redacted.json   {"videos": {uid: {"narrations": [{"time", "text", "_annotation_uid"}]}}}
    B_val.json, B_test_unannotated.json for eight benchmarks B
                                   [{"video_uid"}] under "videos", "clips" or "annotations"
    questions.json                 [{"video_uid", "conversation": [{"role", "content", "time"}]}], the schema of
                                   goalstep_livechat: questions and answers in mid-stream, beside the narrations
    splits.json                    instead of those, for data of one's own: {"train": [uid], "val": [], "test": []}
"""

import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vmod_jax.data.conversation import NARRATION_INSTRUCTION, Sample
from vmod_jax.data.sources.annotations import LONGEST
from vmod_jax.errors import UserError, few, is_number, is_text, read_json, short

log = logging.getLogger(__name__)

BENCHMARKS = ("goalstep", "fho_lta", "nlq", "moments", "av", "fho_oscc-pnr", "fho_sta", "vq")
SPLITS = ("train", "val", "test")
FAILED = "Not sure what you are doing."
REFINED_INSTRUCTIONS = (
    "Please concisely narrate the video in real time.",
    "Help me to illustrate my view in short.",
    "Please simply describe what do you see.",
    "Continuously answer what you observed with simple text.",
    "Do concise real-time narration.",
    "Hey assistant, do you know the current video content? Reply me concisely.",
    "Simply interpret the scene for me.",
    "What can you tell me about? Be concise.",
    "Use simple text to explain what is shown in front of me.",
    "What is the action now? Please response in short.",
)
OUTSIDE = 0.01  # the share of a video's narrations that may lie outside it: annotators mark the end a little late
# The camera wearer, other people, what the annotator was unsure of. Order matters: the lone # comes last.
TAGS = ("#C", "#c", "@c", "#O", "#o", "#Unsure", "#unsure", "#")


def narration_samples(
    narrations_file: str | Path,
    durations: Mapping[str, float],
    fps: float,
    split: str = "train",
    allow_outside: bool = True,
) -> list[Sample]:
    """One sample for each (video, annotator) of a split.

    Args:
        narrations_file: `all_narrations_redacted.json` or a file of that shape; its folder may hold the split files.
        durations: seconds of each video, (frames - 1) / fps; videos that are not in it are left out.
        fps: frames a second at which the videos are watched.
        split: train, val or test. Without any split file everything is train.

    Returns samples whose first stream is one frame that is not learned (at the first narration), followed by the
    instruction and the narrations. Questions of `questions.json` beside the file stand where they are asked; the frames
    from the reply before up to there are not learned, since nobody spoke at the last of them.

    Raises UserError for an unreadable file, naming the video and the key where one is missing, and, unless
    allow_outside, where more than 1% of a video's narrations lie before it or a second or more behind its end.
    """
    path = Path(narrations_file)
    in_split = _split_of(path.parent)
    if split not in SPLITS:
        raise UserError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    questions = _questions(path.with_name("questions.json"), fps)
    samples, dropped, asked = [], 0, 0
    for video, entry in _mapping(_read(path), "videos", path).items():
        if video not in durations or in_split(video) != split:
            continue
        by_annotator = _by_annotator(video, entry, path)
        if not allow_outside:
            _check_inside(path, video, [time for every in by_annotator.values() for time, _ in every], durations[video])
        here = questions.get(video, [])
        own = [one for said in by_annotator.values() for one in _sample(video, said, here, durations[video], fps)]
        asked += len(here)
        dropped += sum(not any(one.start <= frame < one.stop - 1 for one in own) for frame, _, _ in here)
        samples += own
    if dropped:
        log.warning(
            "questions.json: %d of the %d questions about videos of the split %s are left out: they are asked before "
            "the first narration or after the last", dropped, asked, split,
        )  # fmt: skip
    return samples


def refined_samples(
    file: str | Path, durations: Mapping[str, float], fps: float, seed: int = 0, allow_outside: bool = True
) -> Iterator[Sample]:
    """Narrations that were refined ("you" for the camera wearer): one sample for each (video, annotator) of the file.

    file: {video: {annotator: [{"time", "text"}]}}; durations, fps, allow_outside: as for `narration_samples`. The
    instruction is one of ten, drawn by (seed, video, annotator); what could not be refined (`FAILED`) is left out.
    """
    path = Path(file)
    for video, annotators in _mapping(_read(path), None, path).items():
        if video not in durations:
            continue
        by_annotator = {
            uid: _by_annotator(video, {"narrations": _of_annotator(uid, narrations)}, path).get(uid, [])
            for uid, narrations in _mapping(annotators, None, path).items()
        }
        if not allow_outside:
            _check_inside(path, video, [time for every in by_annotator.values() for time, _ in every], durations[video])
        for uid, narrations in by_annotator.items():
            said = [(time, text) for time, text in narrations if text != FAILED]
            rng = np.random.default_rng([seed, zlib.crc32(f"{video} {uid}".encode())])
            instruction = REFINED_INSTRUCTIONS[rng.integers(len(REFINED_INSTRUCTIONS))]
            for sample in _sample(video, said, [], durations[video], fps):
                sample.conversation[1]["content"] = instruction
                yield sample


def _of_annotator(uid: str, narrations: Any) -> Any:
    """Refined narrations with their annotator written in; what is no list of objects is left to be refused."""
    if not isinstance(narrations, list):
        return narrations
    return [{**one, "_annotation_uid": uid} if isinstance(one, dict) else one for one in narrations]


def _check_inside(path: Path, video: str, times: list[float], duration: float) -> None:
    """Raises UserError where so many narrations lie outside their video that they cannot be its own."""
    outside = [time for time in times if not 0 <= time < duration + 1]
    if len(outside) > OUTSIDE * len(times):
        raise UserError(
            f"{path.name}: {len(outside)} of the {len(times)} narrations of video {video} lie outside its "
            f"{duration:.1f} s ({min(times):g} s to {max(times):g} s): are their times seconds of this video? "
            "--allow-outside (data.allow_outside) takes them to its ends"
        )


def clean_text(text: str) -> str:
    """A narration as a sentence: "#C C  picks up a knife" -> "C picks up a knife."."""
    for tag in TAGS:
        text = text.replace(tag, "")
    first, *rest = (text.strip(".,\n ") + ".").split()
    return " ".join([first.capitalize(), *rest])


def _sample(
    video: str,
    narrations: list[tuple[float, str]],
    questions: list[tuple[int, str, str]],
    duration: float,
    fps: float,
) -> list[Sample]:
    """The sample of one annotator's narrations (time, clean text), sorted by time; none where there are none.

    questions: (the last frame seen, question, answer), sorted; those before the first narration or after the last are
    left out.
    """
    # Times are counted in frames, which float seconds would miscount. The tolerance keeps 2.1 s x 10 fps frame 21.
    end = math.floor(duration * fps + 1e-9)
    spoken: list[tuple[int, str]] = []  # frame, text
    last_text = None
    for time, text in narrations:
        if spoken and spoken[-1][0] >= end:
            break
        if text == last_text:
            continue
        frame = min(max(math.ceil(max(min(time, LONGEST), -1.0) * fps - 1e-9), 0), end)
        if spoken and spoken[-1][0] == frame:
            spoken.pop()  # both wait for the same frame; the later one is nearer to it
        spoken.append((frame, text))
        last_text = text
    if not spoken:
        return []
    start, text = spoken[0]
    conversation: list[dict[str, Any]] = [
        {"role": "stream", "num_frames": 1, "learn": False},
        {"role": "user", "content": NARRATION_INSTRUCTION},
        {"role": "assistant", "content": text, "learn": True},
    ]
    for (before, _), (frame, text) in pairwise(spoken):
        for asked, question, answer in questions:
            if before <= asked < frame:
                conversation.append({"role": "stream", "num_frames": asked - before, "learn": False})
                conversation.append({"role": "user", "content": question})
                conversation.append({"role": "assistant", "content": answer, "learn": True})
                before = asked
        conversation.append({"role": "stream", "num_frames": frame - before, "learn": True})
        conversation.append({"role": "assistant", "content": text, "learn": True})
    return [Sample(conversation, video, start, spoken[-1][0] + 1)]


def video_splits(folder: Path) -> dict[str, set[str]]:
    """Split -> the videos that are narrated, of a folder of annotation files. Raises UserError where there are none."""
    path = next(
        (folder / name for name in ("all_narrations_redacted.json", "narrations.json") if (folder / name).exists()),
        None,
    )
    if path is None:
        raise UserError(
            f"{folder}: no annotation file of Ego4D, COIN or Ego-Exo4D; say where they lie with --annotations"
        )
    in_split = _split_of(folder)
    found: dict[str, set[str]] = {split: set() for split in SPLITS}
    for video in _mapping(_read(path), "videos", path):
        if split := in_split(video):
            found[split].add(video)
    return found


def _by_annotator(video: str, entry: Any, path: Path) -> dict[str, list[tuple[float, str]]]:
    """Annotator -> (time, clean text) of the narrations of two or more words, sorted by time."""
    where = f"{path.name}: video {video}"
    if not isinstance(entry, dict) or not isinstance(entry.get("narrations"), list):
        raise UserError(f"{where} has no list 'narrations'; give it one, or take the video out")
    found: dict[str, list[tuple[float, str]]] = {}
    for index, narration in enumerate(entry["narrations"]):
        for key, kind in (("time", int | float), ("text", str), ("_annotation_uid", str)):
            if not isinstance(narration, dict) or key not in narration:
                raise UserError(f"{where}: narration {index} has no '{key}'")
            if not isinstance(narration[key], kind) or (key == "text" and not is_text(narration[key])):
                raise UserError(f"{where}: narration {index} has {short(narration[key])} as its '{key}'")
        if not is_number(narration["time"]):
            raise UserError(f"{where}: narration {index} has {short(narration['time'])} as its 'time'")
        text = clean_text(narration["text"])
        if len(text.split()) >= 2:
            found.setdefault(narration["_annotation_uid"], []).append((float(narration["time"]), text))
    return {uid: sorted(narrations, key=lambda narration: narration[0]) for uid, narrations in found.items()}


def _questions(path: Path, fps: float) -> dict[str, list[tuple[int, str, str]]]:
    """video -> (the last frame seen, question, answer), sorted by time; {} where there is no such file."""
    if not path.is_file():
        return {}
    found: dict[str, list[tuple[int, str, str]]] = {}
    try:
        for chat in _read(path):
            turns = chat["conversation"]
            for asked, answered in zip(turns[::2], turns[1::2], strict=True):
                if (asked["role"], answered["role"]) != ("user", "assistant"):
                    raise UserError(
                        f"{path}: the turns of {chat['video_uid']} must be a question, its answer, and so on"
                    )
                for key, valid in (("time", is_number), ("content", is_text)):
                    if not valid(asked[key]):
                        raise UserError(
                            f"{path}: a question of {chat['video_uid']} has {short(asked[key])} as its '{key}'"
                        )
                if not is_text(answered["content"]):
                    raise UserError(
                        f"{path}: an answer of {chat['video_uid']} has {short(answered['content'])} as its 'content'"
                    )
                frame = math.floor(max(min(asked["time"], LONGEST), -LONGEST) * fps + 1e-9)
                found.setdefault(chat["video_uid"], []).append((frame, asked["content"], answered["content"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a list of conversations in the schema of Ego4D's live chats ({error})") from error
    return {video: sorted(questions) for video, questions in found.items()}


def _split_of(folder: Path) -> Callable[[str], str | None]:
    """video -> "train" | "val" | "test", from the files in the folder."""
    files = {
        split: [folder / f"{benchmark}_{name}.json" for benchmark in BENCHMARKS]
        for split, name in (("val", "val"), ("test", "test_unannotated"))
    }
    expected = files["val"] + files["test"]
    missing = [file.name for file in expected if not file.is_file()]
    if not missing:
        val, test = ({uid for file in files[split] for uid in _video_uids(file)} for split in ("val", "test"))
        if both := len(val & test):
            log.warning("%s: %d videos are in split files of val and in some of test: taken for val", folder, both)
        return lambda video: "val" if video in val else "test" if video in test else "train"
    splits = folder / "splits.json"
    if splits.is_file():
        given = {split: _uids(uids, split, splits) for split, uids in _mapping(_read(splits), None, splits).items()}
        every = [uid for uids in given.values() for uid in uids]
        if twice := sorted({uid for uid in every if every.count(uid) > 1} if len(every) > len(set(every)) else ()):
            raise UserError(f"{splits}: {few(twice)} in more than one split; keep one of them")
        return lambda video: next((split for split, uids in given.items() if video in uids), None)
    if len(missing) < len(expected):
        # A guess would put test videos into the training set.
        raise UserError(f"{folder}: of the benchmarks' split files these are missing: {', '.join(missing)}")
    return lambda video: "train"


def _video_uids(file: Path) -> set[str]:
    data = _mapping(_read(file), None, file)
    for key in ("videos", "clips", "annotations"):
        if key in data:
            try:
                return {item["video_uid"] for item in data[key]}
            except (TypeError, KeyError) as error:
                raise UserError(f"{file}: an entry of '{key}' has no 'video_uid'") from error
    raise UserError(f"{file}: none of the keys 'videos', 'clips', 'annotations' is there")


def _uids(uids: Any, split: str, file: Path) -> set[str]:
    if split not in SPLITS or not isinstance(uids, list):
        raise UserError(f"{file}: {short(split)} must be one of {', '.join(SPLITS)} and hold a list of video ids")
    if wrong := [short(uid) for uid in uids if not isinstance(uid, str)]:
        raise UserError(f"{file}: '{split}' holds {few(wrong)}, which are no video ids")
    return set(uids)


def _read(path: Path) -> Any:
    return read_json(path, "check the path of the annotations")


def _mapping(data: Any, key: str | None, path: Path) -> dict[str, Any]:
    """data, or data[key], which must be an object."""
    if key is not None:
        data = data.get(key) if isinstance(data, dict) else None
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: no object {f'under {key!r}' if key else 'at the top'}; this is not an annotation file"
        )
    return data
