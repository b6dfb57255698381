"""The notebooks are whole, were run, show what they promise, and still run (slow)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
PICTURES = {"quickstart": 2, "routing_study": 3}  # at least
MAX_BYTES = 600_000


def code_cells(name):
    return [cell for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]


def texts(cells):
    """What the outputs say, pictures aside."""
    for cell in cells:
        for output in cell.outputs:
            data = output.get("data", {})
            yield output.get("text", "") + "".join(text for kind, text in data.items() if kind.startswith("text/"))


def test_all_are_known_to_the_runner():
    source = (NOTEBOOKS / "run.py").read_text()
    assert NAMES
    assert all(f'"{name}"' in source for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_was_run_from_top_to_bottom_and_is_small(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size <= MAX_BYTES
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert kinds
    assert "error" not in kinds
    pictures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert pictures >= PICTURES.get(name, 0)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_tell_nothing_of_the_machine(name):
    """Absolute paths, and the marks of a terminal (colours, progress bars drawn over each other)."""
    said = "".join(texts(code_cells(name)))
    assert not re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|var|mnt|Users|content)/\S*", said)
    assert not set(said) & {"\r", "\x1b"}


@pytest.mark.parametrize("name", NAMES)
def test_installs_from_the_repository_only_where_it_must(name):
    first = code_cells(name)[0].source
    assert 'if importlib.util.find_spec("vmod_jax") is None:\n    %pip install' in first
    assert sum("%pip" in cell.source or cell.source.startswith("!") for cell in code_cells(name)) == 1
    assert sum(line.startswith("QUICK = ") for cell in code_cells(name) for line in cell.source.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_with_the_quick_settings(name, tmp_path):
    settings = {"VMOD_NOTEBOOK_QUICK": "1", "HF_HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, str(NOTEBOOKS / "run.py"), name]
    run = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"{name}: " in run.stdout
