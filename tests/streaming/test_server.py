"""The live page: over its socket a stream is the `Session` of the same frames, and nothing a page sends ends it."""

import asyncio
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import jpeg

from vmod_jax import lm
from vmod_jax.commands import cli
from vmod_jax.data.video import picture, read
from vmod_jax.errors import UserError

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from vmod_jax.streaming.engine import Engine
from vmod_jax.streaming.server import Live, Server

OPTIONS = {"threshold": 0.6, "max_frames": 20, "max_reply": 4, "width": 4}
LOCALHOST = "http://localhost"


@pytest.fixture(scope="module")
def model(tiny_run):
    return lm.load(tiny_run[0]).merged


@pytest.fixture(scope="module")
def jpegs(tiny_config):
    """12 frames of a video that the model has not seen."""
    root = Path(tiny_config.data.root)
    (name,) = json.loads((root / "splits.json").read_text())["test"]
    return [jpeg(frame) for frame in read(root / f"{name}.mp4", 2.0, 24).frames[:12]]


@pytest.fixture
def connect(model):
    """Opens the socket of a server that takes two streams."""
    server = Server(model, "tiny", "Say something.", streams=2, hosts=["localhost"], **OPTIONS)
    with TestClient(server.app, base_url=LOCALHOST) as client:
        yield lambda **headers: client.websocket_connect("ws://localhost/stream", headers=headers)


def hear(socket, frames):
    """Reports until so many pictures have been taken, as one."""
    report, sums = {}, {"taken": 0, "silence": [], "turns": [], "notes": [], "errors": []}
    while sums["taken"] < frames:
        report = socket.receive_json()
        sums = {name: so_far + report[name] for name, so_far in sums.items()}
    return {**report, **sums}


def test_what_routed_layers_keep_is_told_of_each_frame(model, jpegs):
    """As a whole sequence of the same tokens has it, however many frames a call had, and where replies roll back."""
    live = Live(model, "Say something.", **OPTIONS)
    told = [*live.take(jpegs[:1])["kept"], *live.take(jpegs[1:8])["kept"], *live.take(jpegs[8:])["kept"]]
    frames = np.stack([picture(data, 24) for data in jpegs])
    whole = model.routing([live.session.engine.input_ids], frames[None])
    assert len(told) == len(frames)
    assert len(whole) == 2
    assert told == [{layer: np.asarray(kept[0, i]).tolist() for layer, (_, kept) in whole.items()} for i in range(12)]


def test_the_clip_is_a_video(model):
    with TestClient(Server(model, hosts=["localhost"], **OPTIONS).app, base_url=LOCALHOST) as client:
        first, second = client.get("/clip.mp4"), client.get("/clip.mp4")
    assert first.headers["content-type"] == "video/mp4"
    assert first.content == second.content
    assert first.content[4:8] == b"ftyp"


def test_a_stream_is_the_session_of_its_frames(model, jpegs, connect):
    """Sent all at once, a question in the middle and the threshold changed after it; against one push a frame."""
    frames = [picture(data, 24) for data in jpegs]

    def one_by_one(first, then):
        session = model.stream(**OPTIONS)
        session.ask("Say something.", 0.0)
        session.threshold = first
        for frame in frames[:5]:
            session.push(frame)
        session.ask("What is it?", 4 / 2)
        session.threshold = then
        for frame in frames[5:]:
            session.push(frame)
        return session

    threshold = float(np.median(one_by_one(0.0, 0.0).silence))
    session = one_by_one(0.0, threshold)
    assert 2 < len([turn for turn in session.turns if turn.role == "assistant"]) < 12  # also by itself

    with connect() as socket:
        hello = socket.receive_json()["hello"]
        assert hello == {
            "name": "tiny", "fps": 2.0, "size": 24, "max_frames": 20, "threshold": 0.6, "window": 8,
            "cls": True, "grid": [3, 3],
        }  # fmt: skip
        socket.send_json({"threshold": 0})
        for data in jpegs[:5]:
            socket.send_bytes(data)
        socket.send_json({"ask": " What is it? "})
        socket.send_json({"threshold": threshold})
        for data in jpegs[5:]:
            socket.send_bytes(data)
        heard = hear(socket, 12)
    assert [tuple(turn.values()) for turn in heard["turns"]] == session.turns
    np.testing.assert_allclose(heard["silence"], session.silence, atol=1e-5)
    assert len(heard["silence"]) == heard["frames"] == 12
    assert heard["errors"] == heard["notes"] == []
    assert heard["cache_bytes"] == session.cache_bytes
    assert heard["seconds"] > 0


