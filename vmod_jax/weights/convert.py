"""Whole models in and out: Hugging Face, PEFT and PyTorch on one side, a workdir on the other.

Both directions write into a folder beside the destination and rename it at the end: what fails leaves nothing behind.
"""

import dataclasses
import json
import resource
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from vmod_jax.errors import UserError, user_path

NOTHING = ""  # what `replacing` may replace
FORMATS = ("llama", "peft", "llava", "vmod")


class Done(NamedTuple):
    """What was written, how to load it, and what it cost, one line each."""

    what: str
    load: str
    measured: str


def import_folder(
    source: str | Path,
    out: str | Path,
    vision: str | Path | None = None,
    adapter: str | Path | None = None,
    policy: str | None = None,
    keep: float | None = None,
    allow_nonfinite: bool = False,
    **fields: Any,
) -> Done:
    """Makes a workdir of a Hugging Face folder or GGUF file: model.json, tokenizer/, generation_config.json,
    checkpoints/0.

    vision, adapter: folders of a SigLIP or CLIP tower, of a PEFT adapter; policy, keep: recorded in model.json;
    allow_nonfinite: take weights with NaN or infinity in them; fields: others of VideoLMConfig. Raises UserError,
    leaving nothing behind, for whatever does not fit.
    """
    import jax

    from vmod_jax import workdir
    from vmod_jax.data.storage import replacing
    from vmod_jax.models.depth import make_policy
    from vmod_jax.models.experts import IMPORTED
    from vmod_jax.models.vision import check_frame_tokens
    from vmod_jax.weights import export, lazy
    from vmod_jax.weights.folder import complete, load_tokenizer, open_folder

    started = time.perf_counter()
    source, out = _source(source), user_path(out)
    check_absent(out)
    opened = open_folder(source, vision and _source(vision), adapter and _source(adapter), allow_nonfinite)
    config, layers = opened.config, opened.config.llama.num_hidden_layers
    if policy is not None or keep is not None:
        name = "interleaved" if policy is None else policy
        fields["policy"] = make_policy(name, layers, 0.2 if keep is None else keep)
    if config.pooled is not None and "grid" in fields:
        fields["pooled"] = fields.pop("grid")  # the tokens of a frame, whatever makes them
    config = dataclasses.replace(config, **fields)
    if config.vision is not None:
        check_frame_tokens(config.vision, config.cls, config.grid)
    tree, missing = complete(config, opened.arrays)
    record = {"source": str(source.absolute()), "vision": vision and str(vision), "adapter": adapter and str(adapter)}
    record["experts"] = "initialised" if "llama/layers/expert/kernel" in missing else "imported"
    record |= {"llava": opened.llava} if opened.llava else {}
    with replacing(out, NOTHING) as folder:
        workdir.write(folder, config, None)
        export.write_json(folder / IMPORTED, record)
        if opened.generation:
            export.write_json(folder / "generation_config.json", opened.generation)
        if opened.tokenizer is not None:
            export.copy_tokenizer(opened.tokenizer, folder / "tokenizer")
            if not (folder / "tokenizer" / "tokenizer.json").exists():
                load_tokenizer(opened.tokenizer).save_pretrained(str(folder / "tokenizer"))
        lazy.save(folder, tree)

    leaves = jax.tree.leaves(tree, is_leaf=lazy.is_lazy)
    read = sum(leaf.nbytes for leaf in leaves if lazy.is_lazy(leaf))
    size = sum(leaf.size for leaf in leaves)
    kinds = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(opened.arrays, is_leaf=lazy.is_lazy)})
    parts = [f"{layers} layers, {size:,} parameters ({', '.join(kinds)})"]
    parts += [] if config.vision is None else [f"{config.vision.kind} tower"]
    parts += [f"LoRA of rank {config.lora.rank}"] if config.lora.rank else []
    parts.append("tokenizer" if opened.tokenizer else "no tokenizer")
    if missing:
        modules = sorted({name.rpartition("/")[0].removeprefix("llama/layers/") for name in missing})
        parts.append(f"initialised what it lacks ({', '.join(modules)})")
    return Done(", ".join(parts), f"vmod_jax.load({str(out)!r})", _measured(read, started))


