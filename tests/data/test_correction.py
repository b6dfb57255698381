"""Replies that went wrong: what is learned of them, that they are seeded, and that frames are neither lost nor made."""

import numpy as np
import pytest

from vmod_jax.data.conversation import num_frames
from vmod_jax.data.correction import SORRY, corrected

STREAM = lambda frames, learn=True: {"role": "stream", "num_frames": frames, "learn": learn}  # noqa: E731
REPLY = lambda text, learn=True: {"role": "assistant", "content": text, "learn": learn}  # noqa: E731
USER = {"role": "user", "content": "Go."}
CONVERSATION = [STREAM(1, False), USER, REPLY("a"), STREAM(3), REPLY("b"), STREAM(4), REPLY("c")]


def drawn(count=300, conversation=CONVERSATION):
    return [corrected(conversation, np.random.default_rng(seed)) for seed in range(count)]


def test_every_way_in_which_a_reply_goes_wrong():
    tail = [STREAM(4), REPLY("c")]
    head = [STREAM(1, False), USER, REPLY("a"), STREAM(3)]
    mended = [STREAM(1), REPLY(SORRY + "b"), STREAM(3), REPLY("c")]
    of_b = [
        *([*head, REPLY(wrong, False), *mended] for wrong in ("a", "c", "")),
        *([*head, REPLY(wrong, False), STREAM(4, False), tail[1]] for wrong in ("a", "c", "")),
        [*head[:3], STREAM(4, 2), REPLY(SORRY + "b"), STREAM(3), REPLY("c")],
        [*head[:3], STREAM(7, 2), REPLY("c")],
    ]
    found = [c for c in drawn() if c[:3] == CONVERSATION[:3] and c[2]["learn"]]
    assert all(c in of_b for c in found)
    assert all(c in found for c in of_b)


def test_frames_and_the_last_reply_stay():
    before = [*map(dict, CONVERSATION)]
    for conversation in drawn():
        assert num_frames(conversation) == num_frames(CONVERSATION)
        assert conversation[-1] == REPLY("c")
        assert conversation != CONVERSATION
    assert before == CONVERSATION  # which is not changed in place


def test_the_same_seed_the_same_conversation():
    assert drawn(20) == drawn(20)
    assert len({str(c) for c in drawn()}) > 10


@pytest.mark.parametrize("conversation", [[], [STREAM(3), REPLY("a")], [REPLY("a", False), STREAM(2), REPLY("b")]])
def test_without_a_second_learned_reply_nothing_happens(conversation):
    assert drawn(5, conversation) == [conversation] * 5
