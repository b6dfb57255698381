r"""A live conversation over a stream of frames: when to speak, and what text goes in around it.

    text      = bos + system + "\n" + message*
    stream    = "\n[" + frame (interval frame)* + "]"        frame = n frame tokens
    user      = "\nUser: " + question
    assistant = "\nAssistant: " + reply + eos

The interval (",") after a frame means "stay silent"; where a model has none, eos does.
"""

import re
import uuid
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer

SYSTEM = (
    "A multimodal AI assistant is helping users with some activities. Below is their conversation, interleaved with "
    "the list of video frames received by the assistant."
)

MARK = "\ufdd0"  # behind the first character of what spells a special token in a text; the text's own is doubled
SNAP = 1e-6  # a question so close to a frame's time (in frames) is asked at that frame


class Turn(NamedTuple):
    """Something said at `time` seconds of the stream, by "user" or "assistant"."""

    time: float
    role: str
    text: str


class Session:
    """Push frames, ask questions; replies come back and are kept in `turns`.

    threshold: the model speaks after a frame when P(interval) < threshold or the interval is not its first choice.
    """

    def __init__(self, model, tokenizer, threshold=0.725, system=SYSTEM, max_reply=64):
        if model.video_lm.get("form", "plain") != "plain":
            raise ValueError("streams in PyTorch are written in the plain form; this model was trained on chat turns")
        self.model, self.threshold, self.max_reply = model, threshold, max_reply
        self.fps, self.interval = model.video_lm["fps"], model.video_lm["interval"]
        self.frame_id = model.video_lm["frame_token_id"]
        if len(tokenizer) == self.frame_id:
            token = AddedToken("<v>", special=True, normalized=False)
            tokenizer.add_tokens([token], special_tokens=True)
        self.tokenizer, self.frame_token = tokenizer, tokenizer.convert_ids_to_tokens(self.frame_id)
        special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = "|".join(re.escape(token) for token in sorted(special.values(), key=len, reverse=True))
        self.special, self.special_ids = re.compile(f"({names})"), special.keys()
        self.starts = re.compile(f"(?={names})(?P<first>.)", re.DOTALL)
        # The same without special tokens, and a token to begin with that no text can hold.
        self.texts, self.begin = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), uuid.uuid4().hex
        self.texts.no_truncation()
        self.texts.no_padding()
        self.texts.encode_special_tokens = True
        self.texts.add_tokens([AddedToken(self.begin, normalized=False)])
        self.interval_ids = self.tokenize(self.interval)
        self.interval_id = self.interval_ids[0] if self.interval else tokenizer.eos_token_id

        self.cache, self.turns, self.frames = model.new_cache(), [], 0
        self.in_stream = False  # whether a "[" is open
        # Text waits until a frame or a reply follows, because tokens may merge across pieces.
        self.pending_ids, self.pending_text = [], f"{tokenizer.bos_token or ''}{self.plain(system)}\n"
        self.queries = []  # (place in frames, time in seconds, text), in order

    @property
    def next_time(self):
        """Time of the next frame, in seconds."""
        return self.frames / self.fps

    @property
    def cache_bytes(self):
        return self.cache.num_bytes

    def ask(self, text, time=None):
        """Asks at `time` seconds (default: the next frame's). Before that time, the reply is returned; else the `push`
        of the last frame that is not later answers.
        """
        time = self.next_time if time is None else max(float(time), (self.frames - 1) / self.fps)
        place = time * self.fps  # in frames; seconds are not exact
        query = (round(place) if abs(place - round(place)) < SNAP else place, time, text)
        if query[0] >= self.frames:
            self.queries = sorted([*self.queries, query], key=lambda query: query[0])
            return None
        self.answer_until(query[0])
        return self.answer(query)

    def push(self, frame):
        """Shows a frame, u8[S, S, 3] pixels or features [n, d_v]; -> what the model says after it, or None."""
        said = len(self.turns)
        self.answer_until(self.frames - SNAP)
        speaks = self.show(frame)
        last, self.frames = self.frames, self.frames + 1
        if self.queries and self.queries[0][0] <= last:
            self.answer_until(last)
        elif speaks:
            self.reply("", last / self.fps)
        replies = [turn.text for turn in self.turns[said:] if turn.role == "assistant"]
        return replies[-1] if replies else None

    def finish(self):
        """Answers the questions that still wait, at the end of the stream; -> the replies' turns."""
        said = len(self.turns)
        self.answer_until(float("inf"))
        return [turn for turn in self.turns[said:] if turn.role == "assistant"]

    def answer_until(self, place):
        """Answers the questions of up to `place` frames."""
        while self.queries and self.queries[0][0] <= place:
            self.answer(self.queries.pop(0))

    def plain(self, text):
        """A text as a part of the dialogue, with marks in whatever would be read as a special token."""
        return self.starts.sub(rf"\g<first>{MARK}", text.replace(MARK, MARK + MARK))

    def tokenize(self, text):
        """Ids of a piece of the dialogue, as in mid-text: some tokenizers treat a text's very start specially."""
        parts = [""]
        for run in self.special.split(text):  # text, special token, text, ...
            if MARK in run:
                parts += [run, ""]
            else:
                parts[-1] += run
        return [id for part in parts if part for id in (self.text_ids if MARK in part else self.dialogue_ids)(part)]

    def dialogue_ids(self, text):
        return self.tokenizer(self.frame_token + text, add_special_tokens=False).input_ids[1:]

    def text_ids(self, marked):
        """Ids of a part in which nothing is a special token."""
        ids = []
        for parts in [marked], re.split(f"(?<!{MARK}){MARK}(?!{MARK})", marked):
            texts = [self.begin + re.sub(f"{MARK}({MARK}?)", r"\1", part) for part in parts]
            ids = [id for text in texts for id in self.texts.encode(text, add_special_tokens=False).ids[1:]]
            # Some vocabularies hold special tokens as words: then they are cut behind their first letter.
            if self.special_ids.isdisjoint(ids):
                break
        return ids

    def show(self, frame):
        """Feeds a frame; -> whether the model wants to speak after it."""
        text = self.pending_text + (self.interval if self.in_stream else "\n[")
        ids = self.pending_ids + self.tokenize(text) + [self.frame_id] * self.model.config.tokens_per_frame
        self.pending_ids, self.pending_text, self.in_stream = [], "", True
        hidden = self.model.extend(ids, torch.as_tensor(np.asarray(frame))[None], self.cache)
        logits = self.model.logits(hidden[-1]).double()
        silent = torch.softmax(logits, -1)[self.interval_id]
        return bool(silent < self.threshold) or int(logits.argmax()) != self.interval_id

    def answer(self, query):
        _, time, question = query
        self.turns.append(Turn(time, "user", question))
        return self.reply(f"\nUser: {self.plain(question)}", time)

    def reply(self, user_text, time):
        """Lets the model speak, greedily, after a question or by itself."""
        text = self.pending_text + ("]" if self.in_stream else "") + user_text + "\nAssistant:"
        ids, reply = self.pending_ids + self.tokenize(text), []
        while len(reply) < self.max_reply:
            logits = self.model.logits(self.model.extend(ids, None, self.cache)[-1])
            logits[self.frame_id :][:1] = -torch.inf  # a padded vocabulary may have a row for it
            token = int(logits.argmax())
            if token == self.tokenizer.eos_token_id:
                break
            reply, ids = [*reply, token], [token]
        else:
            self.model.extend(ids, None, self.cache)  # cut at its limit: its last token still belongs to the stream
        # eos goes in with what comes next, also after a reply that was cut.
        self.pending_ids, self.pending_text, self.in_stream = [self.tokenizer.eos_token_id], "", False
        said = self.tokenizer.decode(reply, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        self.turns.append(Turn(time, "assistant", said))
        return said
