"""GGUF files of Llama-shaped models (llama.cpp's format): read as the Hugging Face folder they were made from.

`GgufReader` gives tensors under Hugging Face's names, dequantised one at a time by the `gguf` package; `hf_config` the
config.json that the file's metadata describe. Quantised weights become float32; F32, F16 and BF16 stay what they are.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vmod_jax.errors import UserError
from vmod_jax.weights.huggingface import TensorReader

BAND_VALUES = 2**22  # dequantised at a time: what is held beside a tensor stays small

_STORED = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

# Their modules -> Hugging Face's; behind each comes ".weight" or ".bias".
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "attn_q": "model.layers.{i}.self_attn.q_proj",
    "attn_k": "model.layers.{i}.self_attn.k_proj",
    "attn_v": "model.layers.{i}.self_attn.v_proj",
    "attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "attn_output": "model.layers.{i}.self_attn.o_proj",
    "ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "ffn_up": "model.layers.{i}.mlp.up_proj",
    "ffn_down": "model.layers.{i}.mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"  # by what each pair's frequency is divided: Llama 3.x's scaling, written out

# general.architecture -> whether q's and k's rows are reordered for rotations of neighbouring channels
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}
_REORDERED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}  # modules -> their heads
_TOKENIZER = "tokenizer.ggml.model"

# Metadata behind "ARCHITECTURE." -> config.json's keys.
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
# Others that decide what is computed and are looked at below, and one that decides nothing.
_HEADS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_SCALING = {"rope.scaling.type": "rope_type", "rope.scaling.factor": "factor"}
_IDLE = ("tensor_data_layout",)
_ABSENT = ("expert_count", "expert_used_count")  # harmless where they are 0
_TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: str
    offset: int  # in the file
    row_bytes: int  # of one row, the last axis
    heads: int = 0  # whose rows are to be brought back into Hugging Face's order


class GgufReader(TensorReader):
    """The tensors of a GGUF file under Hugging Face's names; opening reads the header only, no file stays open.

    metadata: {key: value} of general.*, the architecture's and tokenizer.ggml.*_id; rope_freqs: f32[h / 2] or None.
    Raises UserError for a file that is none, or truncated, of another architecture, or in a quantisation that this
    does not read.
    """

    def __init__(self, path: str | Path, allow_nonfinite: bool = False):
        self.folder, self.allow_nonfinite = Path(path), allow_nonfinite
        file = _open(self.folder)
        self.metadata = {key: file.fields[key].contents() for key in file.fields if _is_short(key)}
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"{path}: architecture '{self.architecture}' is not supported: bring a GGUF of {known}")
        heads = {}
        if ARCHITECTURES[self.architecture]:
            heads = {module: self.metadata.get(f"{self.architecture}.{key}") for module, key in _REORDERED.items()}
        self._tensors: Any = dict(_entry(self.folder, tensor, heads) for tensor in file.tensors)
        self.rope_freqs = self.get(_ROPE_FREQS) if _ROPE_FREQS in self._tensors else None
        self._tensors.pop(_ROPE_FREQS, None)

    def dtype(self, name: str) -> np.dtype:
        """As `get` returns it."""
        return np.dtype(_STORED.get(self._tensors[name].kind, np.float32))

    def get(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face's shape and order, dequantised band by band."""
        tensor = self._tensors[name]
        *lead, width = tensor.shape
        rows = math.prod(lead)
        out = np.empty((rows, width), self.dtype(name))
        band = max(1, BAND_VALUES // width)
        with open(self.folder, "rb") as file:
            file.seek(tensor.offset)
            for start in range(0, rows, band):
                count = min(band, rows - start)
                raw = np.fromfile(file, np.uint8, count * tensor.row_bytes).reshape(count, tensor.row_bytes)
                out[start : start + count] = _values(raw, tensor.kind)
        out = self._checked(name, out.reshape(tensor.shape))
        return _halves(out, tensor.heads) if tensor.heads else out


def _open(path: Path) -> Any:
    """The header by the gguf package, which maps the file: let go of what this returns."""
    try:
        import gguf
    except ImportError:
        raise UserError("reading GGUF files needs the gguf package: pip install 'vmod_jax[gguf]'") from None
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError, TypeError) as error:
        raise UserError(f"{path} is truncated or no GGUF file ({error}); download it again") from None


def _is_short(key: str) -> bool:
    """Whether a key of the metadata is no long list of tokens."""
    return not key.startswith("tokenizer.") or key == _TOKENIZER or key.endswith("_token_id")


