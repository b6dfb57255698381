"""Fixtures that every test may use, and the switch for slow tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all") or "slow" in (config.getoption("-m") or ""):
        return
    skip = pytest.mark.skip(reason="slow: run with --all")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"{variable}: no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The reference implementation's inputs and outputs."""
    return _folder("VMOD_GOLDENS", ROOT.parent / "shared" / "goldens")


@pytest.fixture(scope="session")
def clips() -> Path:
    """Real clips, decoder edge cases and Llama-3's tokenizer."""
    return _folder("VMOD_DATA", ROOT.parent / "shared" / "data")
