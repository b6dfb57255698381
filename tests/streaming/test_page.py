"""The live page in a browser: a file and a camera are watched, questions asked, and mistakes leave what runs alone.

Chromium is driven over its own protocol; where there is none, these are skipped.
"""

import asyncio
import itertools
import json
import re
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest

from vmod_jax import lm
from vmod_jax.data import video

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from websockets.sync.client import connect

from vmod_jax.streaming.server import Server, listen, over_http, warm_up

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream", "--remote-debugging-port=0",
]  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def address(tiny_run):
    """Where a server runs, in a thread of this process."""
    server = Server(lm.load(tiny_run[0]).merged, "tiny", "Say something.", max_frames=200, max_reply=3, threshold=0.4)
    warm_up(server)
    with listen("127.0.0.1", 0) as bound:
        running = over_http(server)
        thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[bound])))
        thread.start()
        yield f"http://localhost:{bound.getsockname()[1]}/"
        running.should_exit = running.force_exit = True
        thread.join()


class Page:
    """A page of Chromium. `run` gives the value of an expression, `until` waits for one to hold."""

    def __init__(self, socket):
        self.socket, self.numbers = socket, itertools.count()

    def call(self, method, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (said := json.loads(self.socket.recv(timeout=60))).get("id") != number:
            pass
        assert "error" not in said, said
        return said["result"]

    def run(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression):
        deadline = time.monotonic() + 90
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, (expression, self.said())
            time.sleep(0.05)
        return value

    def choose(self, path):
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def said(self):
        """[(class, words)] of the conversation."""
        lines = "[...document.querySelectorAll('#said li')].map(l => [l.className, l.lastChild.textContent])"
        return [tuple(each) for each in json.loads(self.run(f"JSON.stringify({lines})"))]


@pytest.fixture
def page(address, tmp_path):
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
        assert browser.stderr
        try:
            found = next(filter(None, (re.search(r"ws://(\S+)/devtools", line) for line in browser.stderr)))
            threading.Thread(target=browser.stderr.read, daemon=True).start()
            with connect(f"ws://{found[1]}/devtools/page/{first_page(found[1])}", max_size=None) as socket:
                page = Page(socket)
                page.call("Page.navigate", url=address)
                page.until("document.readyState === 'complete' && typeof begin === 'function'")
                yield page
        finally:
            browser.kill()


def first_page(host):
    from urllib.request import urlopen

    with urlopen(f"http://{host}/json/list") as answer:
        return next(target["id"] for target in json.load(answer) if target["type"] == "page")


@pytest.fixture
def clip(tmp_path):
    """4 seconds, 8 frames at 2 a second; brighter with time."""
    path = tmp_path / "clip.mp4"
    video.write(path, (np.full((32, 48, 3), 20 + 5 * i, np.uint8) for i in range(40)), 10.0)
    return path


def test_a_file_a_question_and_a_mistake(page, clip):
    page.run("document.getElementById('fast').click()")
    page.choose(clip)
    page.until("document.getElementById('said').textContent.includes('nothing more to see')")
    assert page.run("run.silence.length") == page.run("run.sent") == 8
    lines = page.said()
    assert lines[0] == ("user", "Say something.")
    assert lines[-1] == ("note", "nothing more to see")
    assert "error" not in dict(lines)
    # The middle of the last picture, shown at 3.5 seconds: 20 + 5 * 35.
    seen = "[...document.getElementById('seen').getContext('2d').getImageData(12, 12, 1, 1).data].slice(0, 3)"
    np.testing.assert_allclose(json.loads(page.run(f"JSON.stringify({seen})")), 195, atol=4)

    page.run("at('ask').elements.text.value = ' What is it? '; at('ask').requestSubmit()")
    page.until("run.turns.at(-2)?.text === 'What is it?' && run.turns.at(-1).role === 'assistant'")
    assert page.run("at('ask').elements.text.value") == ""

    before = page.said()
    (clip.parent / "text.mp4").write_text("not a video")
    page.choose(clip.parent / "text.mp4")
    page.until("document.querySelectorAll('#said .error').length")
    assert page.said() == [*before, ("error", "this browser cannot play that")]  # and the stream goes on
    page.run("at('ask').elements.text.value = 'And now?'; at('ask').requestSubmit()")
    page.until("run.turns.at(-2)?.text === 'And now?'")


def test_the_example_is_watched_and_its_kept_tokens_drawn(page):
    """The overlay is the picture where the layer kept a cell, and darker where it did not; the switch takes it away."""
    assert page.run("at('kept').hidden && at('routed').hidden")
    page.run("document.getElementById('fast').click(); at('example').click()")
    page.until("document.getElementById('said').textContent.includes('nothing more to see')")
    assert 16 <= page.run("run.sent") == page.run("run.taken") <= 24
    assert page.run("run.pictures.length") == 0
    kept = json.loads(page.run("JSON.stringify(run.kept)"))
    assert page.run("[...at('layer').options].map(o => o.value).join()") == ",".join(["all", *kept])
    assert re.search(r"[\d.]+ frames a second, cache [\d,]+ bytes", page.run("at('numbers').textContent"))
    for layer, tokens in kept.items():
        page.run(f"at('layer').value = {layer}; at('layer').onchange()")
        colour = "((c, x, y) => [...c.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3))"
        for cell in range(9):
            x, y = 80 + 160 * (cell % 3), 80 + 160 * (cell // 3)
            over, seen = (
                np.array(json.loads(page.run(f"JSON.stringify({colour}(at('{name}'), {x} / {part}, {y} / {part}))")))
                for name, part in (("kept", 1), ("seen", 20))
            )
            np.testing.assert_allclose(over, seen * (1 if cell + 1 in tokens else 0.35), atol=30)
    page.run("at('overlay').click()")
    assert page.run("at('kept').hidden && !at('routed').hidden")


def test_a_camera_the_threshold_and_an_end(page):
    page.run("at('camera').click()")
    page.until("run && run.silence.length >= 2")
    spoken = page.run("run.turns.length")
    page.run("at('threshold').value = 1; at('threshold').oninput(); at('threshold').onchange()")
    page.until(f"run.turns.length >= {spoken} + 2")
    assert page.run("at('chosen').textContent") == "1.000"
    page.run("window.old = run; at('camera').click()")
    page.until("run !== old && run.silence.length >= 1")  # another stream, of which the threshold stays
    assert page.run("old.alive || old.socket.readyState < WebSocket.CLOSING") is False
    page.run("at('stop').click()")
    assert page.said()[-1] == ("note", "stopped")
    assert page.run("run.alive || !at('stop').disabled || !at('ask').elements.text.disabled") is False
