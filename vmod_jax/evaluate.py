"""`vmod evaluate`: score a workdir's checkpoint on a benchmark, beside baselines that see no video.

The default benchmark, `narration`, is the paper's streaming evaluation (section 4.1): on each stream of a held-out
split, does the model speak at the right frame, and does it say the right thing?
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from vmod_jax import workdir as folder
from vmod_jax.data.batch import Bucket
from vmod_jax.data.conversation import IGNORE, Encoded, encode
from vmod_jax.data.pipeline import Streams, open_streams
from vmod_jax.errors import ArgumentParser, UserError
from vmod_jax.evaluation import stream_metrics
from vmod_jax.evaluation.stream_metrics import SampleMetrics, TokenStats
from vmod_jax.lm import LanguageModel, load
from vmod_jax.train import parse
from vmod_jax.training import config as configuration

HEAD_CHUNK = 256  # positions whose logits are held at a time: a vocabulary of 128,000 needs 0.1 GB a row


class Scored(NamedTuple):
    """What a benchmark found. predictions: one object a sample, for the file beside the scores."""

    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]]
    samples: int
    predictions: list[dict[str, Any]]


class Scorer:
    """Runs a model over whole sequences and keeps, position by position, what the metrics need of its logits.

    Rows are padded to a bucket that only grows, so that a handful of compiles serve a whole split.
    """

    def __init__(self, lm: LanguageModel, batch_size: int = 8):
        self.lm, self.batch_size, self.bucket = lm, batch_size, Bucket(0, 0, 0)
        self._stats = jax.jit(self._run)

    def _run(self, params, input_ids, frames, length, labels):
        apply: Any = functools.partial(self.lm.model.apply, {"params": params})
        hidden, _ = apply(input_ids, frames, length, method="hidden")
        batch, size, width = hidden.shape
        chunks = hidden.reshape(batch, -1, HEAD_CHUNK, width).swapaxes(0, 1)
        targets = labels.reshape(batch, -1, HEAD_CHUNK).swapaxes(0, 1)

        def one(chunk):
            hidden, label = chunk
            logits = apply(hidden, method="logits")
            log_p = jax.nn.log_softmax(logits)
            nll = -jnp.take_along_axis(log_p, jnp.maximum(label, 0)[..., None], axis=-1)[..., 0]
            interval = jnp.exp(log_p[..., self.lm.fmt.interval_id])
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), interval, jnp.where(label == IGNORE, 0, nll)

        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, size), jax.lax.map(one, (chunks, targets)))

    def __call__(self, rows: Sequence[tuple[Encoded, np.ndarray]], progress: str = "") -> list[TokenStats]:
        """rows: (encoded, frames u8[F, S, S, 3] | f32[F, n, d_v]); -> statistics of each, in order."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0].input_ids), reverse=True)
        out: dict[int, TokenStats] = {}
        with tqdm(total=len(rows), desc=progress, unit="stream", disable=not progress) as bar:
            for start in range(0, len(order), self.batch_size):
                group = order[start : start + self.batch_size]
                for i, stats in zip(group, self._batch([rows[i] for i in group]), strict=True):
                    out[i] = stats
                bar.update(len(group))
        return [out[i] for i in range(len(rows))]

    def _batch(self, rows: Sequence[tuple[Encoded, np.ndarray]]) -> list[TokenStats]:
        n = self.lm.config.tokens_per_frame
        need = Bucket(
            max(len(frames) for _, frames in rows),
            max(len(row.input_ids) - n * len(frames) for row, frames in rows),
            0,
        )
        if not self.bucket.holds(need):
            self.bucket = Bucket(*(max(up(a, 16), b) for a, b in zip(need, self.bucket, strict=True)))
        size = up(self.bucket.tokens(n), HEAD_CHUNK)
        ids = np.zeros((self.batch_size, size), np.int32)
        labels = np.full((self.batch_size, size), IGNORE, np.int32)
        shape = rows[0][1].shape[1:]
        frames = np.zeros((self.batch_size, self.bucket.frames, *shape), rows[0][1].dtype)
        length = np.ones(self.batch_size, np.int32)
        for b, (row, shown) in enumerate(rows):
            length[b] = len(row.input_ids)
            ids[b, : length[b]], labels[b, : length[b]] = row.input_ids, row.labels
            frames[b, : len(shown)] = shown
        arrays = jax.device_get(self._stats(self.lm.params, ids, frames, length, labels))
        return [TokenStats(*(x[b, : length[b]] for x in arrays)) for b in range(len(rows))]


def up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


# --- benchmarks -------------------------------------------------------------------------------------------------------


def narration(lm: LanguageModel, config: Any, split: str, threshold: float) -> Scored:
    """The four streaming metrics and their strict variants (see evaluation/stream_metrics.py)."""
    fmt, size = lm.fmt, lm.config.vision.image_size if lm.config.vision else 0
    streams = open_streams(config.data, split, size)
    rows = [(encode(sample.conversation, fmt), sample) for sample in streams.samples]
    _check_frames(lm, streams)
    scorer = Scorer(lm)
    with_frames = [(row, streams.frames(sample)) for row, sample in rows]
    stats = scorer(with_frames, f"scoring {split}")

    # Where the model stayed silent, what would it have done without the reply? One continuation a silent turn.
    more = [
        (i, c)
        for i, ((row, _), s) in enumerate(zip(rows, stats, strict=True))
        for c in stream_metrics.continuations(row, s, fmt, threshold)
    ]
    late = scorer([(c.encoded, with_frames[i][1][c.frames]) for i, c in more], "late replies" if more else "")
    continued: dict[int, dict[int, TokenStats]] = {i: {} for i in range(len(rows))}
    for (i, c), s in zip(more, late, strict=True):
        continued[i][c.turn] = s
    samples = [stream_metrics.score(row, stats[i], fmt, threshold, continued[i]) for i, (row, _) in enumerate(rows)]

    prior = stream_metrics.text_prior(
        (encode(sample.conversation, fmt) for sample in open_streams(config.data, "train", size).samples), fmt
    )
    blind = {
        name: _blind(baseline, [row for row, _ in rows], fmt, prior, lm.config.fps) for name, baseline in BLIND.items()
    }
    predictions = [
        {"video": s.video, "start": s.start, "stop": s.stop, **m._asdict(), "replies": _replies(row, st, fmt)}
        for (row, s), m, st in zip(rows, samples, stats, strict=True)
    ]
    return Scored(stream_metrics.aggregate(samples, lm.config.fps), blind, len(rows), predictions)


