"""Hugging Face folders: config.json and safetensors <-> our parameter trees (numpy, nothing unpickled).

A tree is described by two small tables, from our modules to theirs and from our leaves to theirs. All names and shapes
are checked before a tree is read. A `kernel` is their weight transposed, and leaves below `layers` are stacked over the
layers: kernel [L, in, out].
"""

import copy
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes  # its import also gives numpy, and so safetensors, the name "bfloat16"
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vmod_jax.errors import UserError, few, is_text, read_json, short
from vmod_jax.models.vision import VisionConfig, parameter_shapes

log = logging.getLogger(__name__)

Params = dict[str, Any]

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
LONGEST_NAME = 255  # bytes, of a file, on any disk
_PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth")
# Constants that old versions of transformers stored among the weights.
_BUFFERS = (".rotary_emb.inv_freq", "embeddings.position_ids")


class LlamaShape(Protocol):
    """What the Llama tree needs of a config."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...


# ------------------------------------------------------------------------------------------------------- files


def _read_json(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return value


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's config.json; raises UserError when it is missing or broken."""
    return read_json_file(Path(folder), "config.json", "is not a Hugging Face model folder")


def read_json_file(folder: Path, name: str, otherwise: str) -> dict[str, Any]:
    """`folder/name`; raises UserError, "folder `otherwise`: ...", when it is missing, and when it is broken."""
    if not (folder / name).is_file():
        raise UserError(f"{folder} {otherwise}: it has no {name}; give the folder that has")
    return _read_json(folder / name)


class TensorReader:
    """The tensors of a folder's safetensors files, single or sharded, read one at a time.

    Opening reads the files' headers only, and no file stays open: a mapped file would count as memory as far as it has
    been read. Raises UserError when there are none, when a file is truncated or missing, and for a folder of pickles,
    which can run any code when they are opened; and, when a tensor is read, for NaN and infinity in it, unless
    allow_nonfinite.
    """

    def __init__(self, folder: str | Path, allow_nonfinite: bool = False):
        self.folder, self.allow_nonfinite = Path(folder), allow_nonfinite
        self._tensors: dict[str, _Tensor] = {}
        for path, listed in _tensor_files(self.folder).items():
            with _open(path) as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {n: _Tensor(path, tuple(x.get_shape()), x.get_dtype(), n) for n, x in slices.items()}
            if absent := sorted((listed or set()) - found.keys()):
                raise UserError(f"{path} lacks {few(absent)}, which the index promises; download it again")
            self._tensors.update(found)

    def names(self) -> list[str]:
        """All tensors' names, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored; nothing is read."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """As stored, bfloat16 included; raises UserError for quantised weights."""
        stored = self._tensors[name].dtype
        if stored not in _DTYPES:
            raise UserError(f"{self.folder}: {name} is stored as {stored}; use a checkpoint in {', '.join(_DTYPES)}")
        return np.dtype(_DTYPES[stored])

    def get(self, name: str) -> np.ndarray:
        """The tensor, in its stored shape and dtype, as a copy of its own."""
        self.dtype(name)
        with _open(self._tensors[name].path) as file:
            array = file.get_tensor(self._tensors[name].stored)
        return self._checked(name, array)

    def _checked(self, name: str, array: np.ndarray) -> np.ndarray:
        if not self.allow_nonfinite and not all_finite(array):
            raise UserError(
                f"{self.folder}: {name} holds NaN or infinity, which all outputs would be; download the checkpoint "
                "again, or take it as it is with --allow-nonfinite (load(..., allow_nonfinite=True))"
            )
        return array

    def renamed(self, new: Callable[[str], str]) -> "TensorReader":
        """The same tensors, `name` under the name new(name)."""
        other = copy.copy(self)
        other._tensors = {new(name): tensor for name, tensor in self._tensors.items()}
        return other


class _Tensor(NamedTuple):
    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it
    stored: str  # its name in the file


def all_finite(array: np.ndarray) -> bool:
    """Whether no value of a contiguous array of floats (bfloat16 too) is NaN or infinite; as fast as it is read."""
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)  # NaN lies above it, but for the sign
    positive = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    pieces = range(0, bits.size, 2**18)
    return all((bits[start : start + 2**18] & positive).max() < infinity for start in pieces)


def _open(path: Path) -> Any:  # its stubs know no methods
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); download it again") from None


def _tensor_files(folder: Path) -> dict[Path, set[str] | None]:
    """The folder's safetensors files, each with the names that the index expects in it (None without an index)."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a folder with config.json and safetensors files")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index} has no weight_map; download it again")
        wrong = [f"{name}: {short(file)}" for name, file in places.items() if not _is_file_name(file)]
        if wrong:
            raise UserError(f"{index} does not name a file of its folder for {few(wrong)}; download it again")
        files: dict[Path, set[str] | None] = {folder / file: set() for file in places.values()}
        for name, file in places.items():
            files[folder / file].add(name)  # pyright: ignore[reportOptionalMemberAccess]
        absent = sorted(path.name for path in files if not path.is_file())
        if absent:
            raise UserError(f"{folder} lacks {few(absent)}, which {index.name} lists; download them")
        return files
    files = {single: None} if single.is_file() else dict.fromkeys(sorted(folder.glob("*.safetensors")))
    if not files:
        for pattern in _PICKLES:
            if any(folder.glob(pattern)):
                raise UserError(refuse_pickles(folder, pattern))
        raise UserError(f"{folder} has no weights (*.safetensors); download them into it")
    return files


