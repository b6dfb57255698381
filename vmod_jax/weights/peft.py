"""PEFT's LoRA adapters (adapter_config.json + adapter_model.safetensors) <-> our LoRA pairs and connector.

The form that VideoLLM-online is published in: LoRA on q, k, v, o, gate, up, down and lm_head, the connector saved whole
(`modules_to_save`). A layer that an adapter leaves out gets a pair whose `lora_b` is zero: it changes nothing.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmod_jax.errors import UserError, few, short
from vmod_jax.models.llama import LoraConfig
from vmod_jax.models.values import boolean, count, number
from vmod_jax.weights import huggingface as hf
from vmod_jax.weights.huggingface import LazyArray, Params, TensorReader

PREFIX = "base_model.model."
TARGETS = {module: name for module, name in hf.LLAMA_MODULES.items() if module.split("/")[-1] in hf.LINEARS}
# The head and the embedding, which PEFT may save whole beside a LoRA on the head: module -> names.
_WHOLE = {
    "head/kernel": ("lm_head.base_layer.weight", "lm_head.weight"),
    "embed/embedding": ("model.embed_tokens.base_layer.weight", "model.embed_tokens.weight"),
}
# The fields of adapter_config.json. Those that are read or say nothing about what is computed may hold anything; the
# others hold what leaves plain LoRA (null and absent: PEFT's default), or are refused. So is a field that is not here,
# unless it is empty: a later PEFT computes something by it.
_READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save")
_READ += ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_FREE = ("peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")
_FREE += ("runtime_config", "megatron_core", "eva_config")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    # Initialisations that leave the base as it is; all others change it before the pairs are loaded.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "bias": ("none",),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "loftq_config": ({},),
    "qalora_group_size": (16,),
    "target_parameters": (None, []),
    **dict.fromkeys(("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "ensure_weight_tying"), (False,)),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "alora_invocation_tokens"), (None,)),
    **dict.fromkeys(("megatron_config", "corda_config", "lora_ga_config", "velora_config", "kasa_config"), (None,)),
    **dict.fromkeys(("monteclora_config", "arrow_config"), (None,)),
    "use_bdlora": (None, False),
}
_EMPTY = (None, False, [], {}, "")


class Adapter(NamedTuple):
    """What an adapter folder holds, as LazyArrays of our tree.

    pairs: {"layers": {"q": {"lora_a" [L, in, r], "lora_b" [L, r, out]}, ...}, "head": {...}}, its modules only, float32
    connector: the whole connector or None; whole: {"head/kernel": ..., "embed/embedding": ...}, those it brings
    saved: those of `whole` that stand beside the base's own instead of in their place (`modules_to_save`): where the
    base ties the two, they no longer are
    """

    lora: LoraConfig
    pairs: Params
    connector: Params | None
    whole: dict[str, LazyArray]
    saved: frozenset[str]


def _plain_name(name: str) -> str:
    """base_model.model.connector.modules_to_save.default.0.weight -> connector.0.weight"""
    parts = name.removeprefix(PREFIX).split(".")
    return ".".join(part for part in parts if part not in ("modules_to_save", "default"))


def open_adapter(folder: str | Path, cfg: hf.LlamaShape, allow_nonfinite: bool = False) -> Adapter:
    """Reads an adapter's config and headers, and checks all names and shapes against a Llama of shape `cfg`.

    Raises UserError for a folder that holds none, for kinds of adapter other than LoRA and for every option that
    changes more than plain LoRA does, and naming missing, unexpected and misshapen tensors.
    """
    folder = Path(folder)
    config = hf.read_json_file(folder, "adapter_config.json", "is not a PEFT adapter folder")
    _check_plain(folder, config)
    file = f"{folder}/adapter_config.json"
    rank = count(config, "r", file=file)
    alpha = float(number(config, "lora_alpha", file=file)) * (
        rank**0.5 if boolean(config, "use_rslora", False, file=file) else 1.0
    )
    dropout = float(number({"lora_dropout": 0.0} | _given(config), "lora_dropout", above=-1.0, file=file))
    reader = TensorReader(folder, allow_nonfinite).renamed(_plain_name)
    names = reader.names()
    targeted = _targets(folder, config)
    if beside := [n for n in names if ".lora_" in n and not targeted(n.partition(".lora_")[0])]:
        raise UserError(
            f"{folder}: PEFT leaves out {few(beside)}, which target_modules does not name; correct one of them"
        )

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
    saved: set[str] = set()
    for path, candidates in _WHOLE.items():
        for name in (name for name in candidates if name in reader):
            shape = (cfg.vocab_size, cfg.hidden_size)
            expected[name] = shape
            turn = path == "head/kernel"
            read = _reading(reader, name) if turn else (lambda name=name: reader.get(name))
            whole[path] = LazyArray(shape[::-1] if turn else shape, reader.dtype(name), (read,))
            if _is_saved(config, name.removesuffix(".weight")):
                saved.add(path)
    connector = hf.connector_arrays(reader) if any(name.startswith("connector.") for name in names) else None
    hf.check(reader, "LoRA adapter", expected, [name for name in names if not name.startswith("connector.")])
    lora = LoraConfig(rank=rank, alpha=alpha, dropout=dropout)
    return Adapter(lora, hf.nested(pairs), connector, whole, frozenset(saved))


def _check_plain(folder: Path, config: dict[str, Any]) -> None:
    """Raises UserError for an adapter that computes anything but plain LoRA, as far as its config says so."""
    unknown = config.keys() - _PLAIN.keys() - {*_READ, *_FREE}
    for option in (*_PLAIN, *sorted(unknown)):
        value, allowed = config.get(option), (None, *_PLAIN.get(option, _EMPTY))
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise UserError(
                f"{folder}: {option}={short(value)} is not supported; bring a plain LoRA adapter, or merge it"
            )


def _given(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}


def _is_saved(config: dict[str, Any], module: str) -> bool:
    """Whether `modules_to_save` names a module of the base: by its name or the end of it."""
    return any(module.endswith(name) for name in _names(config, "modules_to_save"))


def _names(config: dict[str, Any], option: str) -> list[str]:
    """A list of names, or the one that stands alone."""
    value = config.get(option) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"adapter_config.json: {option} is {short(value)}, not a list of names; correct it")
    return value


def _targets(folder: Path, config: dict[str, Any]) -> Callable[[str], bool]:
    """Whether PEFT puts a pair on a module of the base; the tensors of other pairs it drops without a word."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not targets:
        raise UserError(f"{folder}: adapter_config.json lacks target_modules: which layers does it belong to?")
    ends, left_out, saved = (_names(config, o) for o in ("target_modules", "exclude_modules", "modules_to_save"))
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or None
    pattern = "|".join(_names(config, "layers_pattern")) or r"[^.]*"

    def matches(names: list[str], module: str) -> bool:
        return any(module == name or module.endswith(f".{name}") for name in names)

    def targeted(module: str) -> bool:
        out = re.fullmatch(excluded, module) if isinstance(excluded, str) else matches(left_out, module)
        if out or any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
            return False
        if isinstance(targets, str):
            whole = targets.lower() == "all-linear"
            return module != "lm_head" if whole else bool(re.fullmatch(targets, module))
        if not matches(ends, module) or layers is None:
            return matches(ends, module)
        place = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", module)
        return bool(place) and int(place[1]) in layers

    def checked(module: str) -> bool:
        try:
            return targeted(module)
        except (re.error, TypeError) as error:
            raise UserError(f"{folder}: its target_modules cannot be read ({short(error)}); correct them") from None

    return checked


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
