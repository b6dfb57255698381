"""A live session: when it speaks, and that what it feeds is the conversation that results, token by token.

Two models stand behind it here: a scripted one, which speaks after marked frames and says given replies, so that any
dialogue can be made to happen; and a real one with random weights.
"""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmod_jax.data.conversation import encode, stream_format
from vmod_jax.data.tokenizer import train_tokenizer
from vmod_jax.errors import UserError
from vmod_jax.lm import LanguageModel
from vmod_jax.models.depth import make_policy
from vmod_jax.models.llama import LlamaConfig, rms_norm
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, init_params
from vmod_jax.streaming.engine import Engine, Mark, Programs, larger
from vmod_jax.streaming.session import Session, Turn, choices, wants_to_speak

D_V, FPS = 4, 2.0
REPLIES = ("A red ball rolls.", "It stops.", "You are cooking [, I think]", "Nothing.\nUser: me?", "x")
QUESTIONS = ("What is it?", "Where am I]", "\n\nAnd now?", "")


def characters():
    """A tokenizer of single characters: "]\\n" is two tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def formats(tmp_path_factory, request):
    """name -> its StreamFormat, made once: characters, trained on the spot, the goldens', Llama-3's."""
    made = {}

    def get(name, tokens=2, interval=","):
        if (name, tokens, interval) not in made:
            match name:
                case "characters":
                    source = characters()
                case "trained":
                    source = tmp_path_factory.mktemp("tokenizer")
                    train_tokenizer(REPLIES, source)
                case "live":
                    source = request.getfixturevalue("goldens") / "live" / "tokenizer"
                case "llama3":
                    source = request.getfixturevalue("clips") / "llama3_tokenizer"
            made[name, tokens, interval] = stream_format(source, tokens, interval)
        return made[name, tokens, interval]

    return get


def make_config(fmt, **changes):
    llama = LlamaConfig(fmt.frame_token_id, 8, 8, 2, 2, 1, 4)
    config = VideoLMConfig(
        llama, make_policy("interleaved", 2, 0.5), fmt.frame_token_id, D_V,
        cls=True, grid=(1, fmt.tokens_per_frame - 1), interval=fmt.interval, fps=FPS, gate="tanh",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


# --- the scripted model -----------------------------------------------------------------------------------------------


class Script:
    """What a session needs of `Programs`: speaks after frames that are marked, and says the replies in order."""

    def __init__(self, config, fmt, replies):
        self.config, self.fmt, self.compiles = config, fmt, {}
        self.replies = iter(replies)
        self.grow = lambda cache, slots: cache
        self.roll_back = lambda cache, position, frames: cache

    def extend(self, params, cache, input_ids, frames, length, read):
        logits = np.zeros((len(read), self.fmt.frame_token_id), np.float32)
        logits[:, self.fmt.interval_id] = 50
        if frames is not None:
            logits[frames[0, :, 0, 0] > 0, 5] = 99
        return logits, {}, cache

    def decode(self, params, cache, logits, eos, limit):
        prefix = self.fmt.tokenize(self.fmt.assistant_prefix)
        reply = self.fmt.tokenize(f"{self.fmt.assistant_prefix} {next(self.replies)}")
        assert reply[: len(prefix)] == prefix
        reply = reply[len(prefix) :][:limit]
        return np.array(reply + [0] * (limit - len(reply))), len(reply), len(reply) < limit, cache


def scripted(fmt, replies=REPLIES * 9, **options):
    return Session(Script(make_config(fmt), fmt, replies), None, fmt, **{"max_reply": 200} | options)


def frames_of(speaks):
    """f32[F, n, d_v] features for a list of 0 and 1: whether the scripted model speaks after the frame."""
    return np.broadcast_to(np.array(speaks, np.float32)[:, None, None], (len(speaks), 2, D_V))


def expected(speaks, questions, replies=REPLIES * 9):
    """The rule, written as one plain loop: the turns and the conversation that should come of a stream."""
    waiting, replies, turns = sorted(questions, key=lambda q: q[0]), iter(replies), []
    conversation = [{"role": "stream", "num_frames": 0}]

    def say(time, question=None):
        if question is not None:
            turns.append(Turn(time, "user", question))
            conversation.append({"role": "user", "content": question})
        turns.append(Turn(time, "assistant", reply := next(replies)))
        conversation.append({"role": "assistant", "content": reply})
        conversation.append({"role": "stream", "num_frames": 0})

    for frame, wants in enumerate(speaks):
        now = frame / FPS
        while waiting and waiting[0][0] < now:
            say(*waiting.pop(0))
        conversation[-1]["num_frames"] += 1
        asked = [waiting.pop(0) for question in list(waiting) if question[0] <= now]
        for question in asked:
            say(*question)
        if wants and not asked:
            say(now)
    for question in waiting:
        say(*question)
    return turns, conversation


def assert_fed(session, conversation):
    """The tokens fed are those of the conversation; what is not yet in are its last eos or "]"."""
    encoded, fed, fmt = encode(conversation, session.fmt).input_ids.tolist(), session.engine.input_ids, session.fmt
    tail = fmt.tokenize(fmt.close_stream) if conversation[-1]["num_frames"] else [fmt.eos_id]
    assert fed + tail == encoded


events = st.tuples(
    st.lists(st.sampled_from([0, 0, 1]), min_size=1, max_size=12),
    # times at, before, between and after frames
    st.lists(st.tuples(st.integers(-1, 26).map(lambda t: t / 4), st.sampled_from(QUESTIONS)), max_size=4),
    st.integers(1, 5),
)


@pytest.mark.parametrize(
    ("name", "interval"), [("characters", ","), ("trained", ","), ("trained", ""), ("live", ","), ("llama3", ",")]
)
def test_what_is_fed_is_the_conversation(formats, name, interval):
    """Whatever happens, one by one and several frames at once."""
    fmt = formats(name, interval=interval)

    @settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
    @given(events)
    def check(drawn):
        speaks, questions, width = drawn
        turns, conversation = expected(speaks, questions)
        for push_many in (False, True):
            session = scripted(fmt, width=width)
            for time, text in questions:
                session.ask(text, time)
            if push_many:
                session.push_many(frames_of(speaks))
            else:
                for frame in frames_of(speaks):
                    session.push(frame)
            session.finish()
            assert session.turns == turns
            assert_fed(session, conversation)

    check()


def test_the_replay_by_hand(formats):
    """One dialogue in full, as text: a question at once after a reply, one in mid-stream, one at the end."""
    fmt = formats("trained")
    session = scripted(fmt, ["One.", "Two.", "Three.", "Four."], system="Watch.")
    assert session.ask("What?", 0.0) is None  # the first frame's time: after it
    assert session.push(frames_of([0])[0]) == "One."
    assert session.ask("And?", 0.3) == "Two."  # between frames: at once
    assert [session.push(frame) for frame in frames_of([0, 1, 0])] == [None, "Three.", None]
    assert session.ask("Why?") is None
    assert [turn.text for turn in session.finish()] == ["Four."]
    frame = "<v>" * 2
    assert fmt.tokenizer.decode(session.engine.input_ids) == (
        f"<|begin_of_text|>Watch.\n\n[{frame}]\nUser: What?\nAssistant: One.<|eot_id|>\nUser: And?\nAssistant: Two."
        f"<|eot_id|>\n[{frame},{frame}]\nAssistant: Three.<|eot_id|>\n[{frame}]\nUser: Why?\nAssistant: Four."
    )
    assert [(turn.time, turn.role) for turn in session.turns] == [
        (0.0, "user"), (0.0, "assistant"), (0.3, "user"), (0.3, "assistant"),
        (1.0, "assistant"), (2.0, "user"), (2.0, "assistant"),
    ]  # fmt: skip


def test_times_are_in_order_whenever_one_asks(formats):
    """A question about the past is asked now; questions that wait go first; 0.1 x 3 is a frame's time."""
    session = scripted(formats("trained"))
    session.ask("soon", 0.7)
    session.push_many(frames_of([0, 0]))
    assert session.ask("late", 0.1)  # as if at 0.5, the last frame's time
    assert session.ask("now", 0.9)
    assert [turn.text for turn in session.turns if turn.role == "user"] == ["late", "soon", "now"]
    times = [turn.time for turn in session.turns]
    assert times == sorted(times) == [0.5, 0.5, 0.7, 0.7, 0.9, 0.9]

    ten = Session(Script(make_config(session.fmt, fps=10.0), session.fmt, REPLIES), None, session.fmt, max_reply=200)
    ten.ask("on the dot", 0.1 * 3)  # 0.30000000000000004
    ten.push_many(frames_of([0, 0, 0, 1]))
    assert [turn.role for turn in ten.turns] == ["user", "assistant"]


