"""`vmod env`: one screen that holds what a bug report needs; --clear-cache deletes compiled programs alone."""

from importlib import metadata

import pytest

from vmod_jax import machine
from vmod_jax.commands import cli


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache folder with a compiled program, a decoded video, generated data, and a file of somebody else's."""
    monkeypatch.setenv("VMOD_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    for name, size in (
        ("compiled/jit_f-0123-cache", 3 << 20),
        ("compiled/jit_f-0123-atime", 8),
        ("compiled/notes.txt", 5),
        ("frames/a.rgb", 1 << 20),
        ("shapes-plain/a.mp4", 2 << 20),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * size)
    return tmp_path


def test_one_screen(cache, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS_LIKE", "1")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) <= 30
    assert f"jax {metadata.version('jax')}" in printed
    assert "jax devices: cpu" in lines[0]
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "machine", "versions", "extras", "caches", "data", "variables",
    ]  # fmt: skip
    words = " ".join(printed.split())  # long paths are wrapped
    assert f"compiled programs 3.0 MiB in 3 files {cache}/compiled" in words
    assert f"generated 2.0 MiB in 1 files {cache}/shapes-plain" in words
    assert "XLA_FLAGS_LIKE=1" in printed
    assert "secret" not in printed


def test_clear_cache_deletes_compiled_programs_alone(cache, capsys):
    assert cli.main(["env", "--clear-cache"]) == 0
    assert capsys.readouterr().out == f"deleted 1 compiled programs in {cache}/compiled\n"
    left = sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())
    assert left == ["compiled/notes.txt", "frames/a.rgb", "shapes-plain/a.mp4"]
    assert cli.main(["env", "--clear-cache"]) == 0
    assert capsys.readouterr().out.startswith("deleted 0 ")


def test_a_machine_without_the_device_that_was_asked_for(cache, capsys, monkeypatch):
    def nothing():
        raise RuntimeError("no GPU\nmore lines")

    monkeypatch.setattr(machine, "describe_machine", nothing)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert cli.main(["env"]) == 0
    assert "jax finds no devices (JAX_PLATFORMS=cuda): no GPU\n" in capsys.readouterr().out


NEEDS = {
    "pkg": [
        "there>=1",
        "absent",
        'peer==2 ; extra == "torch"',
        'there[fast] ; extra == "gpu"',
        "win ; os_name == 'nt'",
    ],
    "there": ["absent-too", 'plugin ; extra == "fast"'],
}


def test_missing(monkeypatch):
    """The package's own requirements and an extra's apart, versions compared, extras of extras looked into."""

    def version(name):
        here = {"pkg": "1", "there": "1.5", "peer": "1.9"}
        if name not in here:
            raise metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(machine.metadata, "requires", NEEDS.get)
    monkeypatch.setattr(machine.metadata, "version", version)
    assert machine.missing("pkg") == ["absent"]
    assert machine.missing("pkg", "torch") == ["peer==2 (1.9 is here)"]
    assert machine.missing("pkg", "gpu") == ["plugin"]


def test_what_is_here_is_not_missing():
    """jax and numpy are there, or nothing of this would run; every extra of pyproject.toml is known."""
    assert not {"jax", "numpy", "flax"} & set(machine.missing())
    assert {"torch", "serve", "cuda", "tpu"} <= set(machine.extras())
