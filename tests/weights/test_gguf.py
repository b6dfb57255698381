"""GGUF files: to the bit what the gguf package dequantises, and the models that transformers makes of them."""

import numpy as np
import pytest

from vmod_jax.errors import UserError
from vmod_jax.models.llama import LlamaConfig, rope_frequencies
from vmod_jax.weights.gguf import GgufReader, hf_config
from vmod_jax.weights.huggingface import llama_params

gguf = pytest.importorskip("gguf")
D, F, L, V, HEADS, KV = 64, 96, 2, 60, 4, 2
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
RNG = np.random.default_rng(0)


def head_dim(arch):
    return 128 if arch == "qwen3" else D // HEADS  # all that transformers makes of a Qwen3's file


def metadata(arch="llama", **changes):
    values = {
        "block_count": L, "embedding_length": D, "feed_forward_length": F, "context_length": 512,
        "attention.head_count": HEADS, "attention.head_count_kv": KV, "rope.freq_base": 5e5,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": head_dim(arch),
        "attention.key_length": head_dim(arch), "attention.value_length": head_dim(arch),
    }  # fmt: skip
    return {f"{arch}.{key}": value for key, value in (values | changes).items() if value is not None}


def random_bytes(shape, kind):
    """Quantised blocks of any values: random bytes, in which the scales are finite halves."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = RNG.integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    for place in halves.get(kind, (0, 2) if kind in ("Q4_K", "Q5_K") else (0,)):
        scale = RNG.uniform(0.001, 0.01, raw.shape[:2]).astype(np.float16)
        raw[..., place : place + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def write(path, tensors, values, arch="llama"):
    """tensors: {name: (array, kind)}; a kind of None is written as the array is."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        (writer.add_array if isinstance(value, list) else kind[type(value)])(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind and gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def neighbours(weight, heads):
    """Rows of a projection as llama.cpp's converter orders them: channels that rotate together lie side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tiny(arch="llama", kind="F32", tied=False):
    """Random tensors of a tiny model under llama.cpp's names, as `write` takes them."""
    h = head_dim(arch)

    def norm(size):
        return (1 + 0.2 * RNG.normal(size=size)).astype(np.float32), None

    def matrix(rows, columns):
        array = (0.7 * RNG.normal(size=(rows, columns)) * columns**-0.5).astype(np.float32)
        return (array, None) if kind == "F32" else (gguf.quantize(array, gguf.GGMLQuantizationType[kind]), kind)

    tensors = {"token_embd.weight": matrix(V, D), "output_norm.weight": norm(D)}
    tensors |= {} if tied else {"output.weight": matrix(V, D)}
    for i in range(L):
        block = {
            "attn_norm.weight": norm(D), "ffn_norm.weight": norm(D),
            "attn_q.weight": matrix(HEADS * h, D), "attn_k.weight": matrix(KV * h, D),
            "attn_v.weight": matrix(KV * h, D), "attn_output.weight": matrix(D, HEADS * h),
            "ffn_gate.weight": matrix(F, D), "ffn_up.weight": matrix(F, D), "ffn_down.weight": matrix(D, F),
        }  # fmt: skip
        if arch == "qwen2":
            block |= {f"attn_{x}.bias": norm(n * h) for x, n in (("q", HEADS), ("k", KV), ("v", KV))}
        if arch == "qwen3":
            block |= {f"attn_{x}_norm.weight": norm(h) for x in "qk"}
        tensors |= {f"blk.{i}.{name}": value for name, value in block.items()}
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantisation_is_the_packages_own_to_the_bit(tmp_path, kind):
    """A projection that stays in order, one whose heads are put back, and more rows than a band holds."""
    shapes = {"blk.0.ffn_down.weight": (3, 512), "blk.0.attn_k.weight": (8, 256), "token_embd.weight": (20000, 256)}
    stored = {"F32": np.float32, "F16": np.float16}
    tensors = {
        name: (RNG.normal(size=shape).astype(stored[kind]), None) if kind in stored else (
            gguf.quantize(RNG.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.BF16), kind
        ) if kind == "BF16" else (random_bytes(shape, kind), kind)
        for name, shape in shapes.items()
    }  # fmt: skip
    reader = GgufReader(write(tmp_path / "m.gguf", tensors, metadata()))
    names = {"ffn_down": "mlp.down_proj", "attn_k": "self_attn.k_proj"}
    for name, (array, _) in tensors.items():
        module = names.get(name.split(".")[-2])
        theirs = f"model.layers.0.{module}.weight" if module else "model.embed_tokens.weight"
        want = gguf.dequantize(array, gguf.GGMLQuantizationType[kind])
        got = reader.get(theirs)
        assert got.shape == reader.shape(theirs) == shapes[name]
        assert got.dtype == reader.dtype(theirs)
        got = neighbours(got, KV) if "attn_k" in name else got
        assert np.isfinite(want).all()
        assert got.astype(np.float32).tobytes() == np.ascontiguousarray(want).tobytes()


