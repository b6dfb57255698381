"""`vmod <command>`: each command is one file beside this one, imported only when it is called."""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from vmod_jax import __version__
from vmod_jax.caches import keep_compiled_programs
from vmod_jax.errors import UserError, short


class Command(NamedTuple):
    module: str
    function: str
    about: str


COMMANDS = {
    "demo": Command("demo", "main", "make videos, train the method and its baseline, evaluate, stream, report"),
    "train": Command("train", "main", "train a model, or go on with a run"),
    "evaluate": Command("evaluate", "main", "score a checkpoint"),
    "stream": Command("stream", "main", "stream a video file and print what the model says"),
    "serve": Command("serve", "main", "a page on which a model watches a camera, a screen or a video file"),
    "routing": Command("routing", "main", "what the LayerExperts of a model choose: a table, pictures"),
    "arank": Command("arank", "main", "which layers to route, by the rank of their attention maps"),
    "data": Command("data", "main", "make or prepare a data set"),
    "import": Command("convert", "import_main", "Hugging Face or PEFT weights -> a workdir"),
    "export": Command("convert", "export_main", "a workdir -> Hugging Face, PEFT or PyTorch"),
    "table": Command("table", "main", "the rows of a table of the paper, trained and scored with seeds"),
    "bench": Command("bench", "main", "how fast, and in how much memory, beside a peer"),
    "env": Command("env", "main", "versions, devices, caches, what is missing: what a bug report needs"),
}

USAGE = "\n".join(
    [
        f"vmod_jax {__version__}: language models that watch a video stream and speak when there is something to say",
        "",
        "usage: vmod COMMAND [OPTIONS]    (vmod COMMAND --help)",
        "",
        *(f"  {name:<10}{command.about}" for name, command in COMMANDS.items()),
        "",
        "Compiled programs are kept in ~/.cache/vmod_jax/compiled (VMOD_CACHE moves that folder,",
        "JAX_COMPILATION_CACHE_DIR them alone); JAX_ENABLE_COMPILATION_CACHE=false keeps none.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a user's mistake ends in one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}': use one of {', '.join(COMMANDS)}")
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for noisy in ("jax", "absl", "orbax", "grain", "httpx"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        keep_compiled_programs()
        command = COMMANDS[name]
        module = importlib.import_module(f"vmod_jax.commands.{command.module}")
        return getattr(module, command.function)(rest) or 0
    except SystemExit as end:  # argparse has shown its --help
        return int(end.code or 0)
    except UserError as error:
        print(f"vmod {name}: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else f"{error}"
        print(f"vmod {name}: {reason}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vmod {name}: interrupted", file=sys.stderr)
        if argv is None:  # a process of its own
            # Python's own end would crash (SIGSEGV, jax 0.10.2) where JAX was interrupted while it traced a program.
            with suppress(BrokenPipeError):
                sys.stdout.flush()
            os._exit(130)
        return 130
    except BrokenPipeError:
        return 141  # the reader of our output has gone
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NAMES:
            print(f"vmod {name}: {short(error.filename)}: {error.strerror}", file=sys.stderr)
        elif reason := refused_by_disk(error):
            print(f"vmod {name}: a file cannot be written ({reason}); make room, then run it again", file=sys.stderr)
        else:
            raise
        return 2


NAMES = (errno.ENAMETOOLONG, errno.ELOOP)  # what no file can be called
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def refused_by_disk(error: BaseException | None) -> str | None:
    """What a disk has said that takes no more: libraries in C++ have it in the text of errors of other kinds."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK:
            return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        for reason in map(os.strerror, DISK[:4]):
            if reason in str(error):
                return reason
        error = error.__cause__ or error.__context__
    return None
