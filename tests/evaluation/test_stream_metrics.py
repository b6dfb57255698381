"""LM-PPL, TimeDiff, Fluency and LM-Correctness."""

import json
import random
import zlib

import numpy as np
import pytest

from vmod_jax.data.conversation import IGNORE, Encoded, encode, label_weights, stream_format
from vmod_jax.errors import UserError
from vmod_jax.evaluation.stream_metrics import (
    SampleMetrics,
    TokenStats,
    aggregate,
    always_silent,
    always_speak,
    continuations,
    score,
    text_prior,
)


def character_format(tokens_per_frame=2, interval=","):
    """Every character is a token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    return stream_format(fast, tokens_per_frame, interval)


FMT = character_format()
WRONG = FMT.tokenizer.convert_tokens_to_ids("~")  # never a label
TEXT = len("Assistant: ok") + 1  # learned tokens of that reply, its eos included


def stream(num_frames, learn=True):
    return {"role": "stream", "num_frames": num_frames, "learn": learn}


def assistant(content="ok", learn=True):
    return {"role": "assistant", "content": content, "learn": learn}


def perfect(encoded, fmt=FMT, speak=()):
    """A model that gets every label right, except that it speaks at the learned frames `speak` (counted over all)."""
    at = np.flatnonzero((encoded.labels != IGNORE) & (encoded.input_ids == fmt.frame_token_id))
    argmax = np.where(encoded.labels != IGNORE, encoded.labels, WRONG).astype(np.int32)
    argmax[at[list(speak)]] = WRONG
    interval_prob = (argmax == fmt.interval_id).astype(np.float32)
    return TokenStats(argmax, interval_prob, np.zeros(len(argmax), np.float32))


def silent(encoded, stats, frames, fmt=FMT):
    """The same model, but silent at these learned frames."""
    at = np.flatnonzero((encoded.labels != IGNORE) & (encoded.input_ids == fmt.frame_token_id))[frames]
    stats.argmax[at] = fmt.interval_id
    stats.interval_prob[at] = 1
    return stats


def frame_ends(continuation, fmt=FMT):
    return np.flatnonzero(continuation.input_ids == fmt.frame_token_id)[
        fmt.tokens_per_frame - 1 :: fmt.tokens_per_frame
    ]


def all_silent(continuation, fmt=FMT, but=()):
    """Statistics of a model that speaks only at the frames `but` (in the order they are shown)."""
    argmax = np.full(len(continuation.input_ids), fmt.interval_id, np.int32)
    argmax[frame_ends(continuation, fmt)[list(but)]] = WRONG
    return TokenStats(argmax, (argmax == fmt.interval_id).astype(np.float32), np.zeros(len(argmax), np.float32))


def test_exact():
    encoded = encode([stream(4), assistant(), stream(3), assistant()], FMT)
    assert score(encoded, perfect(encoded), FMT) == SampleMetrics(1, 0, 1, 1, 0, 1)


def test_early():
    encoded = encode([stream(4), assistant(), stream(3), assistant()], FMT)
    got = score(encoded, perfect(encoded, speak=[1]), FMT)  # the second of four: two too early
    assert got.time_diff_frames == got.time_diff_strict_frames == (2 + 0) / 2
    assert got.fluency == got.fluency_strict == ((4 - 2) / (4 + TEXT) + 1) / 2
    assert got.lm_correctness == 1


@pytest.mark.parametrize("late_by", [1, 2, 3, None])
def test_late(late_by):
    """The frames watched for a late reply are as many as there were before the right one: 3 of the next turn's 6."""
    encoded = encode([stream(4), assistant(), stream(6), assistant()], FMT)
    stats = silent(encoded, perfect(encoded), [3])
    (more,) = continuations(encoded, stats, FMT)
    assert more.turn == 0
    assert more.frames.tolist() == list(range(4 + 3))
    assert FMT.tokenizer.convert_ids_to_tokens(more.input_ids[-9:].tolist()) == [",", "<v>", "<v>"] * 3
    got = score(encoded, stats, FMT, continued={0: all_silent(more, but=[3 + late_by] if late_by else [])})
    assert got.time_diff_frames == got.time_diff_strict_frames == (late_by or 3) / 2
    assert got.fluency == got.fluency_strict == (3 / (4 + TEXT) + 1) / 2