def _is_file_name(value: Any) -> bool:
    return is_text(value) and value != "" and Path(value).name == value and len(value.encode()) <= LONGEST_NAME


def refuse_pickles(folder: Path, pattern: str) -> str:
    # weights_only: torch then unpickles tensors and nothing else.
    script = (
        "import glob, torch; from safetensors.torch import save_file; "
        f"save_file({{k: v.clone().contiguous() for f in sorted(glob.glob({str(folder / pattern)!r})) "
        "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}, "
        f"{str(folder / 'model.safetensors')!r}, {{'format': 'pt'}})"
    )
    return f'{folder} has pickled weights ({pattern}), which are never loaded; convert them: python -c "{script}"'


def write_tensors(folder: str | Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = 5 * 10**9) -> None:
    """Write named arrays as model.safetensors, or as shards of at most `shard_bytes` (or one tensor) with an index.

    Holds one shard in memory. The layout is that of Hugging Face's `save_pretrained`, and the folder's former
    model*.safetensors go.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        write_file(folder / f"part-{len(parts)}.safetensors", shard)
        parts.append(list(shard))
        shard.clear()

    for name, array in tensors:
        if shard and sum(part.nbytes for part in shard.values()) + array.nbytes > shard_bytes:
            flush()
        shard[name] = np.ascontiguousarray(array)  # save_file writes the bytes of a transposed view in the wrong order
        total += array.nbytes
    flush()

    index_path = folder / "model.safetensors.index.json"
    for old in (*folder.glob("model*.safetensors"), index_path):
        old.unlink(missing_ok=True)
    names = ["model.safetensors"]
    if len(parts) > 1:
        names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for i, name in enumerate(names):
        (folder / f"part-{i}.safetensors").replace(folder / name)


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file, with the permissions of any other file (safetensors would write it for its owner alone)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


# ------------------------------------------------------------------------------------------- our tree <-> theirs


@dataclass(frozen=True)
class _Leaf:
    """Where one leaf of our tree comes from."""

    names: tuple[str, ...]  # their tensors: one a layer for a stacked leaf, otherwise one
    shape: tuple[int, ...]  # of each of them
    stacked: bool = False
    convert: Callable[[np.ndarray], np.ndarray] = lambda array: array  # one of their tensors -> ours


_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

LLAMA_MODULES = {
    "embed": "model.embed_tokens",
    "layers/input_norm": "model.layers.{i}.input_layernorm",
    "layers/q": "model.layers.{i}.self_attn.q_proj",
    "layers/k": "model.layers.{i}.self_attn.k_proj",
    "layers/v": "model.layers.{i}.self_attn.v_proj",
    "layers/q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers/k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers/o": "model.layers.{i}.self_attn.o_proj",
    "layers/post_norm": "model.layers.{i}.post_attention_layernorm",
    "layers/gate": "model.layers.{i}.mlp.gate_proj",
    "layers/up": "model.layers.{i}.mlp.up_proj",
    "layers/down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
LINEARS = ("q", "k", "v", "o", "gate", "up", "down", "head")
_EXPERT = "model.layers.{i}.expert.weight"  # of a `vmod` export; Hugging Face has none
_CONNECTOR = {"in": "connector.0", "out": "connector.2"}
_VISION = {
    "embed": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "layers/norm1": "encoder.layers.{i}.layer_norm1",
    "layers/q": "encoder.layers.{i}.self_attn.q_proj",
    "layers/k": "encoder.layers.{i}.self_attn.k_proj",
    "layers/v": "encoder.layers.{i}.self_attn.v_proj",
    "layers/o": "encoder.layers.{i}.self_attn.out_proj",
    "layers/norm2": "encoder.layers.{i}.layer_norm2",
    "layers/fc1": "encoder.layers.{i}.mlp.fc1",
    "layers/fc2": "encoder.layers.{i}.mlp.fc2",
    "post_norm": "post_layernorm",
    "head/o": "head.attention.out_proj",
    "head/norm": "head.layernorm",
    "head/fc1": "head.mlp.fc1",
    "head/fc2": "head.mlp.fc2",
}


def _leaf(modules: dict[str, str], path: str, shape: tuple[int, ...]) -> _Leaf:
    """The usual leaf: `path` (modules and leaf, joined by /) has `shape` in our tree."""
    module, _, leaf = path.rpartition("/")
    name = f"{modules[module]}.{_LEAF_NAMES[leaf]}"
    stacked = "{i}" in name
    names = tuple(name.format(i=i) for i in range(shape[0])) if stacked else (name,)
    shape = shape[1:] if stacked else shape
    if leaf == "kernel":
        return _Leaf(names, shape[::-1], stacked, np.transpose)
    return _Leaf(names, shape, stacked)


def flat(tree: Params, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": leaf}} -> {"a/b": leaf}, in the tree's order."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def nested(leaves: dict[str, Any]) -> Params:
    """The inverse of `flat`."""
    tree: Params = {}
    for path, value in leaves.items():
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = value
    return tree


def check(reader: TensorReader, what: str, expected: dict[str, tuple[int, ...]], present: Iterable[str]) -> None:
    """Raise one UserError that names the missing, the unexpected and the misshapen tensors, a few of each."""
    missing = [name for name in expected if name not in reader]
    unexpected = [name for name in present if name not in expected and not name.endswith(_BUFFERS)]
    shapes = [(name, shape, reader.shape(name)) for name, shape in expected.items() if name in reader]
    wrong = [f"{name} (expected {shape}, found {found})" for name, shape, found in shapes if shape != found]
    faults = [
        f"{fault}: {few(names)}"
        for fault, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if faults:
        raise UserError(
            f"{reader.folder}: the weights are not those of the {what} in its config; use the config.json that belongs "
            f"to them; {'; '.join(faults)}"
        )


@dataclass(frozen=True)
class LazyArray:
    """An array of our tree that is still in its file: shape and dtype are known and checked, nothing is read.

    parts: read it, already in our layout: one a layer for a stacked array (its first axis), otherwise one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[Callable[[], np.ndarray], ...]
    stacked: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array, filled part by part: a stacked 8B leaf is gigabytes, and there is never a second one."""
        out = aligned_empty(self.shape, self.dtype)
        for target, part in zip(out if self.stacked else (out,), self.parts, strict=True):
            copy_into(target, part())
        return out


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX takes over without a copy on CPU (its data begins at a multiple of 64 bytes)."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`; a transposed matrix goes in narrow bands, which is five times as fast."""
    if target.dtype == source.dtype and target.dtype.itemsize == 2:
        target, source = target.view(np.uint16), source.view(np.uint16)  # numpy has no fast copy for bfloat16
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[1], 16):
        target[:, start : start + 16] = source[:, start : start + 16]


