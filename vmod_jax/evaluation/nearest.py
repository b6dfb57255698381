"""The nearest of many texts by Levenshtein distance, all at once in NumPy."""

from collections.abc import Sequence

import numpy as np


class Nearest:
    """Finds the nearest of `texts`; ties go to the one that stands first, so give them sorted for alphabetical ties.

    What it was asked once it remembers, and a text that is one of `texts` is found without measuring.
    """

    def __init__(self, texts: Sequence[str]):
        self.texts = list(texts)
        self._place: dict[str, int] = {}
        for place, text in enumerate(self.texts):
            self._place.setdefault(text, place)
        self._length = np.array([len(text) for text in self.texts])
        self._codes = np.full((len(self.texts), max([1, *self._length])), -1, np.int32)
        for row, text in zip(self._codes, self.texts, strict=True):
            row[: len(text)] = [ord(character) for character in text]

    def __call__(self, text: str) -> int:
        """The place of the text nearest to `text`."""
        if text not in self._place:
            self._place[text] = int(np.argmin(self.distances(text)))
        return self._place[text]

    def distances(self, text: str) -> np.ndarray:
        """i32[N]: insertions, deletions and replacements from `text` to each of the N texts."""
        count, width = self._codes.shape
        steps = np.arange(width + 1, dtype=np.int32)
        row = np.broadcast_to(steps, (count, width + 1))
        for deleted, character in enumerate(text, 1):
            new = np.empty_like(row, subok=False)
            new[:, 0] = deleted
            new[:, 1:] = np.minimum(row[:, 1:] + 1, row[:, :-1] + (self._codes != ord(character)))
            # An insertion costs one a place: the best of all places before, each with its way to here.
            row = np.minimum.accumulate(new - steps, axis=1) + steps
        return row[np.arange(count), self._length]


def edit_distance(one: Sequence, other: Sequence) -> int:
    """Levenshtein distance of two sequences of anything that compares."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]
