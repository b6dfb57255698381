"""A model that an earlier version stored still loads and computes what it computed.

`stored_model/` was written by `LanguageModel.save` of commit 47000e7, before the house and before connector, cache and
merger had names; `expected.json` beside it has that version's logits.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from vmod_jax import lm
from vmod_jax.compression.forms import CACHES
from vmod_jax.compression.mergers import MERGERS
from vmod_jax.errors import UserError
from vmod_jax.models.connectors import CONNECTORS
from vmod_jax.models.video_lm import VideoLMConfig

STORED = Path(__file__).with_name("stored_model")


@pytest.fixture(scope="module")
def model():
    return lm.load(STORED)


def test_logits_are_those_of_then(model):
    expected = json.loads((STORED / "expected.json").read_text())
    logits = model.logits(expected["input_ids"], np.array(expected["frames"], np.float32))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)


def test_what_it_does_not_name_is_the_default(model):
    names = json.loads((STORED / "model.json").read_text()).keys()
    assert not {"connector", "cache", "merger"} & names
    assert (model.config.connector, model.config.cache, model.config.merger) == ("mlp", "float", "none")
    assert VideoLMConfig.from_json(model.config.to_json()) == model.config


@pytest.mark.parametrize(("field", "table"), [("connector", CONNECTORS), ("cache", CACHES), ("merger", MERGERS)])
def test_a_name_that_is_in_no_table_is_refused(model, field, table):
    with pytest.raises(UserError, match=f"unknown {field} 'nothing': use one of {', '.join(table)}"):
        dataclasses.replace(model.config, **{field: "nothing"})
    with pytest.raises(UserError, match=f"unknown {field}"):
        lm.load(STORED, **{field: "nothing"})


def test_a_row_more_is_used(model, monkeypatch):
    """A merger that halves frames: shapes follow from its row alone, and so does what a stream caches."""
    from vmod_jax.compression.mergers import Merger

    halves = Merger(lambda n: n // 2, lambda tokens: tokens.reshape(*tokens.shape[:2], -1, 2, tokens.shape[-1]).mean(3))
    monkeypatch.setitem(MERGERS, "halves", halves)
    other = lm.load(STORED, merger="halves")
    assert (other.config.features_per_frame, other.config.tokens_per_frame, other.config.kept) == (4, 2, (2, 1))
    frame = other.config.frame_token_id
    assert other.logits([[1, frame, frame, 2]], np.ones((1, 1, 4, 4), np.float32)).shape == (1, 4, 12)