BLIND = {"always_silent": stream_metrics.always_silent, "always_speak": stream_metrics.always_speak}


def _blind(baseline, rows: Sequence[Encoded], fmt, prior, fps: float) -> dict[str, float]:
    scores: list[SampleMetrics] = []
    for row in rows:
        stats = baseline(row, fmt, prior)
        continued = {c.turn: baseline(c.encoded, fmt, prior) for c in stream_metrics.continuations(row, stats, fmt)}
        scores.append(stream_metrics.score(row, stats, fmt, continued=continued))
    return stream_metrics.aggregate(scores, fps)


def _replies(row: Encoded, stats: TokenStats, fmt) -> list[dict[str, str]]:
    """What was to be said, and the model's first choice at each of its tokens given those before."""
    learned = (row.labels != IGNORE) & (row.input_ids != fmt.frame_token_id)
    ends = np.flatnonzero(learned & (row.labels == fmt.eos_id))
    replies, start = [], 0
    for end in ends:
        at = np.arange(start, end + 1)[learned[start : end + 1]]
        decode = lambda ids: fmt.tokenizer.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
        replies.append({"truth": decode(row.labels[at]), "first_choices": decode(stats.argmax[at])})
        start = end + 1
    return replies


def _check_frames(lm: LanguageModel, streams: Streams) -> None:
    sample = streams.samples[0]
    shape = streams.frames(sample._replace(stop=sample.start + 1)).shape[1:]
    n, width = lm.config.tokens_per_frame, lm.config.vision_hidden_size
    if len(shape) == 2 and shape != (n, width):
        raise UserError(f"the data's features are {list(shape)}, the model takes {[n, width]}: prepare them again")
    if len(shape) == 3 and lm.config.vision is None:
        raise UserError("the data has pixels, and the model has no vision tower: prepare features with vmod data")


# name -> (lm, config, split, threshold) -> Scored
BENCHMARKS: dict[str, Callable[[LanguageModel, Any, str, float], Scored]] = {"narration": narration}


# --- the command ------------------------------------------------------------------------------------------------------


def evaluate(
    workdir: str | Path,
    config: Any = None,
    benchmark: str = "narration",
    split: str | None = None,
    threshold: float = 0.0,
    step: int | None = None,
) -> dict[str, Any]:
    """Scores a checkpoint and writes WORKDIR/eval/BENCHMARK.json, with the predictions beside it.

    config: whose `data` section says what to score on (default: the workdir's own); threshold: theta of the metrics,
    0 for argmax alone; split: default config.data.eval_split. Raises UserError for what does not fit.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"unknown benchmark '{benchmark}': use one of {', '.join(BENCHMARKS)}")
    workdir = Path(workdir).expanduser()
    folder.read_model(workdir)  # is it a workdir at all?
    if config is None:
        stored = folder.read_config(workdir)
        if stored is None:
            raise UserError(f"{workdir} has no config.json (it was imported): say what to score on with --config")
        config = ConfigDict(stored)
    config = configuration.complete(config)
    split = str(split or config.data.eval_split)
    began = time.perf_counter()
    lm = load(workdir, step=step)
    scored = BENCHMARKS[benchmark](lm, config, split, threshold)
    result = {
        "metrics": scored.metrics,
        "baselines": scored.baselines,
        "samples": scored.samples,
        "seconds": time.perf_counter() - began,
        "split": split,
        "threshold": threshold,
    }
    out = workdir / "eval" / f"{benchmark}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    with out.with_name(f"{benchmark}_predictions.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in scored.predictions)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="a trained or imported model")
    parser.add_argument("--config", help="a file of configs/ whose data to score on (default: the workdir's own)")
    parser.add_argument("--benchmark", default="narration", help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: data.eval_split")
    parser.add_argument("--threshold", type=float, default=0.0, help="speak where P(silent) is below; 0: argmax alone")
    parser.add_argument("--step", type=int, help="checkpoint (default: the last)")
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if rest and not args.config:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    config = parse(["--config", args.config, *rest, "--workdir", args.workdir])[0] if args.config else None
    result = evaluate(args.workdir, config, args.benchmark, args.split, args.threshold, args.step)
    print_scores(result)
    print(f"wrote {Path(args.workdir) / 'eval' / args.benchmark}.json")
    return 0


def print_scores(result: dict[str, Any]) -> None:
    """A small table: the model, then the blind baselines."""
    names = list(result["metrics"])
    print(" " * 16 + "".join(f"{name:>18}" for name in names))
    for name, metrics in {"model": result["metrics"], **result["baselines"]}.items():
        print(f"{name:<16}" + "".join(f"{metrics[key]:>18.3f}" for key in names))
