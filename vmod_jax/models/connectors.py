"""Connectors: vision features to the language model's width.

A row of `CONNECTORS` is what `VideoLMConfig.connector` names.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Connector(nn.Module):
    """Linear -> GELU (exact, with erf) -> Linear, both with bias: [..., d_v] -> [..., d]. Parameters are float32.

    The paper's, section 3.1.
    """

    size_in: int
    size_out: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        dense = lambda name: nn.Dense(self.size_out, dtype=self.dtype, name=name)  # noqa: E731
        return dense("out")(jax.nn.gelu(dense("in")(features), approximate=False))


def bilinear(size: int, places: int) -> np.ndarray:
    """f32[places, size]: the weights by which torch's bilinear interpolation reads `size` values at `places`."""
    at = np.maximum((np.arange(places) + 0.5) * size / places - 0.5, 0)
    low = np.floor(at).astype(int)
    matrix = np.zeros((places, size), np.float32)
    matrix[np.arange(places), low] += 1 - (at - low)
    matrix[np.arange(places), np.minimum(low + 1, size - 1)] += at - low
    return matrix


def pool(tokens: Array, grid: tuple[int, int], pooled: tuple[int, int]) -> Array:
    """The connector's h x w tokens of a frame read at h' x w' places: [..., h * w, d] -> [..., h' * w', d].

    LLaVA-OneVision (arXiv 2408.03326) makes 14 x 14 tokens of a video's 27 x 27 patches so, behind the connector.
    """
    rows, columns = (bilinear(size, places) for size, places in zip(grid, pooled, strict=True))
    square = tokens.reshape(*tokens.shape[:-2], *grid, tokens.shape[-1])
    square = jnp.einsum("iH,...HWd,jW->...ijd", rows, square, columns, precision=jax.lax.Precision.HIGHEST)
    return square.reshape(*tokens.shape[:-2], pooled[0] * pooled[1], tokens.shape[-1]).astype(tokens.dtype)


# name: a module of (size_in, size_out, dtype) that is called with features [..., d_v] and gives tokens [..., d]
CONNECTORS = {
    "mlp": Connector,
}
