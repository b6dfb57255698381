"""Arrays on their way from files to devices and to checkpoints: the same bits, a layer at a time."""

import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from vmod_jax.training.checkpoint import load_params, save_params
from vmod_jax.weights import lazy
from vmod_jax.weights.huggingface import LazyArray, copy_into, write_tensors


def lazy_array(array, stacked, reads=None):
    """A LazyArray whose parts are transposed views, as those of real files; reads: names what is read."""

    def part(i, layer):
        def read():
            if reads is not None:
                reads.append(i)
            return np.ascontiguousarray(layer.T).T

        return read

    layers = array if stacked else [array]
    return LazyArray(array.shape, array.dtype, tuple(part(i, x) for i, x in enumerate(layers)), stacked)


def arrays():
    rng = np.random.default_rng(0)
    return {
        "llama": {
            "layers": {"q": {"kernel": rng.normal(size=(3, 16, 40)).astype(ml_dtypes.bfloat16)}},
            "embed": {"embedding": rng.normal(size=(50, 16)).astype(np.float32)},
            "norm": {"scale": rng.normal(size=16).astype(np.float16)},
        },
        "connector": {"in": {"bias": rng.normal(size=5).astype(np.float32)}},
    }


def make_lazy(tree):
    llama, connector = tree["llama"], tree["connector"]
    return {
        "llama": {
            "layers": {"q": {"kernel": lazy_array(llama["layers"]["q"]["kernel"], True)}},
            "embed": {"embedding": lazy_array(llama["embed"]["embedding"], False)},
            "norm": {"scale": lazy_array(llama["norm"]["scale"], False)},
        },
        "connector": jax.tree.map(jax.numpy.asarray, connector),  # initialised, not read
    }


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_lazy_checkpoint_is_what_save_params_writes(tmp_path):
    tree = arrays()
    lazy.save(tmp_path / "lazy", make_lazy(tree))
    save_params(tmp_path / "plain", tree)
    same(load_params(tmp_path / "lazy"), tree)
    same(load_params(tmp_path / "plain"), tree)


def test_arrays_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "CHUNK_BYTES", 4096)
    tree = {"a": np.arange(3 * 40 * 100, dtype=np.float32).reshape(3, 40, 100)}
    lazy.save(tmp_path, {"a": lazy_array(tree["a"], True)})
    same(load_params(tmp_path), tree)


def test_leaves_are_read_one_after_another(tmp_path):
    reads = []
    tree = {name: np.full((2, 3, 4), i, np.float32) for i, name in enumerate("abc")}
    lazy.save(tmp_path, {name: lazy_array(array, True, reads) for name, array in tree.items()})
    assert reads == [0, 1] * 3
    same(load_params(tmp_path), tree)


def test_placing_takes_the_arrays_over_without_a_copy():
    tree = arrays()
    same(lazy.place(make_lazy(tree)), tree)
    leaf = lazy_array(tree["llama"]["embed"]["embedding"], False)
    array = leaf.read()
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_layers_in_place():
    """How stacked arrays reach a device that is not the host."""
    tree = arrays()
    kernel = tree["llama"]["layers"]["q"]["kernel"]
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    same(lazy._place_by_layers(lazy_array(kernel, True), where), kernel)


MESH = """
import jax, sys
sys.path[:0] = sys.argv[1:]
import numpy as np
import test_lazy
from vmod_jax.training.sharding import make_mesh
from vmod_jax.weights import lazy
assert jax.device_count() == 8
mesh = make_mesh({"data": 2, "fsdp": 2, "context": 1, "tensor": 2}, 8, 4, 2)
tree = test_lazy.arrays()
placed = lazy.place(test_lazy.make_lazy(tree), mesh)
test_lazy.same(placed, tree)
kernel = placed["llama"]["layers"]["q"]["kernel"]
assert kernel.sharding.shard_shape(kernel.shape) == (3, 8, 20)
by_layers = lazy._place_by_layers(test_lazy.lazy_array(tree["llama"]["layers"]["q"]["kernel"], True), kernel.sharding)
assert by_layers.sharding == kernel.sharding
test_lazy.same(by_layers, kernel)
"""


@pytest.mark.mesh
def test_placing_on_a_mesh():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    here = os.path.dirname(__file__)
    command = [sys.executable, "-W", "ignore", "-c", MESH, here, os.path.dirname(here)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (33, 70), (70, 33), (2, 3, 4)])
def test_copies_are_exact(dtype, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    for source in (array, np.ascontiguousarray(array.T).T):
        target = np.empty(shape, dtype)
        copy_into(target, source)
        assert target.tobytes() == np.ascontiguousarray(array).tobytes()
        wide = np.empty(shape, np.float32)
        copy_into(wide, source)
        np.testing.assert_array_equal(wide, array.astype(np.float32))


def test_files_are_as_readable_as_others(tmp_path):
    write_tensors(tmp_path, [("a", np.zeros(3, np.float32))])
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