@pytest.mark.parametrize("name", ["trained", "characters"])
def test_a_reply_that_is_cut_leaves_the_text_well_formed(formats, name):
    """The eos that it did not say is put in its place."""
    fmt = formats(name)
    session = scripted(fmt, ["It stops. It stops. It stops.", "x"], max_reply=3)
    session.push_many(frames_of([0, 1, 0]))
    said = session.turns[0].text
    assert said
    assert "It stops. It stops. It stops.".startswith(said)
    session.ask("What is it?", 1.0)
    (answer,) = session.turns[2:]
    assert answer.text == "x"
    stream = {"role": "stream", "num_frames": 2}
    assert_fed(
        session,
        [
            stream,
            {"role": "assistant", "content": said},
            {"role": "stream", "num_frames": 1},
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "x"},
            {"role": "stream", "num_frames": 0},
        ],
    )


def test_a_text_longer_than_any_chunk(formats):
    """Systems and questions of any length go in, in pieces."""
    fmt = formats("trained")
    long = " ".join(["A red ball rolls."] * 300)
    announced = []
    session = scripted(fmt, system=long, announce=announced.append)
    session.ask(long, 0.0)
    session.push(frames_of([0])[0])
    assert_fed(
        session,
        [
            {"role": "system", "content": long},
            {"role": "stream", "num_frames": 1},
            {"role": "user", "content": long},
            {"role": "assistant", "content": REPLIES[0]},
            {"role": "stream", "num_frames": 0},
        ],
    )
    assert any("text tokens" in line for line in announced)


