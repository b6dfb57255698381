"""Batched answers are those of a plain loop over whole sequences, whoever else is in the batch."""

import jax
import numpy as np
import pytest
from tiny_models import VOCAB, make_config, make_params

from vmod_jax.models.inference import merge_lora, unstack
from vmod_jax.models.video_lm import VideoLM
from vmod_jax.streaming import answers
from vmod_jax.streaming.answers import Answers, Prompt, rung

EOS, LIMIT = 7, 6


@pytest.fixture(scope="module")
def config():
    return make_config("interleaved")


@pytest.fixture(scope="module")
def params(config):
    return make_params(config)


@pytest.fixture(scope="module")
def ask(config, params):
    """Four rows at a time, pieces of 3 frames and 5 text tokens."""
    merged, weights = merge_lora(config, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "PIECE", 3)
        patch.setattr(answers, "PIECE_TEXT", 5)
        yield Answers(merged, unstack(weights), EOS, rows=4, temperature=2.0)


@pytest.fixture(scope="module")
def plainly(config, params):
    """Greedy decoding by whole sequences, padded to one length."""
    apply = jax.jit(VideoLM(config).apply)

    def decode(prompt):
        ids, said = list(prompt.ids), []
        frames = np.zeros((1, 8, config.tokens_per_frame, config.vision_hidden_size), np.float32)
        frames[0, : len(prompt.frames)] = prompt.frames
        while len(said) < LIMIT:
            row = np.zeros((1, 120), np.int32)
            row[0, : len(ids)] = ids
            logits = apply({"params": params}, row, frames, np.array([len(ids)], np.int32)).logits
            token = int(logits[0, len(ids) - 1].argmax())
            if token == EOS:
                break
            ids.append(token)
            said.append(token)
        return said

    return decode


def prompts(config, count=5):
    """Of 0, 2, 4, ... frames, with text before and after; the last two ask about the same frames."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        ids = rng.integers(8, VOCAB, 7).tolist()
        for _ in range(2 * number):
            ids += [config.frame_token_id] * config.tokens_per_frame + rng.integers(8, VOCAB, 1).tolist()
        shape = (2 * number, config.tokens_per_frame, config.vision_hidden_size)
        found.append(Prompt(ids, rng.normal(size=shape).astype(np.float32), number))
    return [*found, found[-1]._replace(ids=[*found[-1].ids, 9, 10])]


@pytest.mark.one_function
def test_batched_answers_are_those_of_whole_sequences(config, ask, plainly):
    asked = prompts(config)
    want = [plainly(prompt) for prompt in asked]
    assert ask(asked, LIMIT) == want
    assert len({tuple(reply) for reply in want}) > 1
    compiled = dict(ask.compiles)
    assert ask(asked, LIMIT) == want
    assert ask.compiles == compiled
    assert [ask([prompt], LIMIT)[0] for prompt in asked[-2:]] == want[-2:]


def test_seeds_draw_the_same_again_and_others_differ(config, ask, plainly):
    prompt = prompts(config)[-2]
    drawn = ask([prompt._replace(seed=seed) for seed in (1, 2, 1)], LIMIT)
    assert drawn[0] == drawn[2] != drawn[1]
    assert ask([prompt], LIMIT)[0] == plainly(prompt)


def test_what_prompts_share_is_read_once(config, ask, monkeypatch):
    prefill, seen = ask._prefill, []
    monkeypatch.setattr(ask, "_prefill", lambda rows, more: seen.append(len(rows)) or prefill(rows, more))
    prompt = prompts(config)[-2]
    ask([prompt._replace(ids=[*prompt.ids, extra]) for extra in (3, 4, 5, 3, 4)], LIMIT)
    assert seen == [1]


def test_rungs():
    assert [rung(value) for value in (0, 16, 17, 25, 33, 49, 1000)] == [16, 16, 24, 32, 48, 64, 1024]


def test_a_reply_ends_at_eos(config, ask, plainly, monkeypatch):
    asked = prompts(config)
    whole = [plainly(prompt) for prompt in asked]
    begins = {reply[0] for reply in whole}
    eos = next(token for reply in whole for token in reply if token not in begins)
    monkeypatch.setattr(ask, "eos", eos)
    want = [reply[: reply.index(eos)] if eos in reply else reply for reply in whole]
    assert want != whole
    assert ask(asked, LIMIT) == want
