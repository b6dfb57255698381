"""`vmod bench aot`: steps of full-size models, in training and in a stream, compiled for TPUs and GPUs not here.

XLA's compilers run anywhere. What they say about a step is what that step will need on the device: bytes of each chip's
memory, and every collective. Nothing is run, so there are no times but the compiler's own.

For TPUs the compiler is the library libtpu, 200 MB to download, which comes with `pip install '.[tpu]'`. Where it is
installed, every JAX program looks for a TPU first and complains on stderr that there is none, so on other machines it
is better kept apart (as `launch/test.sh --all` does):

    pip install --no-deps --target DIR 'libtpu==0.0.42.*'        # the version that jax 0.10.2's extra tpu names
    VMOD_LIBTPU=DIR/libtpu/libtpu.so vmod bench aot --json F

For NVIDIA's GPUs it is JAX's CUDA plug-in, `pip install '.[cuda]'` (5 GB; a virtual environment of its own will do). On
the device XLA also tries several kernels for each matrix product, whose scratch memory is not in these figures.
"""

import argparse
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from vmod_jax.errors import UserError
from vmod_jax.models.depth import make_policy
from vmod_jax.models.flops import LLAMA_3_8B
from vmod_jax.models.inference import merge_lora, to_int8, unstack
from vmod_jax.models.kv_cache import num_bytes
from vmod_jax.models.llama import NO_LORA, LlamaConfig, LoraConfig
from vmod_jax.models.video_lm import VideoLM, VideoLMConfig, init_params, make_cache
from vmod_jax.performance.harness import Rows, row
from vmod_jax.performance.setup import Stream, carried_ratio, flops_of_step, ratio_of_formula
from vmod_jax.streaming.engine import Programs, frames_chunk
from vmod_jax.training.config import defaults
from vmod_jax.training.optimizer import make_optimizer, trained_groups
from vmod_jax.training.sharding import AXES, BATCH, chunks_per_row, make_mesh
from vmod_jax.training.step import abstract_state, make_step

LLAMA_3_70B = dataclasses.replace(
    LLAMA_3_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)
MODELS = {"8b": LLAMA_3_8B, "70b": LLAMA_3_70B}
GRIDS = {10: (3, 3), 50: (7, 7)}
TEXT = 2000  # text tokens of a row
RANK = 128


class Target(NamedTuple):
    """A slice as Google names it (a v5p's number counts cores: v5p-8 has 4 chips), or the GPUs of one machine."""

    topology: str
    chips: int
    hbm_gib: int  # of a chip
    platform: str = "tpu"


TARGETS = {
    "h200": Target("1x1x1", 1, 140, "cuda"),  # hosts x processes x GPUs
    "h100-8": Target("1x1x8", 8, 79, "cuda"),
    "v5e-16": Target("v5e:4x4", 16, 16),
    "v6e-1": Target("v6e:1x1", 1, 32),
    "v6e-8": Target("v6e:2x4", 8, 32),
    "v5p-8": Target("v5p:2x2x1", 4, 95),
    "v5p-32": Target("v5p:2x2x4", 16, 95),
    "v5p-128": Target("v5p:4x4x4", 64, 95),
}


class Case(NamedTuple):
    """A training step, or one frame of a stream that has shown all others before, a text token between them.

    mesh: sizes of data, fsdp, context, tensor; rows: streams of a batch, over all chips; step: a name of `STEPS`.
    """

    model: str
    target: str
    frames: int
    tokens: int  # of a frame
    mesh: tuple[int, int, int, int]
    rows: int
    remat: str = "attention"
    step: str = "train"


