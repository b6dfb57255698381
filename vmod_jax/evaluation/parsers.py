"""What a response says: the letter of an option, yes or no, a count, or words to compare.

`choice`, `yes_no` and `count` are strict: what they take is an answer and nothing else, and what they do not take is
said to be unparsed ("" or None). Everything named after a benchmark does what that benchmark's public scorer does, its
defects included, each of which its docstring names. None of them raises on any text.
"""

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_OPENING, _CLOSING = r"\s(\[*\"'", r"\s)\]*\"'"
_LEADING_LETTER = re.compile(rf"[{_OPENING}]*(?:Option\b[{_OPENING}]*)?([A-Za-z])")
_LONE = re.compile(rf"[{_CLOSING}.:,!]*\Z")  # nothing but marks behind the letter
_FOLLOWED = re.compile(r"[.):\]\n\r]|,(?!\s*[A-Z]\b)")
_SAID = re.compile(
    rf"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+is\b:?|:)[{_OPENING}]*([A-Z])[{_CLOSING}]*(?=\Z|[\n\r.,!;:])"
)
_COUNT = re.compile(rf"(?:0*([0-9]{{1,18}})|({'|'.join(NUMBERS)}))(?:\s+times?)?[.!]?", re.ASCII | re.IGNORECASE)


# --- strict -----------------------------------------------------------------------------------------------------------


def fold(text: str) -> str:
    """Lower case, white space as single blanks, no full stops at the end: what two equal answers share."""
    return " ".join(text.lower().split()).rstrip(".")


def option_texts(options: Sequence[str]) -> list[str]:
    """The options without their letters, where all of them begin with their own: "A. red", "B) blue" -> red, blue."""
    labels = [re.match(rf"\s*(?:{x}[.):]|\({x}\))\s*", text) for x, text in zip(LETTERS, options, strict=False)]
    if len(options) > len(LETTERS) or not all(labels):
        return list(options)
    return [text[label.end() :] for label, text in zip(labels, options, strict=True) if label]


def choice(response: str | None, options: Sequence[str]) -> str:
    """The letter of the one option that a response names, "" where it names none or it cannot be told which.

    In this order: an option's whole text; a letter at the very beginning with nothing or a mark behind it; the letter
    that every "answer is X", "option: X", "choice is X" in it agrees on. options: at most 26, with or without letters.
    """
    text = (response or "").strip()
    letters = LETTERS[: len(options)]
    if not text:
        return ""
    folded, texts = fold(text), option_texts(options)
    named = [x for x, own in zip(letters, texts, strict=False) if folded in (fold(own), fold(f"{x}. {own}"))]
    if len(named) == 1:
        return named[0]
    if (first := _LEADING_LETTER.match(text)) and (
        _LONE.match(text, first.end()) or _FOLLOWED.match(text, first.end())
    ):
        return first[1].upper() if first[1].upper() in letters else ""
    said = set(_SAID.findall(text))
    return said.pop() if len(said) == 1 and said <= set(letters) else ""


def yes_no(response: str | None) -> str | None:
    """ "yes" or "no" where the first run of ASCII letters is yes, y, no or n in any case; else None."""
    word = re.search(r"[A-Za-z]+", response or "")
    return {"yes": "yes", "y": "yes", "no": "no", "n": "no"}.get(word[0].lower()) if word else None


def count(response: str | None) -> int | None:
    """A response that is a number and nothing else but "times": digits, or zero to ten in letters; else None."""
    found = _COUNT.fullmatch((response or "").strip())
    if not found:
        return None
    return int(found[1]) if found[1] else NUMBERS.index(found[2].lower())


# --- what the public scorers do ---------------------------------------------------------------------------------------


def first_char(response: str | None, gold: str) -> bool:
    """StreamingBench. "Because" is right for B; " A" and "(A)" are wrong for A."""
    return (response or "")[:1] == gold


def contains(response: str | None, gold: str) -> bool:
    """OVO-Bench: the letter anywhere. "ABCDE" is right for every gold, "Assistant" for A."""
    return response is not None and gold in response


# Two commas are missing in the source, which joins two pairs of prefixes into ones that never occur.
_VIDEOMME_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
    "Answer:",
    "Option:",
)


def videomme_regex(response: str | None) -> str:
    """Video-MME: the first of A, B, C, D anywhere behind some prefixes, "" where there is none.

    "Best answer: C" is B, "Assistant: B" is A; lower case, full texts and E are nothing.
    """
    text = (response or "").strip()
    for prefix in _VIDEOMME_PREFIXES:
        text = text.replace(prefix, "")
    found = re.search("[ABCD]", text)
    return found[0] if found else ""


