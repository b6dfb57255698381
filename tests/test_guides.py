"""The README and the guides of docs/: links lead somewhere, blocks run, the site is built without warnings.

A block runs unless the line above it is `<!-- needs: WHAT -->`. Blocks of a page run in order, in one process and one
folder, in which runs/demo/ is a small trained model; `vmod train` and its like get few steps (`FEW`).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FEW = {
    "data steps": ["--train=8", "--test=2"],
    "train": ["--config.steps=2", "--config.batch_size=2"],
    "stream": ["--max-reply=4"],
    "routing": ["--videos=1"],
}
RUNNABLE = ("demo", "train", "evaluate", "stream", "data", "export", "bench", "routing", "arank", "env")


class Block(NamedTuple):
    language: str
    text: str
    needs: str


def blocks(page):
    """The fenced blocks of a page, and of a list's steps, in order."""
    pattern = r"^(?: *<!-- (?:needs: (.+?)|[\w-]+) -->\n)?( *)```(\w*)\n(.*?)^\2```$"
    found = re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)
    return [
        Block(language, re.sub(f"^{indent}", "", text, flags=re.M), needs) for needs, indent, language, text in found
    ]


def commands(block):
    """The commands of a shell block, split into words, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def script(page):
    """A page's blocks as one Python program."""
    yield "import sys\nfrom vmod_jax.commands import cli\n"
    yield "def vmod(*words):\n    code = cli.main(words)\n    assert code == 0, (words, code)\n"
    for block in blocks(page):
        if block.needs:
            continue
        if block.language == "python":
            yield block.text
        if block.language == "bash":
            for _, *words in commands(block):
                yield f"vmod(*{[*words, *FEW.get(words[0], FEW.get(' '.join(words[:2]), []))]!r})\n"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_and_blocks(page):
    """Every link of the page is to a file that there is, every block is one that runs or says what it needs."""
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link
    assert page.read_text().count("```") == 2 * len(blocks(page))
    for block in blocks(page):
        assert block.language in ("bash", "python", "json")
        if block.language == "python":
            compile(block.text, page.name, "exec")
        if block.language == "json":
            json.loads(block.text.replace("NAME", '"NAME"').replace('""', '"'))
        if block.language == "bash" and not block.needs and page.name != "README.md":
            assert all(words[0] == "vmod" and words[1] in RUNNABLE for words in commands(block)), block.text


def test_every_page_is_in_the_navigation():
    assert {page.name for page in PAGES} <= set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))


def test_the_readme_is_a_screen_with_its_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 70
    for mark, command in (("main-job", "bash launch/local.sh"), ("tests", "bash launch/test.sh")):
        assert f"<!-- {mark} -->\n```bash\n{command}\n```\n" in text


def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ended = subprocess.run(
        build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "vmod_jax.lm.LanguageModel.stream" in (tmp_path / "api" / "index.html").read_text()


@pytest.fixture(scope="module")
def small(tiny_run, tiny_config, tmp_path_factory):
    """A folder whose runs/demo/ has what the main job leaves, on a small scale."""
    folder = tmp_path_factory.mktemp("guides")
    shutil.copytree(tiny_run[0], folder / "runs" / "demo" / "interleaved")
    (folder / "runs" / "demo" / "streams").mkdir()
    (video,) = json.loads((Path(tiny_config.data.root) / "splits.json").read_text())["test"]
    shutil.copy(Path(tiny_config.data.root) / f"{video}.mp4", folder / "runs" / "demo" / "streams" / "test-0000.mp4")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if len(list(script(page))) > 2], ids=lambda page: page.stem)
def test_a_page_runs(page, small):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-c", "".join(script(page))]
    ended = subprocess.run(run, cwd=small, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
