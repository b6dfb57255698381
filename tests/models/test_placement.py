"""What a program traced under a mesh says about its activations, and that it says nothing elsewhere."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from vmod_jax.models.placement import by_heads, by_rows

MESH = jax.sharding.AbstractMesh((2, 2, 1, 2), ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
X = jax.ShapeDtypeStruct((8, 6, 4, 16), jnp.float32)


def traced(function, mesh, *args):
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.make_jaxpr(function)(*args).eqns


def test_without_a_mesh_nothing_is_said():
    attention = lambda q, k, v: q  # noqa: E731
    assert by_heads(attention) is attention
    x = jnp.ones((3, 2))
    assert by_rows(x) is x


def test_rows_are_split_and_whole():
    (constraint,) = traced(by_rows, MESH, X)
    assert constraint.primitive.name == "sharding_constraint"
    assert constraint.params["sharding"].spec == PartitionSpec(("data", "fsdp"))


def test_a_kernel_sees_its_own_rows_and_heads():
    seen = []

    def attention(q, k, v):
        seen.append((q.shape, k.shape))
        return q

    k = jax.ShapeDtypeStruct((8, 6, 2, 16), jnp.float32)
    traced(lambda *qkv: by_heads(attention)(*qkv), MESH, X, k, k)
    assert seen == [((2, 6, 2, 16), (2, 6, 1, 16))]


def test_inside_a_shard_map_rows_are_its_own():
    spec = PartitionSpec(("data", "fsdp"), "context")
    inside = jax.shard_map(by_rows, in_specs=spec, out_specs=spec)
    (outer,) = traced(inside, MESH, X)
    assert not outer.params["jaxpr"].eqns
