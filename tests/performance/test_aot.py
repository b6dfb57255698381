"""`vmod bench aot`: the collectives counted in compiled text, and (slow) a full-size step compiled for a TPU."""

import argparse
import json
import subprocess
import sys

import pytest

from vmod_jax.errors import UserError
from vmod_jax.performance import aot
from vmod_jax.performance.aot import CASES, TARGETS, _line, collective_bytes, compare, cuda_plugin, library
from vmod_jax.performance.harness import Rows

# A loop of 3 around a loop of 8 in steps of 2, as the TPU's compiler writes them.
TEXT = """\
HloModule step, is_scheduled=true

%inner_body (p: (bf16[4,8], u32[])) -> (bf16[4,8], u32[]) {
  %p = (bf16[4,8]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=0
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %move = (bf16[4,8]{1,0}, bf16[4,8]{1,0:S(1)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1
  %moved = bf16[4,8]{1,0} collective-permute-done(%move)
  %next = u32[] add(%i, %two)
  ROOT %t = (bf16[4,8]{1,0}, u32[]) tuple(%moved, %next)
}

%inner_condition (p: (bf16[4,8], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p = (bf16[4,8]{1,0}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%gather_begins (x: f32[16]) -> f32[64] {
  %x = f32[16]{0} parameter(0)
  ROOT %all = f32[64]{0} all-gather(%x), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%gather_ends (x: f32[16]) -> f32[64] {
  %x = f32[16]{0} parameter(0)
  ROOT %all = f32[64]{0} all-gather(%x), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%outer_body (p: (bf16[4,8], f32[16], s32[])) -> (bf16[4,8], f32[16], s32[]) {
  %p = (bf16[4,8]{1,0}, f32[16]{0}, /*index=2*/s32[]) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=0
  %y = f32[16]{0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %zero = u32[] constant(0)
  %begins = f32[64]{0} fusion(%y), kind=kCustom, calls=%gather_begins
  %ends = f32[64]{0} fusion(%y), kind=kCustom, calls=%gather_ends
  %start = (bf16[4,8]{1,0}, u32[]) tuple(%x, %zero)
  %loop = (bf16[4,8]{1,0}, u32[]) while(%start), condition=%inner_condition, body=%inner_body
  %z = bf16[4,8]{1,0} get-tuple-element(%loop), index=0
  %next = s32[] add(%i, %one)
  ROOT %t = (bf16[4,8]{1,0}, f32[16]{0}, s32[]) tuple(%z, %y, %next)
}

%outer_condition (p: (bf16[4,8], f32[16], s32[])) -> pred[] {
  %limit = s32[] constant(3)
  %p = (bf16[4,8]{1,0}, f32[16]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=2
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (a: bf16[4,8], b: f32[16]) -> f32[16] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = (bf16[4,8]{1,0}, f32[16]{0}, s32[]) tuple(%a, %b, %zero)
  %loop = (bf16[4,8]{1,0}, f32[16]{0}, s32[]) while(%start), condition=%outer_condition, body=%outer_body
  %y = f32[16]{0} get-tuple-element(%loop), index=1
  %part = f32[4]{0} reduce-scatter(%y), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%sum
  ROOT %all = f32[16]{0} all-reduce(%y), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}
"""


def test_collectives_are_multiplied_by_their_loops():
    assert collective_bytes(TEXT) == {
        "collective-permute": 3 * 4 * 64,  # bf16[4, 8], 3 x 4 times
        "all-gather": 3 * 192,  # three of four parts of f32[64], once although two fusions name it
        "reduce-scatter": 3 * 16,  # a ring passes f32[4] on three times
        "all-reduce": 2 * 3 * 16,
        "all-to-all": 0,
    }


def test_a_loop_of_unknown_length_is_no_guess():
    with pytest.raises(ValueError, match="not a counting loop"):
        collective_bytes(TEXT.replace("add(%i, %two)", "multiply(%i, %two)"))


def test_a_loop_whose_length_is_noted_is_believed():
    noted = "body=%inner_body"
    text = TEXT.replace(noted, noted + r', backend_config={"known_trip_count":{"n":"5"}}')
    assert collective_bytes(text)["collective-permute"] == 3 * 5 * 64


def test_rows_of_a_stream():
    """One GPU receives nothing; what a frame adds is held against the formula."""
    full, mod = ({"total_bytes": n, "collective_bytes": 0, "frame_bytes": n} for n in (100, 61))
    rows = {row["kind"]: row for row in compare("x", CASES["8b-h200-stream"], mod, full)}
    assert set(rows) == {"aot_memory", "aot_cache"}
    # 16 layers hold 51 tokens of a frame and the text token between two, 16 hold 11
    assert rows["aot_cache"]["formula_ratio"] == pytest.approx((51 + 11) / (2 * 51))
    assert rows["aot_cache"]["text_tokens"] == 1200
    assert "streams of 7 fit" in _line(
        dict.fromkeys(("argument_bytes", "temp_bytes", "collective_bytes", "total_bytes", "hbm_bytes"), 2**30)
        | {"fits": True, "compile_seconds": 1.0, "frame_bytes": 10**6, "longest_frames": 7}
    )


