"""The keys of a training configuration, what each means, and the model that a configuration describes.

A file in `configs/` starts from `defaults()` and changes what its experiment needs; the command line changes it further
(`--config.optimizer.learning_rate=1e-3`). A key that is not here is an error, wherever it comes from.
"""

import difflib
import json
from typing import Any

from ml_collections import ConfigDict

from vmod_jax.data.sources.table import SOURCES
from vmod_jax.errors import UserError, read_json, user_path
from vmod_jax.models.depth import explicit_policy, make_policy
from vmod_jax.models.llama import LlamaConfig, LoraConfig
from vmod_jax.models.video_lm import VideoLMConfig
from vmod_jax.models.vision import VisionConfig, patches_width

Config = Any  # an ml_collections.ConfigDict, whose attributes a type checker cannot know


def defaults() -> Config:
    """A configuration of which every key is there; the paper's recipe for Ego4D where it gives one (its appendix A)."""
    config: Config = ConfigDict()
    config.seed = 0  # of initialisation, dropout and the order of the data
    config.steps = 1000
    config.epochs = 0.0  # over the training split, in place of a number of steps; 0: steps says how many
    config.init_from = ""  # a workdir or imported folder: its model and its parameters start the run
    config.batch_size = 64  # streams a step, over all devices
    config.accumulate = 1  # the batch goes through in so many parts, which saves memory; the gradient is the same
    config.checkpoint_every = 500
    config.keep_checkpoints = 2  # the latest ones, and beside them the best by val_loss
    config.log_every = 10
    config.eval_every = 0  # steps between evaluations on the split "val", each with a checkpoint; 0: none
    config.eval_batches = 8  # of an evaluation, always the same ones, at most what the split holds
    config.profile = ()  # (first, last): a trace of these steps in WORKDIR/profile, for TensorBoard or xprof

    # The method: which layers compute which share of a frame's tokens.
    config.policy = "interleaved"  # a name of models/depth.py, or "explicit": model.routed_layers
    config.keep = 0.2  # share of a frame's tokens that a routed layer computes
    config.keep_warmup = 0.0  # share of the steps over which `keep` comes down to that, halving from 1
    config.gate = "raw"
    config.remat = "none"  # "full": blocks are computed again on the way back, saving memory; "attention": all but that

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "tensor": 1})  # -1: the devices that are left

    model: Config = ConfigDict()  # with init_from only lora, dtype and the routing keys count
    model.hf_config = ""  # an HF Llama's config.json (or its folder), in place of the seven sizes that follow
    model.hidden_size = 256
    model.intermediate_size = 1024
    model.num_hidden_layers = 4
    model.num_attention_heads = 4
    model.num_key_value_heads = 2
    model.rope_theta = 10000.0
    model.max_position_embeddings = 8192
    model.cls = True  # a frame is its CLS token and grid[0] x grid[1] pooled patches
    model.grid = (3, 3)
    model.vision = ConfigDict({"kind": "patches", "image_size": 48, "patch_size": 4})
    model.lora = ConfigDict({"rank": 0, "alpha": 256.0, "dropout": 0.0})
    model.always_keep_last = False
    model.shared_router = False  # all routed layers choose by one LayerExpert
    model.deep = -1  # first routed layer of early_exit and the deep policies; -1: 2 of 32 layers, scaled
    model.routed_layers = ()  # policy="explicit": these layers (from 0)
    model.selector = "learned"  # of the explicit policy
    model.attention = "auto"  # the device's kernel; or a name of models/attention.py
    model.connector = "mlp"  # a name of models/connectors.py; of a new model
    model.merger = "none"  # of a frame's tokens: a name of compression/mergers.py; of a new model
    model.cache = "float"  # of streams: a name of compression/forms.py
    model.dtype = "float32"
    model.param_dtype = "float32"

    data: Config = ConfigDict()
    data.name = "shapes"  # a row of data/sources/table.py
    data.mix = ConfigDict(dict.fromkeys(SOURCES, 0.0))  # weights of several sources, in place of one name
    data.root = ""  # the data set's folder, or that of several; shapes: where to generate ("": the cache)
    data.features = ""  # what `vmod data features` wrote, of the data sets of data.root; "": their videos are decoded
    data.corrections = 0.0  # share of the streams in which a reply goes wrong, to be put right: data/correction.py
    data.world = "plain"  # shapes: a name of data/sources/shapes.py
    data.plain = False  # llava: images and captions alone, without questions and system prompt
    data.missing_images = "refuse"  # llava: records whose images are not there; or "skip"
    data.allow_outside = False  # narrations: take those outside their video to its ends, however many
    data.path = ""  # prepared: the folder that `vmod data` wrote
    data.train_videos = 256  # shapes only
    data.val_videos = 32
    data.test_videos = 8
    data.seed = 0
    data.eval_split = "val"  # what `vmod evaluate` scores on
    data.fps = 2.0
    data.tokenizer = ""  # a folder; "": the one that comes with the data or with init_from
    data.interval = ","  # between frames: "stay silent"; "": eos says so
    data.form = ""  # of conversations: plain, or chat (by the tokenizer's template); "": init_from's, or plain
    data.stream_weight = 1.0  # of the speak-or-stay-silent labels in the loss
    data.max_frames = 1200  # a stream is cut there, at a whole message
    data.buckets = ()  # ((frames, text tokens, labels), ...); (): one that holds every stream
    data.prefetch = 2  # batches built ahead, each by a thread of its own

    optimizer: Config = ConfigDict()
    optimizer.learning_rate = 2e-4  # peak
    optimizer.warmup = 0.05  # of the steps
    optimizer.weight_decay = 0.0
    optimizer.clip = 1.0  # global norm of the trained parameters' gradient
    optimizer.b1, optimizer.b2, optimizer.eps = 0.9, 0.999, 1e-8
    optimizer.train_base = False  # the language model's own weights too (tiny models)
    optimizer.train_vision = False
    optimizer.rates = ConfigDict(  # multipliers of the learning rate
        {"lora": 1.0, "connector": 1.0, "expert": 1.0, "base": 1.0, "vision": 1.0}
    )
    config.model, config.data, config.optimizer = model, data, optimizer
    return config.lock()


