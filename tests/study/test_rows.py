"""Tables: rows differ in what they name, start from the same base, and are scored where they lie."""

import json
import statistics
from pathlib import Path

import pytest

from vmod_jax.commands import cli
from vmod_jax.commands.table import read_table
from vmod_jax.errors import UserError
from vmod_jax.study.rows import Row, chain, row_config
from vmod_jax.training import config as configuration
from vmod_jax.training.metrics import read_metrics

TABLES = sorted((Path(__file__).resolve().parents[2] / "configs" / "tables").glob("*.py"))
TINY = """
from pathlib import Path

from ml_collections import ConfigDict

from vmod_jax.study.rows import Row
from vmod_jax.training.config import complete


def get_config():
    return complete(ConfigDict({config}))


ROWS = {{
    "first": Row({{"policy": "full", "steps": 3}}, base=""),
    "base": Row({{"policy": "full", "steps": 2}}, base="first"),
    "full": Row({{"policy": "full"}}),
    "interleaved": Row({{}}, seeds=2),
}}
"""


@pytest.fixture(scope="module")
def made(tiny_config, tmp_path_factory):
    """A table's file and the folder where all of its rows ran."""
    folder = tmp_path_factory.mktemp("table")
    config = tiny_config.copy_and_resolve_references()
    config.steps = 2
    file = folder / "tiny.py"
    file.write_text(TINY.format(config=config.to_dict()))
    assert cli.main(["table", str(file), "--out", str(folder / "out")]) == 0
    return file, folder / "out"


def test_rows_and_what_is_written(made, capsys):
    file, out = made
    results = json.loads((out / "policies.json").read_text())
    assert list(results) == ["first", "base", "full", "interleaved"]
    for name, row in results.items():
        for place, seed in enumerate(row["seeds"]):
            workdir = out / name / f"seed-{seed}"
            scores = json.loads((workdir / "eval" / "narration.json").read_text())["metrics"]
            for metric in ("lm_ppl", "time_diff", "fluency", "lm_correctness"):
                assert row[metric][place] == scores[metric]
            assert json.loads((workdir / "config.json").read_text())["seed"] == seed
    assert results["interleaved"]["seeds"] == [0, 1]
    assert results["interleaved"]["flops"][0] < results["full"]["flops"][0]
    assert len(set(results["interleaved"]["lm_ppl"])) == 2  # another seed is another run
    starts = [json.loads((out / name / "seed-0" / "config.json").read_text())["init_from"] for name in results]
    assert starts == ["", *(str(out / name / "seed-0") for name in ("first", "base", "base"))]
    lines = (out / "policies.md").read_text().splitlines()
    mean, spread = (f(results["interleaved"]["lm_ppl"]) for f in (statistics.mean, statistics.stdev))
    assert f"| interleaved | 2 | {mean:.3f} ± {spread:.3f} |" in lines[-1]
    assert (out / "quality-flops.png").read_bytes()[:4] == b"\x89PNG"

    before = {path: path.stat().st_mtime_ns for path in out.rglob("row.json")}
    assert cli.main(["table", str(file), "--out", str(out)]) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in out.rglob("row.json")} == before
    assert "vmod routing" in capsys.readouterr().out


def test_one_more_seed_of_one_row(made):
    file, out = made
    command = ["table", str(file), "--out", str(out), "--rows", "full", "--seeds", "5", "--results", str(out / "again")]
    assert cli.main(command) == 0
    assert json.loads((out / "again" / "policies.json").read_text())["full"]["seeds"] == [0, 5]
    assert len(read_metrics(out / "full" / "seed-5" / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "nowhere.py: no such file"),
        (["FILE", "--rows", "fulll"], "no row 'fulll'"),
        ([__file__], "is no table"),
    ],
)
def test_mistakes(made, capsys, arguments, message):
    file, out = made
    assert cli.main(["table", *(a.replace("FILE", str(file)) for a in arguments), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err


def test_a_row_cannot_change_what_does_not_exist(tiny_config):
    with pytest.raises(UserError, match=r"config\.model\.gridd is no key"):
        row_config(tiny_config, Row({"model.gridd": (0, 0)}), Path("out"), 0)


def test_the_papers_tables():
    """Rows of the same name are the same row in all of them; every row is a model; budgets are equal."""
    rows, steps = {}, {}
    for file in TABLES:
        config, these = read_table(file)
        every = {name: (config, row) for name, row in these.items()}
        for name, row in these.items():
            assert rows.setdefault(name, row) == row
            made = configuration.complete(row_config(config, row, Path("out"), 1))
            configuration.method(made, made.model.num_hidden_layers)
            steps[name] = made.steps
            for base in chain(every, name):
                assert these[base].changes["policy"] == "full"
    asked = ["full", "cls_only", "early_exit", "layer_skip", "interleaved", "random", "uniform"]
    assert all(rows[name].seeds >= 3 for name in asked)
    assert len({steps[name] for name, row in rows.items() if row.base in ("base", "base_cls")}) == 1
    more = ["interleaved_r10", "interleaved_r30", "interleaved_deep", "all", "all_deep", "gate_raw", "gate_sigmoid"]
    assert {*more, "keep_last", "keep_warmup", "ranked", "shared_router"} <= rows.keys()