def test_late_is_bounded_by_the_next_turn():
    encoded = encode([stream(4), assistant(), stream(1), assistant()], FMT)
    stats = silent(encoded, perfect(encoded), [3])
    (more,) = continuations(encoded, stats, FMT)
    assert more.frames.tolist() == [0, 1, 2, 3, 4]
    assert score(encoded, stats, FMT, continued={0: all_silent(more)}).time_diff_frames == 1 / 2
    with pytest.raises(ValueError, match="turn 0"):
        score(encoded, stats, FMT)


@pytest.mark.parametrize(("first", "second"), [(1, 5), (4, 0)])
def test_nothing_to_continue_with_counts_as_exact(first, second):
    encoded = encode([stream(first), assistant(), stream(second), assistant()], FMT)
    stats = silent(encoded, perfect(encoded), [first - 1])
    assert continuations(encoded, stats, FMT) == []
    got = score(encoded, stats, FMT)
    assert (got.time_diff_frames, got.fluency) == (0, 1)


def test_silent_last_turn():
    encoded = encode([stream(4), assistant(), stream(3), assistant(), stream(5)], FMT)
    stats = silent(encoded, perfect(encoded), [6])
    assert continuations(encoded, stats, FMT) == []
    got = score(encoded, stats, FMT)
    assert (got.time_diff_frames, got.fluency) == (0, 1)
    assert got.time_diff_strict_frames == (0 + 2) / 2
    assert got.fluency_strict == (1 + 2 / (3 + TEXT)) / 2


def test_unlearned_frames_count_for_the_bound_and_the_position():
    """3 + 4 frames of which the last two are not learned; m = min(5, 7 - 1) frames, the next turn's own."""
    encoded = encode([stream(3, False), stream(4, 2), assistant(), stream(5), assistant()], FMT)
    stats = silent(encoded, perfect(encoded), [0, 1])
    (more,) = continuations(encoded, stats, FMT)
    assert more.frames.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert len(frame_ends(more)) == len(more.frames)
    got = score(encoded, stats, FMT, continued={0: all_silent(more, but=[5 + 2])})
    assert got.time_diff_frames == 3 / 2
    assert got.fluency == (1 / (2 + TEXT) + 1) / 2


def test_turns_without_labels_are_left_out_but_their_frames_are_counted():
    encoded = encode([stream(6, False), assistant(learn=False), stream(3), assistant(), stream(4), assistant()], FMT)
    stats = silent(encoded, perfect(encoded), [2])
    (more,) = continuations(encoded, stats, FMT)
    assert more.turn == 1
    assert more.frames.tolist() == list(range(6 + 3 + 2))
    got = score(encoded, stats, FMT, continued={1: all_silent(more)})
    assert got.time_diff_frames == 2 / 2


def test_text_metrics():
    encoded = encode([stream(2), assistant("ok"), assistant("ok")], FMT)
    stats = perfect(encoded)
    text = np.flatnonzero((encoded.labels != IGNORE) & (encoded.input_ids != FMT.frame_token_id))
    stats.argmax[text[[3, 5]]] = WRONG
    stats.nll[text] = np.repeat([np.log(2), np.log(8)], TEXT)
    got = score(encoded, stats, FMT)
    assert got.lm_ppl == pytest.approx((2 + 8) / 2)
    assert got.lm_correctness == pytest.approx((3 / TEXT + 1) / 2)
    assert got.fluency == pytest.approx((2 + 3) / (2 + TEXT))  # the second turn has no frames


def test_threshold_speaks_whatever_the_argmax():
    encoded = encode([stream(4), assistant()], FMT)
    stats = silent(encoded, perfect(encoded), [0, 1, 2, 3])
    at = np.flatnonzero(encoded.labels == FMT.interval_id)
    stats.interval_prob[at] = [0.9, 0.5, 0.25]
    diffs = [score(encoded, stats, FMT, threshold).time_diff_frames for threshold in (0.0, 0.25, 0.3, 0.5, 0.6, 0.95)]
    assert diffs == [0, 0, 1, 1, 2, 3]  # at the threshold: silent


def test_nothing_to_measure():
    encoded = encode([stream(2, False), {"role": "user", "content": "?"}, assistant(learn=False), stream(3)], FMT)
    assert score(encoded, perfect(encoded), FMT) == SampleMetrics(1, 0, 1, 1, 0, 1)
    encoded = encode([stream(2)], FMT)  # no turn at all
    assert score(encoded, perfect(encoded), FMT) == SampleMetrics(1, 0, 1, 1, 0, 1)


