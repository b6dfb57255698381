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


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Generated and decoded videos, and compiled programs (which many tests share), live as long as the session."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMOD_CACHE", str(tmp_path_factory.mktemp("cache")))
        compiled = str(tmp_path_factory.mktemp("compiled"))
        jax.config.update("jax_compilation_cache_dir", compiled)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)  # of commands in processes of their own
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        yield


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The reference implementation's inputs and outputs."""
    return _folder("VMOD_GOLDENS", ROOT.parent / "shared" / "goldens")


@pytest.fixture(scope="session")
def clips() -> Path:
    """Real clips, decoder edge cases and Llama-3's tokenizer."""
    return _folder("VMOD_DATA", ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
    """configs/tiny.py, cut to 8 steps over 9 generated streams."""
    from vmod_jax.training.flags import parse

    config, _ = parse([f"--config={ROOT / 'configs' / 'tiny.py'}", "--workdir=x"])
    config.steps, config.checkpoint_every = 8, 3
    config.data.root = str(tmp_path_factory.mktemp("data") / "shapes")
    config.data.train_videos, config.data.val_videos, config.data.test_videos = 9, 1, 1
    config.data.max_frames = 16
    return config


@pytest.fixture(scope="session")
def tiny_run(tiny_config, tmp_path_factory):
    """(workdir, summary) of that run without interruptions. Not to be written to."""
    from vmod_jax.training.loop import train

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, train(tiny_config, folder)
