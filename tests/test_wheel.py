"""The wheel: what it holds, and (slow) that it runs outside the checkout."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {".py", ".html"}
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def wanted():
    """What a wheel must hold: the files of the package, and those of configs/ inside it."""
    files = [*(ROOT / "vmod_jax").rglob("*"), *(ROOT / "configs").rglob("*")]
    names = [file.relative_to(ROOT).as_posix() for file in files if file.suffix in SHIPPED]
    return {f"vmod_jax/{name}" if name.startswith("configs/") else name for name in names}


def built(target):
    """What setuptools writes of the package, without building it: paths below the wheel's root."""
    script = """
from distutils.core import run_setup
build = run_setup("setup.py", stop_after="config").get_command_obj("build_py")
build.ensure_finalized()
print(*build.get_outputs(include_bytecode=False), sep="\\n")
"""
    run = [sys.executable, "-c", f"import setuptools{script}"]
    paths = subprocess.run(run, cwd=target, check=True, capture_output=True, text=True).stdout.split()
    return {path.partition("/lib/")[2] for path in paths if path.startswith("build/lib/")}


def test_it_holds_every_file():
    assert built(ROOT) == wanted()


@pytest.fixture
def installed(tmp_path):
    """The bin/ of an environment in which the wheel is installed, beside the packages that it needs."""
    pytest.importorskip("build")
    source, dist, environment = tmp_path / "source", tmp_path / "dist", tmp_path / "environment"
    source.mkdir()
    for name in ("vmod_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--no-isolation", "-w", "-o", dist, source]
    subprocess.run(build, check=True, env=OUTSIDE)
    (wheel,) = dist.glob("*.whl")
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == wanted()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    install = [environment / "bin" / "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, env=OUTSIDE)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text("\n".join(site.getsitepackages()))  # their own .pth files do not count there
    return environment / "bin"


@pytest.mark.slow
def test_it_runs_outside_the_checkout(installed, tmp_path):
    def run(*command):
        ended = subprocess.run(command, cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    vmod = installed / "vmod"
    assert run(installed / "python", "-c", "import vmod_jax; print(vmod_jax.__file__)").startswith(str(tmp_path))
    assert "usage: vmod demo" in run(vmod, "demo", "--help")
    assert "0.6" in run(vmod, "bench", "flops")
    small = ("--config.steps=2", "--config.data.train_videos=8", "--config.data.val_videos=1")
    run(vmod, "train", "--config", "tiny", "--workdir", "run", *small)
    assert (tmp_path / "run" / "checkpoints").is_dir()
