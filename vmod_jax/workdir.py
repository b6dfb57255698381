"""The folder of a run, or of an imported model: what lies where, and whether it fits.

model.json    the model's configuration (VideoLMConfig)     metrics.jsonl   one object a logged step
tokenizer/    Hugging Face files                            tensorboard/    the same, for TensorBoard
config.json   the training configuration (not if imported)  eval/           what `vmod evaluate` writes
checkpoints/STEP/
"""

import json
from pathlib import Path
from typing import Any

from vmod_jax.errors import UserError, few, read_json
from vmod_jax.models.video_lm import VideoLMConfig


def write(workdir: str | Path, model: VideoLMConfig, tokenizer: Any, config: dict[str, Any] | None = None) -> None:
    """Writes everything but the parameters; tokenizer: an HF tokenizer or None."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(workdir / "tokenizer"))
    (workdir / "model.json").write_text(model.to_json() + "\n")
    if config is not None:
        (workdir / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def read_model(workdir: str | Path) -> VideoLMConfig:
    """Its model.json. Raises UserError when there is none, or when it is not one of ours."""
    path = Path(workdir) / "model.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a workdir (no model.json): train into it, or make one with vmod import")
    try:
        return VideoLMConfig.from_json(path.read_text())
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): it was written by another version, or by hand") from error


def read_config(workdir: str | Path) -> dict[str, Any] | None:
    """Its config.json; None for an imported folder. Raises UserError when it cannot be read."""
    path = Path(workdir) / "config.json"
    return read_json(path, "say what to do with --config") if path.is_file() else None


def tokenizer_folder(workdir: str | Path) -> Path | None:
    """Its tokenizer/, or None when the folder has no tokenizer (a model imported without one)."""
    folder = Path(workdir) / "tokenizer"
    return folder if folder.is_dir() else None


def check_same_model(workdir: str | Path, model: VideoLMConfig) -> None:
    """Raises UserError naming the keys in which the workdir's model.json differs from `model`."""
    there = json.loads(read_model(workdir).to_json())
    if names := differing_keys(there, json.loads(model.to_json())):
        raise UserError(f"{workdir} holds another model: {few(names)}; use another --workdir, or the same settings")


def differing_keys(there: Any, here: Any, prefix: str = "") -> list[str]:
    """["llama.hidden_size is 32 there, 64 here", ...], of two JSON values."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        lists = [differing_keys(there.get(key), here.get(key), f"{prefix}.{key}" if prefix else key) for key in keys]
        return [name for names in lists for name in names]
    if there == here:
        return []
    short = [text if len(text := json.dumps(value)) < 40 else "another value" for value in (there, here)]
    return [f"{prefix} is {short[0]} there, {short[1]} here"]
