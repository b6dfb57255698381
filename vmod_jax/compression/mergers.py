"""Frames with fewer tokens: what becomes of a frame's tokens between connector and language model.

A row of `MERGERS` is what `VideoLMConfig.merger` names. It sees one frame at a time, so that a stream is what training
was.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array


class Merger(NamedTuple):
    """count: tokens of a frame that come in -> that go out; merge: [B, F, n, d] -> [B, F, count(n), d]"""

    count: Callable[[int], int]
    merge: Callable[[Array], Array]


MERGERS = {
    "none": Merger(lambda n: n, lambda tokens: tokens),
}