def test_aggregate_is_in_seconds():
    samples = [SampleMetrics(2, 3, 0.5, 0.25, 4, 0.1), SampleMetrics(4, 1, 1, 0.75, 2, 0.3)]
    got = aggregate(samples, fps=2)
    assert got == pytest.approx(
        {
            "lm_ppl": 3,
            "time_diff": 1,
            "fluency": 0.75,
            "lm_correctness": 0.5,
            "time_diff_strict": 1.5,
            "fluency_strict": 0.2,
        }
    )
    with pytest.raises(UserError, match="no samples"):
        aggregate([], fps=2)


# --- against a slow reference, written out message by message --------------------------------------------------------


def oracle(tokens, frames):
    """A model of random opinions: (argmax, P(interval)) after tokens that show these frames. Causal, deterministic."""
    rng = random.Random(zlib.crc32(repr((tokens, frames)).encode()))
    interval_prob = 1 - rng.random() ** 3  # mostly sure that there is nothing to say
    return ("<interval>" if rng.random() < 0.92 else "]"), interval_prob, rng.random() < 0.95, 3 * rng.random()


def oracle_stats(input_ids, labels, shown, fmt):
    """The same model's statistics as arrays."""
    tokens = fmt.tokenizer.convert_ids_to_tokens(list(input_ids))
    argmax, prob, nll = [], [], []
    count = 0
    for t, token in enumerate(tokens):
        count += token == "<v>"
        said, p, right, loss = oracle(tokens[: t + 1], shown[: -(-count // fmt.tokens_per_frame)])
        if token == "<v>":
            argmax.append(fmt.interval_id if said == "<interval>" else WRONG)
        else:
            argmax.append(labels[t] if right else WRONG)
        prob.append(p)
        nll.append(loss)
    return TokenStats(np.array(argmax, np.int32), np.array(prob, np.float32), np.array(nll, np.float32))


def slow_metrics(conversation, fmt, theta):
    """The specification, one message, frame and character after the other. Returns SampleMetrics' fields."""
    n, comma, quiet = fmt.tokens_per_frame, list(fmt.interval), "<interval>"

    def speaks(tokens, frames):
        said, p, _, _ = oracle(tokens, frames)
        return said != quiet or np.float32(p) < theta

    turns = []
    tokens, seen = ["<s>", *fmt.opening()[len("<s>") :]], 0
    turn = {"frames": [], "spoke": [], "at": None, "right": [], "nll": [], "seen": None}
    for message in conversation:
        if message["role"] == "user":
            tokens += f"\nUser: {message['content']}"
        elif message["role"] == "stream" and message["num_frames"]:
            tokens += "\n["
            learned = message["num_frames"] if message["learn"] is True else int(message["learn"])
            for i in range(message["num_frames"]):
                tokens += (comma if i else []) + ["<v>"] * n
                turn["frames"].append(seen)
                seen += 1
                if i < learned:
                    turn["spoke"].append(speaks(tokens, list(range(seen))))
                    turn["at"], turn["seen"] = list(tokens), seen
            tokens += "]"
        elif message["role"] == "assistant":
            tokens += "\n"
            for token in [*f"Assistant: {message['content']}", "</s>"]:
                if message["learn"]:
                    _, _, right, nll = oracle(tokens, list(range(seen)))
                    turn["right"].append(right)
                    turn["nll"].append(nll)
                tokens += [token]
            turns.append(turn)
            turn = {"frames": [], "spoke": [], "at": None, "right": [], "nll": [], "seen": None}

    ppl, diffs, fluency, correct, strict_diffs, strict_fluency = [], [], [], [], [], []
    for r, turn in enumerate(turns):
        run, frames = 0, len(turn["spoke"])
        while run < len(turn["right"]) and turn["right"][run]:
            run += 1
        if turn["right"]:
            ppl.append(np.exp(sum(turn["nll"]) / len(turn["nll"])))
            correct.append(run / len(turn["right"]))
        if not frames:
            continue
        diff, end = 0, False
        if True in turn["spoke"]:
            diff = frames - 1 - turn["spoke"].index(True)
        elif r == len(turns) - 1:
            end = True
        else:
            more = turns[r + 1]["frames"][: len(turn["frames"]) - 1]
            tokens, shown = list(turn["at"]), list(range(turn["seen"]))
            for late, frame in enumerate(more, 1):
                tokens += [*comma, *["<v>"] * n]
                shown.append(frame)
                diff = -late
                if speaks(tokens, shown):
                    break
        diffs.append(abs(diff))
        strict_diffs.append(frames - 1 if end else abs(diff))
        if turn["right"]:
            total = frames + len(turn["right"])
            fluent = frames + run if diff == 0 else frames - diff if diff > 0 else frames - 1
            fluency.append(fluent / total)
            strict_fluency.append((frames - 1) / total if end else fluent / total)

    def mean(values, empty):
        return sum(values) / len(values) if values else empty

    return [
        mean(ppl, 1),
        mean(diffs, 0),
        mean(fluency, 1),
        mean(correct, 1),
        mean(strict_diffs, 0),
        mean(strict_fluency, 1),
    ]


@pytest.mark.parametrize(("tokens_per_frame", "interval"), [(1, ","), (2, ","), (1, ""), (3, "")])
def test_random_dialogues_against_the_slow_reference(tokens_per_frame, interval):
    fmt = character_format(tokens_per_frame, interval)
    continued_turns = 0
    for seed in range(60):
        rng = random.Random(seed)
        conversation = []
        for _ in range(rng.randint(1, 16)):
            count = rng.randint(0, 4)
            kinds = [
                stream(count, rng.choice([True, True, False, rng.randint(0, count)])),
                assistant(rng.choice(["a", ",,]", ""]), rng.random() < 0.7),
                {"role": "user", "content": "?"},
            ]
            conversation.append(rng.choices(kinds, [4, 4, 1])[0])
        encoded = encode(conversation, fmt)
        stats = oracle_stats(encoded.input_ids, encoded.labels, list(range(100)), fmt)
        for threshold in (0.0, 0.1, 0.5):
            needed = continuations(encoded, stats, fmt, threshold)
            continued = {c.turn: oracle_stats(c.input_ids, c.encoded.labels, c.frames.tolist(), fmt) for c in needed}
            continued_turns += len(needed)
            got = score(encoded, stats, fmt, threshold, continued)
            np.testing.assert_allclose(got, slow_metrics(conversation, fmt, threshold), rtol=1e-6, err_msg=str(seed))
            if threshold == 0:
                everything = continued
            assert got == score(encoded, stats, fmt, threshold, everything)
    assert continued_turns > 20


# --- baselines -------------------------------------------------------------------------------------------------------


def test_blind_baselines():
    train = [encode([stream(2), assistant("ok"), stream(2), assistant(text)], FMT) for text in ("ok", "no")]
    prior = text_prior(train, FMT)
    assert prior.reply == tuple(FMT.tokenize("Assistant: ok</s>"))
    assert prior.hit == (4 * TEXT - 2 + 1) / (4 * TEXT + 2)  # "no" has two characters wrong

    encoded = encode([stream(4), assistant("ok"), stream(3), assistant("oh no")], FMT)
    length = len("Assistant: oh no") + 1
    quiet = always_silent(encoded, FMT, prior)
    (more,) = continuations(encoded, quiet, FMT)
    got = score(encoded, quiet, FMT, 0.5, {more.turn: always_silent(more.encoded, FMT, prior)})
    assert got.time_diff_frames == (3 + 0) / 2
    assert got.time_diff_strict_frames == (3 + 2) / 2
    run = len("Assistant: o")
    assert got.lm_correctness == (1 + run / length) / 2
    assert got.fluency == (3 / (4 + TEXT) + (3 + run) / (3 + length)) / 2
    assert got.fluency_strict == (3 / (4 + TEXT) + 2 / (3 + length)) / 2
    right = run + 1  # and the final eos
    miss = (1 - prior.hit) / (len(FMT.tokenizer) - 1)
    second = np.exp(-(right * np.log(prior.hit) + (length - right) * np.log(miss)) / length)
    assert got.lm_ppl == pytest.approx((1 / prior.hit + second) / 2, rel=1e-6)

    loud = always_speak(encoded, FMT, prior)
    assert continuations(encoded, loud, FMT) == []
    for threshold in (0.0, 0.5):
        got = score(encoded, loud, FMT, threshold)
        assert got.time_diff_frames == got.time_diff_strict_frames == (3 + 2) / 2
        assert got.fluency == got.fluency_strict == (1 / (4 + TEXT) + 1 / (3 + length)) / 2

    with pytest.raises(UserError, match="no learned reply"):
        text_prior([encode([stream(2)], FMT)], FMT)


def test_blind_baselines_of_a_later_turns_continuation():
    encoded = encode([stream(2), assistant(), stream(2), assistant(), stream(3), assistant()], FMT)
    prior = text_prior([encoded], FMT)
    quiet = always_silent(encoded, FMT, prior)
    more = continuations(encoded, quiet, FMT)
    assert [one.turn for one in more] == [0, 1]  # the second holds the first turn's reply and its eos
    for one in more:
        assert (always_silent(one.encoded, FMT, prior).nll == 0).all()


# --- the reference implementation ------------------------------------------------------------------------------------


class TinyLlama:
    """The goldens' model in PyTorch: embedding rows for text, connector(frame features) where the frame token is."""

    def __init__(self, folder):
        torch = pytest.importorskip("torch")
        from safetensors.torch import load_file
        from transformers import LlamaConfig, LlamaForCausalLM

        config = json.loads((folder / "config.json").read_text())
        keys = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "rms_norm_eps max_position_embeddings tie_word_embeddings bos_token_id eos_token_id"
        )
        rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        self.torch, weights = torch, load_file(folder / "model.safetensors")
        self.model = LlamaForCausalLM(LlamaConfig(**{k: config[k] for k in keys.split()}, rope_parameters=rope)).eval()
        self.connector = {k: weights.pop(k) for k in list(weights) if k.startswith("connector.")}
        self.model.load_state_dict(weights)
        self.fmt = stream_format(folder / "tokenizer", config["frame_num_tokens"], config["frame_token_interval"])

    def logits(self, input_ids, frames):
        """i32[T], f32[F, n, d_v] -> f32[T, V]"""
        torch, c = self.torch, self.connector
        with torch.no_grad():
            x = torch.nn.functional.linear(torch.from_numpy(frames), c["connector.0.weight"], c["connector.0.bias"])
            x = torch.nn.functional.gelu(x)
            x = torch.nn.functional.linear(x, c["connector.2.weight"], c["connector.2.bias"])
            ids = torch.from_numpy(input_ids.astype(np.int64))
            is_frame = ids == self.fmt.frame_token_id
            embeds = self.model.get_input_embeddings()(ids.masked_fill(is_frame, 0))
            embeds[is_frame] = x.flatten(0, 1)
            return self.model(inputs_embeds=embeds[None]).logits[0].numpy()

    def stats(self, encoded: Encoded, frames) -> TokenStats:
        logits = self.logits(encoded.input_ids, frames)
        log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
        labels = np.maximum(encoded.labels, 0)
        nll = log_z - np.take_along_axis(logits, labels[:, None], -1)[:, 0]
        interval = np.exp(logits[:, self.fmt.interval_id] - log_z)
        return TokenStats(logits.argmax(-1), interval, np.where(encoded.labels == IGNORE, 0, nll))


@pytest.mark.goldens
def test_tiny_llama_scores_are_the_references(goldens):
    folder = goldens / "live"
    tiny = TinyLlama(folder)
    samples = json.loads((folder / "samples.json").read_text())
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        arrays = dict(arrays)
    needed = 0
    for i, sample in enumerate(samples):
        frames = arrays[f"frames_{i}"]
        encoded = encode(sample["conversation"], tiny.fmt)
        np.testing.assert_allclose(tiny.logits(encoded.input_ids, frames), arrays[f"logits_{i}"], atol=1e-4)
        stats = tiny.stats(encoded, frames)
        weights = label_weights(encoded, tiny.fmt, stream_weight=1.0)
        assert (stats.nll * weights).sum() / (weights > 0).sum() == pytest.approx(sample["loss"], abs=1e-5)
        for threshold, expected in sample["metrics"].items():
            more = continuations(encoded, stats, tiny.fmt, float(threshold))
            needed += len(more)
            continued = {c.turn: tiny.stats(c.encoded, frames[c.frames]) for c in more}
            got = score(encoded, stats, tiny.fmt, float(threshold), continued)
            assert got[:4] == pytest.approx(expected, abs=1e-4)
    assert needed > 0
