"""Values of a configuration file, checked: a file that somebody wrote may hold anything under any name."""

from typing import Any

from vmod_jax.errors import UserError, is_number, short

NEEDED: Any = object()  # no default


def number(config: dict[str, Any], name: str, default: Any = NEEDED, *, above: float = 0.0, file: str = "") -> float:
    """config[name], a finite number above `above`, as it is stored; `default` where there is no such name.

    Raises UserError for anything else, null, true and text included; file: what the error names (config.json).
    """
    value = config.get(name, default)
    if value is NEEDED:
        raise UserError(f"{file or 'config.json'} lacks {name}: is it complete?")
    if not is_number(value) or value <= above:
        raise UserError(f"{file or 'config.json'}: {name} is {short(value)}, not a number above {above:g}; correct it")
    return value


def count(config: dict[str, Any], name: str, default: Any = NEEDED, *, file: str = "") -> int:
    """As `number`, a whole one."""
    value = number(config, name, default, file=file)
    if not isinstance(value, int):
        raise UserError(f"{file or 'config.json'}: {name} is {short(value)}, not a whole number; correct it")
    return value


def boolean(config: dict[str, Any], name: str, default: bool, *, file: str = "") -> bool:
    """config[name], true or false; `default` where that is absent or null. Raises UserError for anything else."""
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise UserError(f"{file or 'config.json'}: {name} is {short(value)}, not true or false; correct it")
    return default if value is None else value
