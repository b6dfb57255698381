"""PEFT's LoRA adapters (adapter_config.json + adapter_model.safetensors) <-> our LoRA pairs and connector.

The form that VideoLLM-online is published in: LoRA on q, k, v, o, gate, up, down and lm_head, the connector saved whole
(`modules_to_save`). A layer that an adapter leaves out gets a pair whose `lora_b` is zero: it changes nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmod_jax.errors import UserError
from vmod_jax.models.llama import LoraConfig
from vmod_jax.weights import huggingface as hf
from vmod_jax.weights.huggingface import LazyArray, Params, TensorReader

PREFIX = "base_model.model."
TARGETS = {module: name for module, name in hf.LLAMA_MODULES.items() if module.split("/")[-1] in hf.LINEARS}
# The head and the embedding, which PEFT may save whole beside a LoRA on the head: module -> names.
_WHOLE = {
    "head/kernel": ("lm_head.base_layer.weight", "lm_head.weight"),
    "embed/embedding": ("model.embed_tokens.base_layer.weight", "model.embed_tokens.weight"),
}
# Options that change what is computed, with the values that leave plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
}


class Adapter(NamedTuple):
    """What an adapter folder holds, as LazyArrays of our tree.

    pairs: {"layers": {"q": {"lora_a" [L, in, r], "lora_b" [L, r, out]}, ...}, "head": {...}}, its modules only, float32
    connector: the whole connector or None; whole: {"head/kernel": ..., "embed/embedding": ...}, those it brings
    """

    lora: LoraConfig
    pairs: Params
    connector: Params | None
    whole: dict[str, LazyArray]


class _Renamed(TensorReader):
    """An adapter's tensors under the names of the base model's modules."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._tensors = {_plain_name(name): tensor for name, tensor in self._tensors.items()}
        self._stored = {_plain_name(name): name for name in TensorReader(folder).names()}

    def get(self, name: str) -> np.ndarray:
        return self._read(name, self._stored[name])


def _plain_name(name: str) -> str:
    """base_model.model.connector.modules_to_save.default.0.weight -> connector.0.weight"""
    parts = name.removeprefix(PREFIX).split(".")
    return ".".join(part for part in parts if part not in ("modules_to_save", "default"))


def open_adapter(folder: str | Path, cfg: hf.LlamaShape) -> Adapter:
    """Reads an adapter's config and headers, and checks all names and shapes against a Llama of shape `cfg`.

    Raises UserError for a folder that holds none, for kinds of adapter other than LoRA, and naming every missing,
    unexpected and misshapen tensor.
    """
    folder = Path(folder)
    config = hf.read_json_file(folder, "adapter_config.json", "is not a PEFT adapter folder")
    for option, allowed in _PLAIN.items():
        if (value := config.get(option, allowed[0])) not in allowed:
            raise UserError(f"{folder}: {option}={value!r} is not supported; bring a plain LoRA adapter, or merge it")
    rank = int(config["r"])
    alpha = float(config["lora_alpha"]) * (rank**0.5 if config.get("use_rslora") else 1.0)
    reader = _Renamed(folder)
    names = reader.names()

    shapes, layers = hf.llama_shapes(cfg) | {"head/kernel": (cfg.hidden_size, cfg.vocab_size)}, cfg.num_hidden_layers
    expected: dict[str, tuple[int, ...]] = {}
    pairs: dict[str, LazyArray] = {}
    for module, template in TARGETS.items():
        size_in, size_out = shapes[f"{module}/kernel"][-2:]
        every = [template.format(i=i) for i in range(layers if "{i}" in template else 1)]
        here = [any(f"{name}.lora_{side}.weight" in reader for side in "AB") for name in every]
        for side, shape in (("A", (rank, size_in)), ("B", (size_out, rank))):
            expected |= {f"{name}.lora_{side}.weight": shape for name, there in zip(every, here, strict=True) if there}
            parts = tuple(
                _reading(reader, f"{name}.lora_{side}.weight") if there else _absent(side, shape, i)
                for i, (name, there) in enumerate(zip(every, here, strict=True))
            )
            if any(here):
                stacked = "{i}" in template
                full = (layers, *shape[::-1]) if stacked else shape[::-1]
                pairs[f"{module}/lora_{side.lower()}"] = LazyArray(full, np.dtype(np.float32), parts, stacked)
    if not pairs:
        raise UserError(f"{folder} has no LoRA pair on {', '.join(hf.LINEARS)}; is it an adapter of another model?")

    whole: dict[str, LazyArray] = {}
    for path, candidates in _WHOLE.items():
        for name in (name for name in candidates if name in reader):
            shape = (cfg.vocab_size, cfg.hidden_size)
            expected[name] = shape
            turn = path == "head/kernel"
            read = _reading(reader, name) if turn else (lambda name=name: reader.get(name))
            whole[path] = LazyArray(shape[::-1] if turn else shape, reader.dtype(name), (read,))
    connector = hf.connector_arrays(reader) if any(name.startswith("connector.") for name in names) else None
    hf.check(reader, "LoRA adapter", expected, [name for name in names if not name.startswith("connector.")])
    lora = LoraConfig(rank=rank, alpha=alpha, dropout=float(config.get("lora_dropout", 0.0)))
    return Adapter(lora, hf.nested(pairs), connector, whole)


