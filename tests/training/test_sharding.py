"""The mesh and the table of placements."""

import jax
import ml_collections
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vmod_jax.errors import UserError
from vmod_jax.training.sharding import local_rows, make_mesh, placements, put_batch, spec

MESH = AbstractMesh((2, 2, 1, 2), ("data", "fsdp", "context", "tensor"))


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("llama/embed/embedding", (64, 32), ("tensor", "fsdp")),
        ("llama/embed/embedding", (63, 32), (None, "fsdp")),  # an axis that does not divide stays whole
        ("llama/layers/q/kernel", (4, 32, 64), (None, "fsdp", "tensor")),
        ("llama/layers/o/lora_a", (4, 64, 8), (None, "tensor", "fsdp")),
        ("optimizer/1/mu/llama/layers/down/kernel", (4, 128, 32), (None, "tensor", "fsdp")),
        ("llama/head/kernel", (32, 64), ("fsdp", "tensor")),
        ("connector/in/kernel", (12, 32), (None, "fsdp")),
        ("llama/layers/input_norm/scale", (4, 32), ()),
        ("llama/layers/expert/kernel", (4, 32), ()),
        ("optimizer/1/count", (), ()),
    ],
)
def test_table(path, shape, expected):
    assert spec(path, shape, MESH) == PartitionSpec(*expected)


def _sizes(**sizes):
    return ml_collections.ConfigDict({"data": -1, "fsdp": 1, "context": 1, "tensor": 1} | sizes)


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        (_sizes(data=3), 8, "does not fit 8 device"),
        (_sizes(fsdp=16), 8, "does not fit 8 device"),
        (_sizes(fsdp=-1), 8, "-1 .* may stand once"),
        (_sizes(data=0), 8, "every size must be 1 or more"),
        (_sizes(context=3), 8, "does not fit 8 device"),
        (_sizes(), 12, "batch_size=12 does not divide over mesh.data x mesh.fsdp = 8"),
        (_sizes(tensor=4), 8, "2 key/value heads do not divide over mesh.tensor=4"),
        (_sizes(tensor=8), 8, "4 heads do not divide over mesh.tensor=8"),
    ],
)
def test_a_mesh_that_does_not_fit(sizes, batch, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes, batch, heads=4, kv_heads=2)


def test_one_device():
    mesh = make_mesh(_sizes(), 8, 4, 2)
    if jax.device_count() == 1:
        assert set(mesh.shape.values()) == {1}
    assert local_rows(mesh, 8) == slice(0, 8)
    batch = {"input_ids": np.arange(16).reshape(8, 2), "length": np.arange(8)}
    put = put_batch(batch, mesh, 8)
    for name, array in batch.items():
        np.testing.assert_array_equal(put[name], array)
    shapes = {"llama": {"head": {"kernel": jax.ShapeDtypeStruct((32, 64), np.float32)}}}
    assert placements(shapes, mesh)["llama"]["head"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
