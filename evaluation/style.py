"""The manner of writing in three descriptive numbers, to lay side by side before and after a training."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from evaluation.engagement import length_words

FEATURES = ("sentence_words", "punctuation_rate", "capital_rate")
_SENTENCE = re.compile(r"[^.!?]*\w[^.!?]*")
_MARK = re.compile(r"[^\w\s]")


class Shift(NamedTuple):
    """A feature before and after, in the text that is aimed at, and the share of the gap that is closed.

    `closed` is 1 when `after` reaches the target, 0 when it is as far off as `before`, negative when farther; None
    where `before` was at the target already.
    """

    before: float
    after: float
    target: float
    closed: float | None


def style_counts(text: str) -> dict[str, tuple[int, int]]:
    """(count, of how many) for each of `FEATURES`; the value of several texts is the ratio of the sums.

    Words per sentence; punctuation marks per word; sentences whose first letter is a capital per sentence.
    """
    sentences = _SENTENCE.findall(text)
    words = length_words(text)
    letters = [next((c for c in sentence if c.isalpha()), "") for sentence in sentences]
    return {
        "sentence_words": (words, len(sentences)),
        "punctuation_rate": (len(_MARK.findall(text)), words),
        "capital_rate": (sum(letter.isupper() for letter in letters), len(sentences)),
    }


def style(texts: Iterable[str]) -> dict[str, float]:
    """The features of several texts together.

    Raises:
        ValueError: when they have no word.
    """
    sums = dict.fromkeys(FEATURES, (0, 0))
    for text in texts:
        for name, (count, total) in style_counts(text).items():
            sums[name] = (sums[name][0] + count, sums[name][1] + total)
    if not sums["punctuation_rate"][1]:
        raise ValueError("`texts` have no word: there is no style to measure.")
    return {name: count / total for name, (count, total) in sums.items()}


def style_shift(before: Iterable[str], after: Iterable[str], target: Iterable[str]) -> dict[str, Shift]:
    """How far a training moved each feature of the replies towards the texts that it aimed at.

    Args:
        before, after: replies to the same prompts, of the model before and after.
        target: texts in the style that is wanted, such as the references.
    """
    old, new, wanted = style(before), style(after), style(target)
    shifts = {}
    for name in FEATURES:
        gap = abs(old[name] - wanted[name])
        closed = 1 - abs(new[name] - wanted[name]) / gap if gap else None
        shifts[name] = Shift(old[name], new[name], wanted[name], closed)
    return shifts