def _entry(path: Path, tensor: Any, heads: dict[str, int | None]) -> tuple[str, _Tensor]:
    """(Hugging Face's name, where it lies) of one of the gguf package's tensors."""
    kind, known = tensor.tensor_type.name, (*_STORED, *_QUANTISED)
    if kind not in known:
        raise UserError(f"{path}: {tensor.name} is stored as {kind}; use a file in {', '.join(known)}")
    shape = tuple(int(x) for x in reversed(tensor.shape))
    if tensor.data_offset + tensor.n_bytes > path.stat().st_size:
        raise UserError(f"{path} is truncated: {tensor.name} lies beyond its end; download it again")
    name, module = _hf_name(tensor.name)
    row_bytes = int(tensor.n_bytes) // math.prod(shape[:-1])
    return name, _Tensor(shape, kind, int(tensor.data_offset), row_bytes, heads.get(module) or 0)


def _values(raw: np.ndarray, kind: str) -> np.ndarray:
    """u8[rows, bytes] -> [rows, values]."""
    if kind in _STORED:
        return raw.view(_STORED[kind])
    from gguf import GGMLQuantizationType, dequantize

    return dequantize(raw, GGMLQuantizationType[kind])


def _hf_name(name: str) -> tuple[str, str]:
    """(Hugging Face's name, their module); a name that is not in the table stays, for `check` to complain of."""
    block, _, rest = name.removeprefix("blk.").partition(".") if name.startswith("blk.") else ("", "", name)
    module, _, leaf = rest.rpartition(".")
    return (f"{_MODULES[module].format(i=block)}.{leaf}", module) if module in _MODULES else (name, module)


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (0, h/2, 1, h/2 + 1, ...), whose neighbours rotate together, to (0, 1, ..., h - 1)."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def hf_config(reader: GgufReader) -> dict[str, Any]:
    """config.json's values for the file; raises UserError for metadata that are not understood."""
    known = (*_KEYS, *_HEADS, *_SCALING, *_IDLE, *_ABSENT, "rope.scaling.original_context_length")
    prefix = f"{reader.architecture}."
    own = {k.removeprefix(prefix): v for k, v in reader.metadata.items() if k.startswith(prefix)}
    strange = [key for key in own if key not in known] + [key for key in _ABSENT if own.get(key)]
    strange += [key for key in _KEYS if isinstance(own.get(key), list)]
    if strange:
        value = f"{prefix}{strange[0]} = {own[strange[0]]}"
        raise UserError(f"{reader.folder}: {value} is not understood: bring a plain model")
    raw = {"model_type": reader.architecture} | {_KEYS[key]: own[key] for key in _KEYS if key in own}
    lengths = {own[key] for key in _HEADS if key in own}
    if len(lengths) > 1:
        raise UserError(f"{reader.folder}: keys, values and rotations of {sorted(lengths)} channels: they must agree")
    embedding = "model.embed_tokens.weight"
    raw |= {"head_dim": lengths.pop()} if lengths else {}
    raw |= {"vocab_size": reader.shape(embedding)[0]} if embedding in reader else {}
    raw["tie_word_embeddings"] = "lm_head.weight" not in reader
    scaling = {_SCALING[key]: own[key] for key in _SCALING if key in own}
    if scaling and scaling.get("rope_type") != "none":
        raw["rope_scaling"] = scaling
    if reader.rope_freqs is not None:
        raw["rope_scaling"] = _llama3_scaling(reader.folder, reader.rope_freqs, raw)
    ids = {ours: reader.metadata.get(f"tokenizer.ggml.{theirs}") for theirs, ours in _TOKEN_IDS.items()}
    return raw | {name: value for name, value in ids.items() if value is not None}


def _llama3_scaling(path: Path, divisors: np.ndarray, raw: dict[str, Any]) -> dict[str, Any]:
    """The "llama3" scaling that divides frequencies as the file's tensor does; the file has no other word of it."""
    from vmod_jax.models.llama import LlamaConfig, rope_frequencies

    scaling = {
        "rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    with_it = LlamaConfig.from_hf_config({**raw, "rope_scaling": scaling})
    divided = rope_frequencies(LlamaConfig.from_hf_config(raw)) / rope_frequencies(with_it)
    if divided.shape != divisors.shape or not np.allclose(divided, divisors, rtol=1e-5):
        raise UserError(f"{path}: {_ROPE_FREQS} scales positions as no Llama 3 does: bring its safetensors")
    return scaling


def has_tokenizer(path: Path) -> bool:
    """Whether the file brings a tokenizer."""
    return _TOKENIZER in _open(path).fields


def load_tokenizer(path: Path) -> Any:
    """The file's own tokenizer, by transformers; raises UserError where it cannot make one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except (OSError, ValueError, ImportError, KeyError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: transformers makes no tokenizer of it ({reason}); import its safetensors") from None