def _reading(reader: TensorReader, name: str):
    return lambda: reader.get(name).T


def _absent(side: str, shape: tuple[int, ...], layer: int):
    """The documented initialisation of a pair: a ~ N(0, 1/in), b = 0."""
    if side == "B":
        return lambda: np.zeros(shape[::-1], np.float32)
    return lambda: np.random.default_rng(layer).normal(0, shape[1] ** -0.5, shape[::-1]).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- merging


def merge(llama: Params, lora: LoraConfig, tied: bool) -> Params:
    """The tree of a Llama without LoRA that computes the same: W + (alpha / r) A B, summed in float32, in W's dtype.

    A tied head with a LoRA pair becomes a head of its own. Kernels are merged a layer at a time, when they are written.
    """
    head = dict(llama.get("head", {}))
    if tied and "lora_a" in head:
        head["kernel"] = np.asarray(llama["embed"]["embedding"]).T
    layers = {name: _merged(holder, lora) for name, holder in llama["layers"].items()}
    out = {**llama, "layers": layers, "head": _merged(head, lora)}
    return out if out["head"] else {name: tree for name, tree in out.items() if name != "head"}


def _merged(holder: Params, lora: LoraConfig) -> Params:
    if "lora_a" not in holder:
        return holder
    base = {name: leaf for name, leaf in holder.items() if not name.startswith("lora_")}
    return {**base, "kernel": _Sum(np.asarray(holder["kernel"]), holder["lora_a"], holder["lora_b"], lora.scale)}


class _Sum:
    """kernel + scale * a b, computed when it is asked for; iterating gives the layers of a stacked one."""

    def __init__(self, kernel: np.ndarray, a: Any, b: Any, scale: float):
        self.kernel, self.a, self.b, self.scale, self.shape = kernel, np.asarray(a), np.asarray(b), scale, kernel.shape

    def __iter__(self) -> Iterator[np.ndarray]:
        for kernel, a, b in zip(self.kernel, self.a, self.b, strict=True):
            yield np.asarray(_Sum(kernel, a, b, self.scale))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return (self.kernel.astype(np.float32) + self.scale * (self.a @ self.b)).astype(self.kernel.dtype)


# -------------------------------------------------------------------------------------------------------- export


def adapter_tensors(llama: Params, connector: Params | None) -> Iterator[tuple[str, np.ndarray]]:
    """Our LoRA pairs and connector under PEFT's names: the inverse of `open_adapter`."""
    for module, template in TARGETS.items():
        holder: Any = llama
        for part in module.split("/"):
            holder = holder.get(part, {})
        for side in "AB":
            if (leaf := holder.get(f"lora_{side.lower()}")) is None:
                continue
            stack = np.asarray(leaf)
            for i, pair in enumerate(stack if "{i}" in template else stack[None]):
                yield f"{PREFIX}{template.format(i=i)}.lora_{side}.weight", np.ascontiguousarray(pair.T)
    for name, array in hf.connector_tensors(connector) if connector else ():
        yield PREFIX + name, array


def adapter_config(lora: LoraConfig, base: str | None, connector: bool) -> dict[str, Any]:
    """adapter_config.json for `adapter_tensors`; base: the name or folder of the model that it belongs to."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in TARGETS.values()}),
        "modules_to_save": ["connector"] if connector else None,
        "inference_mode": True,
    }