def read_all(tree: Params) -> Params:
    """The same tree with every LazyArray read."""
    return {
        name: read_all(leaf) if isinstance(leaf, dict) else leaf.read() if isinstance(leaf, LazyArray) else leaf
        for name, leaf in tree.items()
    }


def _lazy(
    reader: TensorReader, what: str, leaves: dict[str, _Leaf], present: Iterable[str], dtype: Any = None
) -> Params:
    check(reader, what, {name: leaf.shape for leaf in leaves.values() for name in leaf.names}, present)

    def lazy(leaf: _Leaf) -> LazyArray:
        wanted = np.dtype(dtype) if dtype is not None else common_dtype([reader.dtype(name) for name in leaf.names])
        shape = leaf.convert(np.empty(leaf.shape, np.bool_)).shape  # the memory is never touched
        return LazyArray(
            (len(leaf.names), *shape) if leaf.stacked else shape,
            wanted,
            tuple(lambda name=name: leaf.convert(reader.get(name)) for name in leaf.names),
            leaf.stacked,
        )

    return nested({path: lazy(leaf) for path, leaf in leaves.items()})


def common_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The smallest dtype that holds all values of these: float32 for float16 beside bfloat16."""
    halves = {"float16", "bfloat16"} <= {dtype.name for dtype in dtypes}  # NumPy has no dtype for the two
    return np.result_type(*(np.float32 if halves and dtype.itemsize == 2 else dtype for dtype in dtypes))


def _tensors(modules: dict[str, str], leaves: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Our leaves -> their (name, array); the conversions of these leaves (none, transpose) are their own inverses."""
    for path, stack in leaves.items():
        leaf = _leaf(modules, path, tuple(stack.shape))
        layers = stack if leaf.stacked else (stack,)
        for name, layer in zip(leaf.names, layers, strict=True):
            array = leaf.convert(np.asarray(layer))
            out = aligned_empty(array.shape, array.dtype)
            copy_into(out, array)
            yield name, out


