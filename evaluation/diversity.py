"""Diversity of the replies: distinct-n at a fixed number of tokens, and repetition."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from evaluation.intervals import Z_95, Interval
from evaluation.overlap import normalize


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams of one reply, in order; empty when it has fewer than `n` tokens."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _sample_ngrams(replies: Sequence[str], n: int, num_tokens: int, seed: int) -> list[tuple[int, tuple[str, ...]]]:
    """(reply index, n-gram) of the first `num_tokens` tokens of the seeded shuffle; n-grams do not cross replies."""
    tokens = [normalize(reply) for reply in replies]
    available = sum(map(len, tokens))
    if num_tokens < 1 or available < num_tokens:
        raise ValueError(
            f"`num_tokens` = {num_tokens}, but the {len(replies)} replies have {available} tokens: distinct-n falls "
            "with size, so compare systems at one number of tokens that each of them (and the reference) has."
        )
    sample, left = [], num_tokens
    for index in np.random.default_rng(seed).permutation(len(tokens)):
        sample += [(int(index), ngram) for ngram in ngrams(tokens[index][:left], n)]
        left -= min(left, len(tokens[index]))
    if not sample:
        raise ValueError(f"no {n}-gram among the first {num_tokens} tokens: every reply is shorter than {n} tokens.")
    return sample


def distinct_n(replies: Sequence[str], n: int, num_tokens: int, seed: int = 0) -> float:
    """Different n-grams / all n-grams over the first `num_tokens` tokens of a seeded shuffle of the replies.

    Source: Li et al. 2016, NAACL; corpus level with n-grams in the denominator, as ParlAI's `interdistinct`.

    Raises:
        ValueError: when the replies have fewer than `num_tokens` tokens, or no n-gram.
    """
    sample = _sample_ngrams(replies, n, num_tokens, seed)
    return len({ngram for _, ngram in sample}) / len(sample)


def distinct_interval(
    replies: Sequence[str], clusters: Sequence[Hashable], n: int, num_tokens: int, seed: int = 0
) -> Interval:
    """`distinct_n` with its 95 % interval by the delete-one-cluster jackknife (Efron & Stein 1981).

    Not a bootstrap: drawing dialogues with replacement repeats replies, and a repeated reply adds no new n-gram, so
    nearly all resamples would lie below the value. The jackknife errs on the wide side: on disjoint samples of human
    dialogues its standard error was 1.3 times the true one. The bounds are NaN for one cluster.
    """
    sample = [(clusters[index], ngram) for index, ngram in _sample_ngrams(replies, n, num_tokens, seed)]
    owners: dict[tuple[str, ...], set[Hashable]] = {}
    for cluster, ngram in sample:
        owners.setdefault(ngram, set()).add(cluster)
    size = Counter(cluster for cluster, _ in sample)
    alone = Counter(next(iter(found)) for found in owners.values() if len(found) == 1)
    value = len(owners) / len(sample)
    if len(size) == 1:
        return Interval(value, math.nan, math.nan)
    without = np.array([(len(owners) - alone[cluster]) / (len(sample) - size[cluster]) for cluster in size])
    error = math.sqrt((len(size) - 1) / len(size) * float(((without - without.mean()) ** 2).sum()))
    return Interval(value, max(0.0, value - Z_95 * error), min(1.0, value + Z_95 * error))


def repetition(reply: str, earlier: Iterable[str] = (), n: int = 4) -> tuple[int, int]:
    """(repeated, all) n-grams of a reply: an n-gram repeats one of an earlier own turn, or one before it in the reply.

    With `earlier` empty it is repetition within the reply alone. The corpus value is the ratio of the two sums.
    Source: repetition measures of Welleck et al. 2020 (unlikelihood), ICLR; n = 4.
    """
    seen = {ngram for turn in earlier for ngram in ngrams(normalize(turn), n)}
    found = ngrams(normalize(reply), n)
    repeated = 0
    for ngram in found:
        repeated += ngram in seen
        seen.add(ngram)
    return repeated, len(found)
