"""The FLOPs formulas against the paper's column and against the published table of limits."""

import pytest

from vmod_jax.models import flops
from vmod_jax.models.depth import FULL, LayerSpec, kept_counts, make_policy
from vmod_jax.models.flops import LLAMA_3_8B
from vmod_jax.models.llama import LlamaConfig

LORA = 128


def policy_tflops(name, keep):
    kept = kept_counts(make_policy(name, 32, keep), 10)
    return flops.linear_flops(LLAMA_3_8B, kept, frames=600, tokens_per_frame=10, text_tokens=146, lora_rank=LORA) / 1e12


@pytest.mark.parametrize(
    ("name", "keep", "paper"),
    [
        ("full", 0.2, 48.29),
        ("all", 0.2, 13.18),
        ("all_deep", 0.2, 15.37),
        ("interleaved", 0.2, 30.74),
        ("interleaved_deep", 0.2, 31.83),
        ("interleaved", 0.1, 28.54),
        ("interleaved", 0.3, 32.93),
        ("random", 0.2, 30.74),
        ("uniform", 0.2, 30.74),
        ("layer_skip", 0.2, 26.35),
        ("early_exit", 0.2, 7.14),
    ],
)
def test_the_papers_flops_column(name, keep, paper):
    assert policy_tflops(name, keep) == pytest.approx(paper, abs=0.01)


def test_macs_of_llama_3_8b():
    linears = flops.layer_linears(LLAMA_3_8B)
    assert flops.weight_macs(linears) / 1e6 == pytest.approx(218.1, abs=0.005)
    assert (flops.weight_macs(linears) + flops.lora_macs(linears, LORA)) / 1e6 == pytest.approx(228.59, abs=0.005)


def test_kept_counts_are_per_layer():
    policy = (FULL, LayerSpec(0.2, "learned"), LayerSpec(0.3, "uniform"), LayerSpec(0.0), LayerSpec(1.0, "random"))
    assert kept_counts(policy, 10) == (10, 2, 3, 0, 10)
    assert kept_counts(policy, 50) == (50, 10, 15, 0, 50)


@pytest.mark.parametrize(
    ("n", "frames", "ratio", "full_seconds", "mod_seconds"),
    [
        (10, 150, 0.819, 0.22, 0.18),
        (10, 600, 0.679, 0.55, 0.37),
        (10, 1200, 0.628, 1.08, 0.68),
        (50, 150, 0.661, 0.67, 0.44),
        (50, 600, 0.582, 3.33, 1.94),
        (50, 1200, 0.559, 9.24, 5.16),
    ],
)
def test_limits_under_full_remat(n, frames, ratio, full_seconds, mod_seconds):
    kept = kept_counts(make_policy("interleaved", 32), n)
    assert flops.formula_ratio(LLAMA_3_8B, kept, frames, n, 2000, LORA, "full") == pytest.approx(ratio, abs=5e-4)
    for counts, seconds in (([n] * 32, full_seconds), (kept, mod_seconds)):
        work = flops.step_flops(LLAMA_3_8B, counts, frames, 2000, LORA, "full")
        assert work / 790e12 == pytest.approx(seconds, abs=0.006)


@pytest.mark.parametrize(("n", "ratio"), [(10, 0.683), (50, 0.588)])
def test_limits_with_attention_kept(n, ratio):
    kept = kept_counts(make_policy("interleaved", 32), n)
    assert flops.formula_ratio(LLAMA_3_8B, kept, 600, n, 2000, LORA, "attention") == pytest.approx(ratio, abs=5e-4)


def test_step_flops_of_a_model_small_enough_to_count_by_hand():
    config = LlamaConfig(16, 4, 8, 1, 2, 1, 2)
    # 5 text tokens and 3 frames of which 1 token is kept: 8 tokens. q 16, k 8, v 8, o 16, gate, up, down 32 each: 144.
    # LoRA of rank 1, in + out: 8 + 6 + 6 + 8 + 3 * 12 = 64. Attention, causal: 2 * 8 * 8 * (2 heads of 2) = 512.
    linear, lora, attention = 2 * 8 * 144, 2 * 8 * 64, 512
    head, head_lora = 2 * 7 * 4 * 16, 2 * 7 * (4 + 16)  # at 7 labels

    def step(**options):
        return flops.step_flops(config, [1], frames=3, text_tokens=5, lora_rank=1, **options)

    assert step(passes="forward") == linear + attention + lora
    assert step(passes="forward", train_weights=True) == step(passes="forward")
    assert step(passes="none") == 2 * linear + 3.5 * attention + 3 * lora
    assert step(passes="full") == 3 * linear + 4.5 * attention + 4 * lora
    assert step(passes="attention") == 3 * linear + 3.5 * attention + 4 * lora
    assert step(passes="none", train_weights=True) == 3 * linear + 3.5 * attention + 3 * lora
    for passes in ("none", "full", "attention"):
        assert step(passes=passes, labels=7) - step(passes=passes) == 2 * head + 3 * head_lora
