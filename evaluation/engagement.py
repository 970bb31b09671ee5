"""Descriptive numbers of engagement. No direction is better: read them on both sides of the human reference."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from evaluation.overlap import normalize
from evaluation.persona import content_stems

# Flags of the earlier project's engagement score: markers of each, and its weight. The rest of the weight is length.
MARKERS: dict[str, tuple[str, ...]] = {
    "question": ("?", "what", "why", "how", "when", "where", "who"),
    "exclamation": ("!",),
    "continuation": ("...", "and", "also", "additionally"),
    "empathy": ("understand", "feel", "sorry", "glad", "happy", "sad"),
    "acknowledgment": ("yes", "no", "right", "exactly", "agree", "see"),
}
WEIGHTS: dict[str, float] = {
    "question": 0.25,
    "exclamation": 0.15,
    "continuation": 0.15,
    "empathy": 0.20,
    "acknowledgment": 0.15,
}
LENGTH_WEIGHT = 0.10
FULL_LENGTH = 30  # words from which on the length counts in full


def has_question(reply: str) -> bool:
    """True when the reply holds a question mark; `question_rate` is the share of such replies.

    See et al. 2019 (NAACL) study asking as an attribute with an optimum: people ask in about 29 % of ConvAI2 turns.
    """
    return "?" in reply


def length_words(reply: str) -> int:
    """Words of the reply, split at white space; a piece without letter or digit (" . ") is punctuation, not a word."""
    return sum(any(character.isalnum() for character in piece) for piece in reply.split())


def engagement_score(
    reply: str,
    markers: Mapping[str, Sequence[str]] = MARKERS,
    weights: Mapping[str, float] = WEIGHTS,
    *,
    whole_words: bool = False,
) -> float:
    """The earlier project's score: a weight for each flag with a marker in the reply, and one for its length. 0 to 1.

    By default a marker may be a SUBSTRING, as it was there: "and" counts in "understand", "no" in "know", so that
    "understand? !no" has 0.91 and human ConvAI2 turns 0.22. It is no measure of quality. `whole_words` asks for the
    word itself; markers without a letter are looked for as they are.

    Raises:
        ValueError: when a flag has markers and no weight, or the reverse.
    """
    if markers.keys() != weights.keys():
        raise ValueError(f"`markers` has the flags {sorted(markers)}, `weights` {sorted(weights)}: give one each.")
    text = reply.lower()
    score = LENGTH_WEIGHT * min(len(reply.split()) / FULL_LENGTH, 1.0)
    for flag, words in markers.items():
        score += weights[flag] * any(
            re.search(rf"\b{re.escape(word)}\b", text) is not None
            if whole_words and word[:1].isalpha()
            else word in text
            for word in words
        )
    return score


def is_follow_up(reply: str, user_turn: str) -> bool:
    """True when a question of the reply shares a content word (`content_stems`) with the user's last turn."""
    asked = re.findall(r"[^.!?]*\?", reply)
    return any(not content_stems(user_turn).isdisjoint(content_stems(question)) for question in asked)


def uptake(reply: str, user_turn: str) -> float | None:
    """Share of the content words of the user's last turn that the reply takes up; None where that turn has none."""
    said = content_stems(user_turn)
    return len(said & content_stems(reply)) / len(said) if said else None


def inverse_document_frequencies(texts: Iterable[str]) -> tuple[dict[str, float], float]:
    """ln((N + 1) / (turns with the word + 1)) for each word of N different turns, and its value for any other word.

    The turns are those of the data, never a system's own, so that all systems on one data are measured by one scale.
    """
    turns = set(texts)
    frequency = Counter(word for turn in turns for word in set(normalize(turn)))
    size = len(turns) + 1
    return {word: math.log(size / (count + 1)) for word, count in frequency.items()}, math.log(size)


def information(reply: str, frequencies: tuple[Mapping[str, float], float]) -> tuple[float, int]:
    """(sum of inverse document frequencies, number) of the reply's words; the corpus value `mean_idf` is their ratio.

    Low is generic: "i do not know" consists of words that half of all turns have.
    """
    known, unknown = frequencies
    words = normalize(reply)
    return sum(known.get(word, unknown) for word in words), len(words)
