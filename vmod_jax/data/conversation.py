"""How a streaming dialogue is written as text, as tokens and as labels.

    text      = bos + system + "\\n" + message*
    stream    = "\\n[" + frame (interval frame)* + "]"     nothing when it has 0 frames
    user      = "\\nUser: " + content
    assistant = "\\nAssistant: " + content + eos
    frame     = frame token x tokens_per_frame

(VideoLLM-online, CVPR 2024, section 3.2; the interval "," between frames means "stay silent".)

That is the form "plain". In the form "chat" the dialogue is written in the turns of the tokenizer's chat template, in
which its model was tuned: what is shown and asked until a reply is one turn of the user, frames inside.

    text      = template's system turn, and the head of a user turn + message*
    stream    = frame (interval frame)* + "\n"
    user      = content
    assistant = end of the user turn, head of an assistant turn + content + eos + head of the next user turn

A conversation is a list of messages:
    {"role": "system" | "user" | "assistant", "content": str}      assistant: + "learn": bool
    {"role": "stream", "num_frames": int, "learn": bool | int}     an integer m: the first m frames

Labels follow the structure, never a search in the text: frames are counted, a turn ends at its own eos, and a reply's
first token is found by its character offset. Contents are text, whatever they spell: of a special token in them
("<v>") its first character is followed by `MARK`, by which `tokenize` knows it from one that the dialogue is made of.
"""

import re
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmod_jax.errors import UserError

DEFAULT_SYSTEM_PROMPT = (
    "A multimodal AI assistant is helping users with some activities. Below is their conversation, interleaved with "
    "the list of video frames received by the assistant."
)
NARRATION_INSTRUCTION = (
    "Please concisely narrate the video in real time. Use the tag 'C' to denote the camera wearer, and other letter "
    "tags, such as 'X', to denote other individuals in the scene."
)
SPECIAL_TOKEN = "a message contains a special token of the tokenizer; remove it from the text"
IGNORE = -100  # the label of a position that is not learned
MARK = "\ufdd0"  # never text's own (Unicode keeps it for such uses); one that is in a content is doubled


class Sample(NamedTuple):
    """A conversation about the frames [start, stop) of one video, counted at the data set's frame rate."""

    conversation: list[dict]
    video: str
    start: int
    stop: int


class Encoded(NamedTuple):
    input_ids: np.ndarray  # i32[T]
    labels: np.ndarray  # i32[T], already shifted: labels[t] is the target of logits[t]; IGNORE elsewhere
    conversation: list[dict]


