"""LayerExperts under another policy than the one they were trained under: what is added, what is left out."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from vmod_jax.models.depth import Policy
from vmod_jax.models.layer_expert import router_init_std
from vmod_jax.models.video_lm import VideoLMConfig

IMPORTED = "import.json"  # in a workdir that vmod import made: where its weights come from


def learned_layers(policy: Policy) -> list[int]:
    """Layers whose LayerExpert chooses."""
    return [layer for layer, spec in enumerate(policy) if spec.selector == "learned"]


def trained_layers(config: VideoLMConfig, workdir: Path | None) -> list[int]:
    """Layers whose LayerExpert has been trained: the policy's, unless the folder is an import without experts."""
    record = workdir / IMPORTED if workdir else None
    if record is not None and record.is_file() and json.loads(record.read_text()).get("experts") == "initialised":
        return []
    return learned_layers(config.policy)


def adapt(params: Any, there: VideoLMConfig, here: VideoLMConfig, trained: Iterable[int]) -> tuple[Any, str | None]:
    """Parameters recorded with `there`, to be run with `here`; and one line on the LayerExperts, or None.

    A LayerExpert that has never been trained is at its initialisation, whose scale depends on the gate: it follows
    `here`'s. The others stay as they are.
    """
    trained, used = set(trained), learned_layers(here.policy)
    fresh = [layer for layer in used if layer not in trained]
    left_out = sorted(trained - set(used))
    d = here.llama.hidden_size
    if fresh and (factor := router_init_std(here.gate, d) / router_init_std(there.gate, d)) != 1:
        llama = params["llama"]
        rows = llama["layers"]["expert"]["kernel"]
        scale = jnp.array([[factor if layer in fresh else 1.0] for layer in range(len(rows))], rows.dtype)
        layers = {**llama["layers"], "expert": {"kernel": rows * scale}}
        params = {**params, "llama": {**llama, "layers": layers}}
    parts = []
    if fresh:
        parts.append(f"LayerExperts of layers {_list(fresh)} are at their initialisation")
    if left_out:
        parts.append(f"trained LayerExperts of layers {_list(left_out)} are left out")
    return params, "; ".join(parts) or None


def _list(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