# -------------------------------------------------------------------------------------------------------- Llama


def llama_shapes(cfg: LlamaShape) -> dict[str, tuple[int, ...]]:
    """The leaves of the Llama tree, by their paths."""
    d, f, stack = cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers
    queries, keys = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    shapes = {
        "embed/embedding": (cfg.vocab_size, d),
        "layers/input_norm/scale": (stack, d),
        "layers/q/kernel": (stack, d, queries),
        "layers/k/kernel": (stack, d, keys),
        "layers/v/kernel": (stack, d, keys),
        "layers/o/kernel": (stack, queries, d),
        "layers/post_norm/scale": (stack, d),
        "layers/gate/kernel": (stack, d, f),
        "layers/up/kernel": (stack, d, f),
        "layers/down/kernel": (stack, f, d),
        "norm/scale": (d,),
    }
    if not cfg.tie_word_embeddings:
        shapes["head/kernel"] = (d, cfg.vocab_size)
    if cfg.qkv_bias:
        shapes |= {"layers/q/bias": (stack, queries), "layers/k/bias": (stack, keys), "layers/v/bias": (stack, keys)}
    if cfg.qk_norm:
        shapes |= {f"layers/{name}/scale": (stack, cfg.head_dim) for name in ("q_norm", "k_norm")}
    return shapes


def llama_arrays(reader: TensorReader, cfg: LlamaShape, dtype: Any = None) -> Params:
    """The Llama part of a checkpoint as our tree of LazyArrays, in the stored dtype or in `dtype`.

    {"embed": {"embedding" [V, d]}, "layers": {"q": {"kernel" [L, d, heads * head_dim]}, ...}, "norm", "head"}; `head`
    is absent when tied, and `layers` has an `expert` where the files have LayerExperts (a `vmod` export). A connector
    and a vision tower in the same files are left alone. Where all names lack the prefix `model.` or have another one,
    they are taken, and the log says so. Raises UserError naming missing, unexpected and misshapen tensors, and when a
    tied head is stored with other values than the embedding's.
    """
    leaves = {path: _leaf(LLAMA_MODULES, path, shape) for path, shape in llama_shapes(cfg).items()}
    reader = _under_usual_names(reader, [name for leaf in leaves.values() for name in leaf.names])
    if _EXPERT.format(i=0) in reader:
        names = tuple(_EXPERT.format(i=i) for i in range(cfg.num_hidden_layers))
        leaves["layers/expert/kernel"] = _Leaf(names, (1, cfg.hidden_size), True, lambda row: row.reshape(-1))
    prefix = _vision_prefix(reader)
    others = ("connector.", "image_newline", *([prefix] if prefix else []))  # parts that others read
    present = [name for name in reader.names() if not name.startswith(others)]
    if cfg.tie_word_embeddings and "lm_head.weight" in present:
        present.remove("lm_head.weight")
        embedding = "model.embed_tokens.weight"
        same = np.array_equal if not reader.allow_nonfinite else partial(np.array_equal, equal_nan=True)
        if embedding in reader and not same(reader.get("lm_head.weight"), reader.get(embedding)):
            raise UserError(
                f"{reader.folder}: lm_head.weight is not {embedding} although config.json ties them; "
                'set "tie_word_embeddings": false there'
            )
    return _lazy(reader, "Llama model", leaves, present, dtype)


