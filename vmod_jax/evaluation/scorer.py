"""Runs a model over whole sequences and keeps of its logits what metrics need."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vmod_jax.data.conversation import IGNORE, Encoded
from vmod_jax.evaluation.stream_metrics import TokenStats
from vmod_jax.lm import LanguageModel
from vmod_jax.streaming.answers import rung

HEAD_CHUNK = 256  # positions whose logits are held at a time: a vocabulary of 128,000 needs 0.1 GB a row


class Scorer:
    """Runs a model over whole sequences and keeps, position by position, what the metrics need of its logits.

    A call's rows are padded to a bucket of their own, one of few: a handful of compiles serve a whole split, and what
    comes out does not depend on what was scored before.
    """

    def __init__(self, lm: LanguageModel, batch_size: int = 8):
        self.lm, self.batch_size = lm, batch_size
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

    def __call__(self, rows: Sequence[tuple[Encoded, np.ndarray]]) -> list[TokenStats]:
        """rows: (encoded, frames u8[F, S, S, 3] | f32[F, n, d_v]); -> statistics of each, in order."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0].input_ids), reverse=True)
        out: dict[int, TokenStats] = {}
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            for i, stats in zip(group, self._batch([rows[i] for i in group]), strict=True):
                out[i] = stats
        return [out[i] for i in range(len(rows))]

    def _batch(self, rows: Sequence[tuple[Encoded, np.ndarray]]) -> list[TokenStats]:
        n = self.lm.config.tokens_per_frame
        most = rung(max(len(frames) for _, frames in rows))
        text = rung(max(len(row.input_ids) - n * len(frames) for row, frames in rows))
        size = up(text + n * most, HEAD_CHUNK)
        ids = np.zeros((self.batch_size, size), np.int32)
        labels = np.full((self.batch_size, size), IGNORE, np.int32)
        shape = rows[0][1].shape[1:]
        frames = np.zeros((self.batch_size, most, *shape), rows[0][1].dtype)
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
