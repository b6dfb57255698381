"""What is read of jaxprs, under whatever JAX is installed."""

import jax
import jax.numpy as jnp
from jax import lax

from vmod_jax.performance.jaxprs import equations, stacked


def test_what_a_scan_stacks_is_what_it_does_not_carry():
    def loss(x):
        def step(carry, more):
            return jnp.sin(carry + more), (carry.sum(), more.astype(jnp.bfloat16)[:3])

        carry, (sums, parts) = lax.scan(step, x, jnp.ones((5, 4)))
        return carry.sum() + sums.sum() + parts.astype(jnp.float32).sum()

    forward = stacked(jax.make_jaxpr(loss)(jnp.ones(4)).jaxpr)
    assert [(a.shape, a.dtype) for a in forward] == [((5,), jnp.float32), ((5, 3), jnp.bfloat16)]
    saved = stacked(jax.make_jaxpr(jax.grad(loss))(jnp.ones(4)).jaxpr)  # the scan of the backward pass stacks nothing
    assert {a.shape for a in saved} == {(5,), (5, 3), (5, 4)}


def test_equations_lie_within_equations():
    inner = jax.jit(lambda x: lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x), x))
    names = [e.primitive.name for e in equations(jax.make_jaxpr(lambda x: jnp.exp(inner(x)))(1.0).jaxpr)]
    assert {"tanh", "exp"} <= set(names)
