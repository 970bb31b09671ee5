"""Overlap of a reply with one reference: corpus BLEU, ROUGE, F1. An empty reply scores 0 and is never left out.

Word overlap with one reference hardly correlates with human judgement of dialogue (Liu et al. 2016, EMNLP): a constant
nonsense reply reaches F1 20.49 on ConvAI2. Read these numbers beside such floors.
"""

import re
from collections import Counter
from functools import cache, lru_cache

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

ROUGE_SIGNATURE = "rouge_score|F-measure|stemmer:no|mean over replies"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = re.compile(r"[!\"#$%&()*+,\-./:;<=>?@\[\]\\^`{|}~_']")


def normalize(text: str) -> list[str]:
    """Tokens by ParlAI's normalisation: lower case, punctuation to spaces, articles out, split at white space.

    Source: ParlAI a29567f, parlai/core/metrics.py, `normalize_answer`. "don't" becomes "don", "t".
    """
    return list(_normalized(text))


@lru_cache(maxsize=2**16)  # a turn is looked at once for itself and once in each later history
def _normalized(text: str) -> tuple[str, ...]:
    return tuple(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split())


def f1(response: str, reference: str) -> float:
    """Multiset word F1 in 0-100 of one reply, ParlAI normalisation; the corpus value is the mean over replies.

    Source: ParlAI a29567f, parlai/core/metrics.py, `F1Metric` (papers print it times 100).
    """
    guess, gold = normalize(response), normalize(reference)
    overlap = sum((Counter(guess) & Counter(gold)).values())
    if overlap == 0:
        return 0.0
    precision, recall = overlap / len(guess), overlap / len(gold)
    return 100 * 2 * precision * recall / (precision + recall)


@cache
def _rouge_scorer(use_stemmer: bool) -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=use_stemmer)


def rouge(response: str, reference: str, use_stemmer: bool = False) -> dict[str, float]:
    """F-measures `rouge1`, `rouge2`, `rougeL` in [0, 1] of one reply (Lin 2004; rouge_score 0.1.2).

    The metrics of METRICS are without the stemmer; with it (Porter, words of 4 letters or more) they do not compare.
    """
    return {name: score.fmeasure for name, score in _rouge_scorer(use_stemmer).score(reference, response).items()}


@cache
def _bleu(effective_order: bool) -> BLEU:
    # force: dialogue corpora come tokenised ("how are you ?"); both sides do, so sacrebleu's warning does not apply.
    return BLEU(lowercase=True, force=True, effective_order=effective_order)


def bleu_statistics(response: str, reference: str) -> np.ndarray:
    """Sufficient statistics ``(10,)`` of one reply: matches and totals of 1- to 4-grams, then both lengths."""
    score = _bleu(effective_order=False).corpus_score([response], [[reference]])
    return np.array([*score.counts, *score.totals, score.sys_len, score.ref_len], dtype=np.float64)


def bleu_from_statistics(totals: np.ndarray) -> np.ndarray:
    """Corpus BLEU-4 in 0-100 from summed `bleu_statistics`, ``(..., 10)`` -> ``(...)``.

    Exponential smoothing of zero counts as sacrebleu does it. Counts need not be whole: several decodings of one prompt
    are averaged before they are summed.
    """

    def one(totals: np.ndarray) -> float:
        counts = [round(total) for total in totals.tolist()]
        score = BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score
        return min(score, 100.0)  # sacrebleu's logarithms make 100.00000000000004 of a perfect match

    return np.apply_along_axis(one, -1, totals)


def bleu(responses: list[str], references: list[str]) -> tuple[float, str]:
    """Corpus BLEU-4 in 0-100, lower-cased, with sacrebleu's signature (Papineni 2002; Post 2018, WMT).

    Raises:
        ValueError: when the lists differ in length or are empty.
    """
    if not responses or len(responses) != len(references):
        raise ValueError(
            f"`responses` ({len(responses)}) and `references` ({len(references)}) must pair up, 1 or more."
        )
    metric = _bleu(effective_order=False)
    score = metric.corpus_score(responses, [references]).score
    return min(score, 100.0), str(metric.get_signature())


def bleu_signature() -> str:
    """What sacrebleu prints so that two BLEU values can be told to be comparable."""
    return bleu([""], [""])[1]


def bleu_per_reply(response: str, reference: str) -> float:
    """BLEU in 0-100 of one reply, with effective order: orders longer than the reply do not make it 0.

    Its mean over replies is not corpus BLEU: use it to look at single replies.
    """
    return _bleu(effective_order=True).sentence_score(response, [reference]).score