def mvbench_official(response: str | None, gold: str, bracket: bool = False) -> bool:
    """MVBench: the first word and "(x)" of the gold, one inside the other. bracket: the reply was begun with "(".

    "" is right for every gold, and so is whatever begins with the letter as a word ("A person"); "[B]" is wrong.
    """
    text = ("(" if bracket else "") + (response or "")
    word, letter = text.strip().split("\n")[0].lower().split(" ")[0], f"({gold.lower()})"
    return word.replace(".", "") in letter or letter in word


def mvbench_lmms(response: str | None) -> str:
    """MVBench as lmms-eval scores it: the first lone letter a-e of any case, upper case. "I am a dog" is A."""
    text = response or ""
    if named := re.match(r"([A-E])\.\s*(.+)$", text, re.IGNORECASE | re.ASCII):
        return named[1].upper()
    text = _no_punctuation(re.sub(r"[\n\t]", " ", text).strip())
    for mark in "'\")(":
        text = text.strip(mark)
    found = re.search(r"\b[a-e]\b", text.strip().lower())
    return found[0].upper() if found else ""


def pope(response: str | None) -> str | None:
    """POPE: "no" where the first sentence has the word No, not or no, else "yes": also for "", "NO!" and "None"."""
    if response is None:
        return None
    words = response.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme(response: str | None) -> str | None:
    """MME: "yes", "no" or "other" by the first four characters. "Not sure" and "Nope" are no."""
    if response is None:
        return None
    text = response.lower()
    start = text if text in ("yes", "no") else text[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def ovo_yes_no(response: str | None, gold: str) -> bool:
    """OVO-Bench: the gold "Yes" or "No" anywhere, or Y, N. "Yes, but No" is right for both, "yes" for neither."""
    return response is not None and (response == gold[0] or gold in response)


def ovo_digits(response: str | None) -> str | None:
    """OVO-Bench: all digits, joined, to be compared with the count. "3 times in 30 s" says 330, "three" nothing."""
    return None if response is None else "".join(re.findall(r"\d+", response))


_PHRASES = (
    *(f"{the}{kind}answer is" for the in ("the ", "") for kind in ("correct ", "best ", "")),
    *(f"{the}{kind}option is" for the in ("the ", "") for kind in ("correct ", "best ")),
    *(f"{the}{kind}choice is" for the in ("the ", "") for kind in ("correct ", "")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
)


def lmms_eval(response: str | None, letters: str = "ABCD") -> str:
    """lmms-eval's extractor: the candidate of the highest rank, then the last one. "Assistant: none" is A."""
    text = (response or "").strip()
    if not text:
        return ""
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    return max(_candidates(text, letters), key=lambda found: found[1:], default=("", 0, 0))[0]


def _candidates(text: str, letters: str) -> list[tuple[str, int, int]]:
    """(letter, rank, place) of everything in the text that could be meant as an answer."""
    found, lower, bare = [], text.lower(), text.strip()
    for x in letters:
        forms = ((f"({x})", 6), (f"{x}.", 5), (f"{x}:", 4), (f"{x})", 3), (f"{x} ", 2))
        found += [(x, rank, text.rfind(form)) for form, rank in forms if form in text]
        ends = [lower.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in lower]
        found += [(x, 7, text.find(x, end)) for end in ends if x in text[end:]]
        if bare.startswith(x) and not bare[1:2].isalpha():
            found.append((x, 10, 0))
        if bare.endswith(x) and not bare[:-1][-1:].isalpha():
            found.append((x, 9, len(text)))
    return found or [(x, 0, text.rfind(x)) for x in letters if x in text]


# --- open answers -----------------------------------------------------------------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_IN_DIGITS = {"none": "0", **{word: str(value) for value, word in enumerate(NUMBERS)}}
_CONTRACTED = re.findall(
    r"\S+",
    """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've y'all'd've 'ow's'at
    """,
)
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_normalise(text: str) -> str:
    """An open answer as the VQA evaluation compares it: no case, articles or punctuation, small numbers as digits.

    The rules are those of the public code that LLaVA carries, which deletes no more than 32 full stops.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _no_punctuation(re.sub(r"[\n\t]", " ", text).strip())
    words = [_IN_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _no_punctuation(text: str) -> str:
    """Marks next to a blank anywhere in the text are deleted, others become blanks; full stops, the first 32."""
    numbers, out = re.search(r"\d,+\d", text), text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if numbers or f"{mark} " in text or f" {mark}" in text else " ")
    return _STOP.sub("", out, count=32)