@pytest.mark.parametrize(
    ("arch", "kind", "tied"),
    [("llama", "Q8_0", False), ("llama", "F16", True), ("qwen2", "Q4_1", True), ("qwen3", "Q4_0", False)],
)
def test_logits_equal_transformers_reading_the_same_file(tmp_path, arch, kind, tied):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    import vmod_jax
    from vmod_jax.weights.convert import import_folder

    folder = tmp_path
    path = write(folder / "m.gguf", tiny(arch, kind, tied), metadata(arch) | {f"{arch}.vocab_size": V}, arch)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32).eval()
    ids = RNG.integers(0, V, (2, 40))
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).logits.numpy()
    import_folder(path, folder / "run")
    assert np.abs(want).max() > 1
    for opened in (folder / "run", path):
        np.testing.assert_allclose(vmod_jax.load(opened).logits(ids), want, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=r"has no config.json but GGUF files: name one of them, such as .*m.gguf"):
        import_folder(folder, folder / "other")


def test_llama_3_scaling_is_found_in_its_factors(tmp_path):
    """llama.cpp writes the scaling as one divisor a frequency, and says nowhere by which rule."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    plain = hf_config(GgufReader(write(tmp_path / "a.gguf", tiny(), metadata())))
    want = LlamaConfig.from_hf_config({**plain, "rope_scaling": scaling})
    factors = (rope_frequencies(LlamaConfig.from_hf_config(plain)) / rope_frequencies(want)).astype(np.float32)
    tensors = tiny() | {"rope_freqs.weight": (factors, None)}
    reader = GgufReader(write(tmp_path / "b.gguf", tensors, metadata()))
    assert LlamaConfig.from_hf_config(hf_config(reader)) == want
    llama_params(reader, want)  # and is not among the weights
    factors[2] *= 1.01
    reader = GgufReader(write(tmp_path / "c.gguf", tensors, metadata()))
    with pytest.raises(UserError, match="as no Llama 3 does"):
        hf_config(reader)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count = 8 is not understood"),
        ({"attention.clamp_kqv": 1.0}, "llama.attention.clamp_kqv = 1.0 is not understood"),
        ({"attention.head_count": [4, 4]}, r"llama.attention.head_count = \[4, 4\] is not understood"),
        ({"attention.key_length": 32}, r"of \[16, 32\] channels: they must agree"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope scaling 'yarn' is not supported"),
    ],
)
def test_metadata_that_are_not_understood_are_refused(tmp_path, changes, message):
    reader = GgufReader(write(tmp_path / "m.gguf", tiny(), metadata(**changes)))
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_hf_config(hf_config(reader))


def test_files_that_are_none_of_ours(tmp_path):
    good = write(tmp_path / "m.gguf", tiny(kind="Q8_0"), metadata())
    whole = good.read_bytes()
    for size in (3, 100, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut.gguf is truncated") as error:
            GgufReader(tmp_path / "cut.gguf")
        assert "\n" not in str(error.value)
    other = write(tmp_path / "o.gguf", {"token_embd.weight": (np.zeros((2, 2), np.float32), None)}, {}, "gpt2")
    with pytest.raises(UserError, match="architecture 'gpt2' is not supported"):
        GgufReader(other)
    blocks = {"token_embd.weight": (random_bytes((2, 256), "IQ4_NL"), "IQ4_NL")}
    with pytest.raises(UserError, match=r"token_embd.weight is stored as IQ4_NL; use a file in F32"):
        GgufReader(write(tmp_path / "i.gguf", blocks, metadata()))
    strange = write(tmp_path / "s.gguf", tiny() | {"blk.0.extra.weight": (np.zeros(2, np.float32), None)}, metadata())
    reader = GgufReader(strange)
    with pytest.raises(UserError, match=r"unexpected: blk.0.extra.weight"):
        llama_params(reader, LlamaConfig.from_hf_config(hf_config(reader)))
