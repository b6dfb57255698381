"""`vmod bench`: the registry, the object it writes, and `flops` from the command line."""

import json

import pytest

from vmod_jax.commands import bench as command
from vmod_jax.errors import UserError
from vmod_jax.machine import describe_machine, machine_line
from vmod_jax.performance import device
from vmod_jax.performance import harness as bench


def run(tmp_path, *options):
    path = tmp_path / "out" / "bench.json"
    command.main(["flops", "--json", str(path), *options])
    return json.loads(path.read_text())


def test_flops_writes_the_papers_column(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    results = run(tmp_path)
    paper = {
        "full": 48.29,
        "early_exit": 7.14,
        "layer_skip": 26.35,
        "interleaved": 30.74,
        "interleaved_deep": 31.83,
        "all": 13.18,
        "all_deep": 15.37,
        "random": 30.74,
        "uniform": 30.74,
    }
    assert results["policies"] == pytest.approx(paper, abs=0.01)
    assert results["versions"]["jax"]
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["devices"]
    assert results["environment"]["MALLOC_ARENA_MAX"] == "1"
    assert "HF_TOKEN" not in results["environment"]
    rows = {entry["name"]: entry for entry in results["rows"]}
    assert rows["interleaved"]["ratio"] == pytest.approx(30.734 / 48.290, abs=1e-4)
    assert {"kind", "formula_ratio", "spread", "dtype", "remat", "tokens_per_frame", "frames"} <= rows["full"].keys()
    assert "interleaved" in capsys.readouterr().out


def test_flops_follows_its_arguments(tmp_path):
    llama = {
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(llama))
    options = ["--hf-config", str(tmp_path), "--frames", "3", "--tokens", "5", "--text", "7", "--lora", "1"]
    policies = run(tmp_path, *options, "--keep", "0.4")["policies"]
    layer, head = 144 + 64, 4 * 16 + (4 + 16)  # see tests/models/test_flops.py
    tokens = 7 + 3 * 5
    assert policies["full"] * 1e12 == pytest.approx(2 * tokens * layer + tokens * head)
    assert policies["interleaved"] * 1e12 == pytest.approx((tokens + 7 + 3 * 2) * layer + tokens * head)
    assert policies["early_exit"] * 1e12 == pytest.approx((tokens + 7) * layer + tokens * head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "1.5"], "keep ratio 1.5"),
        (["--frames", "-1"], "--frames is -1"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--frames", "0", "--text", "0"], "nothing to count"),
        (["--hf-config", "missing.json"], "no file missing.json"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        command.main(["flops", *options])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"hidden_size": 4}'])
def test_a_broken_config_is_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        command.main(["flops", "--hf-config", str(path)])


def test_a_row_has_every_key_and_its_ratio():
    entry = bench.row("interleaved", "train_step", 3.0, 4.0, remat="full", spread=0.01)
    assert entry["ratio"] == 0.75
    assert entry["remat"] == "full"
    assert entry["spread"] == 0.01
    assert entry["formula_ratio"] is None


def test_a_row_is_in_the_file_when_it_is_measured_and_a_failure_is_a_row(tmp_path, capsys, caplog):
    path = tmp_path / "there" / "rows.json"
    rows, inside = bench.Rows(path), lambda: json.loads(path.read_text())["rows"]
    rows.append(bench.row("one", "stream", 1.0, 2.0))
    assert [entry["name"] for entry in inside()] == ["one"]
    with rows.attempt("two", "peer"):
        rows.append(bench.row("half of two", "peer", 1.0, 2.0))
        raise RuntimeError("RESOURCE_EXHAUSTED: no room\nand more")
    rows.extend([bench.row("three", "stream", 1.0, 4.0)])
    assert [entry["name"] for entry in inside()] == ["one", "half of two", "two", "three"]
    assert inside()[2]["error"] == "RuntimeError: RESOURCE_EXHAUSTED: no room"
    assert inside()[2]["ratio"] is None
    assert inside()[2].keys() >= inside()[0].keys()
    assert "two could not be measured" in caplog.text
    with pytest.raises(UserError), rows.attempt("four", "stream"):
        raise UserError("what a user can mend")
    rows.write({"backend": "blocked"})
    assert json.loads(path.read_text())["backend"] == "blocked"
    assert len(inside()) == 4
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]
    bench.print_table(rows, unit="s")
    command.main(["summary", str(path)])
    assert capsys.readouterr().out.count("RESOURCE_EXHAUSTED") == 2


def test_a_borrowed_device_is_measured_part_by_part(tmp_path, monkeypatch, capsys):
    """Each within its limit; what fails is a row; the same command goes on where it ended."""
    programs = {
        "good": device.Part("-m this", 1),
        "bad": device.Part("-m no_such_module", 1),
        "late": device.Part("-m timeit -n 1 -r 1 -s pass __import__('time').sleep(60)", 0.02),
        "flags": device.Part("-m this", 1, device.DETERMINISTIC),
    }
    monkeypatch.setattr(device, "PARTS", programs)
    monkeypatch.setattr(device, "LEAST", 0.5)
    monkeypatch.setattr(device, "_machine", lambda: {"devices": ["NVIDIA H200"]})
    command.main(["device", "--minutes", "1", "--out", str(tmp_path)])
    folder = tmp_path / "nvidia-h200"
    rows = {entry["name"]: entry for entry in json.loads((folder / "device.json").read_text())["rows"]}
    assert "no_such_module" in rows["bad"]["error"]
    assert "killed at its limit of 1 s" in rows["late"]["error"]
    assert rows["good"]["ratio"] is not None is not rows["flags"]["ratio"]
    assert "Zen of Python" in (folder / "good.log").read_text()
    (folder / "good.log").unlink()
    command.main(["device", "--minutes", "0", "--out", str(tmp_path)])
    rows = {entry["name"]: entry for entry in json.loads((folder / "device.json").read_text())["rows"]}
    assert not (folder / "good.log").exists()
    assert rows["good"]["ratio"] is not None
    assert "not begun" in rows["bad"]["error"]
    with pytest.raises(UserError, match="there is no part x"):
        command.main(["device", "--minutes", "1", "--out", str(tmp_path), "--parts", "x"])


def test_a_table_says_where_and_how_times_were_taken(capsys):
    counted = bench.row("counted", "flops", 3.0, 4.0)
    bench.print_table([counted], unit="TFLOPs")
    assert capsys.readouterr().out.splitlines()[1:] == ["counted           3           4   0.750"]
    timed = bench.row("timed", "train_step", 3.0, 4.0, formula_ratio=0.7, spread=0.01, dtype="float32", remat="full")
    bench.print_table([counted, timed], unit="s")
    header, _, line, machine = capsys.readouterr().out.splitlines()
    assert header.split() == ["s", "baseline", "ratio", "formula", "spread", "dtype", "remat"]
    assert line.split() == ["timed", "3", "4", "0.750", "0.700", "0.010", "float32", "full"]
    assert machine == f"on {machine_line(describe_machine())}"
    assert "jax devices: cpu" in machine


def test_times_are_taken_in_turn_and_paired_by_round():
    calls = []
    times = bench.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=2)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    # A machine that slows down threefold moves times, not their ratio.
    paired = bench.pair([1.0, 2.2, 2.7], [2.0, 4.0, 6.0])
    assert (paired["candidate"], paired["baseline"]) == (1.0, 2.0)
    assert paired["spread"] == pytest.approx(0.525 - 0.475)


def test_rounds_end_with_their_time_at_an_odd_number():
    assert len(bench.interleave({"a": lambda: None}, rounds=9, seconds=0)["a"]) == 1
