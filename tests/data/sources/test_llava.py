"""LLaVA's instruction data as streams."""

import json

import numpy as np
import pytest

from vmod_jax.data.conversation import IGNORE, encode, stream_format
from vmod_jax.data.sources import llava
from vmod_jax.data.tokenizer import train_tokenizer
from vmod_jax.errors import UserError


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


ASKED = [human("<image>\nWhat is it?"), gpt("A dog."), human("Sure?"), gpt("Yes.")]
RECORDS = [
    {"id": "one", "image": "coco/a.png", "conversations": ASKED},
    {"id": "text", "model": "x", "conversations": [gpt("Hi"), human('Say [{"]'), gpt('"]}')]},
    {
        "id": "two",
        "image": ["b.png", "coco/a.png"],
        "conversations": [human("Compare <image> and <image>"), gpt("Alike.")],
    },
]


@pytest.fixture
def folder(tmp_path):
    import av

    (tmp_path / "coco").mkdir()
    for name, colour in (("coco/a.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        frame = av.VideoFrame.from_ndarray(np.full((6, 12, 3), colour, np.uint8), format="rgb24")
        with av.open(str(tmp_path / name), "w", format="image2") as out:
            stream = out.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 12, 6, "rgb24"
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    write(tmp_path, RECORDS)
    return tmp_path


def write(folder, records):
    (folder / "train.json").write_text(json.dumps(records, indent=1))


def test_records_become_streams(folder):
    data = llava.Instructions(folder / "train.json", folder)
    assert len(data) == 3
    assert data[0].conversation == [
        {"role": "stream", "num_frames": 1, "learn": False},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A dog.", "learn": True},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes.", "learn": True},
    ]
    assert data[1].conversation == [
        {"role": "user", "content": 'Say [{"]'},
        {"role": "assistant", "content": '"]}', "learn": True},
    ]
    assert data[2].conversation[0] == {"role": "stream", "num_frames": 2, "learn": False}
    assert data[2].conversation[1]["content"] == "Compare  and"
    assert [one.stop for one in data] == [1, 0, 2]


def test_images_are_letterboxed_and_text_alone_shows_none(folder):
    data = llava.Instructions(folder / "train.json", folder)
    frames = data.frames(data[2], 8)
    assert (frames.shape, frames.dtype) == ((2, 8, 8, 3), np.uint8)
    assert frames[0, 4, 4].tolist() == pytest.approx([0, 0, 255], abs=3)
    assert frames[1, 4, 4].tolist() == pytest.approx([255, 0, 0], abs=3)
    assert not frames[:, :2].any()  # black above and below an image that is wider than high
    assert data.frames(data[1], 8).shape == (0, 8, 8, 3)


def test_answers_and_their_ends_are_learned_and_nothing_else(folder):
    fmt = stream_format(train_tokenizer(["What is it?", "Sure?", "A dog.", "Yes."], folder / "tokenizer"), 3)
    row = encode(llava.Instructions(folder / "train.json", folder)[0].conversation, fmt)
    learned = [token for token in row.labels if token != IGNORE]
    eos = fmt.tokenizer.eos_token
    assert fmt.tokenizer.decode(learned) == f"Assistant: A dog.{eos}Assistant: Yes.{eos}"
    frames = row.input_ids == fmt.frame_token_id
    assert frames.sum() == 3
    assert (row.labels[frames] == IGNORE).all()


def test_plain_is_an_image_and_its_caption(folder):
    data = llava.Instructions(folder / "train.json", folder, plain=True)
    assert data[0].conversation[:3] == [
        {"role": "system", "content": ""},
        {"role": "stream", "num_frames": 1, "learn": False},
        {"role": "assistant", "content": "A dog.", "learn": True},
    ]


def test_the_index_is_kept(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = llava.Instructions(folder / "train.json", folder, cache=cache)
    monkeypatch.setattr(llava, "_records", lambda file: pytest.fail("looked for again"))
    again = llava.Instructions(folder / "train.json", folder, cache=cache)
    assert list(first) == list(again)


def test_missing_images(folder):
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match=r"images of 1 of 3 records are not below .*record 2.*missing=skip"):
        llava.Instructions(folder / "train.json", folder)
    data = llava.Instructions(folder / "train.json", folder, missing="skip")
    assert (len(data), data.skipped) == (2, 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [human("<image>"), gpt("x")]}, "has 0 images and names 1"),
        ({"image": "b.png", "conversations": [human("x"), gpt("x")]}, "has 1 images and names 0"),
        ({"conversations": [human("x"), human("x")]}, "in alternation"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "a turn is from 'bot'"),
        ({"conversations": [{"from": "gpt"}]}, "no text 'value'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "a turn is from"),
        ({"conversations": [{"from": "human", "value": "\ud800"}]}, "no text 'value'"),
        ({"conversations": [human("x"), gpt("<image>")], "image": "b.png"}, "a gpt turn holds"),
        ({"conversations": []}, "no list 'conversations'"),
        ({"image": 3, "conversations": []}, "'image' must be a path"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_record(folder, record, message):
    write(folder, [*RECORDS, {"id": "wrong"} | record])
    with pytest.raises(UserError, match=message) as error:
        list(llava.Instructions(folder / "train.json", folder))
    assert "record 3 ('wrong')" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mark_in_front_of_the_records(folder):
    write(folder, RECORDS)
    text, whole = (folder / "train.json").read_text(), list(llava.Instructions(folder / "train.json", folder))
    (folder / "train.json").write_text(text, encoding="utf-8-sig")
    assert list(llava.Instructions(folder / "train.json", folder)) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no list of records"),
        ("[]", "no list of records"),
        ('{"a": 1}', "no list of records"),
        ('[{"a": 1}', "not closed"),
        ('["a"]', "something else"),
    ],
)
def test_what_is_no_list_of_records(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        llava.Instructions(tmp_path / "x.json", tmp_path)
