"""Paths as users give them, and errors of a bounded length."""

import ast
from pathlib import Path

import pytest

from vmod_jax.commands import cli
from vmod_jax.errors import UserError, user_path
from vmod_jax.training import config as configuration
from vmod_jax.training.flags import parse

PACKAGE = Path(__file__).resolve().parents[1] / "vmod_jax"
# Options and arguments that are paths; --workdir of a training command goes through `parse`.
PATHS = {
    "source", "root", "video", "files", "tables", "--out", "--root", "--workdir", "--encoder", "--vision", "--adapter",
    "--annotations", "--results", "--jsonl", "--json", "--video", "--videos", "--hf-config",
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder beside the folder in which the test runs, where nothing called ~ may come to be."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").glob("~*"))


def test_a_path_is_expanded_once(home, tmp_path):
    assert user_path("~") == home
    assert user_path("~/a/~b") == home / "a" / "~b"
    assert user_path(Path("~/a")) == home / "a"
    assert user_path("a/~/b") == Path("a/~/b")
    assert user_path("./~") == user_path(user_path("./~")) == tmp_path / "here" / "~"
    assert user_path("~root").is_absolute()
    for unknown in ("~nobody-of-that-name/x", "~~"):
        with pytest.raises(UserError, match="no home folder of that user is known"):
            user_path(unknown)


def test_a_file_whose_name_begins_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~lock.mp4").touch()
    assert user_path("~lock.mp4") == user_path(user_path("./~lock.mp4")) == tmp_path / "~lock.mp4"


def test_every_option_that_is_a_path_is_expanded():
    wrong, seen = [], set()
    for file in [*(PACKAGE / "commands").glob("*.py"), *(PACKAGE / "performance").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if node.func.attr == "add_argument" and isinstance(node.args[0], ast.Constant):
                name = node.args[0].value
                kind = next((ast.unparse(k.value) for k in node.keywords if k.arg == "type"), "")
                seen.add(name)
                # `of` of vmod table: a path or a bare name
                if kind == "Path" or (name in PATHS and kind not in ("user_path", "of") and "int" not in kind):
                    wrong.append(f"{file.name}: {name}")
    assert not wrong
    assert seen >= PATHS - {"--videos"}


def test_what_is_made_at_home_lies_there(home, capsys):
    sizes = ["--train", "1", "--val", "1", "--test", "0"]
    assert cli.main(["data", "shapes", "--out", "~/made", *sizes]) == 0
    assert (home / "made" / "narrations.json").is_file()
    assert cli.main(["data", "narration", "--root", "~/made", "--out", "~/set", "--image-size", "24"]) == 0
    assert cli.main(["data", "features", "~/made", "--out", "~/features", "--image-size", "24"]) == 0
    assert (home / "set" / "meta.json").is_file()
    assert (home / "features" / "meta.json").is_file()
    capsys.readouterr()
    for arguments in (
        ["stream", "~/no.mp4", "--workdir", "~/run"],
        ["import", "~/no", "--out", "~/run"],
        ["export", "--workdir", "~/no", "--out", "~/out"],
        ["evaluate", "--workdir", "~/no"],
        ["arank", "--workdir", "~/no"],
        ["routing", "--workdir", "~/no"],
        ["table", "~/no.py"],
        ["train", "--config=~/no.py", "--workdir=~/run"],
        ["train", "--config", "~/no.py", "--workdir", "~/run"],
        ["bench", "flops", "--hf-config", "~/no.json"],
        ["data", "features", "~/no", "--out", "~/out"],
    ):
        assert cli.main(arguments) == 2
        assert str(home / "no") in capsys.readouterr().err


def test_paths_of_a_configuration(home):
    (home / "run.py").write_text(
        "from vmod_jax.training.config import defaults\n"
        "def get_config():\n"
        "    config = defaults()\n"
        "    config.init_from = '~/base'\n"
        "    return config\n"
    )
    arguments = [
        "--config=~/run.py",
        "--workdir=~/run",
        "--config.data.root=~/data",
        "--config.model.hf_config=~/c.json",
    ]
    config, workdir = parse(arguments)
    config = configuration.complete(config)
    assert workdir == home / "run"
    assert (config.init_from, config.data.root) == (str(home / "base"), str(home / "data"))
    assert config.model.hf_config == str(home / "c.json")
    assert (config.data.path, config.data.tokenizer) == ("", "")


def test_a_cache_at_home(home, monkeypatch):
    from vmod_jax.caches import cache_folder

    monkeypatch.setenv("VMOD_CACHE", "~/cache")
    assert cache_folder() == home / "cache"