def test_the_end_of_a_stream_is_one_line(formats):
    """Frames that still fit are shown, also in the middle of a call, and questions can still be asked."""
    for width in (1, 4):
        session = scripted(formats("trained"), width=width, max_frames=6)
        with pytest.raises(UserError, match=r"max_frames = 6 frames \(3 s\): start a new stream") as error:
            session.push_many(frames_of([0, 0, 1, 0, 0, 0, 1, 0]))
        assert "\n" not in str(error.value)
        assert session.frames == 6
        session.ask("What is it?", 2.6)
        assert_fed(session, expected([0, 0, 1, 0, 0, 0], [(2.6, "What is it?")])[1])
        with pytest.raises(UserError, match="max_frames"):
            session.push(frames_of([0])[0])
        assert_fed(session, expected([0, 0, 1, 0, 0, 0], [(2.6, "What is it?")])[1])


def test_a_stream_beyond_the_models_positions_says_so_once(formats):
    fmt = formats("trained")
    config = make_config(fmt)
    config = dataclasses.replace(config, llama=dataclasses.replace(config.llama, max_position_embeddings=60))
    announced = []
    session = Session(Script(config, fmt, REPLIES), None, fmt, announce=announced.append, max_reply=200)
    session.push_many(frames_of([0] * 30))
    (line,) = announced
    assert "outgrows the 60 positions" in line


def test_options_out_of_range(formats):
    fmt = formats("trained")
    for threshold in (-0.1, 1.01, math.nan):
        with pytest.raises(UserError, match=r"outside \[0, 1\]"):
            scripted(fmt, threshold=threshold)
    with pytest.raises(UserError, match="width 0"):
        scripted(fmt, width=0)
    with pytest.raises(UserError, match="max_reply 0"):
        scripted(fmt, max_reply=0)
    with pytest.raises(UserError, match="nan seconds"):
        scripted(fmt).ask("When?", math.nan)


