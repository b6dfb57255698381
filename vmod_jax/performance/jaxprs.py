"""What a traced program says of itself. Nothing else reads the insides of jaxprs, whose names change with JAX."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import jaxprs_in_params


def equations(jaxpr: Any) -> Iterator[Any]:
    """Of a jaxpr and of all within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def stacked(jaxpr: Any) -> list[Any]:
    """Shapes and dtypes of what the forward scans of a jaxpr stack, [length, ...], beside what they carry.

    A scan's parameters say how many of its outputs are carried under a name that changes with JAX's versions (0.11).
    Its body says it under all: what is stacked has there an axis less.
    """
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan" and not e.params["reverse"]]
    pairs = [pair for e in scans for pair in zip(e.outvars, e.params["jaxpr"].out_avals, strict=True)]
    return [whole.aval for whole, step in pairs if whole.aval.ndim > step.ndim]
