"""What a row of the table of benchmarks is, and what runs a row is given.

    Benchmark(documents, respond, scores, constants)

`documents(task)` are what is asked, without any frames, always in the same order. `respond(task)` is called once a run
and gives a function of a few documents that returns a response to each, any JSON value; only it reads frames, those of
its documents. `scores` are functions (documents, responses) -> metrics, numbers in a dict that may be nested, by name
("official", "strict"; "" where there is one only): they see the responses alone and are called again on documents that
were drawn with repetition, for intervals. `constants(task, documents)` are answers that see no video, scored as the
model is. `write(documents, responses, folder)` writes the results file that the benchmark's own scorer or server takes.

Documents of one `group` share a video: they stand together, come in one batch where they fit, and are drawn together.
Where responses are texts, `respond=texts(show)` is all that is needed; see `evaluation/answering.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vmod_jax.data.pipeline import Streams, open_streams
from vmod_jax.errors import user_path
from vmod_jax.evaluation.documents import Document, Responses
from vmod_jax.lm import LanguageModel

Respond = Callable[[Sequence[Document]], Sequence[Any]]
Score = Callable[[Sequence[Document], Responses], Mapping[str, Any]]


class Task(NamedTuple):
    """One evaluation. config: of training, whose `data` says where the data lie; options: the command's own flags."""

    lm: LanguageModel
    config: Any
    split: str
    threshold: float = 0.0  # of speaking
    options: Mapping[str, Any] = {}

    @property
    def root(self) -> Path:
        """The data set's folder."""
        return user_path(self.config.data.root)

    @property
    def image_size(self) -> int:
        """Side of the pictures that the model takes; 0 where it takes features."""
        return self.lm.config.vision.image_size if self.lm.config.vision else 0

    def streams(self, source: str = "", split: str = "") -> Streams:
        """The streams of a source (default: the configuration's own), as the model takes their frames."""
        data = self.config.data.copy_and_resolve_references()
        if source:
            data.name, data.mix = source, type(data)()
        return open_streams(data, split or self.split, self.image_size)


class Benchmark(NamedTuple):
    """A row of the table; see above."""

    documents: Callable[[Task], Sequence[Document]]
    respond: Callable[[Task], Respond]
    scores: Mapping[str, Score]
    constants: Callable[[Task, Sequence[Document]], Mapping[str, Responses]]
    write: Callable[[Sequence[Document], Responses, Path], None] | None = None
    split: str = ""  # "": config.data.eval_split
    batch: int = 8  # documents that are answered together
