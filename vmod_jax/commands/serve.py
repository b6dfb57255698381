"""`vmod serve`: a page on which a model watches a camera, a screen or a video file, and speaks while it does."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vmod_jax.commands.options import add_session_arguments, load_for_streams, session_options
from vmod_jax.errors import ArgumentParser, UserError
from vmod_jax.streaming.server import EVERYWHERE, LOCAL, Server, listen, over_http, warm_up


def main(argv: Sequence[str] | None = None) -> NoReturn:
    parser = ArgumentParser("vmod serve", description=__doc__)
    add_session_arguments(parser, width=8)
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (8000)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all of the network, without a password")
    parser.add_argument("--streams", type=int, default=4, help="open at once; each has a cache of its own (4)")
    args = parser.parse_args(argv)
    options = session_options(args)
    if args.streams < 1:
        raise UserError("--streams must be at least 1")
    with listen(args.host, args.port) as bound:
        hosts, name = LOCAL if args.host in LOCAL else ("*",), Path(args.workdir).resolve().name
        server = Server(load_for_streams(args), name, args.instruction, args.streams, hosts, **options)
        print("compiling ...", flush=True)
        warm_up(server)
        host, port = f"[{args.host}]" if ":" in args.host else args.host, bound.getsockname()[1]
        if args.host in LOCAL + EVERYWHERE:
            host = "localhost"
            print(f"from another machine: ssh -L {port}:localhost:{port} THIS-MACHINE, then")
        print(f"open http://{host}:{port}/ in a browser (Ctrl-C ends)", flush=True)
        over_http(server).run(sockets=[bound])
    raise KeyboardInterrupt  # nothing else ends it, and uvicorn may have kept that to itself