PATHS = (  # keys that are paths of the user's
    ("", "init_from"), ("model", "hf_config"), *(("data", key) for key in ("root", "path", "features", "tokenizer"))
)  # fmt: skip


def complete(config: Config) -> Config:
    """`defaults()` with the given values; UserError for a key that is unknown or a value of another type."""
    out = defaults()
    for path, value in _leaves(config.to_dict()):
        *parents, name = path
        section: Any = out
        for parent in parents:
            section = section.get(parent) if isinstance(section, ConfigDict) else None
        if not isinstance(section, ConfigDict) or name not in section:
            raise unknown_key(".".join(path))
        try:
            section[name] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise UserError(f"config.{'.'.join(path)}={value!r} is not a {type(section[name]).__name__}") from error
    for section, name in PATHS:
        if (given := (out[section] if section else out)[name]).startswith("~"):
            (out[section] if section else out)[name] = str(user_path(given))
    names = ("steps", "batch_size", "accumulate", "checkpoint_every", "keep_checkpoints", "log_every", "eval_batches")
    for name in names:
        if out[name] < 1:
            raise UserError(f"config.{name}={out[name]}: give at least 1")
    if not 0 <= out.keep_warmup <= 1:
        raise UserError(f"config.keep_warmup={out.keep_warmup}: give a share of the steps, 0 to 1")
    if out.profile and not (len(out.profile) == 2 and 1 <= out.profile[0] <= out.profile[1]):
        raise UserError(f"config.profile={out.profile}: give (first, last), steps counted from 1")
    return out


# What a run may change when it goes on: where its data lie, and what is not trained on.
MOVABLE = ("root", "path", "features", "tokenizer", "val_videos", "test_videos", "eval_split", "prefetch")


