"""Images and single frames of videos as a model sees them."""

import numpy as np
import pytest

from vmod_jax.data import stills, video
from vmod_jax.errors import UserError


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """3 s at 4 a second, each frame of one grey: 0, 20, 40, ..."""
    path = tmp_path_factory.mktemp("clip") / "grey.mp4"
    video.write(path, (np.full((16, 32, 3), 20 * i, np.uint8) for i in range(12)), 4)
    return path


def grey(frames):
    """The middle pixel of each frame, in steps of 20."""
    return [round(float(frame[8, 8].mean()) / 20) for frame in frames]


def test_times_in_the_middles_of_equal_parts():
    assert stills.spread(0, 4, 1, 100) == [0.5, 1.5, 2.5, 3.5]
    assert stills.spread(10, 14, 1, 2) == [11, 13]
    assert stills.spread(0, 0.1, 1, 8) == [0.05]


def test_frames_at_times(clip):
    assert grey(stills.at(clip, [0, 0.1, 0.25, 1.49, 9], 16)) == [0, 0, 1, 5, 11]
    assert stills.at(clip, [0.3], 24).shape == (1, 24, 24, 3)
    assert stills.duration(clip) == pytest.approx(3)


def test_a_stream_up_to_a_question_shows_no_frame_after_it(clip):
    assert grey(stills.until(clip, 2, 1.0, 16)) == [0, 2, 4]
    assert grey(stills.until(clip, 2, 1.4, 16)) == [0, 2, 4]
    assert grey(stills.until(clip, 2, 2.0, 16, context=1.0)) == [4, 6, 8]
    assert grey(stills.until(clip, 2, 99, 16)) == [0, 2, 4, 6, 8, 10]


def test_images_of_all_kinds(clip, tmp_path):
    from PIL import Image

    array = np.zeros((4, 8, 3), np.uint8)
    array[:, :, 0] = 200
    Image.fromarray(array).save(tmp_path / "x.png")
    for source in (array, Image.fromarray(array), tmp_path / "x.png", str(tmp_path / "x.png")):
        seen = stills.image(source, 16)
        assert (seen.shape, seen.dtype) == ((16, 16, 3), np.uint8)
        assert seen[8, 8].tolist() == pytest.approx([200, 0, 0], abs=3)
        assert not seen[:3].any()
    for source, message in (
        (tmp_path / "no.png", "no such image"),
        (np.zeros((4, 8), np.uint8), r"not uint8\[4, 8\]"),
        (np.zeros((4, 8, 3)), "not float64"),
        (None, "not NoneType"),
    ):
        with pytest.raises(UserError, match=message):
            stills.image(source, 16)
    (tmp_path / "bad.png").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"bad\.png"):
        stills.image(tmp_path / "bad.png", 16)
