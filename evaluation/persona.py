"""Persona metrics of a single recorded reply, by words alone: shown beside the probes, never the headline.

The keyword score is kept because it is what keyword matching usually means. It cannot be read as consistency: reciting
the whole persona scores 1, denying a fact scores as asserting it, human replies on ConvAI2 score 0.11.
"""

from collections.abc import Sequence
from functools import cache

from rouge_score.tokenizers import DefaultTokenizer

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


def keyword_score(persona: Sequence[str], reply: str) -> float:
    """Share of persona sentences of which a word longer than 3 letters, no stop word, is a SUBSTRING of the reply.

    In [0, 1]. "start" counts inside "started" and in "no fresh start" alike: the definition in use.

    Raises:
        ValueError: when the persona is empty.
    """
    reply = reply.lower()
    hits = 0
    for sentence in _checked(persona):
        words = (word.strip(".,!?;:'\"()") for word in sentence.lower().split())
        hits += any(len(word) >= MIN_KEYWORD_LENGTH and word not in STOP_WORDS and word in reply for word in words)
    return hits / len(persona)


def fact_density(persona: Sequence[str], reply: str) -> float:
    """Share of persona sentences of which a content word is in the reply, whole words by Porter stem. In [0, 1].

    Descriptive: 0 ignores the persona, and far above the human value is reciting it. Content words are all but
    `UNINFORMATIVE`.
    """
    spoken = _stems(reply)
    return sum(not spoken.isdisjoint(_stems(sentence)) for sentence in _checked(persona)) / len(persona)


def copied_share(persona: Sequence[str], reply: str, min_run: int = 4) -> float:
    """Share of the reply's words that lie in a run of at least `min_run` words of one persona sentence; 0 if empty."""
    words = _tokenizer(stem=False).tokenize(reply)
    runs = {
        tuple(sentence[i : i + min_run])
        for sentence in map(_tokenizer(stem=False).tokenize, persona)
        for i in range(len(sentence) - min_run + 1)
    }
    copied = {
        position
        for start in range(len(words) - min_run + 1)
        if tuple(words[start : start + min_run]) in runs
        for position in range(start, start + min_run)
    }
    return len(copied) / len(words) if words else 0.0


def is_copy(persona: Sequence[str], reply: str) -> bool:
    """True when more than half of the reply is copied (`copied_share`); `copy_rate` is the share of such replies."""
    return copied_share(persona, reply) > 0.5


@cache
def _tokenizer(stem: bool) -> DefaultTokenizer:
    return DefaultTokenizer(use_stemmer=stem)


def _stems(text: str) -> set[str]:
    words = (word for word in _tokenizer(stem=False).tokenize(text) if word not in UNINFORMATIVE)
    return set(_tokenizer(stem=True).tokenize(" ".join(words)))


def _checked(persona: Sequence[str]) -> Sequence[str]:
    if not persona:
        raise ValueError("`persona` is empty: a share of persona sentences needs at least one sentence.")
    return persona
