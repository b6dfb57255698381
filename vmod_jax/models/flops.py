"""Work in closed form: what a policy costs on a model of any shape, without running it.

Two conventions. `linear_flops` is the paper's FLOPs column: multiply-accumulates of the linear layers of one forward
pass. `step_flops` counts real operations (two a multiply-accumulate), attention, the backward pass and
rematerialisation included: the measure for MFU and for the ratio that a speed-up is held against.
"""

from collections.abc import Sequence

from vmod_jax.models.llama import LlamaConfig

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
)


def layer_linears(config: LlamaConfig) -> tuple[tuple[int, int], ...]:
    """(in, out) of one block's q, k, v, o, gate, up and down."""
    d, f = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return ((d, queries), (d, keys), (d, keys), (queries, d), (d, f), (d, f), (f, d))


def weight_macs(linears: Sequence[tuple[int, int]]) -> int:
    """Multiply-accumulates a token of dense linear maps."""
    return sum(a * b for a, b in linears)


def lora_macs(linears: Sequence[tuple[int, int]], rank: int) -> int:
    """Multiply-accumulates a token of the rank-`rank` adapters beside those maps."""
    return sum(rank * (a + b) for a, b in linears)


def linear_flops(
    config: LlamaConfig, kept: Sequence[int], frames: int, tokens_per_frame: int, text_tokens: int, lora_rank: int
) -> int:
    """FLOPs of a forward pass as the paper counts them (tables 1 and 3): multiply-accumulates of linear layers.

    Attention scores, embedding, connector and vision tower are left out; the head runs at every position. `kept` holds
    the tokens a frame that each layer computes (`depth.kept_counts`); text goes through every layer.
    """
    layer, head = layer_linears(config), ((config.hidden_size, config.vocab_size),)
    layer_macs = weight_macs(layer) + lora_macs(layer, lora_rank)
    head_macs = weight_macs(head) + lora_macs(head, lora_rank)
    through_layers = sum(text_tokens + k * frames for k in kept)
    return through_layers * layer_macs + (text_tokens + tokens_per_frame * frames) * head_macs


# How often a kind of work runs (the frozen linear maps, causal attention, LoRA), in units of its forward pass.
# Training with frozen weights: forward 1; gradients of linear maps 1 for the inputs, of attention 2.5 (flash attention
# recomputes the scores), of LoRA 2 (inputs and weights). Rematerialisation adds a forward, attention only where its
# output was not kept.
PASSES: dict[str, tuple[float, float, float]] = {
    "forward": (1, 1, 1),
    "none": (2, 3.5, 3),
    "full": (3, 4.5, 4),
    "attention": (3, 3.5, 4),
}


def step_flops(
    config: LlamaConfig,
    kept: Sequence[int],
    frames: int,
    text_tokens: int,
    lora_rank: int,
    passes: str = "none",
    train_weights: bool = False,
    labels: int = 0,
) -> float:
    """FLOPs of one row in a training step (or, with passes="forward", of a forward pass), attention included.

    passes: "forward", or the rematerialisation of a training step: "none", "full", or "attention" (everything is
        recomputed but attention, whose output and log-sum-exp are kept).
    train_weights: the linear maps themselves are trained, which adds their weight gradients.
    labels: positions at which the head runs; 0 leaves it out, as `formula_ratio` does.
    """
    linear, attention, lora = PASSES[passes]
    weights = linear + (train_weights and passes != "forward")
    layer, head = layer_linears(config), ((config.hidden_size, config.vocab_size),)
    token = 2 * (weights * weight_macs(layer) + lora * lora_macs(layer, lora_rank))
    pair = 2 * attention * config.num_attention_heads * config.head_dim  # scores and values, halved by causality
    tokens = [text_tokens + k * frames for k in kept]
    total = sum(t * token + t * t * pair for t in tokens)
    if labels:  # the head is not recomputed
        again = 0 if passes in ("forward", "none") else 1
        total += 2 * labels * ((weights - again) * weight_macs(head) + (lora - again) * lora_macs(head, lora_rank))
    return float(total)


def formula_ratio(
    config: LlamaConfig,
    kept: Sequence[int],
    frames: int,
    tokens_per_frame: int,
    text_tokens: int,
    lora_rank: int,
    passes: str = "none",
    train_weights: bool = False,
) -> float:
    """The decoder's work under a policy over that of the full model: what a measured ratio can hope for."""
    full = [tokens_per_frame] * len(kept)
    policy_work, full_work = (
        step_flops(config, counts, frames, text_tokens, lora_rank, passes, train_weights) for counts in (kept, full)
    )
    return policy_work / full_work
