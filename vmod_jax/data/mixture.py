"""Several sources as one: which source each stream of a batch comes from is drawn, each source goes its own way.

The g-th stream of a run, g = step x batch size + place in the batch, comes from a source drawn by (seed, g); it is that
source's next one, each source shuffled anew every epoch of its own. Where every source stands after g streams follows
from g: the state of a mixture is one number, as of any data set, and no run can come back to another place.
"""

import bisect
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np

from vmod_jax.data.conversation import Sample
from vmod_jax.data.streams import Streams
from vmod_jax.errors import UserError

BLOCK = 4096  # streams whose sources are drawn at a time


class Joined(Sequence[Sample]):
    """The samples of several sources one after another, each video's name led by its source's."""

    def __init__(self, parts: Mapping[str, Sequence[Sample]]):
        self.names, self.parts = list(parts), list(parts.values())
        self.stops = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return self.stops[-1]

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part = bisect.bisect_right(self.stops, range(len(self))[index])
        sample = self.parts[part][range(len(self))[index] - (self.stops[part - 1] if part else 0)]
        return sample._replace(video=f"{self.names[part]}:{sample.video}")

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def mixture(parts: Mapping[str, Streams], weights: Mapping[str, float], split: str) -> Streams:
    """Sources as one, in the proportion of their weights. Raises UserError where one has no stream in the split."""
    for name, part in parts.items():
        if not len(part.samples):
            raise UserError(f"data.mix: '{name}' has no streams in its split '{split}': check data.root")
        if weights[name] < 0:
            raise UserError(f"data.mix: the weight of '{name}' is {weights[name]:g}, below zero")

    def frames(sample: Sample) -> np.ndarray:
        name, video = sample.video.split(":", 1)
        return parts[name].frames(sample._replace(video=video))

    def texts() -> list[str]:
        return sorted({text for part in parts.values() for text in (part.texts() if part.texts else ())})

    samples = Joined({name: part.samples for name, part in parts.items()})
    shares = tuple((len(part.samples), float(weights[name])) for name, part in parts.items())
    return Streams(samples, frames, None, texts=texts, parts=shares)


def order(parts: Sequence[tuple[int, float]], seed: int) -> Callable[[int], int]:
    """g -> the index, among all sources' streams one after another, of the g-th stream of a run."""
    sizes, weights = np.array([size for size, _ in parts]), np.array([weight for _, weight in parts])
    offsets = np.cumsum(sizes) - sizes

    @functools.lru_cache(4 * len(parts))
    def shuffled(source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed % 2**32, source, epoch]).permutation(sizes[source])

    @functools.lru_cache(64)
    def drawn(block: int) -> np.ndarray:
        return np.random.default_rng([seed % 2**32, block]).choice(len(parts), BLOCK, p=weights / weights.sum())

    lock = threading.Lock()  # batches are built by several threads
    before = [np.zeros(len(parts), np.int64)]  # a block each: streams of each source in all blocks before

    def index(g: int) -> int:
        block, place = divmod(int(g), BLOCK)
        with lock:
            while len(before) <= block:
                before.append(before[-1] + np.bincount(drawn(len(before) - 1), minlength=len(parts)))
        source = drawn(block)[place]
        nth = before[block][source] + (drawn(block)[:place] == source).sum()
        epoch, own = divmod(int(nth), int(sizes[source]))
        return int(offsets[source] + shuffled(int(source), epoch)[own])

    return index