CASES = {
    "8b-v5e-16-600x10": Case("8b", "v5e-16", 600, 10, (1, 16, 1, 1), 16),
    "8b-v6e-8-600x10": Case("8b", "v6e-8", 600, 10, (1, 8, 1, 1), 8),
    "8b-v5p-8-600x10": Case("8b", "v5p-8", 600, 10, (1, 4, 1, 1), 4),
    "8b-v5p-8-1200x50": Case("8b", "v5p-8", 1200, 50, (1, 4, 1, 1), 4),
    "8b-v6e-8-1200x50": Case("8b", "v6e-8", 1200, 50, (1, 2, 4, 1), 2),
    "8b-v5e-16-1200x50": Case("8b", "v5e-16", 1200, 50, (1, 4, 4, 1), 4),
    "8b-h200-600x10": Case("8b", "h200", 600, 10, (1, 1, 1, 1), 1),
    "8b-h200-600x50": Case("8b", "h200", 600, 50, (1, 1, 1, 1), 1),
    "8b-h100-8-600x10": Case("8b", "h100-8", 600, 10, (1, 8, 1, 1), 8),
    "8b-h100-8-600x50": Case("8b", "h100-8", 600, 50, (1, 8, 1, 1), 8),
    "8b-h100-8-1200x50": Case("8b", "h100-8", 1200, 50, (1, 8, 1, 1), 8),
    "8b-h200-stream": Case("8b", "h200", 1200, 50, (1, 1, 1, 1), 1, "none", "stream"),
    "8b-v6e-1-stream": Case("8b", "v6e-1", 1200, 50, (1, 1, 1, 1), 1, "none", "stream"),
    "8b-h200-stream-int8": Case("8b", "h200", 1200, 50, (1, 1, 1, 1), 1, "none", "stream int8"),
    "70b-v5p-32-600x10": Case("70b", "v5p-32", 600, 10, (1, 16, 1, 1), 16),
    "70b-v5p-128-600x10": Case("70b", "v5p-128", 600, 10, (1, 64, 1, 1), 64),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"which ones (all): {', '.join(CASES)}")


