"""`vmod demo`: the main job from nothing to a streaming model, on generated videos and two CPU cores.

Make videos -> train a small base model -> from it, train the method and the full-compute baseline for the same steps ->
evaluate both on unseen videos -> stream an unseen video -> report.

The base plays the part of the pretrained language model from which the paper starts (section 4.1): both policies begin
with the same weights, which were trained with full compute.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vmod_jax.data.pipeline import open_streams
from vmod_jax.errors import ArgumentParser, user_path
from vmod_jax.evaluation.benchmarks import evaluate, print_scores
from vmod_jax.lm import LanguageModel, load
from vmod_jax.report.page import write_report
from vmod_jax.streaming.session import Turn
from vmod_jax.streaming.watch import Streamed, stream_video
from vmod_jax.study.rows import banner, stream_flops
from vmod_jax.study.worlds import demo_config, truth
from vmod_jax.training.loop import train_to_the_end
from vmod_jax.training.metrics import read_metrics

POLICIES = ("interleaved", "full")
BASE_STEPS = 1600  # of the base model, full compute
METRICS = ("lm_ppl", "time_diff", "fluency", "fluency_strict", "lm_correctness")


def demo(out: Path, config: Any, base_steps: int = BASE_STEPS) -> dict[str, Any]:
    """Runs the whole job in `out`; -> what it writes to report.json."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    if not config.data.root:
        config.data.root = str(out / "streams")

    # --- videos -------------------------------------------------------------------------------------------------------
    banner("videos")
    image_size = config.model.vision.image_size
    open_streams(config.data, "train", image_size)
    print(f"narrated streams in {config.data.root}")

    # --- the base model that both start from --------------------------------------------------------------------------
    banner("train: base")
    base = config.copy_and_resolve_references()
    base.policy, base.steps, base.optimizer.learning_rate = "full", base_steps, 2 * config.optimizer.learning_rate
    base.data.stream_weight = 1.0  # from nothing, *when* is learned after *what*: weighed more it is not learned at all
    base_summary = train_to_the_end(base, out / "base")

    # --- train and evaluate, the method and the baseline --------------------------------------------------------------
    policies, curves, scores = {}, {}, {}
    config.init_from = str(out / "base")
    for policy in POLICIES:
        banner(f"train: {policy}, from the base")
        config.policy = policy
        summary = train_to_the_end(config, out / policy)
        curves[policy] = read_metrics(out / policy / "metrics.jsonl")
        banner(f"evaluate on unseen videos: {policy}")
        scores[policy] = evaluate(out / policy)
        print_scores(scores[policy])
        policies[policy] = {
            **{name: scores[policy]["metrics"][name] for name in METRICS},
            "train_seconds": summary.seconds,
            "step_seconds": summary.step_seconds,
            "flops": stream_flops(load(out / policy), config),
        }

    # --- stream an unseen video, live ---------------------------------------------------------------------------------
    banner("stream an unseen video")
    lm = load(out / POLICIES[0])
    streams = open_streams(config.data, "test", image_size)
    name = streams.samples[0].video
    video = Path(config.data.root) / f"{name}.mp4"
    print(f"{video}\n")
    streamed = stream_video(lm, video, say=say, keep_frames=True)
    print()

    # --- report -------------------------------------------------------------------------------------------------------
    banner("report")
    report = {
        "policies": policies,
        "baselines": scores[POLICIES[0]]["baselines"],
        "stream": {**streamed.summary, "video": str(video), "replies": [turn._asdict() for turn in streamed.turns]},
        "base": {"steps": base_steps, "train_seconds": base_summary.seconds},
        "samples": scores[POLICIES[0]]["samples"],
        "seconds": time.perf_counter() - began,
        "machine": f"{jax.devices()[0].platform} x {jax.device_count()}",
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    write_report(
        out,
        report,
        curves=curves,
        timeline=timeline(lm, streamed, truth(Path(config.data.root), name)),
        routing=routing(lm, streamed),
        grid=lm.config.grid,
        cls=lm.config.cls,
    )
    print(
        f"all done in {report['seconds']:.0f} s; wrote {out}/report.json and {out}/report.html (open it in a browser)"
    )
    print(f"next: vmod stream {video} --workdir {out}/{POLICIES[0]} --ask '5:What do you see?'")
    return report


def say(turn: Turn) -> None:
    who = "you" if turn.role == "user" else "vmod"
    print(f"{turn.time:8.1f} s  {who:>4}: {turn.text}", flush=True)


def timeline(lm: LanguageModel, streamed: Streamed, spoken: list[dict[str, Any]]) -> Any:
    replies = [turn._asdict() for turn in streamed.turns]
    return {"fps": lm.config.fps, "frames": streamed.frames, "replies": replies, "truth": spoken}


def routing(lm: LanguageModel, streamed: Streamed) -> dict[int, np.ndarray]:
    """The tokens kept of each frame by each routed layer, of the very sequence that was streamed."""
    assert streamed.frames is not None
    routed = lm.routing(np.array([streamed.input_ids]), streamed.frames[None])
    return {layer: np.asarray(decided.kept[0]) for layer, decided in routed.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod demo", description=__doc__)
    parser.add_argument("--out", type=user_path, default=Path("runs/demo"), help="where everything goes (runs/demo)")
    parser.add_argument("--steps", type=int, help="training steps of each policy")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, help="training steps of the base model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    config = demo_config()
    config.seed = args.seed
    if args.steps:
        config.steps = args.steps
    demo(args.out, config, args.base_steps)
    return 0
