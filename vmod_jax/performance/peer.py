"""The same model in PyTorch as its users have it: transformers' Llama with PEFT's adapters on every linear layer.

Scaled-dot-product attention (or FlashAttention, where it is installed), gradient checkpointing, features through a
connector into `inputs_embeds`, logits at every position, AdamW. It has no routing: it is the dense model. Weights are
copied from ours, so that both compute the same numbers.
"""

import gc
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from vmod_jax.errors import UserError
from vmod_jax.machine import cores
from vmod_jax.models.video_lm import VideoLMConfig

log = logging.getLogger(__name__)

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def available() -> bool:
    """Whether torch, transformers and peft are installed (`pip install vmod_jax[torch]`)."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))


@contextmanager
def unless_full(left_out: list[str]) -> Iterator[None]:
    """Goes on without PyTorch where its GPU has no room for it beside ours: says so, and adds a line to `left_out`."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        advice = "XLA_PYTHON_CLIENT_ALLOCATOR=platform gives our memory back between steps, or take --no-peer"
        left_out.append(f"PyTorch is left out, there was no room for it: {reason}; {advice}")
        log.warning(left_out[-1])


class Peer:
    """A dense Llama with adapters and a connector, on the first GPU that PyTorch sees or on this process's cores."""

    def __init__(self, config: VideoLMConfig, params: Any, training: bool):
        if not available():
            raise UserError("the peer needs PyTorch: pip install 'vmod_jax[torch]', or leave it out with --no-peer")
        import peft
        import torch
        import transformers

        torch.set_num_threads(cores())
        c = config.llama
        self.config, self.torch = config, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, config.dtype)
        flash = self.device == "cuda" and importlib.util.find_spec("flash_attn")
        llama: Any = transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
            max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=False, use_cache=not training,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )  # fmt: skip
        self.attention = "flash_attention_2" if flash else "sdpa"
        with torch.device(self.device):
            model: Any = transformers.AutoModelForCausalLM.from_config(
                llama, dtype=self.dtype, attn_implementation=self.attention
            )
            adapters = peft.LoraConfig(
                r=config.lora.rank, lora_alpha=int(config.lora.alpha), lora_dropout=config.lora.dropout,
                target_modules=[*(path.split(".")[1] for path in LINEARS.values()), "lm_head"],
            )  # fmt: skip
            with warnings.catch_warnings():  # the names by which all versions of transformers 5 and peft know it
                warnings.simplefilter("ignore", FutureWarning)
                model = peft.get_peft_model(model, adapters)
                if training:
                    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.connector = torch.nn.Sequential(
                torch.nn.Linear(config.vision_hidden_size, c.hidden_size),
                torch.nn.GELU(),
                torch.nn.Linear(c.hidden_size, c.hidden_size),
            )
        self.model = model
        self._copy(params)
        if training:
            model.train()
            trained = [p for p in (*model.parameters(), *self.connector.parameters()) if p.requires_grad]
            self.trained, self.optimizer = trained, torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
        else:
            self.model = model.merge_and_unload().eval()

    def _copy(self, params: Any) -> None:
        """Our weights [in, out] into PyTorch's [out, in]."""
        base = self.model.base_model.model
        layers = params["llama"]["layers"]

        def put(target: Any, value: Any, turned: bool = True) -> None:
            array = np.array(value, np.float32)
            with self.torch.no_grad():
                target.copy_(self.torch.from_numpy(array.T if turned else array))

        def linear(module: Any, leaves: dict[str, Any], *layer: int) -> None:
            put(module.base_layer.weight, leaves["kernel"][layer])
            put(module.lora_A["default"].weight, leaves["lora_a"][layer])
            put(module.lora_B["default"].weight, leaves["lora_b"][layer])

        for i, block in enumerate(base.model.layers):
            for name, path in LINEARS.items():
                linear(block.get_submodule(path), layers[name], i)
            put(block.input_layernorm.weight, layers["input_norm"]["scale"][i], turned=False)
            put(block.post_attention_layernorm.weight, layers["post_norm"]["scale"][i], turned=False)
        put(base.model.norm.weight, params["llama"]["norm"]["scale"], turned=False)
        put(base.model.embed_tokens.weight, params["llama"]["embed"]["embedding"], turned=False)
        linear(base.lm_head, params["llama"]["head"])
        for module, name in ((self.connector[0], "in"), (self.connector[2], "out")):
            put(module.weight, params["connector"][name]["kernel"])
            put(module.bias, params["connector"][name]["bias"], turned=False)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives its memory back, so that what comes next has the GPU to itself."""
        torch = self.torch
        vars(self).clear()
        gc.collect()  # models refer to themselves
        torch.cuda.empty_cache()

    def put(self, array: np.ndarray) -> Any:
        """To the peer's device."""
        return self.torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def embed(self, ids: Any, frames: Any) -> Any:
        """i64[1, T], f32[1, F, n, d_v] -> [1, T, d]"""
        is_frame = ids == self.config.frame_token_id
        text = self.model.get_input_embeddings()(ids.masked_fill(is_frame, 0))
        tokens = self.connector(frames).reshape(-1, text.shape[-1]).to(text.dtype)
        return text.masked_scatter(is_frame[..., None], tokens)

    def step(self, batch: dict[str, Any]) -> float:
        """One training step on `place`d arrays: -> the loss, the mean cross-entropy of all labels."""
        torch = self.torch
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            embeds = self.embed(batch["ids"], batch["frames"])
            # HF shifts labels by one: position t predicts token t + 1.
            loss = self.model(inputs_embeds=embeds, labels=batch["labels"], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.item()

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Our batch as PyTorch's: {ids: i64[1, T], frames, labels: i64[1, T], -100 where there is none}."""
        ids = batch["input_ids"].astype(np.int64)
        labels = np.full_like(ids, -100)
        inside = batch["label_pos"][0] + 1 < ids.shape[1]
        labels[0, batch["label_pos"][0][inside] + 1] = batch["label"][0][inside]
        return {"ids": self.put(ids), "frames": self.put(batch["frames"]), "labels": self.put(labels)}
