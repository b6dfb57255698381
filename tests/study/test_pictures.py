"""Pictures of routing: bright where a token was kept, dark where not, and files that open."""

import av
import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from vmod_jax.study import pictures
from vmod_jax.study.routing import Choice

GRID, N, FRAMES, SIDE = (2, 3), 7, 5, 25
LAYERS = (1, 3)


@pytest.fixture(autouse=True)
def settings_stay():
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(100, 255, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture
def choices():
    rng = np.random.default_rng(1)
    out = {}
    for layer in LAYERS:
        scores = rng.normal(size=(FRAMES, N)).astype(np.float32)
        out[layer] = Choice(scores, scores >= np.sort(scores, -1)[:, -2:-1])
    return out


@pytest.mark.parametrize("cls", [True, False])
def test_skipped_cells_are_dark(frames, cls):
    """Pixel by pixel, for a side that neither h nor w divides."""
    kept = np.random.default_rng(2).random(6 + cls) < 0.5
    kept[0] = True
    out = pictures.shade(frames[0], kept, GRID, cls)
    mark = 4 if cls else 0
    for y in range(SIDE):
        for x in range(SIDE):
            if y < mark and x < mark:
                assert (out[y, x] == 255).all()
                continue
            cell = int(y * 2 / SIDE) * 3 + int(x * 3 / SIDE)
            factor = 1 if kept[cell + cls] else pictures.DIM
            np.testing.assert_array_equal(out[y, x], (factor * frames[0, y, x]).astype(np.uint8))
    if cls:
        kept[0] = False
        assert (pictures.shade(frames[0], kept, GRID, True)[1:3, 1:3] == 0).all()


def test_a_frame_that_is_cls_alone_is_one_cell(frames):
    assert (pictures.enlarge(np.array([True]), (0, 0), True, (8, 8))).all()
    assert not (pictures.enlarge(np.array([False]), (0, 0), True, (8, 8))).any()


def opened(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_strip(tmp_path, choices):
    """A strip of white frames: the more is kept, the brighter it is."""
    white = np.full((FRAMES, SIDE, SIDE, 3), 255, np.uint8)
    means = []
    for share in (0.0, 0.5, 1.0):
        kept = {layer: np.random.default_rng(3).random((FRAMES, N)) < share for layer in LAYERS}
        pictures.strip(tmp_path / "strip.png", white, kept, grid=GRID, cls=True, fps=2.0)
        picture = opened(tmp_path / "strip.png")
        assert picture.shape[1] > picture.shape[0]
        means.append(picture.mean())
    assert means[0] + 10 < means[1] < means[2] - 10


def test_strip_of_one_frame_without_pixels(tmp_path, choices):
    kept = {1: choices[1].kept[:1]}
    pictures.strip(tmp_path / "strip.png", pictures.blank(1), kept, grid=GRID, cls=True, fps=2.0)
    assert opened(tmp_path / "strip.png").std() > 0


@pytest.mark.parametrize(("grid", "cls", "layers"), [(GRID, True, 2), (GRID, False, 9), ((0, 0), True, 1)])
def test_positions(tmp_path, grid, cls, layers):
    """Rates of 1 are drawn in the brightest colour, rates of 0 in the darkest, whatever the others are."""
    n = int(cls) + grid[0] * grid[1]
    yellow = np.array(mpl.colormaps["viridis"](1.0)[:3]) * 255

    def area(rate):
        rates = {layer: np.full(n, rate) for layer in range(layers)}
        pictures.positions(tmp_path / "positions.png", rates, grid=grid, cls=cls)
        return (np.abs(opened(tmp_path / "positions.png") - yellow).max(-1) < 3).mean()

    assert area(1.0) > area(0.0) + 0.2


def test_overlaps(tmp_path):
    mean = np.array([[1.0, 0.4], [0.4, 1.0]])
    pictures.overlaps(tmp_path / "overlap.png", LAYERS, mean, np.full((2, 2), 2 / 7))
    picture = opened(tmp_path / "overlap.png")
    colour = np.array(mpl.colormaps["viridis"](0.4)[:3]) * 255
    assert (np.abs(picture - colour).max(-1) < 3).mean() > 0.03
    pictures.overlaps(tmp_path / "overlap.png", range(20), np.eye(20), np.linspace(0.1, 0.2, 400).reshape(20, 20))
    assert opened(tmp_path / "overlap.png").shape > picture.shape


@pytest.mark.parametrize("layers", [LAYERS, range(16)])
def test_heat_video(tmp_path, choices, layers):
    """Read back: a panel for each layer, in which kept cells are brighter than skipped ones, whatever their scores."""
    frames = np.full((FRAMES, SIDE, SIDE, 3), 180, np.uint8)
    choices = dict(zip(layers, [*choices.values()] * 8, strict=False))
    pictures.heat_video(tmp_path / "stream.mp4", frames, choices, grid=GRID, cls=True, fps=2.0)
    with av.open(str(tmp_path / "stream.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 2
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    side = read.shape[1] - 24
    assert read.shape == (FRAMES, side + 24, side * len(choices), 3)
    assert read[:, :24].min() < 100  # names of the layers
    for i, choice in enumerate(choices.values()):
        panel = read[:, 24:, i * side : (i + 1) * side].astype(float)
        for frame in range(FRAMES):
            for cell, kept in enumerate(choice.kept[frame, 1:]):
                row, column = divmod(cell, 3)
                y, x = int((row + 0.5) * side / 2), int((column + 0.5) * side / 3)
                brightness = panel[frame, y - 4 : y + 5, x - 4 : x + 5].mean()
                assert (brightness > 92) == kept, (i, frame, cell, brightness)
