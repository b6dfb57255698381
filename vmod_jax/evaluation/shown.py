"""What other harnesses show a model: PIL images and paths of images and videos, in one list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmod_jax.data.streams import VIDEO_ENDINGS
from vmod_jax.errors import UserError
from vmod_jax.lm import LanguageModel
from vmod_jax.streaming.questions import Question


def shown(lm: LanguageModel, text: str, seen: Sequence[Any], frames: int, begin: str = "") -> Question:
    """A question about all of them: images in order, or one video. Raises UserError for both, or several videos."""
    videos = [one for one in seen if isinstance(one, str | Path) and Path(one).suffix.lower() in VIDEO_ENDINGS]
    if not videos:
        return lm.question(text, list(seen) or None, begin=begin)
    if len(seen) > 1:
        raise UserError(f"a question about {len(seen)} things, one of them a video: one video is shown at a time")
    return lm.question(text, video=videos[0], frames=frames, begin=begin)