def export_folder(
    folder: str | Path, out: str | Path, form: str = "llama", step: int | None = None, base: str | None = None
) -> Done:
    """Writes a workdir's model as `form`, one of FORMATS. Raises UserError, leaving nothing behind."""
    from vmod_jax import workdir
    from vmod_jax.data.storage import replacing
    from vmod_jax.models.experts import IMPORTED
    from vmod_jax.training.checkpoint import load_params
    from vmod_jax.weights import export

    started = time.perf_counter()
    folder, out = user_path(folder), user_path(out)
    check_absent(out)
    config = workdir.read_model(folder)
    origin = _origin(folder)
    record = _json(origin / IMPORTED)
    training = workdir.read_config(folder) or {}
    if form == "peft" and (training.get("optimizer") or {}).get("train_base"):
        raise UserError(f"{folder}: the base weights were trained too, an adapter would lose that; use --format llama")
    params = load_params(folder, step=step)
    tokenizer = workdir.tokenizer_folder(folder)
    generation = _json(origin / "generation_config.json") or _token_ids(tokenizer)
    name = shlex.quote(str(out))
    with replacing(out, NOTHING) as target:
        if form == "llama":
            left_out = export.llama_folder(target, config, params, generation)
            what = f"a {export.kind(config.llama)[1].architecture}"
            load = f"transformers.AutoModelForCausalLM.from_pretrained({name})"
        elif form == "peft":
            base = base or record.get("source")
            left_out = export.peft_folder(target, config, params, base)
            what, load = "a PEFT adapter", f"peft.PeftModel.from_pretrained(base, {name}), base: {base or 'its model'}"
        elif form == "llava":
            left_out = export.llava_folder(target, config, params, record.get("llava"))
            what, load = "a LLaVA", f"transformers.AutoModelForImageTextToText.from_pretrained({name})"
        else:
            left_out = export.vmod_folder(target, config, params, generation)
            what = "the whole model and its PyTorch code"
            load = f"transformers.AutoModel.from_pretrained({name}, trust_remote_code=True)"
        if tokenizer is not None:
            export.copy_tokenizer(tokenizer, target)
        written = sum(file.stat().st_size for file in target.iterdir())
    parts = [what, "with its tokenizer" if tokenizer else "without a tokenizer", *([left_out] if left_out else [])]
    return Done(", ".join(parts), load, _measured(written, started))


# ------------------------------------------------------------------------------------------------------- folders


def check_absent(out: Path) -> None:
    """Raises UserError where something already lies."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists: name another folder, or remove it")


def _source(path: str | Path) -> Path:
    """A folder or a GGUF file; another single file is a mistake with a known remedy."""
    path = user_path(path)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if not path.exists():
        raise UserError(f"{path}: no such folder; download the model and give the folder that has its config.json")
    if path.suffix in (".bin", ".pt", ".pth"):
        from vmod_jax.weights.huggingface import refuse_pickles

        raise UserError(refuse_pickles(path.parent, path.name))
    raise UserError(f"{path} is a file: give the folder that has config.json and the safetensors files")


def _origin(folder: Path) -> Path:
    """The imported folder that a run started from, at whatever remove; the folder itself where there is none."""
    from vmod_jax import workdir

    seen = [folder]
    while source := (workdir.read_config(seen[-1]) or {}).get("init_from"):
        if not (before := user_path(source)).is_dir() or before in seen:
            break
        seen.append(before)
    return seen[-1]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _token_ids(tokenizer: Path | None) -> dict[str, Any]:
    """What generation needs, of a model whose folder says nothing: its tokenizer's bos and eos."""
    if tokenizer is None:
        return {}
    from vmod_jax.weights.folder import load_tokenizer

    made = load_tokenizer(tokenizer)
    ids = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    return {name: value for name, value in ids.items() if value is not None}


def _measured(size: int, started: float) -> str:
    seconds = time.perf_counter() - started
    return f"{size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s), peak memory {_peak():.2f} GiB"


def _peak() -> float:
    """The most memory that this process has held, in GiB."""
    try:  # Linux's getrusage counts the parent's memory at the fork too
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    except (OSError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (2**30 if sys.platform == "darwin" else 2**20)
