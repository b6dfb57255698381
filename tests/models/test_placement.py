"""What a program traced under a mesh says about its activations, and that it says nothing elsewhere."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from vmod_jax.models.placement import by_heads, by_rows, lookup, on_rows

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


def test_a_table_is_looked_up_where_it_lies():
    """The width of the table over fsdp, then rows over data and fsdp."""
    index, table = jax.ShapeDtypeStruct((8, 6), jnp.int32), jax.ShapeDtypeStruct((32, 16), jnp.float32)
    placed = [
        eqn.params["sharding"].spec
        for eqn in traced(lookup, MESH, table, index)
        if eqn.primitive.name == "sharding_constraint"
    ]
    assert placed == [
        PartitionSpec(("data",)),
        PartitionSpec(("data",), (), ("fsdp",)),
        PartitionSpec(("data", "fsdp")),
    ]
    rows = jnp.arange(6.0).reshape(3, 2)
    assert lookup(rows, jnp.array([[2, 0]])).tolist() == [[[4, 5], [0, 1]]]


def test_rows_for_themselves():
    seen = []
    traced(lambda x: on_rows(lambda x: seen.append(x.shape) or x)(x), MESH, X)
    assert seen == [(2, 6, 4, 16)]
    assert on_rows(jnp.sort) is jnp.sort
