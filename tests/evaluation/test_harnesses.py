"""lmms-eval's and VLMEvalKit's adapters, against stubs of their interfaces: replies are `lm.answers` on the same."""

import importlib
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest

from vmod_jax.errors import UserError
from vmod_jax.evaluation.shown import shown
from vmod_jax.streaming.questions import Answer, Question


class Recorder:
    """A model that says what it was asked, and how much it was shown."""

    image_size = 8

    def __init__(self):
        self.calls = []

    def question(self, text, images=None, video=None, options=(), frames=32, span=None, begin=""):
        return Question(text, (images, video and (str(video), frames)), None, tuple(options), begin)

    def answers(self, questions, by="text", rows=8, max_reply=64):
        self.calls.append((by, rows, max_reply, len(questions)))
        says = [f"{one.begin}{one.text}|{one.frames}|{max_reply}" for one in questions]
        if by == "text":
            return [Answer(text) for text in says]
        return [Answer(one.options[0], (-float(len(one.options[0])),)) for one in questions]


class Instance(NamedTuple):
    args: tuple


@pytest.fixture
def stub(monkeypatch):
    """Empty modules of the harnesses' names with what adapters use of them."""

    def module(name, **members):
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    class Base:
        def __init__(self):
            self.task_dict = {}

    class ModelManifest(NamedTuple):
        model_id: str
        simple_class_path: str

    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", "vlmeval", "vlmeval.vlm"):
        module(name)
    module("lmms_eval.api.model", lmms=Base)
    module("lmms_eval.models.registry_v2", ModelManifest=ModelManifest)
    module("vlmeval.vlm.base", BaseModel=Base)
    config = module("vlmeval.config", supported_VLM={})
    for name in ("vmod_jax.evaluation.lmms_eval", "vmod_jax.evaluation.vlmevalkit"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield config
    for name in ("vmod_jax.evaluation.lmms_eval", "vmod_jax.evaluation.vlmevalkit"):
        sys.modules.pop(name, None)


def test_lmms_eval(stub, monkeypatch):
    adapter = importlib.import_module("vmod_jax.evaluation.lmms_eval")
    lm, picture = Recorder(), np.zeros((4, 4, 3), np.uint8)
    monkeypatch.setattr(adapter, "load", lambda workdir: lm)
    model = adapter.VMod(workdir="run", batch_size="4", frames="5")
    model.task_dict = {"mme": {"test": [{"see": [picture]}, {"see": ["a/b.mp4"]}, {"see": None, "answer": "No"}]}}
    see = lambda document: document["see"]  # noqa: E731
    requests = [
        Instance(("<image>\nIs it?", {"max_new_tokens": 16, "until": ["|"]}, see, 0, "mme", "test")),
        Instance(("What?", {}, see, 1, "mme", "test")),
        Instance(("Text?", {"max_new_tokens": 16}, see, 2, "mme", "test")),
        Instance(("Text?", {"until": "T"}, None, 2, "mme", "test")),
    ]
    said = model.generate_until(requests)
    assert said == ["Is it?", "What?|(None, ('a/b.mp4', 5))|64", "Text?|(None, None)|16", ""]
    assert [call[:3] for call in lm.calls] == [("text", 4, 16), ("text", 4, 64)]
    likely = model.loglikelihood(
        [
            Instance(("Is it?", " Yes", see, 0, "mme", "test")),
            Instance(("Is it?", lambda document: document["answer"], see, 2, "mme", "test")),
        ]
    )
    assert likely == [(-3.0, False), (-2.0, False)]
    with pytest.raises(NotImplementedError):
        model.generate_until_multi_round([])
    made = adapter.manifest()
    assert (made.model_id, made.simple_class_path) == ("vmod", "vmod_jax.evaluation.lmms_eval.VMod")


def test_lmms_eval_finds_it():
    """The package's entry point names the manifest."""
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"vmod": "vmod_jax.evaluation.lmms_eval:manifest"}


def test_vlmevalkit(stub, monkeypatch, tmp_path):
    adapter = importlib.import_module("vmod_jax.evaluation.vlmevalkit")
    lm = Recorder()
    monkeypatch.setattr(adapter, "load", lambda workdir: lm)
    model = adapter.VMod(workdir="run")
    model.nframe = 7
    texts = [{"type": "text", "value": "One."}, {"type": "image", "value": "a.png"}, {"type": "text", "value": "Two?"}]
    assert model.generate_inner(texts, "MME") == "One.\nTwo?|(['a.png'], None)|64"
    film = [{"type": "video", "value": "a.mp4"}, {"type": "text", "value": "Q?"}]
    begun = [*film, {"type": "text", "value": "Best option:(", "role": "assistant"}]
    assert model.generate_inner(begun) == "Best option:(Q?|(None, ('a.mp4', 7))|64"
    assert model.use_custom_prompt("MME") is False
    (tmp_path / "run.py").write_text("import pathlib, sys\npathlib.Path('seen').write_text(' '.join(sys.argv))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    adapter.main(["RUN", "--data", "MME"])
    assert (tmp_path / "seen").read_text() == "run.py --data MME"
    assert stub.supported_VLM["vmod"]().lm is lm


def test_several_videos_are_refused():
    with pytest.raises(UserError, match="one video is shown at a time"):
        shown(Recorder(), "?", ["a.mp4", "b.png"], 4)
