"""The server of a page on which a model watches a camera, a screen or a video file, and speaks while it does.

The page (`page.html`) takes `fps` pictures a second and sends each over a web socket, one socket a stream.
Streams share the model, which computes for one of them at a time. Messages are JSON, but for the pictures:

    page -> server   a JPEG                  the next frame
                     {"ask": TEXT}           answered at once; before the first frame, with it
                     {"threshold": P}        from the next frame on
    server -> page   {"hello": {...}}        once: name, fps, size, max_frames, threshold, window, cls, grid
                     {"frames": ..., ...}    after each piece of work: what `Live.take` returns
                     {"errors": [TEXT]}      the stream is over

A frame's tokens are its CLS token, where `cls` is true, then a `grid` of cells, row by row (null: no such tokens).
The server also makes a short clip, /clip.mp4, for whoever has nothing else to show.

The page keeps at most `window` frames on their way: of a camera frames are left out then (and counted), a file waits.
"""

import asyncio
import functools
import itertools
import json
import logging
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vmod_jax.data import video
from vmod_jax.data.conversation import NARRATION_INSTRUCTION
from vmod_jax.data.sources import shapes
from vmod_jax.data.video import picture
from vmod_jax.errors import UserError
from vmod_jax.models.video_lm import VideoLMConfig

if TYPE_CHECKING:
    from vmod_jax.lm import LanguageModel

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect
except ImportError as error:
    raise UserError(f"vmod serve needs {error.name}, of the extra serve: pip install '.[serve]'") from error

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
LARGEST = 2**22  # bytes of a message
LONGEST = 2000  # characters of a question: all streams wait while it is read
LOCAL, EVERYWHERE = ("localhost", "127.0.0.1"), ("0.0.0.0", "::")


class Live:
    """One stream, and what its page has not been told yet. options: those of `LanguageModel.stream`."""

    def __init__(self, lm: "LanguageModel", instruction: str, **options: Any):
        self.size = lm.image_size
        self.notes: list[str] = []
        self.session = lm.stream(announce=self.notes.append, routing=True, **options)
        if instruction:
            self.session.ask(instruction, 0.0)

    def take(self, messages: Sequence[bytes | str]) -> dict[str, Any]:
        """Works off messages in their order, frames that follow one another together.

        -> {taken: pictures among them; frames: seen so far; silence: P(interval) after each new one; kept: {layer: [its
        kept tokens]} of each new one; turns, notes, errors: the new ones; seconds: what this took; cache_bytes}. A
        message that cannot be used is one line of errors, and the stream goes on.
        """
        session, errors, began = self.session, [], time.perf_counter()
        frames, turns = session.frames, len(session.turns)
        for _, group in itertools.groupby(messages, type):
            pictures = []
            for message in group:
                with _collect(errors):
                    if isinstance(message, str):
                        self._obey(message)
                    else:
                        pictures.append(picture(message, self.size))
            with _collect(errors):
                session.push_many(pictures)
        notes = self.notes.copy()
        self.notes.clear()
        return {
            "taken": sum(isinstance(message, bytes) for message in messages),
            "frames": session.frames,
            "silence": session.silence[frames:],
            "kept": session.kept[frames:],
            "turns": [turn._asdict() for turn in session.turns[turns:]],
            "notes": notes,
            "errors": errors,
            "seconds": time.perf_counter() - began,
            "cache_bytes": session.cache_bytes,
        }

    def _obey(self, message: str) -> None:
        try:
            said = json.loads(message)
        except (ValueError, RecursionError):
            said = None
        match said:
            case {"ask": str(text), **rest} if text.strip() and not rest:
                if len(text) > LONGEST:
                    raise UserError(f"a question of {len(text)} characters: {LONGEST} is the most")
                # Behind the frames that came before it, and before those that come next.
                self.session.ask(text.strip(), max(0, self.session.frames - 1) / self.session.fps)
            case {"threshold": int() | float() as value, **rest} if not rest:
                self.session.threshold = value
            case _:
                raise UserError('a message is a JPEG, {"ask": TEXT} or {"threshold": P}, not ' + repr(message[:80]))


