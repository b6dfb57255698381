"""The model once more, slowly: one row, one layer, one frame at a time, with masks and loops and no compaction.

Written from the paper's equations (and `models/depth.py` for how many tokens are kept), in NumPy float64 where the
product uses float32, so that the two share neither code nor rounding.
"""

import numpy as np
from scipy.special import erf

from vmod_jax.models.depth import num_kept
from vmod_jax.models.llama import rope_frequencies


def _norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def _linear(p, x, lora):
    y = x @ p["kernel"]
    if "bias" in p:
        y = y + p["bias"]
    if "lora_a" in p:
        y = y + x @ p["lora_a"] @ p["lora_b"] * (lora.alpha / lora.rank)
    return y


def _rope(x, positions, frequencies):
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * frequencies.astype(np.float64)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def _attention(q, k, v, mask):
    groups = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        logits = q[:, head] @ k[:, head // groups].T / np.sqrt(q.shape[-1])
        logits = np.where(mask, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // groups]
    return out


def _update(p, x, positions, alive, config, lora):
    """f of the block for one row, in which only `alive` tokens may be attended to."""
    size = len(x)
    y = _norm(x, p["input_norm"]["scale"], config.rms_norm_eps)
    q, k, v = (_linear(p[name], y, lora).reshape(size, -1, config.head_dim) for name in "qkv")
    if "q_norm" in p:
        q, k = (_norm(x, p[f"{name}_norm"]["scale"], config.rms_norm_eps) for x, name in ((q, "q"), (k, "k")))
    frequencies = rope_frequencies(config)
    mask = (positions[:, None] >= positions[None, :]) & alive[None, :] | np.eye(size, dtype=bool)
    out = _attention(_rope(q, positions, frequencies), _rope(k, positions, frequencies), v, mask)
    a = _linear(p["o"], out.reshape(size, -1), lora)
    y = _norm(x + a, p["post_norm"]["scale"], config.rms_norm_eps)
    gate = _linear(p["gate"], y, lora)
    return a + _linear(p["down"], gate / (1 + np.exp(-gate)) * _linear(p["up"], y, lora), lora)


GATES = {
    "raw": lambda m: m,
    "tanh": lambda m: 1 + 0.2 * np.tanh(m),
    "sigmoid": lambda m: 1 / (1 + np.exp(-m)),
    "straight_through": np.ones_like,
}


def forward(config, params, input_ids, frames, replay=None):
    """One row: i64[T], f64[F, n, d_v] -> (logits [T, V], {layer: (scores [F, n], kept list of F arrays)})."""

    def wide(tree):
        return {k: wide(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}

    p = wide(params)
    llama, n = config.llama, config.tokens_per_frame
    input_ids = np.asarray(input_ids)
    is_vision = input_ids == config.frame_token_id
    hidden = np.asarray(frames, np.float64) @ p["connector"]["in"]["kernel"] + p["connector"]["in"]["bias"]
    hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    vision = hidden @ p["connector"]["out"]["kernel"] + p["connector"]["out"]["bias"]
    x = np.zeros((len(input_ids), llama.hidden_size))
    x[~is_vision] = p["llama"]["embed"]["embedding"][input_ids[~is_vision]]
    x[is_vision] = vision.reshape(-1, llama.hidden_size)
    frame_tokens = np.flatnonzero(is_vision).reshape(-1, n)
    positions = np.arange(len(input_ids))

    decided = {}
    for layer, spec in enumerate(config.policy):
        one = {
            name: {leaf: array[layer] for leaf, array in holder.items()}
            for name, holder in p["llama"]["layers"].items()
        }
        alive, factor = np.ones(len(x), bool), np.ones(len(x))
        if spec.routed:
            k = num_kept(n, spec.keep)
            scores, kept = [], []
            for f, tokens in enumerate(frame_tokens):
                if spec.selector == "learned":
                    score = x[tokens] @ one["expert"]["kernel"]
                    chosen = np.sort(np.argsort(-score, kind="stable")[:k])
                    scores.append(score)
                elif spec.selector == "uniform":
                    chosen = np.round(np.linspace(0, n - 1, k)).astype(int)
                elif spec.selector is None:
                    chosen = np.arange(0)
                if replay is not None and spec.selector is not None:
                    chosen = np.asarray(replay[layer][f])
                alive[tokens] = False
                alive[tokens[chosen]] = True
                if spec.selector == "learned":
                    factor[tokens[chosen]] = GATES[config.gate](score[chosen])
                kept.append(chosen)
            decided[layer] = (scores, kept)
        update = _update(one, x, positions, alive, llama, config.lora)
        x = np.where(alive[:, None], x + factor[:, None] * update, x)
    x = _norm(x, p["llama"]["norm"]["scale"], llama.rms_norm_eps)
    head = dict(p["llama"]["head"]) if "head" in p["llama"] else {}
    if llama.tie_word_embeddings:
        head["kernel"] = p["llama"]["embed"]["embedding"].T
    return _linear(head, x, config.lora), decided
