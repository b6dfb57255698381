"""Questions answered many at a time: what one by one, a stream, and the whole sequence at once say."""

import numpy as np
import pytest
from tiny_models import make_params

from vmod_jax.data.conversation import stream_format
from vmod_jax.data.tokenizer import train_tokenizer
from vmod_jax.errors import UserError
from vmod_jax.lm import LanguageModel
from vmod_jax.models.depth import make_policy
from vmod_jax.models.llama import LlamaConfig
from vmod_jax.models.video_lm import VideoLMConfig
from vmod_jax.streaming.questions import Answerer, Question

TEXTS = ["What is it?", "Where?", "Is there a red thing in the picture, or is there none at all?", "How many?"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Letters are tokens, most words are several: replies and options have some length."""
    return train_tokenizer(["A", "B", "yes no"], tmp_path_factory.mktemp("tokenizer"), vocab_size=280)


def make_lm(tokenizer):
    """Two layers, of which the second is routed."""
    fmt = stream_format(tokenizer, 7)
    llama = LlamaConfig(fmt.frame_token_id, 32, 48, 2, 4, 2, 8, max_position_embeddings=2048)
    policy = make_policy("interleaved", 2, 0.3)
    config = VideoLMConfig(llama, policy, fmt.frame_token_id, 12, grid=(2, 3), gate="tanh")
    return LanguageModel(config, make_params(config), tokenizer)


@pytest.fixture(scope="module")
def lm(tokenizer):
    return make_lm(tokenizer)


@pytest.fixture(scope="module")
def answerer(lm):
    return Answerer(lm.merged.config, lm.merged.params, lm.fmt, rows=4, limit=6)


def draw(lm, counts, seed=0):
    rng = np.random.default_rng(seed)
    c = lm.config
    return [rng.normal(size=(n, c.tokens_per_frame, c.vision_hidden_size)).astype(np.float32) for n in counts]


def logits_of(lm, ids, frames, room=256, most=4):
    """Of one row, in one shape for all: f32[T, V]."""
    n, count = lm.config.tokens_per_frame, 0 if frames is None else len(frames)
    padded = np.zeros((1, room + most * n), np.int32)
    padded[0, : len(ids)] = ids
    shown = np.zeros((1, most, n, lm.config.vision_hidden_size), np.float32)
    if count:
        shown[0, :count] = frames
    out = lm._forward({"params": lm.params}, padded, shown, np.array([len(ids)], np.int32))
    return np.asarray(out.logits[0, : len(ids)], np.float64)


def prompt_of(lm, question):
    fmt, frames = lm.fmt, question.frames
    shown = "" if frames is None else fmt.open_stream + fmt.frames(len(frames)) + fmt.close_stream
    begin = f" {question.begin}" if question.begin else ""
    return fmt.opening() + shown + fmt.user_text(question.text) + fmt.assistant_prefix + begin


def by_hand(lm, question, limit=6):
    """Greedy, the whole sequence anew for every token."""
    fmt = lm.fmt
    ids = fmt.tokenize(prompt_of(lm, question))
    start = len(ids)
    while len(ids) < start + limit:
        ids = [*ids, int(logits_of(lm, ids, question.frames)[-1].argmax())]
        if ids[-1] == fmt.eos_id:
            break
    return fmt.tokenizer.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def options_by_hand(lm, question):
    fmt, prompt, scores = lm.fmt, prompt_of(lm, question), []
    for option in question.options:
        ids = fmt.tokenize(f"{prompt} {option}{fmt.tokenizer.eos_token}")
        logits = logits_of(lm, ids, question.frames)
        top = logits.max(-1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        scores.append(sum(log_p[i - 1, ids[i]] for i in range(len(fmt.tokenize(prompt)), len(ids))))
    return scores


def test_together_and_by_hand(lm, answerer):
    """Groups of different lengths, with frames and without, one of several questions, in one batch."""
    one, two = draw(lm, [3, 4])
    questions = [
        Question(TEXTS[0], one, "one"),
        Question(TEXTS[1], two, "two"),
        Question(TEXTS[2], two, "two"),
        Question(TEXTS[3]),
        Question(TEXTS[3], one, "one", begin="yes"),
    ]
    together = [answer.text for answer in answerer.by_text(questions)]
    assert together == [by_hand(lm, question) for question in questions]
    assert len(set(together)) > 2  # the model does look at what it is given
    assert answerer.by_text(questions[3:4])[0].text == together[3]


def test_a_stream_says_the_same(lm, answerer):
    (frames,) = draw(lm, [4], seed=3)
    session = lm.stream(threshold=0.0, max_reply=6)
    for frame in frames[:-1]:
        session._show(frame[None])
        session.frames += 1
    session._show(frames[-1:])
    session.frames += 1
    said = session.ask(TEXTS[0], time=(len(frames) - 1) / lm.config.fps - 0.1)
    assert said == answerer.by_text([Question(TEXTS[0], frames)])[0].text


def test_likelihood_is_that_of_the_whole_reply(lm, answerer):
    one, two = draw(lm, [4, 3], seed=1)
    questions = [
        Question(TEXTS[0], one, "1", ("A", "B")),
        Question(TEXTS[1], one, "1", tuple("ABCDE")),
        Question(TEXTS[2], two, "2", ("C", "yes no", "B")),
    ]
    answers = answerer.by_likelihood(questions)
    for question, answer in zip(questions, answers, strict=True):
        np.testing.assert_allclose(answer.scores, options_by_hand(lm, question), atol=1e-4)
        assert len(answer.scores) == len(question.options)
        assert answer.text == question.options[int(np.argmax(answer.scores))]
    with pytest.raises(UserError, match="a question without options"):
        answerer.by_likelihood([Question("?", one)])


def test_frames_of_a_group_are_read_once_and_few_shapes_are_compiled(lm):
    answerer = Answerer(lm.merged.config, lm.merged.params, lm.fmt, rows=4, limit=6)
    videos, read = draw(lm, [3, 4, 3, 4, 2]), []

    def frames_of(i):
        def frames():
            read.append(i)
            return videos[i]

        return frames

    questions = [Question(text, frames_of(i), i) for i in range(4) for text in TEXTS]
    questions = questions[::2] + questions[1::2]  # not one after another either
    answerer.by_text(questions)
    assert sorted(read) == [0, 1, 2, 3]
    assert answerer.answers.encoded == 14
    before = dict(answerer.answers.compiles)
    assert before == {"read": 2, "generate": 1}  # the opening alone, as text of more than a piece, and frames
    answerer.by_text([Question(text, draw(lm, [4], 9)[0], "x") for text in TEXTS])
    assert answerer.answers.compiles == before
    assert answerer.answers.encoded == 18


def test_long_videos_are_read_in_pieces(lm, answerer, monkeypatch):
    (frames,) = draw(lm, [3], seed=5)
    monkeypatch.setattr("vmod_jax.streaming.answers.PIECE", 2)
    before = answerer.answers.encoded
    question = Question(TEXTS[0], frames)
    assert answerer.by_text([question])[0].text == by_hand(lm, question)
    assert answerer.answers.encoded == before + 3


def test_what_does_not_fit_is_one_line(lm, answerer):
    (frames,) = draw(lm, [300])
    with pytest.raises(UserError, match=r"300 frames of 7 tokens.*2048: show fewer") as error:
        answerer.by_text([Question("?", frames)])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"shape \[3, 12\], but the model takes \[7, 12\]"):
        answerer.by_text([Question("?", frames[:1, :3])])
    with pytest.raises(UserError, match="must be at least 1"):
        Answerer(lm.config, lm.params, lm.fmt, rows=0)


def test_special_tokens_in_questions_and_options_are_text(lm, answerer, monkeypatch):
    """What spells a frame, or the end of a turn, is neither."""
    spelt, (frames,) = "reads <v> <|eot_id|>", draw(lm, [2])
    question = Question(f"Who {spelt}?", frames, options=(spelt, "no"), begin=spelt)
    prompt = answerer._prompt(question, frames)
    assert prompt.ids.count(lm.fmt.frame_token_id) == 2 * lm.config.tokens_per_frame
    assert lm.fmt.eos_id not in prompt.ids
    assert lm.fmt.tokenizer.decode(prompt.ids).count(spelt) == 2
    fed, score = [], answerer.answers.score
    monkeypatch.setattr(
        answerer.answers, "score", lambda prompts, tails: (fed.extend(tails[0]), score(prompts, tails))[1]
    )
    answerer.by_likelihood([question])
    assert [ids.count(lm.fmt.eos_id) for ids in fed] == [1, 1]  # an option's own end
    assert lm.fmt.frame_token_id not in fed[0]
