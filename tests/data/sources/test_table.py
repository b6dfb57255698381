"""Every source on generated files in its data set's own layout, from videos and from features."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from vmod_jax.data import features
from vmod_jax.data.conversation import num_frames
from vmod_jax.data.pipeline import open_streams
from vmod_jax.data.sources import coin, shape_steps
from vmod_jax.data.sources.table import split_videos
from vmod_jax.errors import UserError

SOURCES = {
    **{f"coin_{task}": ("coin", "videos", "test") for task in coin.TASKS},
    "egoexo4d_keystep": ("egoexo4d", "", "val"),
    "ego4d_lta": ("lta", "v2/full_scale", "val"),
    "ego4d_narration": ("narration", "v2/full_scale", "val"),
    "ego4d_refined": ("narration", "v2/full_scale", "val"),
    "ego4d_livechat": ("dialogue", "videos", "train"),
    "dialogue": ("dialogue", "videos", "val"),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """{schema: (folder, its features)}, two videos for training and one held out."""
    made = {}
    for schema, videos in {schema: videos for schema, videos, _ in SOURCES.values()}.items():
        root, out = (tmp_path_factory.mktemp(schema) / name for name in ("data", "features"))
        shape_steps.generate(root, schema, 2, 1)
        plan = features.make_plan(root / videos, out, 2.0, 8, {}, 3 * 8 * 8)
        features.write(plan, out, lambda: None)
        made[schema] = root, out
    return made


def data(root, **changes):
    return ConfigDict(
        {"name": "", "root": str(root), "features": "", "fps": 2.0, "seed": 0, "mix": {}, "allow_outside": False}
        | changes
    )


@pytest.mark.parametrize("source", SOURCES)
def test_a_source(roots, source):
    schema, _, held_out = SOURCES[source]
    root, stored = roots[schema]
    for split in ("train", held_out):
        decoded = open_streams(data(root, name=source), split, 8)
        read = open_streams(data(root, name=source, features=str(stored)), split, 8)
        assert list(read.samples) == list(decoded.samples)
        for sample in decoded.samples:
            assert num_frames(sample.conversation) == sample.stop - sample.start
            np.testing.assert_array_equal(read.frames(sample), decoded.frames(sample))
    assert any(text.strip() for text in decoded.texts())


def test_a_mixture_of_sources(roots):
    root, stored = roots["coin"]
    mix = {"coin_step": 1.0, "coin_task": 2.0, "shapes": 0.0}
    streams = open_streams(data(root, features=str(stored), mix=mix), "train", 8)
    assert {sample.video.split(":")[0] for sample in streams.samples} == {"coin_step", "coin_task"}
    sample = streams.samples[-1]
    assert len(streams.frames(sample)) == sample.stop - sample.start


def test_videos_of_each_split(roots):
    assert split_videos(roots["coin"][0], 1) == ["train-0000", "test-0000"]
    assert split_videos(roots["narration"][0], 1) == ["train-0000", "test-0000"]
    name = "takes/{}/frame_aligned_videos/aria01_214-1".format
    assert split_videos(roots["egoexo4d"][0], 5) == [name("train-0000"), name("train-0001"), name("test-0000")]
    with pytest.raises(UserError, match="no annotation file"):
        split_videos(roots["coin"][0] / "videos", 1)


def test_generated_again_it_is_the_same(roots, tmp_path):
    shape_steps.generate(tmp_path / "again", "coin", 2, 1)
    for file in ("coin.json", "videos/train-0001.mp4"):
        assert (tmp_path / "again" / file).read_bytes() == (roots["coin"][0] / file).read_bytes()
    with pytest.raises(UserError, match="unknown schema"):
        shape_steps.generate(tmp_path / "x", "chess", 1, 1)