def test_rows_hold_the_method_against_full():
    full = {"total_bytes": 8, "flops": 10.0, "collective_bytes": 6}
    mod = {"total_bytes": 6, "flops": 6.8, "collective_bytes": 6}
    rows = {row["kind"]: row for row in compare("x", CASES["8b-v5e-16-600x10"], mod, full)}
    ratios = [rows[kind]["ratio"] for kind in ("aot_memory", "aot_flops", "aot_collectives")]
    assert ratios == pytest.approx([0.75, 0.68, 1.0])
    assert rows["aot_flops"]["formula_ratio"] == pytest.approx(0.683, abs=1e-3)  # spec: attention kept
    assert [row["kind"] for row in compare("x", CASES["8b-v5e-16-600x10"], mod, {"flops": 10.0})] == ["aot_flops"]


def test_a_step_that_is_too_large_is_said_whether_it_compiles_or_not():
    result = dict.fromkeys(("argument_bytes", "temp_bytes", "collective_bytes"), 2**30)
    result |= {"fits": False, "total_bytes": 20 * 2**30, "hbm_bytes": 16 * 2**30, "flops": 1e12, "compile_seconds": 1.0}
    assert _line(result).startswith("does not fit: 20.00 of 16 GiB a chip")
    assert (
        _line({"fits": False, "error": "RESOURCE_EXHAUSTED: 20 of 16"}) == "does not fit: RESOURCE_EXHAUSTED: 20 of 16"
    )
    assert not _line(result | {"fits": True}).startswith("does not fit")


def test_without_a_compiler_nothing_is_begun(monkeypatch):
    """Cases that nobody named are those that can be compiled; a named one that cannot is refused before the others."""
    begun = []
    monkeypatch.setattr(aot, "compile_case", lambda case, *_: begun.append(case.target) or {"fits": False, "error": ""})
    monkeypatch.setattr(aot, "library", lambda: "libtpu.so")
    monkeypatch.setattr(aot, "cuda_plugin", lambda: False)
    run = lambda *cases, quick=False: aot.run(argparse.Namespace(cases=list(cases), quick=quick), Rows())  # noqa: E731
    run()
    assert {TARGETS[target].platform for target in begun} == {"tpu"}
    begun.clear()
    with pytest.raises(UserError, match="no CUDA plug-in"):
        run("8b-v5e-16-600x10", "8b-h200-stream")
    monkeypatch.setattr(aot, "library", lambda: None)
    with pytest.raises(UserError, match="no libtpu"):
        run()
    assert not begun
    monkeypatch.setattr(aot, "cuda_plugin", lambda: True)
    run(quick=True)
    assert begun == ["h200", "h200"]


def test_every_case_names_a_slice_whose_chips_it_uses():
    for case in CASES.values():
        chips = TARGETS[case.target].chips
        assert chips == case.mesh[0] * case.mesh[1] * case.mesh[2] * case.mesh[3]
        assert case.rows % (case.mesh[0] * case.mesh[1]) == 0


@pytest.mark.slow
def test_llama_3_8b_streams_on_an_h200(tmp_path):
    """A frame of a stream of 10 minutes at 50 tokens a frame, by XLA's own compiler for GPUs."""
    if not cuda_plugin():
        pytest.skip("no CUDA plug-in of JAX: get it as the head of vmod_jax/performance/aot.py says")
    command = [sys.executable, "-m", "vmod_jax", "bench", "aot", "8b-h200-stream", "--json", "aot.json"]
    subprocess.run(command, check=True, cwd=tmp_path)
    full, mod = json.loads((tmp_path / "aot.json").read_text())["compiles"]
    assert mod["longest_frames"] > 1.6 * full["longest_frames"]
    weights, cache = 2 * (32 * 218.1e6 + 2 * 128256 * 4096), 1200 * mod["frame_bytes"]
    assert mod["argument_bytes"] < 1.01 * (weights + cache)
    assert mod["alias_bytes"] > 0.99 * cache
    assert mod["temp_bytes"] < 2**26  # a copy of one layer's weights would take 416 MiB, of its cache 240


@pytest.mark.slow
def test_llama_3_8b_fits_v5e_16(tmp_path):
    """LoRA training on 600 frames x 10 tokens, under the method and in full, by XLA's own TPU compiler."""
    if library() is None:
        pytest.skip("no libtpu: get it as the head of vmod_jax/performance/aot.py says")
    arguments = [
        sys.executable,
        "-m",
        "vmod_jax",
        "bench",
        "aot",
        "--quick",
        "--json",
        str(tmp_path / "aot.json"),
    ]
    subprocess.run(arguments, check=True)
    results = json.loads((tmp_path / "aot.json").read_text())
    compiles = {entry["policy"]: entry for entry in results["compiles"]}
    for entry in compiles.values():
        assert entry["fits"]
        assert entry["total_bytes"] < 16 * 2**30
        # 8 billion bf16 weights and 0.36 billion float32 ones, thrice: all of it split over 16 chips
        assert 1.2 * 2**30 < entry["argument_bytes"] < 1.3 * 2**30
        # Weights are gathered for the forward pass and again backwards, and nothing else to speak of: the loss, which
        # comes in two parts, gathers the head (1.05 GB) four times.
        weights = 2 * 32 * 218.1e6 * 2 * 15 / 16
        assert weights < entry["collective_bytes"] < 1.2 * weights + 4 * 1.05e9
    rows = {row["kind"]: row for row in results["rows"]}
    assert rows["aot_flops"]["ratio"] == pytest.approx(rows["aot_flops"]["formula_ratio"], abs=0.02)