@dataclass(frozen=True)
class StreamFormat:
    """A tokenizer and how frames are written with it. Make one with `stream_format`.

    A live session feeds the same text in pieces. Tokens may merge across pieces ("]" + "\\n"), but never across a
    special token, so text between two of them (frame, eos) must be gathered and tokenized in one go:

        opening() + open_stream | frame | interval + frame | close_stream + user_text(q) + assistant_prefix | reply, eos
        after_reply + open_stream | ...

    learned_from: characters of a whole assistant turn before the first one that is learned.
    """

    tokenizer: Any  # HF fast tokenizer that has the frame token as its last token
    tokens_per_frame: int
    interval: str = ","  # "": eos stands for "stay silent"
    frame_token: str = "<v>"

    form = "plain"
    open_stream = "\n["
    close_stream = "]"
    assistant_prefix = "\nAssistant:"
    after_reply = ""
    learned_from = len("\n")

    @cached_property
    def frame_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.frame_token)

    @cached_property
    def interval_ids(self) -> list[int]:
        """What is fed between two frames of a stream: one token, none where there is no interval."""
        return self.tokenize(self.interval)

    @cached_property
    def interval_id(self) -> int:
        """The token that means "stay silent"."""
        return self.interval_ids[0] if self.interval else self.eos_id

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    def opening(self, system: str = DEFAULT_SYSTEM_PROMPT) -> str:
        """The text before the first message."""
        return f"{self.tokenizer.bos_token or ''}{self.plain(system)}\n"

    def frames(self, count: int) -> str:
        """The text of `count` frames of one stream."""
        return self.interval.join([self.frame_token * self.tokens_per_frame] * count)

    def user_text(self, query: str) -> str:
        return f"\nUser: {self.plain(query)}"

    def reply_text(self, content: str) -> str:
        """A whole assistant turn, its eos included."""
        return f"{self.assistant_prefix} {self.plain(content)}{self.tokenizer.eos_token}"

    def plain(self, content: str) -> str:
        """The content as a part of the dialogue's text, with a `MARK` in whatever would be read as a special token."""
        return self._starts.sub(rf"\g<first>{MARK}", content.replace(MARK, MARK + MARK))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a piece of the dialogue that starts at a special token or right after one; nothing is added."""
        return self.tokenize_with_ends(text)[0]

    def tokenize_with_ends(self, text: str) -> tuple[list[int], np.ndarray]:
        """Token ids of a piece, and where in `unmarked(text)` each token ends (i64[T], in characters)."""
        ids, ends, before = [], [], 0
        for part in self._parts(text):
            some, stops = (self._as_text if MARK in part else self._as_dialogue)(part)
            ids += some
            ends += [before + stop for stop in stops]
            before += len(unmarked(part))
        return ids, np.array(ends, np.int64)

    def _parts(self, text: str) -> list[str]:
        """Cuts a piece into texts between two special tokens that have a mark in them, and what is between those."""
        if MARK not in text:
            return [text]
        parts = [""]
        for run in self._special.split(text):  # text, special token, text, ...
            if MARK in run:
                parts += [run, ""]
            else:
                parts[-1] += run
        return [part for part in parts if part]

    def _as_dialogue(self, text: str) -> tuple[list[int], list[int]]:
        """(ids, ends) of a part in which what spells a special token is one."""
        # Some tokenizers treat the very start of a text specially (a blank in front); a frame token put there and
        # dropped again makes every piece read as in mid-dialogue.
        out = self.tokenizer(
            self.frame_token + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return out["input_ids"][1:], [end - len(self.frame_token) for _, end in out["offset_mapping"][1:]]

    def _as_text(self, marked: str) -> tuple[list[int], list[int]]:
        """(ids, ends) of a part in which nothing is a special token."""
        tokenizer, begin = self._without_special_tokens
        ids, ends = [], []
        for parts in [marked], _CUT.split(marked):
            ids, ends, before = [], [], 0
            for part in map(unmarked, parts):
                out = tokenizer.encode(begin + part, add_special_tokens=False)
                ids += out.ids[1:]
                ends += [before + end - len(begin) for _, end in out.offsets[1:]]
                before += len(part)
            # Vocabularies of SentencePiece hold special tokens as words: then they are cut behind their first letter.
            if self._special_ids.isdisjoint(ids):
                break
        return ids, ends

    @cached_property
    def _without_special_tokens(self) -> tuple[Any, str]:
        """The tokenizer with `split_special_tokens` on (in the one that threads share it would come and go), and a
        token put in front, as `_as_dialogue` does, that no text can hold."""
        from tokenizers import AddedToken, Tokenizer

        tokenizer, begin = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str()), uuid.uuid4().hex
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        tokenizer.add_tokens([AddedToken(begin, normalized=False)])
        return tokenizer, begin

    @cached_property
    def _special_ids(self) -> set[int]:
        return {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def _special(self) -> re.Pattern:
        special = [self.tokenizer.added_tokens_decoder[id].content for id in self._special_ids]
        return re.compile(f"({'|'.join(re.escape(token) for token in sorted(special, key=len, reverse=True))})")

    @cached_property
    def _starts(self) -> re.Pattern:
        """The first character of a special token."""
        return re.compile(f"(?={self._special.pattern})(?P<first>.)", re.DOTALL)


class Turns(NamedTuple):
    """What a chat template writes around the contents of a dialogue."""

    opening: str  # before the system's text
    system_end: str  # between it and a user's
    user_end: str  # between that and the assistant's
    after_reply: str  # behind the assistant's eos, before a user's


class ChatFormat(StreamFormat):
    """The form "chat": turns as the tokenizer's own chat template writes them.

    UserError, at the first use, for a tokenizer without a template, and for templates without turns of the system or
    that do not end a reply with eos.
    """

    form = "chat"
    open_stream = ""
    close_stream = "\n"

    @cached_property
    def turns(self) -> Turns:
        """The template's texts between contents, from a dialogue of marks."""
        marks = [f"@{i}@" for i in range(4)]
        roles = ("system", "user", "assistant", "user")
        dialogue = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        name = _name(self.tokenizer)
        if not self.tokenizer.chat_template:
            raise UserError(f"{name}: the tokenizer has no chat template: use the form 'plain'")
        try:  # a date, where one is written, is always the same: training and streaming are
            text = self.tokenizer.apply_chat_template(dialogue, tokenize=False, date_string="26 Jul 2024")
        except Exception as error:  # templates raise what they like
            raise UserError(f"{name}: its chat template has no such turns ({error}): use the form 'plain'") from None
        parts = re.split("|".join(marks), text)
        eos = self.tokenizer.eos_token
        if len(parts) != 5 or [text.count(mark) for mark in marks] != [1] * 4 or not parts[3].startswith(eos):
            raise UserError(f"{name}: its chat template has no system turn, or no {eos} behind a reply: use 'plain'")
        return Turns(parts[0], parts[1], parts[2], parts[3].removeprefix(eos))

    @property
    def assistant_prefix(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.turns.user_end

    @property
    def after_reply(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.turns.after_reply

    @property
    def learned_from(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.assistant_prefix)

    def opening(self, system: str = DEFAULT_SYSTEM_PROMPT) -> str:
        return f"{self.turns.opening}{self.plain(system)}{self.turns.system_end}"

    def user_text(self, query: str) -> str:
        return self.plain(query)

    def reply_text(self, content: str) -> str:
        return f"{self.assistant_prefix}{self.plain(content)}{self.tokenizer.eos_token}{self.after_reply}"


FORMS = {"plain": StreamFormat, "chat": ChatFormat}


def stream_format(
    tokenizer_or_path: Any, tokens_per_frame: int, interval: str = ",", frame_token: str = "<v>", form: str = "plain"
) -> StreamFormat:
    """The format of a tokenizer (an HF fast tokenizer, or a folder or name to load one from); form: a name of `FORMS`.

    Adds the frame token to the tokenizer (in place) where it has none. UserError where the tokenizer is not fast, has
    no eos, writes the interval with several tokens, or has the frame token anywhere but last.
    """
    tokenizer = _load(tokenizer_or_path) if isinstance(tokenizer_or_path, str | Path) else tokenizer_or_path
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{_name(tokenizer)}: a fast tokenizer is needed (a folder with tokenizer.json)")
    if tokenizer.eos_token is None:
        raise UserError(f"{_name(tokenizer)}: the tokenizer has no eos token; set eos_token in tokenizer_config.json")
    if tokens_per_frame < 1:
        raise UserError(f"tokens_per_frame is {tokens_per_frame}; a frame needs at least one token")
    if frame_token not in tokenizer.get_vocab():
        from transformers import AddedToken

        tokenizer.add_tokens([AddedToken(frame_token, special=True, normalized=False)], special_tokens=True)
    if form not in FORMS:
        raise UserError(f"unknown form '{form}' of conversations: use one of {', '.join(FORMS)}")
    fmt = FORMS[form](tokenizer, tokens_per_frame, interval, frame_token)
    # Its embedding is never looked up and the table is not resized, so no token with a row may come after it.
    if fmt.frame_token_id != len(tokenizer) - 1:
        raise UserError(
            f"{_name(tokenizer)}: the frame token {frame_token!r} has id {fmt.frame_token_id}, not the last one "
            f"({len(tokenizer) - 1}); add other tokens before it, or choose another frame token"
        )
    if not tokenizer.added_tokens_decoder[fmt.frame_token_id].special:
        raise UserError(f"{_name(tokenizer)}: the frame token {frame_token!r} must be a special token of the tokenizer")
    if interval and len(fmt.interval_ids) != 1:
        raise UserError(f"{_name(tokenizer)}: the interval {interval!r} must be one token, not {len(fmt.interval_ids)}")
    return fmt


def unmarked(text: str) -> str:
    """A piece of a dialogue as it reads, without the marks of `StreamFormat.plain`."""
    return re.sub(f"{MARK}({MARK}?)", r"\1", text)


_CUT = re.compile(f"(?<!{MARK}){MARK}(?!{MARK})")  # a mark that is no text of the content's own


def render(conversation: list[dict], fmt: StreamFormat) -> str:
    """The dialogue's text, to read (`encode` and `prompt_ids` make tokens of it). UserError for a malformed message."""
    return unmarked("".join(_pieces(conversation, fmt)))


def prompt_ids(conversation: list[dict], fmt: StreamFormat) -> list[int]:
    """Tokens of everything up to a reply, `Assistant:` included."""
    return fmt.tokenize("".join(_pieces(conversation, fmt)) + fmt.assistant_prefix)


def encode(conversation: list[dict], fmt: StreamFormat) -> Encoded:
    """Tokens and labels of a dialogue: input_ids i32[T], labels i32[T].

    Learned are: after each learned frame, whether to speak (the last frame token predicts the interval, or for the
    stream's final frame the token that closes the stream); and each learned reply from `Assistant` to its eos.
    UserError for a malformed message.
    """
    pieces = _pieces(conversation, fmt)
    ids, ends = fmt.tokenize_with_ends("".join(pieces))
    input_ids = np.array(ids, np.int32)
    labels = np.full(len(ids), IGNORE, np.int32)
    messages = _messages(conversation)
    frame_stop = np.flatnonzero(input_ids == fmt.frame_token_id)[fmt.tokens_per_frame - 1 :: fmt.tokens_per_frame]
    reply_stop = _reply_ends(input_ids, pieces, messages, fmt)
    if len(frame_stop) != num_frames(conversation):
        raise UserError(SPECIAL_TOKEN)

    frame = reply = 0
    char = len(unmarked(pieces[0]))
    for message, piece in zip(messages, pieces[1:], strict=True):
        if message["role"] == "stream":
            for i in range(_learned(message)):
                last = i == message["num_frames"] - 1
                at = frame_stop[frame + i]
                labels[at] = input_ids[at + 1] if last else fmt.interval_id
            frame += message["num_frames"]
        elif message["role"] == "assistant":
            if message.get("learn", False):
                # in the plain form the token that holds the A of "\nAssistant: ...", whatever it was merged with
                first = int(np.searchsorted(ends, char + fmt.learned_from, side="right"))
                stop = reply_stop[reply] + 1
                labels[first - 1 : stop - 1] = input_ids[first:stop]
            reply += 1
        char += len(unmarked(piece))
    return Encoded(input_ids, labels, conversation)


def _reply_ends(input_ids: np.ndarray, pieces: list[str], messages: list[dict], fmt: StreamFormat) -> np.ndarray:
    """Where the eos of each reply lies, i64[R]; in chat forms eos may end the turns of users and of the system, too."""
    at, own = np.flatnonzero(input_ids == fmt.eos_id), fmt.assistant_prefix.count(fmt.tokenizer.eos_token)
    counts = [piece.count(fmt.tokenizer.eos_token) for piece in pieces]
    if len(at) != sum(counts):
        raise UserError(SPECIAL_TOKEN)
    before = np.cumsum(counts)[:-1]
    is_reply = np.array([message["role"] == "assistant" for message in messages], bool)
    return at[before[is_reply] + own]


def reply_ends(encoded: Encoded, fmt: StreamFormat) -> np.ndarray:
    """Where the eos of each of a dialogue's replies lies: i64[R]."""
    messages = _messages(encoded.conversation)
    return _reply_ends(encoded.input_ids, _pieces(encoded.conversation, fmt), messages, fmt)


def label_weights(encoded: Encoded, fmt: StreamFormat, stream_weight: float) -> np.ndarray:
    """f32[T]: `stream_weight` where a frame token has a label, 1 where another token has one, 0 elsewhere."""
    weights = np.where(encoded.input_ids == fmt.frame_token_id, stream_weight, 1.0)
    return np.where(encoded.labels != IGNORE, weights, 0.0).astype(np.float32)


def num_frames(conversation: list[dict]) -> int:
    """Frames that a conversation shows."""
    return sum(message["num_frames"] for message in conversation if message["role"] == "stream")


def _pieces(conversation: list[dict], fmt: StreamFormat) -> list[str]:
    """The opening, then one text for each message of `_messages`."""
    for index, message in enumerate(conversation):
        _check(message, index)
    given = conversation and conversation[0]["role"] == "system"
    pieces = [fmt.opening(conversation[0]["content"] if given else DEFAULT_SYSTEM_PROMPT)]
    before = ""
    for message in _messages(conversation):
        if message["role"] == "stream":
            count = message["num_frames"]
            pieces.append(f"{fmt.open_stream}{fmt.frames(count)}{fmt.close_stream}" if count else "")
        elif message["role"] == "user":
            again = "\n" if fmt.form == "chat" and before == "user" else ""  # in one turn: a line each
            pieces.append(again + fmt.user_text(message["content"]))
        else:
            pieces.append(fmt.reply_text(message["content"]))
        before = message["role"]
    return pieces


def _messages(conversation: list[dict]) -> list[dict]:
    """The conversation without its system message."""
    return [message for message in conversation if message["role"] != "system"]


def _learned(message: dict) -> int:
    """How many of a stream's frames are learned: the first ones."""
    learn = message.get("learn", False)
    return message["num_frames"] if learn is True else min(int(learn), message["num_frames"])


def _check(message: dict, index: int) -> None:
    where = f"message {index} of the conversation"
    role = message.get("role")
    if role == "stream":
        for key in ("num_frames", "learn"):
            value = message.get(key, False if key == "learn" else None)
            if not isinstance(value, int | np.integer) or value < 0:
                raise UserError(f"{where}: {key} of a stream must be a number of frames, not {value!r}")
    elif role in ("system", "user", "assistant"):
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: a {role} message needs its text under the key 'content'")
        if role == "system" and index > 0:
            raise UserError(f"{where}: the system message must come first")
    else:
        raise UserError(f"{where}: role must be system, stream, user or assistant, not {role!r}")


def _load(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer could be loaded; give a folder that has tokenizer.json") from error


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