def check_same_run(there: dict[str, Any], config: Config) -> list[str]:
    """["steps is 10 there, 20 here", ...]: how a run's config.json differs from the one that it is to go on with.

    Raises UserError where the batches would not be those that come next: another seed, batch size or data.
    """
    old, new = (dict(_leaves(tree)) for tree in (there, json.loads(config.to_json())))
    changed = [path for path, value in new.items() if path in old and old[path] != value]
    lines = {path: f"{'.'.join(path)} is {old[path]!r} there, {new[path]!r} here" for path in changed}
    fixed = [path for path in changed if path[-1] in ("seed", "batch_size") or path[0] == "data"]
    if wrong := [lines[path] for path in fixed if path[-1] not in MOVABLE]:
        raise UserError(
            f"the run began with other batches: {'; '.join(wrong)}; set that back, or use another --workdir"
        )
    return list(lines.values())


def unknown_key(key: str) -> UserError:
    """What to say about a key that does not exist: the nearest one that does."""
    known = [".".join(path) for path, _ in _leaves(defaults().to_dict())]
    near = difflib.get_close_matches(key, known, 1, cutoff=0)
    return UserError(f"config.{key} is no key of a training configuration; did you mean config.{near[0]}?")


def _leaves(tree: dict, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    out = []
    for name, value in tree.items():
        out += _leaves(value, (*prefix, name)) if isinstance(value, dict) else [((*prefix, name), value)]
    return out


# --- the model --------------------------------------------------------------------------------------------------------


def make_vision(config: Config) -> VisionConfig:
    """config.model.vision -> VisionConfig; the sizes of `patches` follow from its patch_size."""
    fields = config.model.vision.to_dict()
    if fields["kind"] == "patches":
        fields["hidden_size"] = patches_width(fields["patch_size"])
    try:
        return VisionConfig(**fields)
    except TypeError as error:
        raise UserError(f"config.model.vision: {error}".replace("VisionConfig.__init__() ", "")) from error


def make_model(
    config: Config, frame_token_id: int, vision: VisionConfig | None, vision_hidden_size: int
) -> VideoLMConfig:
    """The model of a configuration without init_from; its vocabulary is all that comes before the frame token."""
    model = config.model
    if model.hf_config:
        path = user_path(model.hf_config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"config.model.hf_config={model.hf_config}: no such file")
        llama = LlamaConfig.from_hf_config(read_json(path, "give a config.json of Hugging Face"))
    else:
        llama = LlamaConfig.from_hf_config(
            {"vocab_size": frame_token_id, "rms_norm_eps": 1e-5}
            | {
                name: model[name]
                for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            }
            | {name: model[name] for name in ("num_key_value_heads", "rope_theta", "max_position_embeddings")}
        )
    return VideoLMConfig(
        llama=llama,
        frame_token_id=frame_token_id,
        vision=vision,
        vision_hidden_size=vision_hidden_size,
        cls=model.cls,
        grid=tuple(model.grid),
        interval=config.data.interval,
        form=config.data.form or "plain",
        fps=config.data.fps,
        param_dtype=model.param_dtype,
        connector=model.connector,
        merger=model.merger,
        **method(config, llama.num_hidden_layers),
    )


def method(config: Config, num_layers: int) -> dict[str, Any]:
    """The fields of VideoLMConfig that a run chooses for any model, imported or new: routing, LoRA, precision."""
    model = config.model
    if config.policy == "explicit":
        policy = explicit_policy(num_layers, model.routed_layers, config.keep, model.selector)
    else:
        policy = make_policy(config.policy, num_layers, config.keep, None if model.deep < 0 else model.deep)
    return {
        "policy": policy,
        "gate": config.gate,
        "always_keep_last": model.always_keep_last,
        "shared_router": model.shared_router,
        "lora": LoraConfig(**model.lora.to_dict()),
        "remat": config.remat,
        "attention": model.attention,
        "cache": model.cache,
        "dtype": model.dtype,
    }
