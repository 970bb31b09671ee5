"""Persona metrics of a single recorded reply, by words alone: shown beside the probes, never the headline.

The keyword score is kept because it is what keyword matching usually means. It cannot be read as consistency: reciting
the whole persona scores 1, denying a fact scores as asserting it, human replies on ConvAI2 score 0.11.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from rouge_score.tokenizers import DefaultTokenizer

from rlhf.facts import plain

# English function words, the list in common use, and verbs so usual in persona sentences that they name no fact.
_FUNCTION_WORDS = """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
    its itself they them their theirs themselves what which who whom this that these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of at by for with about
    against between into through during before after above below to from up down in out on off over under again further
    then once here there when where why how all any both each few more most other some such no nor not only own same so
    than too very s t can will just don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn haven isn ma
    mightn mustn needn shan shouldn wasn weren won wouldn would could also
"""
_GENERIC_WORDS = """
    like likes love loves enjoy enjoys go goes going get gets want wants think thinks know make makes favorite
    favourite really one
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
UNINFORMATIVE = STOP_WORDS | frozenset(_GENERIC_WORDS.split())
MIN_KEYWORD_LENGTH = 4
EXPRESSING_SHARE = 0.5  # of a sentence's content words
MIN_RUN = 4  # words in a row that nobody hits on by chance

_SAYING = (
    r"(?:say|says|said|saying|claim|claims|claimed|tell|tells|told|think|thinks|thought|believe|believes|believed)"
)
_LIE = r"(?:lie|lies|rumou?r|rumou?rs|myth|gossip|joke|mistake|fiction|invention|misunderstanding)"
# What is said under such words is not claimed: denials other than a plain "not", wishes, hearsay, the past. Matched in
# lower-case words with "not" spelled out; apostrophes may be gone.
UNTRUE = re.compile(
    rf"\b(?:not (?:true|right|correct|the case)|false|untrue|wrong|{_LIE}) (?:that|to {_SAYING})\b|\bno truth\b"
    rf"|\bnever (?:\w+ )?(?:{_SAYING}|admit\w*|state|stated)\b|\bnot (?:\w+ )?{_SAYING} (?:that )?(?:i|my)\b"
    r"|\b(?:i|we) (?:\w+ )?wish(?:ed)?\b(?! (?:you|him|her|them)\b)|\b(?:if only|(?:as )?if i (?:had|were|was)|in my dreams)\b"
    r"|\bpretend(?:s|ed|ing)? (?:that|to)\b|\b(?:supposedly|allegedly)\b|\b(?:some(?:body|one)|any(?:body|one)) else\b"
    rf"|\b(?:nobody|no one|who ?ever|people|they|some|every(?:body|one)|some(?:body|one)) (?:\w+ ){{0,3}}?{_SAYING} "
    r"(?:\w+ ){0,2}?(?:that|i|my)\b|(?<!\bi )\btold you\b|(?<!get )(?<!getting )(?<!am )(?<!m )\bused to\b|\bago that\b"
    rf"|\b(?:is|are|was|were) (?:\w+ )?(?:a {_LIE}|lies|gossip|fiction|not true|untrue|false|not the case|made up|not me)\b"
)


class Overlap(NamedTuple):
    """Precision, recall and their harmonic mean, in [0, 1]."""

    precision: float
    recall: float
    f1: float


def keyword_score(
    persona: Sequence[str],
    reply: str,
    *,
    min_length: int = MIN_KEYWORD_LENGTH,
    stop_words: Collection[str] = STOP_WORDS,
    whole_words: bool = False,
) -> float:
    """Share of persona sentences of which a word of `min_length` letters or more, no stop word, is in the reply.

    In [0, 1]. By default the word may be a SUBSTRING: "start" counts inside "started" and in "no fresh start" alike.
    This is the definition in use, and the one of the metric `keyword_score`; `whole_words` asks for the word itself.

    Raises:
        ValueError: when the persona is empty.
    """
    reply = reply.lower()
    spoken: Collection[str] = set(map(_bare, reply.split())) if whole_words else reply
    hits = 0
    for sentence in _checked(persona):
        words = map(_bare, sentence.lower().split())
        hits += any(len(word) >= min_length and word not in stop_words and word in spoken for word in words)
    return hits / len(persona)


def _bare(word: str) -> str:
    return word.strip(".,!?;:'\"()")


def fact_density(persona: Sequence[str], reply: str) -> float:
    """Share of persona sentences of which a content word is in the reply, whole words by Porter stem. In [0, 1].

    Descriptive: 0 ignores the persona, and far above the human value is reciting it. Content words are all but
    `UNINFORMATIVE`.
    """
    spoken = content_stems(reply)
    return sum(not spoken.isdisjoint(content_stems(sentence)) for sentence in _checked(persona)) / len(persona)


def expressed(persona: Sequence[str], reply: str, heard: Iterable[str] = ()) -> set[int]:
    """Places of the persona sentences that the reply expresses: it has half of their content words or more.

    What a sentence says under a frame of `UNTRUE` ("it is a lie that", "i wish") does not count, but for a persona
    sentence that has such a frame itself. Recall of denials is limited: other words for one still express the fact.

    Args:
        heard: what the user has said. Its words do not count: repeating them says nothing of oneself, and on
            Synthetic-Persona-Chat an echo would cover as much of the persona as people do.
    """
    echoed = frozenset().union(*map(content_stems, heard))
    spoken, claimed = content_stems(reply) - echoed, content_stems(_claimed(reply)) - echoed
    found = set()
    for place, sentence in enumerate(persona):
        stems = content_stems(sentence)
        shared = stems & (claimed if _claimed(sentence) else spoken)
        if stems and len(shared) >= EXPRESSING_SHARE * len(stems):
            found.add(place)
    return found


