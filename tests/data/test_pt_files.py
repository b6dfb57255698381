"""Tensors of .pt files: equal to the bit, and nothing is ever run."""

import json
import pickle
import zipfile

import numpy as np
import pytest

from vmod_jax.data.pt_files import open_tensor
from vmod_jax.errors import UserError


@pytest.mark.goldens
def test_what_is_opened_and_what_is_refused(goldens, capsys):
    folder = goldens / "benchmarks" / "features"
    cases = json.loads((folder / "cases.json").read_text())
    with np.load(folder / "expected.npz") as arrays:
        expected = dict(arrays)
    for name in cases["opens"]:
        np.testing.assert_array_equal(open_tensor(folder / f"{name}.pt").astype(np.float32), expected[name])
    for name, why in cases["refused"].items():
        with pytest.raises(UserError) as error:
            open_tensor(folder / f"{name}.pt")
        assert why in str(error.value)
        assert f"{name}.pt" in str(error.value)
        assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def pt(path, pickled, storage=b"", compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", storage)
    return path


def tensor(offset=0, size=(2, 1, 2), stride=(2, 2, 1), elements=4, kind=b"FloatStorage"):
    """A pickle as torch writes it, by hand."""
    number = lambda value: b"J" + value.to_bytes(4, "little", signed=True)  # noqa: E731
    text = lambda value: b"X" + len(value).to_bytes(4, "little") + value  # noqa: E731
    row = lambda values: b"(" + b"".join(map(number, values)) + b"t"  # noqa: E731
    where = b"ctorch\n" + kind + b"\n" + text(b"0") + text(b"cpu") + number(elements)
    storage = b"(" + text(b"storage") + where + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + storage + number(offset) + row(size) + row(stride) + b"\x89" + hooks + b"t"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."


def test_a_tensor_by_hand(tmp_path):
    values = np.arange(4, dtype="<f4")
    np.testing.assert_array_equal(
        open_tensor(pt(tmp_path / "a.pt", tensor(), values.tobytes())), values.reshape(2, 1, 2)
    )


@pytest.mark.parametrize(
    ("pickled", "storage", "words"),
    [
        (tensor(offset=1), bytes(16), "cannot be"),
        (tensor(stride=(3, 1, 1)), bytes(16), "cannot be"),
        (tensor(stride=(-2, 1, 1)), bytes(16), "cannot be"),
        (tensor(size=(4,), stride=(1,)), bytes(16), "cannot be"),
        (tensor(), bytes(12), "not as long as it says"),
        (tensor(kind=b"LongStorage"), bytes(32), "a global that is not allowed: torch.LongStorage"),
        (pickle.dumps([1], protocol=2), b"", "opcode EMPTY_LIST is not allowed"),
        (b"\x80\x02cos\nsystem\n.", b"", "a global that is not allowed: os.system"),
        (b"\x80\x02", b"", "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, pickled, storage, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        open_tensor(pt(tmp_path / "a.pt", pickled, storage))


def test_a_compressed_storage_is_refused(tmp_path):
    with pytest.raises(UserError, match="compressed"):
        open_tensor(pt(tmp_path / "a.pt", tensor(), bytes(16), zipfile.ZIP_DEFLATED))