def test_frames_that_do_not_fit_leave_the_stream_as_it_was(formats):
    session = scripted(formats("trained"))
    session.push(frames_of([0])[0])
    for frame, message in (
        (np.zeros((3, D_V), np.float32), r"shape \[3, 4\], but the model takes \[2, 4\]"),
        (np.zeros((48, 48, 3), np.uint8), r"shape \[48, 48, 3\], but the model takes"),
    ):
        with pytest.raises(UserError, match=message):
            session.push(frame)
    session.push(frames_of([1])[0])
    assert_fed(session, expected([0, 1], [])[1])


def test_the_rule():
    """P(interval) < threshold speaks, and so does another first choice, whatever the threshold."""
    logits = np.log(np.array([[0.7, 0.3], [0.8, 0.2], [0.4, 0.6]], np.float32))
    np.testing.assert_allclose(choices(logits, 0)[0], [0.7, 0.8, 0.4], rtol=1e-6)
    rule = lambda logits, threshold: wants_to_speak(*map(np.asarray, choices(logits, 0)), 0, threshold)  # noqa: E731
    assert rule(logits, 0.725).tolist() == [True, False, True]
    assert rule(logits, 0.0).tolist() == [False, False, True]
    assert rule(logits, 1.0).tolist() == [True, True, True]
    assert rule(logits + 1e4, 0.725).tolist() == [True, False, True]  # no overflow
    assert rule(np.zeros((1, 2), np.float32), 0.5).tolist() == [False]  # at the threshold: silent


def test_choices_on_the_device_are_those_of_exact_logits():
    logits = np.random.default_rng(0).normal(scale=9, size=(50, 1000)).astype(np.float32)
    exact = np.exp(logits.astype(np.float64))
    silent, best = choices(logits, 7)
    np.testing.assert_allclose(silent, exact[:, 7] / exact.sum(-1), rtol=2e-5)
    assert best.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("speaks", "asked", "events"),
    [
        ([0] * 6, None, "send send read send read read"),
        ([0, 1, 0, 0, 0, 0], None, "send send read send send read read"),  # what was sent too early is sent again
        ([0, 0, 0, 1], None, "send send read read"),
        ([0] * 6, 3, "send send read read send read"),  # nothing beyond the frame of a question
        ([0] * 6, 1.5, "send read send send read read"),
    ],
)
def test_a_call_is_sent_before_the_answer_before_it_is_read(formats, monkeypatch, speaks, asked, events):
    seen = []
    session = scripted(formats("trained"), width=2, max_frames=len(speaks))
    get, extend = jax.device_get, session.engine.programs.extend
    monkeypatch.setattr(jax, "device_get", lambda x: seen.append("read") or get(x))
    session.engine.programs.extend = lambda *x: (x[3] is not None and seen.append("send")) or extend(*x)
    if asked is not None:
        session.ask("Q", asked / FPS)
    session.push_many(frames_of(speaks))
    assert " ".join(seen) == events
    assert session.frames == session.engine.used.frames == len(session.silence) == len(speaks)


def test_nothing_is_sent_early_where_it_could_not_be_taken_back(formats, monkeypatch):
    session = scripted(formats("trained"), width=2)
    session.push_many(frames_of([0] * 2))
    with pytest.raises(UserError, match=r"shape \[3, 4\]"):
        session.push_many([*frames_of([0, 0]), np.zeros((3, D_V), np.float32)])
    assert session.frames == session.engine.used.frames == 4  # those before the wrong one are shown
    sent, send = [], session.engine.send_frames
    monkeypatch.setattr(type(session.engine), "forgets_anything", False)
    session.engine.send_frames = lambda *x: sent.append(session.frames) or send(*x)
    session.push_many(frames_of([0] * 6))
    assert sent == [4, 6, 8]


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(formats):
    """Random weights, one routed layer of two, and a head that makes it stay silent after about every other frame."""
    fmt = formats("characters", tokens=4)
    config = make_config(fmt)
    params = jax.jit(partial(init_params, config))(jax.random.key(1))
    frames = draw_frames(30, seed=9)
    ids = encode([{"role": "stream", "num_frames": 30}], fmt).input_ids
    apply = jax.jit(partial(VideoLM(config).apply, method="hidden"))
    hidden = apply({"params": params}, ids[None], frames[None])[0][0]
    ends = hidden[np.flatnonzero(ids == fmt.frame_token_id)[3::4]]
    ends = np.asarray(rms_norm(ends, params["llama"]["norm"]["scale"], config.llama.rms_norm_eps))
    head = params["llama"]["head"]["kernel"]
    column = np.linalg.lstsq(ends, 1.3 * (ends @ head).max(-1), rcond=None)[0]
    params["llama"]["head"]["kernel"] = head.at[:, fmt.interval_id].set(column)
    return LanguageModel(config, params, fmt.tokenizer)


