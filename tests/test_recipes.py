"""The paper's four recipes: complete, on sources that there are, with rows that the model has positions for."""

from pathlib import Path

import pytest

from vmod_jax.data.sources.table import SOURCES
from vmod_jax.training.config import complete
from vmod_jax.training.flags import parse

PAPERS = sorted((Path(__file__).resolve().parents[1] / "configs" / "papers").glob("*.py"))


@pytest.mark.parametrize("file", PAPERS, ids=lambda file: file.stem)
def test_a_recipe(file):
    config = complete(parse(["--config", str(file), "--workdir", "run"])[0])
    mixed = [name for name, weight in config.data.mix.items() if weight]
    assert {*mixed, config.data.name} <= {*SOURCES}
    assert config.epochs > 0
    assert config.batch_size == 64
    assert 10 * config.data.max_frames < 8192
    assert (config.policy, config.keep) == ("interleaved", 0.2)


def test_there_are_four():
    assert [file.stem for file in PAPERS] == ["coin", "keystep", "lta", "narration"]
