"""LayerExperts under another policy than the one they were trained under: what is added, what is left out."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from vmod_jax.models.depth import Policy
from vmod_jax.models.layer_expert import router_init_std
from vmod_jax.models.llama import share_router
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
    `here`'s. The others stay as they are; one that layers shared and no longer share becomes that of every layer.
    trained: layers of `there` whose LayerExpert, their own or a shared one, has been trained.
    """
    layers, parts = params["llama"]["layers"], []
    used, trained = _rows(here, learned_layers(here.policy)), _rows(there, trained)
    if there.shared_router and not here.shared_router and trained and used:
        layers, trained = share_router(layers), used
        parts.append(f"layers {_list(used, here)} begin with the LayerExpert that was shared")
    fresh, left_out = used - trained, trained - used
    d = here.llama.hidden_size
    if fresh and (factor := router_init_std(here.gate, d) / router_init_std(there.gate, d)) != 1:
        rows = layers["expert"]["kernel"]
        scale = jnp.array([[factor if row in fresh else 1.0] for row in range(len(rows))], rows.dtype)
        layers = {**layers, "expert": {"kernel": rows * scale}}
    if fresh:
        parts.append(f"LayerExperts of layers {_list(fresh, here)} are at their initialisation")
    if left_out:
        parts.append(f"trained LayerExperts of layers {_list(left_out, there)} are left out")
    return {**params, "llama": {**params["llama"], "layers": layers}}, "; ".join(parts) or None


def _rows(config: VideoLMConfig, layers: Iterable[int]) -> set[int]:
    """The rows of the stacked LayerExperts by which these layers choose: row 0 alone where it is shared."""
    return {0 if config.shared_router else layer for layer in layers}


def _list(rows: set[int], config: VideoLMConfig) -> str:
    return ", ".join(map(str, sorted(rows))) + " (shared)" * config.shared_router