@lru_cache(maxsize=2**16)
def _claimed(text: str) -> str:
    """The sentences of a text that no frame of `UNTRUE` takes back."""
    sentences = re.findall(r"[^.!?\n]+", text)
    return " ".join(said for said in sentences if not UNTRUE.search(" ".join(_words(plain(said)))))


def persona_lift(persona: Sequence[str], other: Sequence[str], reply: str) -> float:
    """`fact_density` of the own persona less that of another one: what the reply owes to its persona. In [-1, 1]."""
    return fact_density(persona, reply) - fact_density(other, reply)


def persona_overlap(persona: Sequence[str], reply: str) -> Overlap:
    """Precision, recall and F1 of the reply's words against the words of all persona sentences, stop words left out.

    Both sides are sets of whole words without stemming. 0 where nothing is shared, as in an empty reply.
    Source: Lian et al. 2019 (PostKS), IJCAI, knowledge recall, precision and F1; the corpus value is the mean.
    """
    known = {word for sentence in _checked(persona) for word in _words(sentence)} - STOP_WORDS
    spoken = set(_words(reply)) - STOP_WORDS
    shared = len(known & spoken)
    if not shared:
        return Overlap(0.0, 0.0, 0.0)
    precision, recall = shared / len(spoken), shared / len(known)
    return Overlap(precision, recall, 2 * precision * recall / (precision + recall))


def copied_share(persona: Sequence[str], reply: str, min_run: int = MIN_RUN) -> float:
    """Share of the reply's words that lie in a run of at least `min_run` words of one persona sentence; 0 if empty."""
    words = _words(reply)
    runs = {sentence[i : i + min_run] for sentence in map(_words, persona) for i in range(len(sentence) - min_run + 1)}
    copied = {
        position
        for start in range(len(words) - min_run + 1)
        if words[start : start + min_run] in runs
        for position in range(start, start + min_run)
    }
    return len(copied) / len(words) if words else 0.0


def is_copy(persona: Sequence[str], reply: str) -> bool:
    """True when more than half of the reply is copied (`copied_share`), or a persona sentence is said whole.

    A whole sentence has `MIN_RUN` words or more and stands in the reply in one run: padding does not hide it.
    `copy_rate` is the share of such replies.
    """
    text = f" {' '.join(_words(reply))} "
    whole = any(len(words) >= MIN_RUN and f" {' '.join(words)} " in text for words in map(_words, persona))
    return whole or copied_share(persona, reply) > 0.5


# -- what must be kept letter by letter --------------------------------------------------------------------------------

_URL = r"(?:https?://|www\.)[^\s<>\"]*[^\s<>\".,;:!?)\]']|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
_NUMBER = r"(?<![\w.,:/-])\d+(?:[.,:/-]\d+)*%?(?!\w)"
# A capital within a sentence; the first word of one has it anyway, and "I" is no name.
_NAME = r"(?<=[a-z0-9,;] )(?:[A-Z][\w'’-]+)(?: [A-Z][\w'’-]+)*"
_VERBATIM = re.compile(f"{_URL}|{_NUMBER}|{_NAME}")


def verbatim_items(text: str) -> set[str]:
    """Addresses, numbers in digits and capitalised names of a text, as they are written there."""
    return set(_VERBATIM.findall(text))


def verbatim_kept(persona: Sequence[str], reference: str, reply: str) -> tuple[int, int]:
    """(kept, called for) items that the persona has and the reference shows to be wanted here.

    An item is kept if the reply has it whole and in the same writing: "www.example.org/ap" does not keep
    "www.example.org/apply", and "1995" does not keep "19".
    """
    wanted = {item for sentence in persona for item in verbatim_items(sentence)}
    wanted = {item for item in wanted if _stands_in(item, reference)}
    return sum(_stands_in(item, reply) for item in wanted), len(wanted)


def _stands_in(item: str, text: str) -> bool:
    return re.search(rf"(?<![\w/@.-])(?<!\d[,:]){re.escape(item)}(?![\w/@%-]|[.,:?=&]\w)", text) is not None


# -- words -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2**16)  # the sentences of a persona come back with each of its replies
def content_stems(text: str) -> frozenset[str]:
    """Porter stems of the words of a text that are not `UNINFORMATIVE`."""
    return frozenset(_stem(word) for word in _words(text) if word not in UNINFORMATIVE)


@lru_cache(maxsize=2**16)
def _words(text: str) -> tuple[str, ...]:
    return tuple(_tokenizer(stem=False).tokenize(text))


@lru_cache(maxsize=2**16)
def _stem(word: str) -> str:
    return _tokenizer(stem=True).tokenize(word)[0]


@cache
def _tokenizer(stem: bool) -> DefaultTokenizer:
    return DefaultTokenizer(use_stemmer=stem)


def unreadable(text: str) -> bool:
    """True for a text with letters of which the tokeniser sees none: it reads a to z and 0 to 9."""
    return not _words(text) and any(map(str.isalpha, text))


def _checked(persona: Sequence[str]) -> Sequence[str]:
    if not persona:
        raise ValueError("`persona` is empty: a share of persona sentences needs at least one sentence.")
    return persona