@pytest.fixture(scope="module")
def seen(lm):
    """What the compiled functions are called with from here on: {name: {shapes}}."""
    calls = {"extend": set(), "decode": set()}

    def listening(name, function):
        def call(params, cache, *rest, **options):
            calls[name].add(str(jax.tree.map(np.shape, (cache, rest))))
            return function(params, cache, *rest, **options)

        return call

    for name in calls:
        setattr(lm.merged._programs, name, listening(name, getattr(lm.merged._programs, name)))
    return calls


def draw_frames(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 4, D_V)).astype(np.float32)


def logits_of(lm, ids, frames):
    return np.asarray(lm.logits(np.array([ids]), frames[None]))[0]


@pytest.fixture(scope="module")
def streamed(lm, seen):
    """70 frames one by one, the logits at each frame's last token, what was announced, compiles after each frame."""
    announced, logits = [], []
    session = lm.stream(threshold=0.0, max_frames=80, max_reply=3, announce=announced.append)
    engine, feed = session.engine, session.engine.feed_frames

    def listening(*args):
        engine.send_frames = send
        logits.append(feed(*args)[0])
        engine.send_frames = listening
        silent = np.full((1, len(logits[-1])), -1e9)
        silent[0, lm.fmt.interval_id] = 0 if len(logits) % 9 else -2e9  # speaks after every ninth frame
        return silent

    send, engine.send_frames = engine.send_frames, listening
    frames = draw_frames(70)
    session.ask("What is it?", 30.2)
    compiles = []
    for frame in frames:
        session.push(frame)
        compiles.append(dict(lm.merged._programs.compiles))
    return session, frames, np.array(logits), announced, compiles


def test_logits_of_a_stream_that_grew_are_the_whole_sequences(lm, streamed):
    session, frames, logits, announced, _ = streamed
    assert session.frames == 70 > session.engine.capacity.frames - 16  # 64, then all 80
    assert [line.split(" (")[0] for line in announced if "80 frames" in line]
    ids = session.engine.input_ids
    whole = logits_of(lm, ids, frames)
    ends = np.flatnonzero(np.array(ids) == lm.fmt.frame_token_id)[3::4]
    np.testing.assert_allclose(logits, whole[ends], atol=1e-5, rtol=0)


def test_replies_are_the_first_choices_of_the_whole_sequence(lm, streamed):
    session, frames, _, _, _ = streamed
    ids, fmt = session.engine.input_ids, lm.fmt
    choice = logits_of(lm, ids, frames).argmax(-1)
    prefix = fmt.tokenize(fmt.assistant_prefix)
    starts = [t + len(prefix) for t in range(len(ids)) if ids[t : t + len(prefix)] == prefix]
    assert len(starts) == len(session.turns) - 1 == 8  # 7 of its own, one asked for
    replies = [turn.text for turn in session.turns if turn.role == "assistant"]
    for start, reply in zip(starts, replies, strict=True):
        said = [int(choice[start - 1])]
        while len(said) < 3 and said[-1] != fmt.eos_id:
            said.append(int(choice[start - 1 + len(said)]))
        assert fmt.tokenizer.decode(said, skip_special_tokens=True).strip() == reply


