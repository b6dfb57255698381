"""Connectors: vision features to the language model's width.

A row of `CONNECTORS` is what `VideoLMConfig.connector` names.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
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


# name: a module of (size_in, size_out, dtype) that is called with features [..., d_v] and gives tokens [..., d]
CONNECTORS = {
    "mlp": Connector,
}
