"""Compiled programs are kept by every command, where the user wants them; what does not compile starts without JAX."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmod_jax import caches

COMPILE = """
import sys
from vmod_jax.commands import cli
cli.COMMANDS["probe"] = cli.Command("probe", "main", "")
class Probe:
    @staticmethod
    def main(arguments):
        import jax
        jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
sys.modules["vmod_jax.commands.probe"] = Probe
sys.exit(cli.main(["probe"]))
"""


def kept(folder: Path) -> list[Path]:
    return list(folder.glob("*-cache"))


@pytest.fixture
def probe(tmp_path):
    """Runs a command that compiles one small program, in a process with these variables."""

    def run(**variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {"VMOD_CACHE": str(tmp_path / "cache")} | variables
        subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)

    return run


def test_a_command_keeps_the_smallest_program(probe, tmp_path):
    probe()
    first = {path: path.stat().st_mtime_ns for path in kept(tmp_path / "cache" / "compiled")}
    assert first
    probe()
    assert {path: path.stat().st_mtime_ns for path in kept(tmp_path / "cache" / "compiled")} == first


def test_the_users_settings_go_first(probe, tmp_path):
    probe(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert kept(tmp_path / "mine")
    assert not (tmp_path / "cache" / "compiled").exists()
    probe(JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "cache" / "compiled").exists()


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("VMOD_CACHE", str(tmp_path))
    for value, folder in (("", tmp_path / "compiled"), (str(tmp_path / "mine"), tmp_path / "mine")):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
        assert caches.compiled_folder() == folder


def test_help_and_the_package_start_without_jax():
    """`vmod --help` answers at once."""
    code = "import sys, json, vmod_jax.commands.cli as c; c.main(['--help']); print(json.dumps(sorted(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"jax", "numpy", "flax", "transformers"} & set(json.loads(said.splitlines()[-1]))