def _under_usual_names(reader: TensorReader, expected: Sequence[str]) -> TensorReader:
    """The reader, with the `expected` names where all differ by a prefix: a decoder saved alone, or inside another."""
    mark = "embed_tokens.weight"
    inner = [name.removesuffix(mark) for name in reader.names() if name.endswith(mark)]
    if len(inner) != 1 or inner[0] == "model.":
        return reader
    outer = inner[0].removesuffix("model.")
    ours = {name: place for name in expected for place in (_prefixed(name, inner[0], outer),) if place in reader}
    if len(ours) <= sum(name in reader for name in expected):
        return reader
    log.warning("%s: its names begin with %s where 'model.' is usual: taken so", reader.folder, short(inner[0]))
    usual = {place: name for name, place in ours.items()}
    return reader.renamed(lambda name: usual.get(name, name))


def _prefixed(name: str, inner: str, outer: str) -> str:
    return inner + name.removeprefix("model.") if name.startswith("model.") else outer + name


def llama_params(reader: TensorReader, cfg: LlamaShape, dtype: Any = None) -> Params:
    """`llama_arrays`, read into memory."""
    return read_all(llama_arrays(reader, cfg, dtype))


def llama_tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `llama_params`, bit for bit: (HF name, array), one tensor in memory at a time.

    LayerExperts have no HF name and are left out (`expert_tensors` has ours). Raises ValueError while LoRA is not
    merged: Llama's own names have no place for it.
    """
    leaves = {path: array for path, array in flat(params).items() if path != "layers/expert/kernel"}
    if any("lora_" in path for path in leaves):
        raise ValueError("merge LoRA into the kernels first")
    return _tensors(LLAMA_MODULES, leaves)


def expert_tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The LayerExperts of a Llama tree, one row [1, d] a layer: (name in a `vmod` export, array)."""
    for i, row in enumerate(np.asarray(params["layers"]["expert"]["kernel"])):
        yield _EXPERT.format(i=i), row[None]


# ---------------------------------------------------------------------------------------------------- connector


def connector_arrays(reader: TensorReader, dtype: Any = None) -> Params:
    """{"in": {"kernel" [d_v, d], "bias" [d]}, "out": {"kernel" [d, d], "bias" [d]}} of `connector.{0,2}.{weight,bias}`.

    LazyArrays. The widths are those of the first weight; raises UserError naming what is missing, unexpected or does
    not fit them.
    """
    first = "connector.0.weight"
    d, d_v = shape if first in reader and len(shape := reader.shape(first)) == 2 else (0, 0)
    shapes = {"in/kernel": (d_v, d), "in/bias": (d,), "out/kernel": (d, d), "out/bias": (d,)}
    leaves = {path: _leaf(_CONNECTOR, path, shape) for path, shape in shapes.items()}
    return _lazy(reader, "connector", leaves, [n for n in reader.names() if n.startswith("connector.")], dtype)


def connector_params(reader: TensorReader, dtype: Any = None) -> Params:
    """`connector_arrays`, read into memory."""
    return read_all(connector_arrays(reader, dtype))


