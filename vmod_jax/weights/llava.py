"""Whole multimodal checkpoints: LLaVA-1.5 (arXiv 2310.03744), LLaVA-1.6 and LLaVA-OneVision (arXiv 2408.03326).

A LLaVA is a CLIP or SigLIP tower, a connector and a Llama or Qwen, which is what this model is: only names differ, and
which of the tower's hidden states the connector is given. What they do with single images of high resolution (tiles,
a newline behind each row) is not done: a frame is the tower's one view of it, as in their videos.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmod_jax.errors import UserError, short
from vmod_jax.models.depth import make_policy
from vmod_jax.models.llama import LlamaConfig
from vmod_jax.models.values import number
from vmod_jax.models.video_lm import VideoLMConfig
from vmod_jax.models.vision import VisionConfig
from vmod_jax.weights import huggingface as hf
from vmod_jax.weights.huggingface import LazyArray, Params, TensorReader


class Kind(NamedTuple):
    """A model type. newline: it has the embedding `image_newline`; halved: half the tokens a side behind the connector.

    layer, strategy: what its config.json means where it says nothing.
    """

    newline: bool
    halved: bool
    layer: int = -2
    strategy: str = "default"


KINDS = {
    "llava": Kind(newline=False, halved=False),
    "llava_next": Kind(newline=True, halved=False),
    "llava_onevision": Kind(newline=True, halved=True, layer=-1, strategy="full"),
}

# Of transformers: a config.json of a LLaVA may leave them out.
_TEXT_DEFAULTS = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016},
}
_TEXT_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}

# Their prefixes -> those of our tables. Published files have the first form, transformers since 4.52 the second in
# memory; either may have "vision_model." below the tower.
_FORMS = (
    {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "vision_model.",
        "multi_modal_projector.linear_1.": "connector.0.",
        "multi_modal_projector.linear_2.": "connector.2.",
        "image_newline": "image_newline",
    },
    {
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
        "model.vision_tower.": "vision_model.",
        "model.multi_modal_projector.linear_1.": "connector.0.",
        "model.multi_modal_projector.linear_2.": "connector.2.",
        "model.image_newline": "image_newline",
    },
)
NEWLINE = "image_newline"


class _Renamed(TensorReader):
    """A LLaVA's tensors under the names of our tables; prefixes: {theirs: ours}, by which a name goes back."""

    def __init__(self, folder: Path, allow_nonfinite: bool):
        super().__init__(folder, allow_nonfinite)
        stored = self._tensors
        form = _FORMS[any(name.startswith("model.") for name in stored)]
        deep = any("vision_tower.vision_model." in name for name in stored)
        towers = {their: f"{their}vision_model." for their in form if deep and form[their] == "vision_model."}
        self.prefixes = {towers.get(their, their): ours for their, ours in form.items()}
        self._tensors = {_swap(name, self.prefixes): tensor for name, tensor in stored.items()}


