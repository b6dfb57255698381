"""vmod's models in VLMEvalKit: `python -m vmod_jax.evaluation.vlmevalkit RUN --data MME --model vmod`, in its folder.

`main` adds the model to the kit's own table and then runs the kit's run.py with the other arguments.
"""

import runpy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from vlmeval.vlm.base import BaseModel  # pyright: ignore[reportMissingImports]

from vmod_jax.errors import UserError
from vmod_jax.evaluation.shown import shown
from vmod_jax.lm import load


class VMod(BaseModel):
    """workdir: what `vmod_jax.load` opens. The kit sets `nframe` and `fps` itself."""

    INTERLEAVE = True
    VIDEO_LLM = True

    def __init__(self, workdir: str, nframe: int = 32, limit: int = 64, **_: Any):
        super().__init__()
        self.lm, self.nframe, self.fps, self.limit = load(workdir), nframe, -1, limit

    def use_custom_prompt(self, dataset: str | None) -> bool:
        return False

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The reply to a message of texts, images and videos; a text of role assistant begins the reply."""
        of = lambda kinds, role: [  # noqa: E731
            part["value"]
            for part in message
            if part["type"] in kinds and (part.get("role") == "assistant") == (role == "assistant")
        ]
        question = shown(
            self.lm,
            "\n".join(of(("text",), "user")),
            of(("image", "video"), "user"),
            self.nframe if self.nframe and self.nframe > 0 else 32,
            begin="\n".join(of(("text",), "assistant")),
        )
        return self.lm.answers([question], "text", rows=1, max_reply=self.limit)[0].text


def main(argv: Sequence[str] | None = None) -> None:
    """WORKDIR, then the arguments of the kit's run.py, which must lie in the current folder."""
    from vlmeval.config import supported_VLM  # pyright: ignore[reportMissingImports]

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        raise UserError("name a workdir, then the arguments of VLMEvalKit's run.py")
    supported_VLM["vmod"] = partial(VMod, workdir=arguments[0])
    sys.argv = ["run.py", *arguments[1:]]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