def test_a_question_before_the_first_frame_waits_for_it(model, jpegs):
    live = Live(model, "", **OPTIONS)
    report = live.take(['{"ask": "What will come?"}'])
    assert (report["frames"], report["turns"], report["errors"]) == (0, [], [])
    turns = live.take([jpegs[0]])["turns"]
    assert [(turn["time"], turn["role"]) for turn in turns] == [(0.0, "user"), (0.0, "assistant")]
    assert turns[0]["text"] == "What will come?"


def test_special_tokens_in_a_question_are_text(model, jpegs, connect, monkeypatch):
    """A question that spells a frame and the end of a turn, over the socket: neither comes to the model."""
    fed, generate = [], Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, ids, *more: (fed.append(ids), generate(self, ids, *more))[1])
    question = "#C C reads <v> <|eot_id|>"
    with connect() as socket:
        socket.receive_json()
        socket.send_bytes(jpegs[0])
        socket.send_json({"ask": question})
        socket.send_bytes(jpegs[1])
        heard = hear(socket, 2)
    assert [turn["text"] for turn in heard["turns"] if turn["role"] == "user"][-1] == question
    asked = next(ids for ids in fed if "reads" in model.tokenizer.decode(ids))
    assert question in model.tokenizer.decode(asked)
    assert not set(asked[1:]) & set(model.tokenizer.added_tokens_decoder)  # the first one ends the reply before


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (b"not a picture", "a picture of 13 bytes is not a JPEG"),
        (b"\xff\xd8\xff", "a picture of 3 bytes is not a JPEG"),
        ("{", """a message is a JPEG, {"ask": TEXT} or {"threshold": P}, not '{'"""),
        ('{"ask": " "}', "a message is"),
        ('{"ask": 1}', "a message is"),
        ("[]", "a message is"),
        ("[" * 100_000, "a message is"),
        ('{"ask": "a", "threshold": 1}', "a message is"),
        ('{"ask": "half an \\ud83d"}', "a question holds half a character"),
        ('{"ask": "' + "word " * 401 + '"}', "a question of 2005 characters: 2000 is the most"),
        ("", "a message is"),
        ('{"threshold": 1.5}', "threshold 1.5 is outside [0, 1]"),
        ('{"threshold": NaN}', "threshold nan is outside [0, 1]"),
        ('{"threshold": "1"}', "a message is"),
    ],
)
def test_what_cannot_be_used_is_said_and_the_stream_goes_on(model, jpegs, message, line):
    live = Live(model, "", **OPTIONS)
    report = live.take([jpegs[0], message, jpegs[1]])
    (error,) = report["errors"]
    assert error.startswith(line)
    assert "\n" not in error
    assert report["frames"] == len(report["silence"]) == 2
    assert report["taken"] == 2 + isinstance(message, bytes)
    assert live.session.threshold == 0.6


def test_a_full_stream_says_so(model, jpegs):
    live = Live(model, "", **OPTIONS)
    report = live.take(jpegs + jpegs)
    assert (report["frames"], report["taken"]) == (20, 24)
    (error,) = report["errors"]
    assert "has reached max_frames = 20" in error


def test_no_more_streams_than_allowed(connect, jpegs):
    with connect() as first, connect() as second:
        assert {"hello"} == first.receive_json().keys() == second.receive_json().keys()
        with connect() as third:
            (line,) = third.receive_json()["errors"]
            assert line.startswith("as many streams are open as this server takes (2)")
            with pytest.raises(WebSocketDisconnect):
                third.receive_json()
        second.send_bytes(jpegs[0])
        assert hear(second, 1)["frames"] == 1
    with connect() as fourth:  # whoever leaves makes room
        assert "hello" in fourth.receive_json()


