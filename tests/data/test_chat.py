"""The form "chat": turns as a chat template writes them, the same tokens in training and in a stream."""

import dataclasses

import numpy as np
import pytest

from vmod_jax.data.conversation import IGNORE, encode, render, stream_format
from vmod_jax.data.tokenizer import train_tokenizer
from vmod_jax.errors import UserError
from vmod_jax.evaluation.stream_metrics import TokenStats, score
from vmod_jax.streaming import session as sessions

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nHelp."
    "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|head|>' + message['role'] + '<|end|>\n\n' }}"
    "{{ message['content'] | trim + eos_token }}{% endfor %}"
)
TEXTS = ["a red ball comes in", "What do you see?", "system user assistant", "It leaves.\n", "Watch,and say.", "\n\n"]
TALK = [
    {"role": "system", "content": "Watch,and say."},
    {"role": "user", "content": "What do you see?"},
    {"role": "stream", "num_frames": 3, "learn": True},
    {"role": "assistant", "content": "a red ball comes in", "learn": True},
    {"role": "stream", "num_frames": 2, "learn": True},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "It leaves.", "learn": True},
    {"role": "stream", "num_frames": 2, "learn": 1},
]


@pytest.fixture(scope="module", params=["chatml", "llama3"])
def fmt(request, tmp_path_factory):
    tokenizer = train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer"), 400)
    if request.param == "chatml":  # one token ends every turn, the assistant's too
        tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
        tokenizer.chat_template = CHATML
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|head|>", "<|end|>"]})
        tokenizer.chat_template = LLAMA3
    return stream_format(tokenizer, 2, form="chat")


def test_text_and_labels(fmt):
    text = render(TALK, fmt)
    if "im_start" in text:
        assert text == (
            "<|im_start|>system\nWatch,and say.<|im_end|>\n<|im_start|>user\nWhat do you see?<v><v>,<v><v>,<v><v>\n"
            "<|im_end|>\n<|im_start|>assistant\na red ball comes in<|im_end|>\n<|im_start|>user\n<v><v>,<v><v>\nAnd "
            "now?<|im_end|>\n<|im_start|>assistant\nIt leaves.<|im_end|>\n<|im_start|>user\n<v><v>,<v><v>\n"
        )
    encoded = encode(TALK, fmt)
    learned = encoded.labels[encoded.labels != IGNORE]
    close = encoded.input_ids[np.flatnonzero(encoded.input_ids == fmt.frame_token_id)[5] + 1]
    said = [[*fmt.tokenize(text), fmt.eos_id] for text in ("a red ball comes in", "It leaves.")]
    comma = fmt.interval_id
    assert learned.tolist() == [comma, comma, close, *said[0], comma, close, *said[1], comma]
    at = np.flatnonzero(encoded.labels != IGNORE)
    assert (encoded.input_ids[at[learned == comma]] == fmt.frame_token_id).all()
    perfect = TokenStats(
        encoded.labels.copy(), np.zeros(len(encoded.labels)), np.where(encoded.labels == comma, 1.0, 0.0)
    )
    assert score(encoded, perfect, fmt).fluency_strict == 1


class Recorder:
    """An engine without a model: it keeps what it is fed, and speaks after the frames that it is told to."""

    forgets_anything = True

    def __init__(self, programs, params, max_frames, announce, chunk):
        self.fmt, self.speak_after, self.replies, self.max_frames = *params, max_frames
        self.ids, self.shown, self.kept = [], 0, {}

    def send_frames(self, ids, frames, interval, width=1):
        n = self.fmt.tokens_per_frame
        self.ids += [*ids, *([self.fmt.frame_token_id] * n)]
        for _ in frames[1:]:
            self.ids += [*interval, *([self.fmt.frame_token_id] * n)]
        logits = np.full((len(frames), len(self.fmt.tokenizer)), -9.0)
        for row in logits:
            row[0 if self.shown in self.speak_after else self.fmt.interval_id] = 9.0
            self.shown += 1
        return logits

    def forget_frames(self, count, interval):
        tokens = count * (self.fmt.tokens_per_frame + len(interval))
        del self.ids[len(self.ids) - tokens :]
        self.shown -= count

    def generate(self, ids, eos, limit):
        reply = self.fmt.tokenize(self.replies.pop(0))
        self.ids += [*ids, *reply]
        return reply, True


@pytest.mark.one_function
@pytest.mark.parametrize("seed", range(8))
def test_a_stream_feeds_the_tokens_of_training(fmt, seed, monkeypatch):
    monkeypatch.setattr(sessions, "Engine", Recorder)
    rng = np.random.default_rng(seed)
    system, conversation = str(rng.choice(TEXTS)), []
    conversation.append({"role": "system", "content": system})
    speak_after, replies, questions, frames = set(), [], [], 0
    for _ in range(6):
        count = int(rng.integers(1, 4))
        frames += count
        conversation.append({"role": "stream", "num_frames": count, "learn": True})
        if rng.random() < 0.5:
            questions.append((frames - 1, str(rng.choice(TEXTS))))
            conversation.append({"role": "user", "content": questions[-1][1]})
        else:
            speak_after.add(frames - 1)
        replies.append(str(rng.choice([text.strip() or "yes" for text in TEXTS])))
        conversation.append({"role": "assistant", "content": replies[-1], "learn": True})
    programs = type("P", (), {"config": type("C", (), {"fps": 2.0, "tokens_per_frame": fmt.tokens_per_frame})})
    live = sessions.Session(programs, (fmt, speak_after, list(replies)), fmt, system=system, width=4)
    for place, question in questions:
        live.ask(question, place / 2.0)
    live.push_many([np.zeros(1)] * frames)
    assert [turn.text for turn in live.turns if turn.role == "assistant"] == replies
    whole = encode(conversation, fmt).input_ids.tolist()
    fed = live.engine.ids + live._pending_ids + fmt.tokenize(live._pending_text)
    assert fed == whole


def test_two_questions_in_a_row_are_two_lines(fmt):
    user = {"role": "user", "content": "a"}
    assert "a\na" in render([user, user], fmt)


def test_templates_that_do_not_fit(fmt):
    plain = stream_format(fmt.tokenizer, 2)
    assert plain.form == "plain"
    with pytest.raises(UserError, match="unknown form 'alpaca' of conversations: use one of plain, chat"):
        stream_format(fmt.tokenizer, 2, form="alpaca")
    import copy

    for template, message in (
        (None, "has no chat template"),
        ("{{ raise_exception('no system') }}", "has no such turns"),
        (
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + eos_token }}{% endfor %}",
            "no system turn",
        ),
        ("{% for m in messages %}{{ m['content'] + '###' }}{% endfor %}", "behind a reply"),
    ):
        tokenizer = copy.deepcopy(fmt.tokenizer)
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=message):
            stream_format(tokenizer, 2, form="chat").opening()


def test_a_model_keeps_its_form():
    from tiny_models import make_config

    from vmod_jax.models.video_lm import VideoLMConfig

    config = dataclasses.replace(make_config(), form="chat")
    assert VideoLMConfig.from_json(config.to_json()).form == "chat"
    assert VideoLMConfig.from_json(config.to_json().replace('"form": "chat"', '"fps": 2.0')).form == "plain"