def run(args: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """Compiles each case under the method and under full compute, and holds one against the other.

    Where no case is named, all those whose compiler is installed. --quick: with the compiler's least effort, and where
    no case is named the first alone. What such a step needs is close to, but not, what a training run's needs.
    """
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        raise UserError(f"there is no case {unknown[0]}: use {', '.join(CASES)}")
    missing = {name: no_compiler(TARGETS[case.target].platform) for name, case in CASES.items()}
    names = args.cases or [name for name in CASES if not missing[name]][: 1 if args.quick else None]
    for reason in filter(None, (missing[name] for name in names or CASES)):
        raise UserError(reason)  # before anything is compiled
    compiles = []
    for name in names:
        pair = {policy: compile_case(CASES[name], policy, -1.0 if args.quick else 0.0) for policy in ("full", "mod")}
        for policy, result in pair.items():
            compiles.append({"case": name, "policy": policy, **CASES[name]._asdict(), **result})
            print(f"{name} {policy}: {_line(result)}", flush=True)
        rows.extend(compare(name, CASES[name], pair["mod"], pair["full"]))
    return {"compiles": compiles, "text_tokens": TEXT, "lora_rank": RANK}


def compare(name: str, case: Case, candidate: dict[str, Any], baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows aot_memory (bytes a chip), aot_flops, aot_collectives (bytes received a chip) and aot_cache (bytes that a
    frame adds to a stream's cache); those that both compiles have."""
    config, train = model_config(case, "mod"), case.step == "train"
    stream = Stream(case.frames, case.tokens, TEXT if train else case.frames)
    formula = {"aot_flops": ratio_of_formula(config, stream, case.remat), "aot_cache": carried_ratio(config, stream)}
    more: dict[str, Any] = {"dtype": "bfloat16", "remat": case.remat if train else None, "target": case.target}
    more |= stream.row_keys()
    kinds = {"aot_memory": "total_bytes", "aot_flops": "flops"}
    kinds |= {"aot_collectives": "collective_bytes", "aot_cache": "frame_bytes"}
    return [
        row(name, kind, candidate[key], baseline[key], formula_ratio=formula.get(kind), **more)
        for kind, key in kinds.items()
        if key in candidate and baseline.get(key)
    ]


def _line(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"does not fit: {result['error']}"
    gib = {name: result[f"{name}_bytes"] / 2**30 for name in ("total", "argument", "temp", "collective")}
    if "longest_frames" in result:
        more = f"{result['frame_bytes'] / 1e6:.2f} MB a frame, so that streams of {result['longest_frames']} fit"
    else:
        more = f"{result['flops'] / 1e12:.1f} TFLOP and {gib['collective']:.2f} GiB received a chip and step"
    return (
        f"{'' if result['fits'] else 'does not fit: '}"
        f"{gib['total']:.2f} of {result['hbm_bytes'] / 2**30:.0f} GiB a chip ({gib['argument']:.2f} arguments, "
        f"{gib['temp']:.2f} temporary), {more}; compiled in {result['compile_seconds']:.0f} s"
    )


# --- a compile --------------------------------------------------------------------------------------------------------


def _policy(case: Case, policy: str) -> Any:
    return make_policy("interleaved" if policy == "mod" else "full", MODELS[case.model].num_hidden_layers)


def model_config(case: Case, policy: str) -> VideoLMConfig:
    """The model of a case on features f32[n, 1024] of SigLIP-L: bf16, LoRA beside every linear layer."""
    llama: LlamaConfig = dataclasses.replace(
        MODELS[case.model], max_position_embeddings=case.frames * case.tokens + TEXT
    )
    return VideoLMConfig(
        llama=llama,
        policy=_policy(case, policy),
        frame_token_id=llama.vocab_size,
        vision_hidden_size=1024,
        grid=GRIDS[case.tokens],
        lora=LoraConfig(RANK, 2.0 * RANK),
        remat=case.remat,
        attention={"tpu": "splash", "cuda": "cudnn"}[TARGETS[case.target].platform],
        dtype="bfloat16",
        param_dtype="bfloat16",
    )


def abstract_batch(case: Case, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of rows that are all `frames` frames and TEXT tokens long, every frame and half the text labelled.

    Over `context` each row is cut into equal chunks (`data/batch.py`).
    """
    size, labels, parts = case.frames * case.tokens + TEXT, case.frames + TEXT // 2, chunks_per_row(mesh)
    assert case.frames % parts == TEXT % parts == labels % parts == 0
    shapes = {
        "input_ids": ((size,), jnp.int32),
        "length": ((), jnp.int32) if parts == 1 else ((parts,), jnp.int32),
        "frames": ((case.frames, case.tokens, 1024), jnp.float32),
        "label_pos": ((labels,), jnp.int32),
        "label": ((labels,), jnp.int32),
        "label_weight": ((labels,), jnp.float32),
        "label_is_stream": ((labels,), jnp.bool_),
    }
    if parts > 1:
        shapes |= dict.fromkeys(("first_position", "first_frame"), ((parts,), jnp.int32))
    place = NamedSharding(mesh, BATCH if parts == 1 else PartitionSpec(*BATCH, "context"))
    return {
        name: jax.ShapeDtypeStruct((case.rows, *shape), dtype, sharding=place)
        for name, (shape, dtype) in shapes.items()
    }


def library() -> str | None:
    """The file of libtpu: $VMOD_LIBTPU, or where JAX itself looks; None where there is none."""
    place = os.environ.get("VMOD_LIBTPU") or os.environ.get("TPU_LIBRARY_PATH")
    if not place and (package := importlib.util.find_spec("libtpu")) and package.origin:
        place = str(Path(package.origin).with_name("libtpu.so"))
    return place if place and Path(place).is_file() else None


def cuda_plugin() -> bool:
    """Whether JAX's plug-in for CUDA 12 or 13 is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def no_compiler(platform: str) -> str | None:
    """What to do for want of a platform's compiler; None where it is installed."""
    if platform == "cuda":
        return None if cuda_plugin() else "no CUDA plug-in of JAX, which compiles for GPUs: pip install '.[cuda]'"
    return None if library() else "no libtpu, XLA's compiler for TPUs: get it as the head of benchmarks/aot.py says"


# What XLA asks a GPU of NVIDIA's Hopper generation about itself, and what distinguishes H100 from H200.
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  device_memory_size: {memory}  memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


def devices(target: Target) -> Sequence[Any]:
    """The chips of a slice, or the GPUs of a machine, that are not here; their compiler is (`no_compiler`)."""
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    if target.platform == "cuda":
        name, bandwidth = ("NVIDIA H200", 4.8e12) if target.hbm_gib > 80 else ("NVIDIA H100", 3.35e12)
        text = HOPPER.format(memory=target.hbm_gib * 2**30, bandwidth=int(bandwidth), name=name)
        described = topologies.get_topology_desc(name, "cuda", topology=target.topology, target_config=text)
        assert len(described.devices) == target.chips
        return described.devices
    os.environ["TPU_LIBRARY_PATH"] = str(library())
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody is there to be asked
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is there to be locked
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if target.chips == 1 else {}
    found = topologies.get_topology_desc(target.topology, "tpu", **bounds).devices
    assert len(found) == target.chips, (target, len(found))
    return found


def compile_case(case: Case, policy: str, effort: float) -> dict[str, Any]:
    """What the compiler says of a step: bytes and FLOPs are of one chip and one step.

    effort: the compiler's, from -1 to 1; 0 is what a training run gets.
    """
    target = TARGETS[case.target]
    lowered, said = STEPS[case.step](case, policy, devices(target))
    hbm = target.hbm_gib * 2**30
    said |= {"hbm_bytes": hbm, "chips": target.chips, "effort": effort}
    began = time.perf_counter()
    try:
        compiled = lowered.compile({"exec_time_optimization_effort": effort} if effort else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return said | {"fits": False, "error": str(error).splitlines()[0]}
    said["compile_seconds"] = time.perf_counter() - began

    memory: Any = compiled.memory_analysis()
    for name in ("argument", "output", "alias", "temp", "generated_code"):
        said[f"{name}_bytes"] = getattr(memory, f"{name}_size_in_bytes")
    # What is donated is argument and output in one.
    total = said["argument_bytes"] + said["output_bytes"] - said["alias_bytes"] + said["temp_bytes"]
    said["total_bytes"] = total + said["generated_code_bytes"]
    said["fits"] = said["total_bytes"] < hbm
    if "frame_bytes" in said:
        said["longest_frames"] = case.frames + int((hbm - said["total_bytes"]) // said["frame_bytes"])
    said["collectives"] = collective_bytes(compiled.as_text())
    said["collective_bytes"] = sum(said["collectives"].values())
    return said


def _lower_training(case: Case, policy: str, chips: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    """`train.make_step`, and its FLOPs a chip by the formula."""
    config, options = model_config(case, policy), defaults().optimizer
    heads = config.llama.num_attention_heads, config.llama.num_key_value_heads
    mesh = make_mesh(dict(zip(AXES, case.mesh, strict=True)), case.rows, *heads, chips)
    optimizer = make_optimizer(options, 1000)
    frozen, state = abstract_state(config, trained_groups(options), optimizer, mesh)
    work = flops_of_step(config, Stream(case.frames, case.tokens, TEXT), labels=case.frames + TEXT // 2)
    step = make_step(VideoLM(config), optimizer, state, mesh)
    return step.lower(state, frozen, abstract_batch(case, mesh), 0), {"flops": work * case.rows / len(chips)}


def _lower_frame(case: Case, policy: str, chips: Sequence[Any], change: Any = merge_lora) -> tuple[Any, dict[str, Any]]:
    """`Programs.extend` by a frame on one chip, with a cache for all frames, and the bytes that a frame adds to it."""
    trained, n = model_config(case, policy), case.tokens
    config = dataclasses.replace(trained, lora=NO_LORA)

    def arguments():
        params = unstack(change(trained, init_params(trained, jax.random.key(0)))[1])
        ids, one = jnp.zeros((1, frames_chunk(n, 1, 1)), jnp.int32), jnp.zeros(1, jnp.int32)
        frame = jnp.zeros((1, 1, n, trained.vision_hidden_size))
        return params, make_cache(config, case.frames, case.frames + 64), ids, frame, one, one

    place = SingleDeviceSharding(chips[0])
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(arguments))
    held = [num_bytes(jax.eval_shape(lambda: make_cache(config, frames, frames))) for frames in (1, 2)]  # noqa: B023
    return Programs(config).extend.lower(*given), {"frame_bytes": held[1] - held[0]}


STEPS = {
    "train": _lower_training,
    "stream": _lower_frame,
    "stream int8": functools.partial(_lower_frame, change=to_int8),
}


# --- the compiled text ------------------------------------------------------------------------------------------------

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    line: str


def _computations(text: str) -> dict[str, list[_Instruction]]:
    """Instructions of every computation of an HLO module; the entry's name is ENTRY."""
    found: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?(\S+) \(.*\{$", line):
            current = found.setdefault("ENTRY" if header[1] else header[2], [])
        elif (parts := re.match(r"\s+(?:ROOT )?%?(\S+) = (.*)", line)) and (
            opcode := re.search(r"\s([a-z][\w-]*)\(([^)]*)\)", " " + parts[2])
        ):
            operands = [name.split("%")[-1].strip() for name in opcode[2].split(",")]
            shape = (" " + parts[2])[: opcode.start()]
            current.append(_Instruction(parts[1], shape, opcode[1], operands, line))
    return found


def _attribute(line: str, name: str) -> str | None:
    match = re.search(rf"[ ,]{name}=%?([^,\s}}]+)", line)
    return match[1] if match else None


def _trips(computations: dict[str, list[_Instruction]], loop: _Instruction) -> int:
    """How often a counting loop runs: as XLA notes beside it or, where its counter starts at 0 and `condition` compares
    it with a constant, as that says."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.line):
        return int(known[1])
    condition, body = (computations[str(_attribute(loop.line, name))] for name in ("condition", "body"))
    constant = lambda block, name: next(  # noqa: E731
        (int(m[1]) for i in block if i.name == name and (m := re.search(r"\sconstant\((\d+)\)", i.line))), None
    )
    compare = next(i for i in condition if i.opcode == "compare" and "direction=LT" in i.line)
    counter = next(i for i in condition if i.name == compare.operands[0])
    limit, index = constant(condition, compare.operands[1]), _attribute(counter.line, "index")
    root = next(i for i in body if i.line.lstrip().startswith("ROOT"))
    step = next(i for i in body if i.name == root.operands[int(str(index))])
    if limit is None or step.opcode != "add":
        raise ValueError(f"not a counting loop: {loop.line[:200]}")
    return -(-limit // (constant(body, step.operands[1]) or 1))


def _callees(computations: dict[str, list[_Instruction]], instruction: _Instruction) -> Iterator[tuple[str, int]]:
    """(computation, how often) that an instruction calls."""
    if instruction.opcode == "while":
        yield str(_attribute(instruction.line, "body")), _trips(computations, instruction)
        return
    for name in ("calls", "to_apply"):
        if called := _attribute(instruction.line, name):
            yield called, 1
    if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.line):
        yield from ((name.strip().lstrip("%"), 1) for name in branches[1].split(","))


def _bytes(shape: str) -> list[int]:
    """Of every array that a shape names."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return [_BYTES[kind] * math.prod(int(n) for n in size.split(",") if n) for kind, size in arrays if kind in _BYTES]


def _group(line: str) -> int:
    """Devices that take part in one collective."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(tiled[2])
    groups = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(groups[1].split(",")) if groups else 1


def _received(instruction: _Instruction, kind: str, scattered: bool) -> float:
    """Bytes that one device receives in a collective, as a ring does it."""
    if kind == "collective-permute":
        return _bytes(instruction.shape)[0]
    size, group = sum(_bytes(instruction.shape)), _group(instruction.line)
    if instruction.opcode.endswith("-start"):  # (what goes in, what comes out)
        size = max(_bytes(instruction.shape))
    if kind == "reduce-scatter":
        return size * (group - 1)
    passes = 2 if kind == "all-reduce" and not scattered else 1
    return passes * size * (group - 1) / group


def collective_bytes(text: str) -> dict[str, int]:
    """{kind of collective: bytes that each device receives in a run} of a compiled module's text, loops multiplied out.

    Raises ValueError for a loop around collectives whose length the text does not say.
    """
    computations = _computations(text)
    total: dict[tuple[str, str], float] = {}

    def walk(name: str, times: int) -> None:
        for instruction in computations.get(name, ()):
            kind = instruction.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                # An asynchronous collective is named once in each of the fusions that it runs beside.
                channel = _attribute(instruction.line, "channel_id") or f"{name}/{instruction.name}"
                moved = times * _received(instruction, kind, name.startswith("all-reduce-scatter"))
                total[kind, channel] = max(total.get((kind, channel), 0.0), moved)
            elif inside(instruction):
                for called, again in _callees(computations, instruction):
                    walk(called, times * again)

    memo: dict[str, bool] = {}

    def holds(name: str) -> bool:
        if name not in memo:
            memo[name] = any(
                i.opcode.removesuffix("-start") in _COLLECTIVES or inside(i) for i in computations.get(name, ())
            )
        return memo[name]

    def inside(instruction: _Instruction) -> bool:
        if instruction.opcode == "while":
            return holds(str(_attribute(instruction.line, "body")))
        return any(holds(called) for called, _ in _callees(computations, instruction))

    walk("ENTRY", 1)
    return {kind: round(sum(n for (k, _), n in total.items() if k == kind)) for kind in _COLLECTIVES}