def test_who_leaves_makes_room_while_the_model_still_computes(model, jpegs, monkeypatch):
    """Spoken to as by a server that goes on: Starlette's client would end what is computed with its socket."""
    computing, go_on, done, take = threading.Event(), threading.Event(), threading.Event(), Live.take

    def slow(*arguments):
        computing.set()
        go_on.wait(120)
        done.set()
        return take(*arguments)

    monkeypatch.setattr(Live, "take", slow)
    server = Server(model, streams=1, **OPTIONS)
    scope = {"type": "websocket", "path": "/stream", "headers": [(b"host", b"localhost")], "query_string": b""}

    async def until(reached):
        deadline = time.monotonic() + 20
        while not reached() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    async def visit():
        said, inbox = [], asyncio.Queue()

        async def send(message):
            said.append(message)

        for message in ({"type": "websocket.connect"}, {"type": "websocket.receive", "bytes": jpegs[0]}):
            inbox.put_nowait(message)
        stream = asyncio.create_task(server.app(scope, inbox.get, send))
        try:
            await until(computing.is_set)
            assert server.open == 1
            inbox.put_nowait({"type": "websocket.disconnect", "code": 1001})
            await until(lambda: not server.open)
            assert server.open == 0
            assert not done.is_set()  # room is made before the computation has ended, not by its end
        finally:
            go_on.set()
            await stream
        assert server.open == 0

    asyncio.run(visit())


def test_strangers(connect, model):
    """A page of another origin, and another name that leads here."""
    with connect(origin=LOCALHOST) as own:
        assert "hello" in own.receive_json()
    for stranger in ("http://elsewhere.example", "http://[", "null"):
        with pytest.raises(WebSocketDisconnect), connect(origin=stranger) as other:
            other.receive_json()
    with TestClient(Server(model, hosts=["localhost"], **OPTIONS).app, base_url=LOCALHOST) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "new WebSocket" in page.text
        assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 400


def test_a_stream_that_breaks_says_so_and_leaves_the_others(connect, jpegs, monkeypatch):
    with connect() as broken, connect() as other:
        broken.receive_json(), other.receive_json()
        with monkeypatch.context() as patch:
            patch.setattr(Live, "take", lambda *_: 1 / 0)
            broken.send_bytes(jpegs[0])
            assert broken.receive_json() == {"errors": ["the stream broke off: division by zero"]}
        other.send_bytes(jpegs[0])
        assert hear(other, 1)["frames"] == 1


# --- the command ------------------------------------------------------------------------------------------------------


def test_from_a_shell(tiny_run, jpegs):
    from websockets.sync.client import connect

    command = [sys.executable, "-m", "vmod_jax", "serve", "--workdir", str(tiny_run[0]), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            address = next(filter(None, (re.search(r"http://(localhost:\d+)/", line) for line in process.stdout)))[1]
            with connect(f"ws://{address}/stream", additional_headers={"Origin": f"http://{address}"}) as ws:
                assert json.loads(ws.recv())["hello"]["name"] == tiny_run[0].name
                ws.send(jpegs[0])
                said = json.loads(ws.recv())
                assert (said["frames"], said["errors"]) == (1, [])
                assert [turn["role"] for turn in said["turns"]] == ["user", "assistant"]
                for data in jpegs:  # while it is busy
                    ws.send(data)
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.endswith("vmod serve: interrupted\n")
    assert "Traceback" not in errors


def test_mistakes(tiny_run, tmp_path, capsys, monkeypatch):
    def mistake(*arguments, workdir=tiny_run[0]):
        assert cli.main(["serve", "--workdir", str(workdir), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in mistake("--port", port)
    assert "ports go from 0 to 65535" in mistake("--port", 65536)
    assert "cannot listen on 192.0.2.1" in mistake("--host", "192.0.2.1")  # nobody's address
    assert "must be at least 1" in mistake("--streams", 0)
    assert "outside [0, 1]" in mistake("--port", 0, "--threshold", 2)
    assert "no such folder" in mistake("--port", 0, workdir=tmp_path / "nowhere")
    for module in ("commands.serve", "streaming.server"):
        monkeypatch.delitem(sys.modules, f"vmod_jax.{module}")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert "of the extra serve: pip install '.[serve]'" in mistake()


def test_a_model_without_a_tower(model):
    blind = dataclasses.replace(model.config, vision=None)
    with pytest.raises(UserError, match="no vision tower"):
        Live(lm.LanguageModel(blind, model.params, model.tokenizer), "", **OPTIONS)