def connector_tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `connector_params`, bit for bit."""
    return _tensors(_CONNECTOR, flat(params))


# ------------------------------------------------------------------------------------------------------- vision


def _vision_prefix(reader: TensorReader) -> str | None:
    """What comes before the vision tower's names: "" alone, "vision_model." inside a two-tower checkpoint."""
    mark = "embeddings.patch_embedding.weight"
    prefixes = [name.removesuffix(mark) for name in reader.names() if name.endswith(mark)]
    if len(prefixes) > 1:
        raise UserError(f"{reader.folder} has {len(prefixes)} vision towers ({few(prefixes)}); keep one")
    return prefixes[0] if prefixes else None


def vision_arrays(reader: TensorReader, config: VisionConfig, dtype: Any = None) -> Params:
    """A SigLIP or CLIP vision tower, alone or inside a larger checkpoint, as `models.vision.parameter_shapes` has it.

    LazyArrays in the stored dtype or in `dtype`. Raises UserError naming what is missing, unexpected or misshapen.
    """
    d, p = config.hidden_size, config.patch_size
    prefix = _vision_prefix(reader)
    prefix = "vision_model." if prefix is None else prefix
    modules = {ours: prefix + theirs for ours, theirs in _VISION.items()}

    def third(i: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda array: array[i * d : (i + 1) * d].T

    def one(name: str, *shape: int, convert: Callable[[np.ndarray], np.ndarray] = lambda array: array) -> _Leaf:
        return _Leaf((prefix + name,), shape, convert=convert)

    patches = f"{prefix}embeddings.patch_embedding.weight"
    is_linear = patches in reader and len(reader.shape(patches)) == 2  # SigLIP 2 of any resolution
    unusual = {
        # A convolution [out, channel, row, column] is a linear layer on (row, column, channel).
        "embed/kernel": _Leaf((patches,), (d, 3 * p * p), convert=np.transpose)
        if is_linear
        else _Leaf((patches,), (d, 3, p, p), convert=lambda w: w.transpose(2, 3, 1, 0).reshape(-1, d)),
        "embed/position": one("embeddings.position_embedding.weight", config.side**2 + (config.kind == "clip"), d),
        "embed/class": one("embeddings.class_embedding", d),
        "head/probe": one("head.probe", 1, 1, d, convert=lambda w: w.reshape(d)),
    }
    for i, name in enumerate("qkv"):  # the pooling head keeps the three in one matrix
        unusual[f"head/{name}/kernel"] = one("head.attention.in_proj_weight", 3 * d, d, convert=third(i))
        unusual[f"head/{name}/bias"] = one("head.attention.in_proj_bias", 3 * d, convert=third(i))

    shapes = flat(parameter_shapes(config))
    leaves = {path: unusual.get(path) or _leaf(modules, path, shape) for path, shape in shapes.items()}
    present = [name for name in reader.names() if name.startswith(prefix)]
    return _lazy(reader, f"{config.kind} vision tower", leaves, present, dtype)


def vision_params(reader: TensorReader, config: VisionConfig, dtype: Any = None) -> Params:
    """`vision_arrays`, read into memory."""
    return read_all(vision_arrays(reader, config, dtype))


def vision_tensors(params: Params, config: VisionConfig, prefix: str = "vision_model.") -> Iterator[tuple[str, Any]]:
    """The inverse of `vision_params`, bit for bit: (HF name behind `prefix`, array)."""
    d, p = config.hidden_size, config.patch_size
    leaves = {path: np.asarray(array) for path, array in flat(params).items()}
    kernel = leaves.pop("embed/kernel").reshape(p, p, 3, d)
    yield f"{prefix}embeddings.patch_embedding.weight", np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    yield f"{prefix}embeddings.position_embedding.weight", leaves.pop("embed/position")
    if "embed/class" in leaves:
        yield f"{prefix}embeddings.class_embedding", leaves.pop("embed/class")
    if "head/probe" in leaves:
        yield f"{prefix}head.probe", leaves.pop("head/probe").reshape(1, 1, d)
        kernels = [leaves.pop(f"head/{name}/kernel").T for name in "qkv"]
        yield f"{prefix}head.attention.in_proj_weight", np.concatenate(kernels)
        yield f"{prefix}head.attention.in_proj_bias", np.concatenate([leaves.pop(f"head/{n}/bias") for n in "qkv"])
    yield from _tensors({ours: prefix + theirs for ours, theirs in _VISION.items()}, leaves)
