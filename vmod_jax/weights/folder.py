"""Opens what users bring: a Hugging Face folder, with a vision tower or a PEFT adapter from other folders beside it.

Opening reads configurations and headers only and checks every name and shape; the arrays stay in their files until
`lazy.place` or `lazy.save` reads them, one at a time.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vmod_jax.errors import UserError, short
from vmod_jax.models.depth import make_policy
from vmod_jax.models.llama import LlamaConfig, LoraConfig
from vmod_jax.models.video_lm import VideoLMConfig, init_params
from vmod_jax.models.vision import VisionConfig, check_frame_tokens
from vmod_jax.weights import gguf, llava, peft
from vmod_jax.weights import huggingface as hf
from vmod_jax.weights.huggingface import LazyArray, Params, TensorReader

log = logging.getLogger(__name__)

MODEL_TYPE = "videollm_mod"  # of `vmod export --format vmod`; its config.json has our model.json under "video_lm"
GGUF = ".gguf"
FEATURE_SIZE = 1024  # d_v where nothing says it: that of SigLIP-L and CLIP-L
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Opened(NamedTuple):
    """config: under the `full` policy (a `vmod` export: its own); arrays: LazyArrays of our tree, without what the
    files lack; tokenizer: the folder of its files, or None; generation: generation_config.json's values; llava: what
    `llava.tensors` and its config.json need to go back, of a whole multimodal checkpoint.
    """

    config: VideoLMConfig
    arrays: Params
    tokenizer: Path | None
    generation: dict[str, Any]
    llava: dict[str, Any] | None = None


def open_folder(
    path: str | Path,
    vision: str | Path | None = None,
    adapter: str | Path | None = None,
    allow_nonfinite: bool = False,
) -> Opened:
    """A Llama's or Qwen's folder or GGUF file, a LLaVA's folder, VideoLLM-online's (frame keys in its config,
    `connector.*`), or a `vmod` export.

    vision: a SigLIP or CLIP folder, whose tower comes with the model; adapter: a PEFT folder, whose LoRA pairs and
    connector come on top. Raises UserError for whatever does not fit, before any array is read, and, unless
    allow_nonfinite, as soon as one with NaN or infinity in it is.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise UserError(f"{path} is a PEFT adapter: import its base model and name it there, --adapter {path}")
    if path.suffix == GGUF:
        reader = gguf.GgufReader(path, allow_nonfinite)
        raw = gguf.hf_config(reader)
    else:
        if not (path / "config.json").is_file() and (files := sorted(path.glob(f"*{GGUF}"))):
            raise UserError(f"{path} has no config.json but GGUF files: name one of them, such as {files[0]}")
        raw, reader = hf.read_config(path), None
    form = None
    if raw.get("model_type") == MODEL_TYPE:
        config, arrays = _open_vmod(path, raw, allow_nonfinite)
    elif str(raw.get("model_type")) in llava.KINDS:
        config, arrays, form = llava.open_llava(path, raw, allow_nonfinite)
    else:
        llama = LlamaConfig.from_hf_config(raw)  # a kind that is not supported is named before its weights are opened
        config, arrays = _open_llama(reader or TensorReader(path, allow_nonfinite), llama, raw)
    tokenizer = tokenizer_folder(path)
    if tokenizer is not None and "v_placeholder_id" not in raw and raw.get("model_type") != MODEL_TYPE:
        config = dataclasses.replace(config, frame_token_id=_frame_token_id(tokenizer))
    if adapter is not None:
        config, arrays = _with_adapter(Path(adapter), config, arrays, allow_nonfinite)
    if vision is not None:
        config, arrays = _with_vision(Path(vision), config, arrays, allow_nonfinite)
    stored = path / "generation_config.json"
    generation = hf.read_json_file(path, stored.name, "") if stored.is_file() else {}
    ids = {name: raw[name] for name in TOKEN_IDS if name in raw}
    return Opened(config, arrays, tokenizer, ids | generation, form)


def _open_llama(reader: TensorReader, llama: LlamaConfig, raw: dict[str, Any]) -> tuple[VideoLMConfig, Params]:
    if (window := raw.get("sliding_window")) and raw.get("model_type") == "mistral":
        log.warning("sliding_window=%d is not computed: outputs are the original's up to that many tokens", window)
    arrays: Params = {"llama": hf.llama_arrays(reader, llama)}
    if any(name.startswith("connector.") for name in reader.names()):
        arrays["connector"] = hf.connector_arrays(reader)
    bf16 = str(arrays["llama"]["embed"]["embedding"].dtype) == "bfloat16"
    h, w = (raw.get("frame_token_pooled") or (0, 0)) if "frame_token_cls" in raw else (3, 3)
    config = VideoLMConfig(
        llama=llama,
        policy=make_policy("full", llama.num_hidden_layers),
        frame_token_id=raw.get("v_placeholder_id", llama.vocab_size),
        vision_hidden_size=_feature_size(arrays) or raw.get("vision_hidden_size", FEATURE_SIZE),
        cls=raw.get("frame_token_cls", True),
        grid=(h, w),
        interval=raw.get("frame_token_interval", ","),
        fps=raw.get("frame_fps", 2.0),
        param_dtype="bfloat16" if bf16 else "float32",
    )
    return config, arrays


