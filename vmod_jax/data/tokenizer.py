"""A small tokenizer for small models: byte-level BPE, so any text comes back; few tokens, so a head is cheap."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vmod_jax.data.conversation import DEFAULT_SYSTEM_PROMPT, NARRATION_INSTRUCTION

BOS, EOS = "<|begin_of_text|>", "<|eot_id|>"

# How Llama-3 cuts text before merging: contractions, words with one leading mark or blank, numbers of up to three
# digits, punctuation with the line ends behind it (so that "]\n" can be one token), line ends, blanks.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What every conversation has around its texts; learned with them so that it costs few tokens.
FRAME_OF_A_CONVERSATION = (
    f"{DEFAULT_SYSTEM_PROMPT}\n",
    f"\nUser: {NARRATION_INSTRUCTION}\nAssistant:",
    "]\n",
)


def train_tokenizer(texts: Iterable[str], out: str | Path, vocab_size: int = 2048) -> Any:
    """Learns a byte-level BPE from `texts` and writes it as a Hugging Face folder (AutoTokenizer opens it).

    Ids: bos 0, eos 1, the bytes, then merges, at most `vocab_size` in all; with room enough every word of `texts`
    and of the conversations' frame becomes one token. The same texts give the same files. Returns a
    transformers.PreTrainedTokenizerFast.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # A reply's first word has a blank in front and is learned with it.
    tokenizer.train_from_iterator([*FRAME_OF_A_CONVERSATION, *(f"Assistant: {text}" for text in texts)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(str(out))
    return fast