def _swap(name: str, prefixes: dict[str, str]) -> str:
    """The name with the first prefix that it has exchanged; as it is without one."""
    for before, after in prefixes.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def open_llava(
    path: Path, raw: dict[str, Any], allow_nonfinite: bool = False
) -> tuple[VideoLMConfig, Params, dict[str, Any]]:
    """A LLaVA's folder -> (config under the `full` policy, LazyArrays of our tree, what `tensors` needs to go back).

    raw: its config.json. Raises UserError for options that this does not compute, and naming what does not fit.
    """
    kind = KINDS[raw["model_type"]]
    for option, known in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
        if (value := raw.get(option, known)) != known:
            raise UserError(f"{path}: {option}={short(value)} is not supported: this connector has {short(known)}")
    llama = LlamaConfig.from_hf_config(text_config(raw))
    vision, cls = _vision(path, raw, kind)
    side = vision.side
    reader = _Renamed(path, allow_nonfinite)
    arrays: Params = {}
    if (NEWLINE in reader) != kind.newline:
        fault = "lacks" if kind.newline else "has no place for"
        raise UserError(f"{path}: a {raw['model_type']} that {fault} {NEWLINE}; use the config.json of its weights")
    if kind.newline:
        arrays["newline"] = {"embedding": newline(reader, llama.hidden_size)}
    arrays["llama"] = hf.llama_arrays(reader, llama)
    arrays["connector"] = hf.connector_arrays(reader)
    arrays["vision"] = hf.vision_arrays(reader, vision)
    dtype = str(arrays["llama"]["embed"]["embedding"].dtype)
    config = VideoLMConfig(
        llama=llama,
        policy=make_policy("full", llama.num_hidden_layers),
        frame_token_id=llama.vocab_size,
        vision_hidden_size=vision.hidden_size,
        vision=vision,
        cls=cls,
        grid=(side, side),
        param_dtype="bfloat16" if dtype == "bfloat16" else "float32",
        pooled=(-(-side // 2), -(-side // 2)) if kind.halved else None,
        newline_token_id=_token_id(raw, "image") if kind.newline else None,
    )
    return config, arrays, {"config": raw, "prefixes": reader.prefixes}


def text_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of a LLaVA's language model, whole. Raises UserError for another than a Llama or Qwen."""
    text = _section(raw, "text_config")
    kind = text.get("model_type", "qwen2" if raw["model_type"] == "llava_onevision" else "llama")
    if kind not in ("mistral", *_TEXT_DEFAULTS):
        raise UserError(
            f"text_config.model_type {short(kind)} is not supported: bring a LLaVA of a Llama, Mistral or Qwen2"
        )
    defaults = _TEXT_SIZES | _TEXT_DEFAULTS[kind] if kind in _TEXT_DEFAULTS else {}
    whole = {"model_type": kind, **defaults, **text}
    tied = raw.get("tie_word_embeddings") or whole.get("tie_word_embeddings")
    return whole | {"tie_word_embeddings": bool(tied)}


def _vision(path: Path, raw: dict[str, Any], kind: Kind) -> tuple[VisionConfig, bool]:
    """The tower with the hidden state that its connector is given, and whether its CLS token comes along."""
    vision = VisionConfig.from_hf_config(_section(raw, "vision_config"))
    layer = raw.get("vision_feature_layer", kind.layer)
    if isinstance(layer, list):
        raise UserError(f"{path}: vision_feature_layer={short(layer)}: features of several layers are not supported")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise UserError(f"{path}: vision_feature_layer={short(layer)} is no number of a layer; correct config.json")
    layer -= vision.num_hidden_layers + 1 if layer >= 0 else 0
    strategy = raw.get("vision_feature_select_strategy", kind.strategy)
    if strategy not in ("default", "full") or (vision.kind == "siglip" and strategy == "default"):
        raise UserError(f"{path}: vision_feature_select_strategy={short(strategy)} is not supported with {vision.kind}")
    fields = vision.to_dict() | {"feature_layer": layer}
    return VisionConfig.from_dict(fields), vision.kind == "clip" and strategy == "full"


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """An object of config.json; {} where it is left out."""
    if not isinstance(section := raw.get(name) or {}, dict):
        raise UserError(f"config.json: {name} is {short(section)}, not an object; correct it")
    return section


def newline(reader: TensorReader, width: int) -> LazyArray:
    """`image_newline`, [d], in its file. Raises UserError where there is none, or one of another width."""
    hf.check(reader, "LLaVA", {NEWLINE: (width,)}, ())
    return LazyArray((width,), reader.dtype(NEWLINE), (lambda: reader.get(NEWLINE),))


def _token_id(raw: dict[str, Any], what: str) -> int:
    name = next((name for name in (f"{what}_token_index", f"{what}_token_id") if name in raw), None)
    return int(number(raw, name, above=-1)) if name else 0


def tensors(params: Params, vision: VisionConfig, prefixes: dict[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """The model's arrays, LoRA merged, under the names that its LLaVA had: the inverse of `open_llava`."""
    back = {ours: theirs for theirs, ours in prefixes.items()}
    for part in (
        hf.llama_tensors(params["llama"]),
        hf.connector_tensors(params["connector"]),
        hf.vision_tensors(params["vision"], vision),
    ):
        yield from ((_swap(name, back), array) for name, array in part)
    if "newline" in params:
        yield back[NEWLINE], np.asarray(params["newline"]["embedding"])
