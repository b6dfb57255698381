"""What a response says, strictly and as the public scorers take it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmod_jax.evaluation import parsers

FOUR = ["A. red dog.", "B. blue cup.", "C. green kite.", "D. red clock."]


@pytest.fixture(scope="module")
def folder(goldens):
    if not (goldens / "benchmarks").is_dir():
        pytest.skip("no goldens of benchmarks")
    return goldens / "benchmarks"


@pytest.mark.goldens
def test_multiple_choice_is_the_references(folder):
    golden = json.loads((folder / "parsers" / "multiple_choice.json").read_text())
    options, letters = golden["options"], "ABCD"
    for case in golden["cases"]:
        response = case["response"]

        def right(rule, response=response):
            return "".join(x for x in letters if rule(response, x))

        got = {
            "first_char": (response or "")[:1],
            "contains": right(parsers.contains),
            "videomme_regex": parsers.videomme_regex(response),
            "lmms_eval": parsers.lmms_eval(response, letters),
            "mvbench_lmms_correct_for": right(lambda r, x: parsers.mvbench_lmms(r) == x),
            "mvbench_official_correct_for": right(parsers.mvbench_official),
            "mvbench_official_with_bracket_correct_for": right(lambda r, x: parsers.mvbench_official(r, x, True)),
            "strict": parsers.choice(response, options),
        }
        assert got == {name: case[name] for name in got}, response
        assert [x for x in letters if parsers.first_char(response, x)] == [x for x in letters if x == got["first_char"]]


@pytest.mark.goldens
def test_yes_no_and_counts_are_the_references(folder):
    for case in json.loads((folder / "parsers" / "yes_no.json").read_text()):
        response = case.pop("response")
        assert case == {
            "pope": parsers.pope(response),
            "mme": parsers.mme(response),
            "ovo_yes": parsers.ovo_yes_no(response, "Yes"),
            "ovo_no": parsers.ovo_yes_no(response, "No"),
            "strict": parsers.yes_no(response),
        }, response
    for case in json.loads((folder / "parsers" / "count.json").read_text()):
        response = case.pop("response")
        assert case == {"ovo_digits": parsers.ovo_digits(response), "strict": parsers.count(response)}, response


@pytest.mark.goldens
def test_open_answers_are_normalised_as_the_references(folder):
    cases = json.loads((folder / "expected.json").read_text())["vqa_normalise"]
    assert [parsers.vqa_normalise(case["text"]) for case in cases] == [case["normalised"] for case in cases]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("d)", "D"),
        ("**C**", "C"),
        ("C, because", "C"),
        ("Option B is wrong, so the answer is C.", "C"),
        ("a, B", ""),
        ("A or B", ""),
        ("A man walks in.", ""),
        ("answer: c", ""),
        ("The answer is A. No, the answer is B.", ""),
        ("The answer is E.", ""),
        ("e.", ""),
        ("red dog", "A"),
        ("B. Blue  CUP..", "B"),
        (None, ""),
        (" \n", ""),
    ],
)
def test_choices(response, letter):
    assert parsers.choice(response, FOUR) == letter


@pytest.mark.parametrize("count", [2, 3, 5, 26])
def test_any_number_of_options(count):
    texts = [f"thing {i}" for i in range(count)]
    labelled = [f"{x}) {text}" for x, text in zip(parsers.LETTERS, texts, strict=False)]
    last = parsers.LETTERS[count - 1]
    for options in (texts, labelled):
        assert parsers.choice(last, options) == last
        assert parsers.choice(f"({last.lower()})", options) == last
        assert parsers.choice(f"thing {count - 1}.", options) == last
        if count < 26:
            assert parsers.choice(parsers.LETTERS[count], options) == ""


def test_options_that_read_alike_are_told_apart_by_letters_alone():
    assert parsers.choice("dog", ["dog", "Dog.", "cat"]) == ""
    assert parsers.choice("B. dog", ["dog", "Dog.", "cat"]) == "B"
    assert parsers.choice("A. dog", ["A. dog", "the A. dog"]) == "A"  # the second has no letter of its own


def test_only_the_first_32_full_stops_go():
    assert parsers.vqa_normalise("x." * 40) == "x" * 32 + "x." * 8
    assert parsers.vqa_normalise("3.14.") == "3.14"


@given(st.one_of(st.none(), st.text()), st.integers(2, 26))
def test_no_text_raises(response, count):
    options = [f"{x}. thing" for x in parsers.LETTERS[:count]]
    assert parsers.choice(response, options) in ("", *parsers.LETTERS[:count])
    assert parsers.yes_no(response) in ("yes", "no", None)
    assert parsers.count(response) is None or parsers.count(response) >= 0
    for x in "AB":
        parsers.first_char(response, x), parsers.contains(response, x), parsers.mvbench_official(response, x, True)
    assert parsers.lmms_eval(response) in ("", *"ABCD")
    assert parsers.mvbench_lmms(response) in ("", *"ABCDE")
    assert parsers.videomme_regex(response) in ("", *"ABCD")
    parsers.pope(response), parsers.mme(response), parsers.ovo_digits(response), parsers.vqa_normalise(response or "")


@given(st.sampled_from("0123456789"), st.integers(1, 6000))
def test_numbers_of_any_length(digit, length):
    assert parsers.count(digit * length) in (None, int(digit * min(length, 18)))
