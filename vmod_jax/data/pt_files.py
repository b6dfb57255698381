"""Tensors of `.pt` files without running a pickle: its opcodes are walked, and what they name is built by hand.

A file that `torch.save` wrote (torch 1.6 or later) is a zip: `data.pkl` says offset, size and strides of a tensor, raw
storages lie beside it. Of the pickle a handful of opcodes and five names are understood; anything else is refused, so
that opening a file never runs code.
"""

import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmod_jax.errors import UserError

BEFORE_ZIP = bytes.fromhex(
    "1950a86a20f9469cfc6c"
)  # the number that files of older versions begin with, last byte first
STORAGES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "bfloat16"}
REBUILD, ORDERED = ("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")
GLOBALS = {REBUILD, ORDERED, *(("torch", name) for name in STORAGES)}
ADVICE = "save it anew with torch.save, a tensor [frames, tokens, d] a file"


class Storage(NamedTuple):
    dtype: str
    key: str
    elements: int


class Tensor(NamedTuple):
    """How a tensor lies in its storage, in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def open_tensor(path: str | Path) -> np.ndarray:
    """The tensor of a file, [frames, tokens, d], as it is stored (float32, float16 or bfloat16): a view of the file.

    Raises UserError in one line with the file for whatever else the file is.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(64)
    if not head.startswith(b"PK\x03\x04"):
        older = " (a file of torch before 1.6)" if BEFORE_ZIP[::-1] in head else ""
        raise UserError(f"{path}: not a zip{older}; {ADVICE}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            top = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
            if top is None:
                raise UserError(f"{path}: no data.pkl inside; {ADVICE}")
            order = f"{top}byteorder"
            if order in names and archive.read(order).strip() != b"little":
                raise UserError(f"{path}: written by a big-endian machine; {ADVICE}")
            tensor = _walk(archive.read(f"{top}data.pkl"), path)
            return _view(path, archive, f"{top}data/{tensor.storage.key}", tensor)
    except (zipfile.BadZipFile, KeyError, EOFError, struct.error) as error:
        raise UserError(f"{path}: not a whole zip ({error}); {ADVICE}") from error


def _view(path: Path, archive: zipfile.ZipFile, member: str, tensor: Tensor) -> np.ndarray:
    """The tensor as a view of its storage inside the file, checked before."""
    import ml_dtypes

    storage, offset, size, stride = tensor
    dtype = np.dtype(ml_dtypes.bfloat16) if storage.dtype == "bfloat16" else np.dtype(storage.dtype)
    entry = archive.getinfo(member)
    reach = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if all(size) else 0
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != storage.elements * dtype.itemsize:
        raise UserError(f"{path}: its storage is compressed, or not as long as it says; {ADVICE}")
    if len(size) != 3 or min(offset, *size, *stride) < 0 or (storage.elements and reach >= storage.elements):
        raise UserError(
            f"{path}: a tensor of {list(size)}, offset {offset}, strides {list(stride)} cannot be; {ADVICE}"
        )
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        name, extra = struct.unpack("<HH", file.read(30)[26:30])
    start = entry.header_offset + 30 + name + extra
    if start + entry.file_size > path.stat().st_size:
        raise UserError(f"{path}: not a whole zip (its storage ends early); {ADVICE}")
    if not all(size):
        return np.zeros(size, dtype)
    flat = np.memmap(path, dtype, "r", start, (storage.elements,))
    return np.lib.stride_tricks.as_strided(
        flat[offset:], size, [step * dtype.itemsize for step in stride], writeable=False
    )


# --- the pickle, read and not run -------------------------------------------------------------------------------------

MARK = object()


def _walk(pickle: bytes, path: Path) -> Tensor:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for code, argument, _ in pickletools.genops(pickle):
            if code.name == "STOP":
                break
            if code.name not in _STEPS:
                raise UserError(f"{path}: the opcode {code.name} is not allowed; {ADVICE}")
            _STEPS[code.name](stack, memo, argument)
        result = stack[-1]
    except _NotAllowed as error:
        raise UserError(f"{path}: a global that is not allowed: {error}; {ADVICE}") from error
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its pickle cannot be read ({error}); {ADVICE}") from error
    if not isinstance(result, Tensor):
        raise UserError(f"{path}: not a tensor but {type(result).__name__}; {ADVICE}")
    return result


class _NotAllowed(Exception):
    pass


def _since_mark(stack: list) -> list:
    place = max(i for i, value in enumerate(stack) if value is MARK)
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _global(stack: list, memo: dict, argument: str) -> None:
    name = tuple(argument.split(" ", 1))
    if name not in GLOBALS:
        raise _NotAllowed(".".join(name))
    stack.append(name)


def _storage(stack: list, memo: dict, argument: Any) -> None:
    kind, storage, key, _, elements = stack.pop()
    if kind != "storage" or storage[1] not in STORAGES:
        raise ValueError("a reference to something else than a storage")
    stack.append(Storage(STORAGES[storage[1]], str(key), int(elements)))


def _call(stack: list, memo: dict, argument: Any) -> None:
    arguments, function = stack.pop(), stack.pop()
    if function == ORDERED and arguments == ():
        stack.append({})
    elif function == REBUILD and isinstance(arguments[0], Storage):
        storage, offset, size, stride = arguments[:4]
        stack.append(Tensor(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride))))
    else:
        raise _NotAllowed(f"a call of {'.'.join(function) if isinstance(function, tuple) else function!r}")


def _pack(count: int):
    def step(stack: list, memo: dict, argument: Any) -> None:
        items = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        stack.append(items)

    return step


def _set_items(stack: list, memo: dict, argument: Any) -> None:
    items = _since_mark(stack)
    stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _set_item(stack: list, memo: dict, argument: Any) -> None:
    value, key = stack.pop(), stack.pop()
    stack[-1][key] = value


_push = lambda stack, memo, argument: stack.append(argument)  # noqa: E731
_put = lambda stack, memo, argument: memo.__setitem__(argument, stack[-1])  # noqa: E731
_get = lambda stack, memo, argument: stack.append(memo[argument])  # noqa: E731

_STEPS: dict[str, Any] = {
    "PROTO": lambda stack, memo, argument: None,
    "MARK": lambda stack, memo, argument: stack.append(MARK),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    **dict.fromkeys(("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"), _push),
    "NONE": lambda stack, memo, argument: stack.append(None),
    "NEWTRUE": lambda stack, memo, argument: stack.append(True),
    "NEWFALSE": lambda stack, memo, argument: stack.append(False),
    "EMPTY_TUPLE": _pack(0),
    "TUPLE1": _pack(1),
    "TUPLE2": _pack(2),
    "TUPLE3": _pack(3),
    "TUPLE": lambda stack, memo, argument: stack.append(tuple(_since_mark(stack))),
    "EMPTY_DICT": lambda stack, memo, argument: stack.append({}),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "BINPERSID": _storage,
    "REDUCE": _call,
    "GLOBAL": _global,
}
