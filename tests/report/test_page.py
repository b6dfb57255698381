"""report.html from synthetic results: well-formed, self-contained, and drawn where the numbers say."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from vmod_jax.report.page import write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects elements and text; unclosed or crossed tags fail."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"unclosed {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag, **attrs):
        return [found for name, found in self.elements if name == tag and attrs.items() <= found.items()]


FRAMES = 24


@pytest.fixture
def inputs():
    """Two routed layers over 24 frames of 1 + 2x3 tokens; the first keeps CLS and the last cell, always."""
    rng = np.random.default_rng(0)
    metrics = {"lm_ppl": 1.5, "fluency_strict": 0.8125, "time_diff": 0.25, "step_seconds": 0.0123, "flops": 1.5e9}
    curve = [{"step": s, "loss": 3 / s, "lm_loss": 2 / s, "stream_loss": 1 / s} for s in range(1, 61)]
    return {
        "report": {
            "policies": {"full": metrics, "interleaved": metrics | {"flops": 9e8}},
            "baselines": {"always_silent": {"fluency_strict": 0.125}, "always_speak": {"fluency_strict": 0.0625}},
            "stream": {"frames": FRAMES, "fps": 31.5, "replies": 2},
        },
        "curves": {"full": curve, "interleaved": curve},
        "timeline": {
            "fps": 2.0,
            "frames": rng.integers(0, 255, (FRAMES, 16, 16, 3), dtype=np.uint8),
            "replies": [
                {"time": 3.0, "role": "assistant", "text": "a red ball <b>appears</b>"},
                {"time": 4.0, "role": "user", "text": "which colour?"},
            ],
            "truth": [{"time": 2.5, "text": "a red ball appears"}, {"time": 9.0, "text": "it leaves & is gone"}],
        },
        "routing": {
            1: np.tile(np.array([0, 6], np.int32), (FRAMES, 1)),
            3: np.stack([np.sort(rng.permutation(6)[:2] + 1) for _ in range(FRAMES)]).astype(np.int32),
        },
        "grid": (2, 3),
        "cls": True,
    }


def test_the_page_is_whole_and_self_contained(tmp_path, inputs):
    path = write_report(tmp_path / "new", **inputs)
    assert path == tmp_path / "new" / "report.html"
    html = path.read_text()
    page = Page(html)
    assert [found["id"] for found in page.all("section")] == ["metrics", "curves", "timeline", "routing"]
    for _, attrs in page.elements:
        for name in ("href", "src", "xlink:href"):
            assert re.match(r"#|data:image/png;base64,", attrs.get(name, "#")), attrs
    assert not re.search(r"url\((?!#)|@import|<script", html)
    # every picture that is used is there
    symbols = {"#" + found["id"] for found in page.all("symbol")}
    used = {found["href"] for found in page.all("use") if found.get("href", "").startswith("#frame-")}
    assert used == symbols
    assert len(symbols) >= 12


def test_what_was_said_is_text_not_markup(tmp_path, inputs):
    page = Page(write_report(tmp_path, **inputs).read_text())
    assert "a red ball <b>appears</b>" in page.text
    assert "it leaves & is gone" in page.text
    assert "which colour?" in page.text


def test_the_table_holds_policies_and_baselines(tmp_path, inputs):
    html = write_report(tmp_path, **inputs).read_text()
    rows = re.findall(r'<tr class="(policy|baseline)"><td>([^<]*)</td>(.*?)</tr>', html)
    cells = {name: re.findall("<td>([^<]*)</td>", rest) for _, name, rest in rows}
    assert cells == {
        "full": ["1.50", "0.25", "0.812", "1.5 G", "12.3"],
        "interleaved": ["1.50", "0.25", "0.812", "900 M", "12.3"],
        "always silent": ["-", "-", "0.125", "-", "-"],
        "always speak": ["-", "-", "0.062", "-", "-"],
    }


def test_kept_tokens_are_drawn_where_they_were_kept(tmp_path, inputs):
    html = write_report(tmp_path, **inputs).read_text()
    masks = re.findall(r'<svg class="mask".*?</svg>', html, re.DOTALL)
    assert len(masks) == 2 * 8
    for mask in masks[:8]:  # layer 1: CLS and the last of 2 x 3 cells
        (kept,) = re.findall(r'<rect class="kept" x="([\d.]+)" y="([\d.]+)"', mask)
        assert [float(value) for value in kept] == pytest.approx([100 * 2 / 3 + 1, 51], abs=0.01)
        assert "kept-cls" in mask
        assert mask.count("M") == 5
    for mask in masks[8:]:  # layer 3: two cells, never CLS
        assert mask.count('class="kept"') == 2
        assert "kept-cls" not in mask
    assert "CLS in 100%" in html
    assert "CLS in 0%" in html
    heat = re.findall(r"fill-opacity=\"([\d.]+)\"><title>(\d+)%", html)
    assert heat[:6] == [("0.06", "0")] * 5 + [("1.0", "100")]


def test_labels_never_overlap_in_a_lane(tmp_path, inputs):
    inputs["timeline"]["replies"] = [{"time": t / 4, "text": "the same long sentence " * 2} for t in range(40)]
    html = write_report(tmp_path, **inputs).read_text()
    said = html[html.rindex('<g class="said">') :]
    labels = re.findall(r'<text x="([\d.]+)" y="(\d+)">the same', said)
    assert len(labels) == 40
    lanes = {}
    for x, y in labels:
        assert float(x) - lanes.get(y, -1e9) > 46 * 6
        lanes[y] = float(x)


def test_a_model_without_grid_routing_or_curves(tmp_path, inputs):
    inputs |= {"routing": {1: np.zeros((FRAMES, 1), np.int32)}, "grid": (0, 0)}
    assert 'class="kept"' not in write_report(tmp_path, **inputs).read_text()
    inputs |= {"routing": {}, "curves": {}}
    page = Page(write_report(tmp_path, **inputs).read_text())
    assert [found["id"] for found in page.all("section")] == ["metrics", "timeline"]
