"""`--config FILE [--config.key=value ...] --workdir DIR`: what the commands that take a configuration share."""

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from vmod_jax.errors import UserError, user_path
from vmod_jax.training import config as configuration
from vmod_jax.training.config import Config

# configs/ of the checkout; a wheel has it inside the package.
CONFIGS = [folder / "configs" for folder in Path(__file__).resolve().parents[1:3]]


def find_config(name: str) -> str:
    """The path of a file that comes with the package, where its bare name is given ("tiny", "papers/lta"), else `name`.

    What stands behind a colon is the file's own argument and stays ("llama3_8b:v5e_16").
    """
    stem, colon, argument = name.partition(":")
    if stem.startswith("~"):
        return f"{user_path(stem)}{colon}{argument}"
    if not re.fullmatch(r"\w+(/\w+)*", stem) or Path(stem).is_file():
        return name
    files = (folder / f"{stem}.py" for folder in CONFIGS)
    return next((f"{file}{colon}{argument}" for file in files if file.is_file()), name)


def _found(argv: Sequence[str]) -> list[str]:
    """argv, with the file in place of a bare name behind --config."""
    out = list(argv)
    for i, argument in enumerate(out):
        flag, equals, name = argument.partition("=")
        if flag.lstrip("-") == "config" and equals:
            out[i] = f"{flag}={find_config(name)}"
        elif i and out[i - 1].startswith("-") and out[i - 1].lstrip("-") == "config":
            out[i] = find_config(argument)
    return out


def parse(argv: Sequence[str]) -> tuple[Config, Path]:
    """`--config FILE [--config.key=value ...] --workdir DIR` -> (configuration, workdir); UserError for a mistake.

    FILE may be a bare name of configs/ (`find_config`).
    """
    values = flags.FlagValues()
    arguments = ["vmod", *_found(argv)]
    config_flags.DEFINE_config_file("config", None, "a file of configs/", flag_values=values, sys_argv=arguments)
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    try:
        with warnings.catch_warnings():  # ml_collections 1.1 still loads files by a deprecated method of importlib
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            rest = values(arguments)[1:]
        config = values["config"].value
        if config is not None:
            file = config_flags.get_config_filename(values["config"])
            if not Path(file.partition(":")[0]).is_file():
                raise UserError(f"--config {file}: no such file")
            config.to_dict()  # a file that could not be read says so when its values are asked for
    except flags.Error as error:
        raise UserError(f"{_reason(error)}") from error
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        raise _config_error(argv, error) from error
    if rest:
        raise UserError(f"unexpected {' '.join(rest)}; values are given as --config.key=value")
    if config is None or values["workdir"].value is None:
        raise UserError("needs --config FILE (a path, or a name of configs/ such as tiny) and --workdir DIR")
    return config, user_path(values["workdir"].value)


def _reason(error: Exception) -> str:
    """One line of an error that may hold a traceback: the line that names the exception, else the first."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named[-1] if named else lines[0]).split(" Other fields present")[0]


def _config_error(argv: Sequence[str], error: Exception) -> UserError:
    known = json.loads(configuration.defaults().to_json())
    for argument in argv:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config."):
            node: Any = known
            for part in name.split(".")[1:]:
                node = node.get(part, ...) if isinstance(node, dict) else ...
            if node is ...:
                return configuration.unknown_key(name.removeprefix("config."))
    return UserError(f"the configuration cannot be read: {_reason(error)}")