@contextmanager
def _collect(errors: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        errors.append(str(error))


def cells(config: VideoLMConfig) -> tuple[int, int] | None:
    """Rows and columns of a frame's cells, a token each; None where tokens are merged into others."""
    return (config.pooled or config.grid) if config.merger == "none" else None


@functools.cache
def example_clip(seed: int = 8) -> bytes:
    """An mp4 of 8 to 12 seconds of the world of `vmod demo`: coloured shapes that appear, move, turn and leave."""
    rng, world = np.random.default_rng(seed), shapes.WORLDS["plain"]
    frames, events = shapes.script(rng, world)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        video.write(path, shapes.render(rng, world, frames, events), world.fps)
        return path.read_bytes()


# --- the server -------------------------------------------------------------------------------------------------------


class Server:
    """The page and its streams. At most `streams` at once; hosts: names under which browsers may call it (any)."""

    def __init__(
        self,
        lm: "LanguageModel",
        name: str = "",
        instruction: str = NARRATION_INSTRUCTION,
        streams: int = 4,
        hosts: Sequence[str] = ("*",),
        **options: Any,
    ):
        self.lm, self.name, self.instruction, self.options = lm, name, instruction, options
        self.streams, self.open = streams, 0
        self.model = ThreadPoolExecutor(1, "model")  # one stream at a time, and none of them in the way of the sockets
        self.app = Starlette(
            routes=[Route("/", self.page), Route("/clip.mp4", self.clip), WebSocketRoute("/stream", self.stream)],
            # Of other names, one might be an attacker's that leads here.
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        )

    async def page(self, request: Any) -> FileResponse:
        return FileResponse(PAGE, headers={"Cache-Control": "no-store"})

    async def clip(self, request: Any) -> Response:
        return Response(await asyncio.to_thread(example_clip), media_type="video/mp4")

    async def stream(self, ws: WebSocket) -> None:
        """One stream, from its socket's opening to its end."""
        origin, host = ws.headers.get("origin"), ws.headers.get("host")
        if origin not in (None, f"http://{host}", f"https://{host}"):
            return await ws.close()  # a page of somebody else's
        await ws.accept()
        if self.open >= self.streams:
            full = f"as many streams are open as this server takes ({self.streams}): close one, or raise --streams"
            await ws.send_json({"errors": [full]})
            return await ws.close()
        self.open += 1
        inbox: asyncio.Queue[bytes | str | None] = asyncio.Queue(64)
        receiving = asyncio.create_task(self._receive(ws, inbox))
        try:
            await self._converse(ws, inbox)
        except (WebSocketDisconnect, asyncio.CancelledError):
            pass  # the page has gone, or the server ends
        except Exception as error:
            log.exception("a stream broke off")
            with suppress(WebSocketDisconnect, RuntimeError):  # the page has gone, too
                await ws.send_json({"errors": [f"the stream broke off: {error}"[:500]]})
                await ws.close(1011)
        finally:
            receiving.cancel()

    async def _receive(self, ws: WebSocket, inbox: asyncio.Queue[bytes | str | None]) -> None:
        try:
            while (message := await ws.receive())["type"] == "websocket.receive":
                await inbox.put(message.get("bytes") or message.get("text") or "")
            await inbox.put(None)
        finally:  # whoever goes and comes again must not wait for what still computes
            self.open -= 1

    async def _converse(self, ws: WebSocket, inbox: asyncio.Queue[bytes | str | None]) -> None:
        run = asyncio.get_running_loop().run_in_executor
        live = await run(self.model, lambda: Live(self.lm, self.instruction, **self.options))
        session = live.session
        hello = {
            "name": self.name,
            "fps": session.fps,
            "size": live.size,
            "max_frames": session.engine.max_frames,
            "threshold": session.threshold,
            "window": 2 * session.width,  # as one call computes, another waits
            "cls": self.lm.config.cls,
            "grid": cells(self.lm.config),
        }
        await ws.send_json({"hello": hello})
        while True:
            queued = [await inbox.get()]
            # No more than a call's frames, so that other streams get their turn.
            while not inbox.empty() and len(queued) < session.width:
                queued.append(inbox.get_nowait())
            messages = [message for message in queued if message is not None]
            if len(messages) < len(queued):
                return  # nobody is there to hear more
            await ws.send_json(await run(self.model, live.take, messages))


# --- its socket ------------------------------------------------------------------------------------------------------


def warm_up(server: Server) -> None:
    """Compiles what streams begin with (frames, replies, roll-backs, a question), while nobody waits.

    Raises UserError for a model that cannot watch.
    """
    live = Live(server.lm, server.instruction, **server.options)
    black = np.zeros((live.size, live.size, 3), np.uint8)
    live.session.push(black)
    live.session.threshold = 1.0  # speaks after every frame
    live.session.push_many([black] * min(live.session.width, live.session.engine.max_frames - 1))
    live.session.ask("What do you see in this video?", 0.0)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens (port 0: at any free one); whoever comes already, waits. Raises UserError."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: ports go from 0 to {2**16 - 1}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror}; give another --port or --host"
        ) from error


def over_http(server: Server) -> uvicorn.Server:
    options: dict[str, Any] = {"ws": "websockets-sansio", "ws_max_size": LARGEST, "timeout_graceful_shutdown": 1}
    return uvicorn.Server(uvicorn.Config(server.app, log_level="warning", **options))