def _open_vmod(path: Path, raw: dict[str, Any], allow_nonfinite: bool) -> tuple[VideoLMConfig, Params]:
    try:
        config = VideoLMConfig.from_json(json.dumps(raw["video_lm"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}/config.json cannot be read ({error}): it was written by another version") from None
    reader = TensorReader(path, allow_nonfinite)
    arrays: Params = {"llama": hf.llama_arrays(reader, config.llama), "connector": hf.connector_arrays(reader)}
    if config.vision is not None and config.vision.kind != "patches":
        arrays["vision"] = hf.vision_arrays(reader, config.vision)
    if config.newline_token_id is not None:
        arrays["newline"] = {"embedding": llava.newline(reader, config.llama.hidden_size)}
    return config, arrays


def _with_adapter(
    folder: Path, config: VideoLMConfig, arrays: Params, allow_nonfinite: bool
) -> tuple[VideoLMConfig, Params]:
    adapter = peft.open_adapter(folder, config.llama, allow_nonfinite)
    leaves = hf.flat(arrays)
    whole = {f"llama/{name}": array for name, array in adapter.whole.items()}
    if config.llama.tie_word_embeddings:
        config, whole = _with_tied(config, leaves, whole, {f"llama/{name}" for name in adapter.saved})
    leaves |= whole
    leaves |= {f"llama/{name}": array for name, array in hf.flat(adapter.pairs).items()}
    if adapter.connector:
        leaves |= {f"connector/{name}": array for name, array in hf.flat(adapter.connector).items()}
    arrays = hf.nested(leaves)
    width = _feature_size(arrays) or config.vision_hidden_size
    return dataclasses.replace(config, lora=adapter.lora, vision_hidden_size=width), arrays


def _with_tied(
    config: VideoLMConfig, leaves: dict[str, Any], whole: dict[str, LazyArray], saved: set[str]
) -> tuple[VideoLMConfig, dict[str, LazyArray]]:
    """What an adapter brings over a base whose head is its embedding: `whole`, as PEFT loads it.

    A copy of the base's own matrix takes the place of both; one that was saved as a module of its own unties them.
    """
    head, embedding = "llama/head/kernel", "llama/embed/embedding"
    shared = [
        _turned(whole[name]) if name == head else whole[name]
        for name in (head, embedding)
        if name in whole.keys() - saved
    ]
    base = (shared or [leaves[embedding]])[0]  # PEFT fills the one matrix with the embedding's, then with the head's
    if not saved:
        return config, {embedding: base} if shared else {}
    llama = dataclasses.replace(config.llama, tie_word_embeddings=False)
    both = {embedding: base, head: _turned(base)} | {name: whole[name] for name in saved}
    return dataclasses.replace(config, llama=llama), both


def _turned(array: LazyArray) -> LazyArray:
    read = array.parts[0]
    return LazyArray(array.shape[::-1], array.dtype, (lambda: read().T,))


def _with_vision(
    folder: Path, config: VideoLMConfig, arrays: Params, allow_nonfinite: bool
) -> tuple[VideoLMConfig, Params]:
    vision = VisionConfig.from_hf_config(hf.read_config(folder))
    if "connector" in arrays and vision.hidden_size != config.vision_hidden_size:
        raise UserError(
            f"{folder}: its features are {vision.hidden_size} wide, the model's connector takes "
            f"{config.vision_hidden_size}; name the tower that it was trained with"
        )
    check_frame_tokens(vision, config.cls, config.grid)
    config = dataclasses.replace(config, vision=vision, vision_hidden_size=vision.hidden_size)
    return config, {**arrays, "vision": hf.vision_arrays(TensorReader(folder, allow_nonfinite), vision)}


def _feature_size(arrays: Params) -> int | None:
    return arrays["connector"]["in"]["kernel"].shape[0] if "connector" in arrays else None


# ----------------------------------------------------------------------------------------------------- tokenizer


def tokenizer_folder(path: Path) -> Path | None:
    """Where a model's tokenizer lies: beside its config.json, in tokenizer/, in its GGUF file; None without one."""
    if path.suffix == GGUF:
        return path if gguf.has_tokenizer(path) else None
    names = ("tokenizer.json", "tokenizer.model")
    return next((f for f in (path / "tokenizer", path) if any((f / name).is_file() for name in names)), None)


def load_tokenizer(folder: Path) -> Any:
    """An HF tokenizer; raises UserError where transformers cannot make one of the files."""
    if folder.suffix == GGUF:
        return gguf.load_tokenizer(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises that very class for a file that it does not understand
        reason = short(Exception(str(error).strip().partition("\n")[0]))
        raise UserError(f"{folder}: no tokenizer can be made of its files ({reason}); add a tokenizer.json") from None


def _frame_token_id(folder: Path) -> int:
    tokenizer = load_tokenizer(folder)
    return tokenizer.get_vocab().get("<v>", len(tokenizer))


# ---------------------------------------------------------------------------------------------- what files lack


def complete(config: VideoLMConfig, arrays: Params) -> tuple[Params, list[str]]:
    """`arrays` in the model's tree, with the documented initialisation for every leaf that they lack, and its names.

    Only those leaves are computed. The result mixes LazyArrays and jax.Arrays.
    """
    key = jax.random.key(0)
    wanted = hf.flat(jax.eval_shape(lambda: init_params(config, key)))
    given = hf.flat(arrays)
    missing = [name for name in wanted if name not in given]
    # XLA computes what comes out and nothing else.
    fresh = jax.jit(lambda: {name: hf.flat(init_params(config, key))[name] for name in missing})() if missing else {}
    return hf.nested({name: given[name] if name in given else fresh[name] for name in wanted}), missing


def without_lora(config: VideoLMConfig) -> VideoLMConfig:
    """The configuration of the model whose LoRA pairs are merged."""
    return dataclasses.replace(config, lora=LoraConfig())