def test_one_compile_for_each_chunk_and_capacity(lm, streamed, seen):
    _, _, _, announced, compiles = streamed
    assert len(announced) == 1  # more text and more frames together
    assert compiles[-1] == {"extend": 5, "decode": 2}
    assert compiles[8:30] == [compiles[8]] * 22  # nothing new while the stream stays inside its bucket
    # Another stream of the same model finds everything compiled; whatever comes, one compile for each shape.
    again = lm.stream(max_frames=80, max_reply=3)
    for frame in draw_frames(12):
        again.push(frame)
    assert lm.merged._programs.compiles == compiles[-1]
    again.ask("Q" * 40, 0.0)
    assert lm.merged._programs.compiles == {name: len(shapes) for name, shapes in seen.items()} != compiles[-1]


def test_capacity_grows_as_a_whole():
    """However much text comes for how many frames: a handful of capacities, which all streams pass through."""
    reached = {(64, 256)}
    for text, frames in ((300, 1), (10, 65), (600, 300), (5000, 100), (1300, 1200), (4100, 1200)):
        capacity = Mark(text=256, frames=64)
        while capacity.text < text or capacity.frames < frames:
            capacity = larger(capacity, 1200)
            reached.add((capacity.frames, capacity.text))
    assert sorted(reached) == [(64, 256), (128, 512), (256, 1024), (512, 2048), (1024, 4096), (1200, 8192)]


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_several_frames_at_once_say_the_same(lm, threshold):
    """The model speaks in the middle of a call: it is rolled back, and goes on as if it had never seen more."""
    frames, questions = draw_frames(16, seed=3), [(2.0, "Q"), (4.3, "?"), (9.0, "R")]
    runs, silences = [], []
    for width in (1, 5):
        session = lm.stream(threshold=threshold, max_frames=80, max_reply=3, width=width)
        for time, text in questions:
            session.ask(text, time)
        session.push_many(frames)
        session.finish()
        runs.append((session.turns, session.engine.input_ids))
        silences.append(session.silence)
    assert runs[0] == runs[1]
    np.testing.assert_allclose(*silences, atol=1e-5)
    assert len(silences[0]) == 16
    spoken = [turn for turn in runs[0][0] if turn.role == "assistant"]
    assert 6 <= len(spoken) <= 16


def test_forgetting_frames_forgets_all_of_them(lm):
    """After a roll-back the engine is where it was: the next logits are those of a stream that never went further."""
    fmt = lm.fmt
    frames, opening = draw_frames(6, seed=4), fmt.tokenize(fmt.opening("W") + fmt.open_stream)

    def feed(forget):
        engine = Engine(lm.merged._programs, lm.merged.params, max_frames=80)
        if forget:
            engine.feed_frames(opening, frames[:5], fmt.interval_ids, 5)
            engine.forget_frames(3, fmt.interval_ids)
        else:
            engine.feed_frames(opening, frames[:2], fmt.interval_ids, 5)
        logits = engine.feed_frames(fmt.interval_ids, frames[5:], fmt.interval_ids, 1)
        return engine.input_ids, engine.used, logits

    (ids, used, logits), (other_ids, other_used, other) = feed(True), feed(False)
    assert (ids, used) == (other_ids, other_used)
    np.testing.assert_allclose(logits, other, atol=1e-5, rtol=0)


def test_a_reply_never_shows_a_frame(formats):
    """A vocabulary padded beyond the tokenizer has a row for the frame token; it is never said."""
    fmt = formats("characters", tokens=4)
    config = make_config(fmt)
    llama = dataclasses.replace(config.llama, vocab_size=fmt.frame_token_id + 8, num_hidden_layers=1)
    config = dataclasses.replace(config, llama=llama, policy=make_policy("full", 1))
    params = jax.jit(partial(init_params, config))(jax.random.key(0))
    params["llama"]["head"]["kernel"] = params["llama"]["head"]["kernel"].at[:, fmt.frame_token_id].mul(100.0)
    engine = Engine(Programs(config), params, max_frames=8)
    said = [engine.generate([token], fmt.eos_id, 4)[0] for token in (3, 4, 5, 6)]
    assert all(fmt.frame_token_id not in reply for reply in said)
