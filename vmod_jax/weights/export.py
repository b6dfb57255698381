"""Writes a model as others read it: a stock Llama, a PEFT adapter, or the whole model with its PyTorch runtime."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vmod_jax.errors import UserError
from vmod_jax.models.experts import learned_layers
from vmod_jax.models.llama import KINDS, Kind, LlamaConfig, share_router
from vmod_jax.models.video_lm import VideoLMConfig
from vmod_jax.weights import huggingface as hf
from vmod_jax.weights import llava, peft
from vmod_jax.weights.folder import MODEL_TYPE, without_lora

SHARD_BYTES = 2 * 10**9  # a shard is held in memory while it is written
RUNTIME = Path(__file__).parent / "torch_runtime"
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
    "*processor_config.json",
)  # fmt: skip


def llama_folder(out: Path, config: VideoLMConfig, params: Any, generation: dict[str, Any]) -> str:
    """A folder that transformers opens as a Llama or Qwen, LoRA merged; -> one line on what it leaves out, or ""."""
    llama = _merged(config, params)
    tied = config.llama.tie_word_embeddings and "head" not in llama
    written = llama_config(config.llama, generation) | {"tie_word_embeddings": tied, **_dtype(llama)}
    write_json(out / "config.json", written)
    if generation:
        write_json(out / "generation_config.json", generation)
    hf.write_tensors(out, hf.llama_tensors(llama), SHARD_BYTES)
    return _left_out(config, ["connector"] + (["vision tower"] if "vision" in params else []))


def llava_folder(out: Path, config: VideoLMConfig, params: Any, form: dict[str, Any] | None) -> str:
    """A folder in the form of the LLaVA that the model was imported from; -> one line on what it leaves out, or "".

    form: `folder.Opened.llava`. Raises UserError for a model that was none.
    """
    if form is None or config.vision is None:
        raise UserError("the model was not imported from a LLaVA, whose form it would go back to; use --format vmod")
    llama = _merged(config, params)
    if config.llama.tie_word_embeddings and "head" in llama:
        raise UserError("LoRA gave the tied head values of its own, which a LLaVA has no place for; use --format vmod")
    write_json(out / "config.json", form["config"])
    whole = {**params, "llama": llama}
    hf.write_tensors(out, llava.tensors(whole, config.vision, form["prefixes"]), SHARD_BYTES)
    return _left_out(config, [])


def peft_folder(out: Path, config: VideoLMConfig, params: Any, base: str | None) -> str:
    """A LoRA adapter with the connector saved whole; -> one line on what it leaves out, or "".

    base: the model that the adapter belongs to. Raises UserError for a model without LoRA.
    """
    if not config.lora.rank:
        raise UserError("the model has no LoRA pairs: nothing to write as an adapter; use --format llama or vmod")
    tensors = dict(peft.adapter_tensors(params["llama"], params["connector"]))
    hf.write_file(out / "adapter_model.safetensors", tensors)
    write_json(out / "adapter_config.json", peft.adapter_config(config.lora, base, connector=True))
    return _left_out(config, [])


def vmod_folder(out: Path, config: VideoLMConfig, params: Any, generation: dict[str, Any]) -> str:
    """The whole model, LoRA merged, with the PyTorch files that run it (trust_remote_code).

    A shared router is written for every layer: the runtime needs no word of it.
    """
    llama = _merged(config, params)
    if config.shared_router:
        llama = {**llama, "layers": share_router(llama["layers"])}
    tied = config.llama.tie_word_embeddings and "head" not in llama
    video_lm = json.loads(without_lora(config).to_json())
    video_lm["llama"]["tie_word_embeddings"] = tied
    code = {"AutoConfig": "configuration_vmod.VideoLMConfig", "AutoModel": "modeling_vmod.VideoLM"}
    written = {
        "model_type": MODEL_TYPE,
        "architectures": ["VideoLM"],
        "auto_map": code | {"AutoModelForCausalLM": code["AutoModel"]},
        **_dtype(llama),
        **{name: generation[name] for name in ("bos_token_id", "eos_token_id") if name in generation},
        "tie_word_embeddings": False,  # Hugging Face's: the model ties its head itself
        "video_lm": video_lm,
    }
    write_json(out / "config.json", written)
    if generation:
        write_json(out / "generation_config.json", generation)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from hf.llama_tensors(llama)
        yield from hf.expert_tensors(llama)
        yield from hf.connector_tensors(params["connector"])
        if config.vision is not None and "vision" in params:
            yield from hf.vision_tensors(params["vision"], config.vision)
        if "newline" in params:
            yield llava.NEWLINE, np.asarray(params["newline"]["embedding"])

    hf.write_tensors(out, tensors(), SHARD_BYTES)
    for file in sorted(RUNTIME.glob("*.py")):
        shutil.copyfile(file, out / file.name)
    return ""


def kind(config: LlamaConfig) -> tuple[str, Kind]:
    """The model type whose blocks compute what the decoder's do. Raises UserError where none does."""
    for name, one in KINDS.items():
        if (one.qkv_bias, one.qk_norm) == (config.qkv_bias, config.qk_norm):
            return name, one
    raise UserError("no Hugging Face model has both biases on q, k, v and norms on q and k; use --format vmod")


def llama_config(config: LlamaConfig, generation: dict[str, Any]) -> dict[str, Any]:
    """config.json of the decoder's class, in the form that transformers 4 and 5 both read."""
    scaling = config.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling is not None:
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        more = {name: getattr(scaling, name) for name in names} if scaling.rope_type == "llama3" else {}
        rope = {"rope_type": scaling.rope_type, "factor": scaling.factor, **more}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_theta")
    model_type, made = kind(config)
    return {
        "architectures": [made.architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **{name: getattr(config, name) for name in names},
        "rope_scaling": rope,
        **{name: generation.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies a tokenizer's files, as they are."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out / file.name)


def _merged(config: VideoLMConfig, params: Any) -> Any:
    if not config.lora.rank:
        return params["llama"]
    return peft.merge(params["llama"], config.lora, config.llama.tie_word_embeddings)


def _dtype(llama: Any) -> dict[str, str]:
    """The dtype under the name that transformers 4 knows and under the one that 5 does."""
    name = str(np.asarray(llama["norm"]["scale"]).dtype)
    return {"torch_dtype": name, "dtype": name}


def _left_out(config: VideoLMConfig, parts: list[str]) -> str:
    """What a stock Llama has no place for, in one line; "" for nothing."""
    parts = parts + (["LayerExperts"] if learned_layers(config.policy) else [])
    line = f"left out: {', '.join(parts)}" if parts else ""
    if any(spec.routed for spec in config.policy):
        line += f"{'; ' if line else ''}the policy is not there: every token goes through every layer"
    return line
