"""The small tokenizer: any text comes back, known text is short, the same texts give the same files."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmod_jax.data.conversation import NARRATION_INSTRUCTION, Sample, encode, stream_format
from vmod_jax.data.sources import shapes
from vmod_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(shapes.sentences(), out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def roundtrip(tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    assert roundtrip(tokenizer, text) == text


def test_every_byte_has_a_token(tokenizer):
    """Every byte that UTF-8 can contain, in characters of one to four bytes."""
    ranges = [range(0x800), range(0x800, 0xD800, 64), range(0xE000, 0x10000, 64), range(0x10000, 0x110000, 4096)]
    text = "".join(chr(c) for codes in ranges for c in codes)
    assert len(set(text.encode())) == 256 - 13  # C0, C1 and F5 to FF never occur
    assert roundtrip(tokenizer, text) == text


def test_specials(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|begin_of_text|>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|eot_id|>", 1)
    assert tokenizer("a<|eot_id|>", add_special_tokens=False)["input_ids"][-1] == 1
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_known_texts_are_short(tokenizer):
    assert len(tokenizer) < 600
    for text in shapes.sentences():
        words = text.rstrip(".").split()
        assert tokenizer.tokenize(f" {text}") == [f"Ġ{word}" for word in words] + ["."]
    assert len(tokenizer.tokenize(NARRATION_INSTRUCTION)) <= 40


def test_splits_like_llama3(folder, clips):
    """The texts around a conversation fall into the same pieces; only the merges inside words may differ."""
    from tokenizers import Tokenizer

    ours, theirs = (
        Tokenizer.from_file(str(path / "tokenizer.json")).pre_tokenizer for path in (folder, clips / "llama3_tokenizer")
    )
    for text in (
        "]\nAssistant: It's 12345, I'M  here.\n\n",
        f"\nUser: {NARRATION_INSTRUCTION}",
        "a\r\n  b\t(c)[",
        "été 日本",
    ):
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_a_conversation_is_encoded_with_it(folder):
    fmt = stream_format(str(folder), tokens_per_frame=3)
    sample = Sample(
        [
            {"role": "stream", "num_frames": 1, "learn": False},
            {"role": "user", "content": NARRATION_INSTRUCTION},
            {"role": "assistant", "content": "A red circle is at the top.", "learn": True},
            {"role": "stream", "num_frames": 2, "learn": True},
            {"role": "assistant", "content": "The red circle turns blue.", "learn": True},
        ],
        "v",
        0,
        3,
    )
    encoded = encode(sample.conversation, fmt)
    assert (encoded.input_ids == fmt.frame_token_id).sum() == 9
    assert len(encoded.input_ids) < 9 + 100
    turns = fmt.tokenizer.convert_tokens_to_ids(["Ġturns", "Ġblue"])
    assert set(turns) <= set(encoded.labels.tolist())


def test_a_small_vocabulary_is_kept_small(tmp_path):
    tokenizer = train_tokenizer(["a red circle"] * 3, tmp_path, vocab_size=300)
    assert len(tokenizer) == 300
    assert roundtrip(tokenizer, "a red circle, Ω") == "a red circle, Ω"


def test_deterministic(tmp_path, folder):
    """Another process, with another hash seed, writes the same bytes."""
    code = (
        "import sys; from vmod_jax.data.sources import shapes; from vmod_jax.data.tokenizer import train_tokenizer;"
        "train_tokenizer(shapes.sentences(), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={"PYTHONHASHSEED": "7"})
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
