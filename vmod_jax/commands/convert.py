"""`vmod import` and `vmod export`: Hugging Face, PEFT and PyTorch on one side, a workdir on the other."""

import re
from collections.abc import Sequence
from typing import Any

from vmod_jax.errors import ArgumentParser, UserError, user_path
from vmod_jax.weights.convert import FORMATS, export_folder, import_folder


def import_main(argv: Sequence[str]) -> None:
    """`vmod import SRC --out DIR`"""
    from vmod_jax.data.conversation import FORMS
    from vmod_jax.models.depth import POLICIES
    from vmod_jax.models.layer_expert import GATES

    parser = ArgumentParser("vmod import", description="Hugging Face or PEFT weights -> a workdir.")
    parser.add_argument(
        "source", type=user_path, metavar="SRC", help="folder of a Llama, Mistral or Qwen, or a GGUF file"
    )
    parser.add_argument("--out", required=True, type=user_path, metavar="DIR", help="workdir to make; must not exist")
    parser.add_argument(
        "--vision", type=user_path, metavar="FOLDER", help="SigLIP or CLIP: its vision tower comes along"
    )
    parser.add_argument(
        "--adapter", type=user_path, metavar="FOLDER", help="PEFT LoRA adapter, with its connector, on top of SRC"
    )
    parser.add_argument("--policy", choices=POLICIES, help="depth policy to record (full)")
    parser.add_argument("--keep", type=float, help="share of a frame's tokens that routed layers keep (0.2)")
    parser.add_argument("--gate", choices=GATES, help="what multiplies a kept token's update (raw)")
    parser.add_argument("--grid", metavar="HxW", help="patch tokens a frame, 0x0 for none (3x3)")
    parser.add_argument("--form", choices=FORMS, help="of its conversations: plain, or chat by its template (plain)")
    parser.add_argument("--no-cls", action="store_true", help="a frame has no CLS token")
    parser.add_argument("--allow-nonfinite", action="store_true", help="take weights with NaN or infinity in them")
    args = parser.parse_args(argv)
    fields: dict[str, Any] = {name: value for name in ("gate", "form") if (value := getattr(args, name)) is not None}
    if args.grid is not None:
        if not (match := re.fullmatch(r"(\d+)x(\d+)", args.grid)):
            raise UserError(f"--grid {args.grid}: give rows and columns, such as 3x3")
        fields["grid"] = (int(match[1]), int(match[2]))
    if args.no_cls:
        fields["cls"] = False
    done = import_folder(
        args.source, args.out, args.vision, args.adapter, args.policy, args.keep, args.allow_nonfinite, **fields
    )
    print(f"wrote {args.out}: {done.what}; {done.measured}")
    print(f"next: vmod_jax.load({str(args.out)!r}), or init_from={args.out} in a training config")


def export_main(argv: Sequence[str]) -> None:
    """`vmod export --workdir DIR --out DST`"""
    parser = ArgumentParser("vmod export", description="A workdir -> Hugging Face, PEFT or PyTorch.")
    parser.add_argument(
        "--workdir", required=True, type=user_path, metavar="DIR", help="a run's, or an imported folder"
    )
    parser.add_argument("--out", required=True, type=user_path, metavar="DST", help="folder to make; must not exist")
    parser.add_argument("--format", choices=FORMATS, default="llama", help=_FORMATS_HELP)
    parser.add_argument("--step", type=int, help="of the checkpoint (the last)")
    parser.add_argument("--base", metavar="NAME", help="peft: the base model's name or folder (the imported one)")
    args = parser.parse_args(argv)
    done = export_folder(args.workdir, args.out, args.format, args.step, args.base)
    print(f"wrote {args.out}: {done.what}; {done.measured}")
    print(f"load: {done.load}")


_FORMATS_HELP = (
    "llama: a LlamaForCausalLM (of a Qwen: its class), LoRA merged (default); peft: the LoRA adapter and the "
    "connector; llava: as the LLaVA that it was imported from; vmod: the whole model with PyTorch code beside it"
)
