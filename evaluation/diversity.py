"""Diversity of the replies: distinct-n at a fixed number of tokens, EAD, and repetition."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from evaluation.intervals import Z_95, Interval
from evaluation.overlap import normalize

# Chosen once, for all systems: the words of the official ConvAI2 dictionary (ParlAI a29567f, projects/convai2).
EAD_VOCABULARY = 19_304

Ngram = tuple[str, ...]


def ngrams(tokens: Sequence[str], n: int) -> list[Ngram]:
    """All n-grams of one reply, in order; empty when it has fewer than `n` tokens."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _sample_ngrams(replies: Sequence[str], n: int, num_tokens: int, seed: int) -> list[tuple[int, Ngram]]:
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


def distinct_per_reply(reply: str, n: int) -> float | None:
    """Different n-grams / all n-grams of one reply, None when it has none (ParlAI's `intradistinct`).

    Its mean over replies is near 1 for anybody (ConvAI2 humans 0.96 and 1.00): use it to look at single replies.
    """
    found = ngrams(normalize(reply), n)
    return len(set(found)) / len(found) if found else None


def distinct_interval(
    replies: Sequence[str], clusters: Sequence[Hashable], n: int, num_tokens: int, seed: int = 0
) -> Interval:
    """`distinct_n` with its 95 % interval by the delete-one-cluster jackknife."""
    sample = [(clusters[index], ngram) for index, ngram in _sample_ngrams(replies, n, num_tokens, seed)]
    return _jackknife(sample, lambda different, total: different / total, 1.0)


def ead(different: int, total: int, vocabulary: int = EAD_VOCABULARY) -> float:
    """Expectation-adjusted distinct: different words / how many `total` random draws from the vocabulary would show.

    N / (V (1 - ((V - 1) / V)^C)). Unlike distinct-1 it does not fall with the number of words, though words are no
    uniform draws, so that very different sizes still do not compare.

    Source: Liu et al. 2022, ACL, "Rethinking and Refining the Distinct Metric".

    Args:
        different, total: words, each counted once, and all.
        vocabulary: words that there are to draw from; one number for all systems that are compared.

    Raises:
        ValueError: when there is no word, or there are more different words than the vocabulary holds.
    """
    if not 0 < different <= min(total, vocabulary):
        raise ValueError(
            f"{different} different words of {total} with `vocabulary` = {vocabulary}: need one word or more, and a "
            "vocabulary that holds them, the same for all systems."
        )
    return different / (vocabulary * -math.expm1(total * math.log1p(-1 / vocabulary)))


def ead_interval(replies: Sequence[str], clusters: Sequence[Hashable], vocabulary: int = EAD_VOCABULARY) -> Interval:
    """[`ead`] of all words of the replies, ParlAI normalisation, with a delete-one-cluster jackknife interval."""
    words = [(c, (word,)) for reply, c in zip(replies, clusters, strict=True) for word in normalize(reply)]
    return _jackknife(words, lambda different, total: ead(different, total, vocabulary), math.inf)


def _jackknife(
    sample: Sequence[tuple[Hashable, Ngram]], number: Callable[[int, int], float], highest: float
) -> Interval:
    """95 % interval of a number of (different, all) n-grams by the delete-one-cluster jackknife (Efron & Stein 1981).

    Not a bootstrap: drawing dialogues with replacement repeats replies, and a repeated reply adds no new n-gram, so
    nearly all resamples would lie below the value. The jackknife errs on the wide side: on disjoint samples of human
    dialogues its standard error was 1.3 times the true one. The bounds are NaN for one cluster.
    """
    # An n-gram's owner is its cluster, and SEVERAL once a second one has it.
    several = object()
    owners: dict[Ngram, object] = {}
    for cluster, ngram in sample:
        if owners.setdefault(ngram, cluster) != cluster:
            owners[ngram] = several
    size = Counter(cluster for cluster, _ in sample)
    alone = Counter(owner for owner in owners.values() if owner is not several)
    value = number(len(owners), len(sample))
    if len(size) == 1:
        return Interval(value, math.nan, math.nan)
    without = np.array([number(len(owners) - alone[cluster], len(sample) - size[cluster]) for cluster in size])
    error = math.sqrt((len(size) - 1) / len(size) * float(((without - without.mean()) ** 2).sum()))
    return Interval(value, max(0.0, value - Z_95 * error), min(highest, value + Z_95 * error))


def repetition(reply: str, earlier: Iterable[str] = (), n: int = 4) -> tuple[int, int]:
    """(repeated, all) n-grams of a reply: an n-gram repeats one of an earlier own turn, or one before it in the reply.

    With `earlier` empty it is repetition within the reply alone (ParlAI's lrep-n). The corpus value is the ratio of the
    two sums. Source: repetition measures of Welleck et al. 2020 (unlikelihood), ICLR; n = 4.
    """
    seen = {ngram for turn in earlier for ngram in ngrams(normalize(turn), n)}
    found = ngrams(normalize(reply), n)
    repeated = 0
    for ngram in found:
        repeated += ngram in seen
        seen.add(ngram)
    return repeated, len(found)


def taken_from(reply: str, texts: Iterable[str], n: int = 4) -> tuple[int, int]:
    """(found in the texts, all) n-grams of a reply; repeats inside the reply do not count by themselves.

    With the bot's earlier turns as `texts` it is repetition across turns, with persona and history ParlAI's crep-n.
    Source: Welleck et al. 2020, as for `repetition`.
    """
    found = ngrams(normalize(reply), n)
    known = {ngram for text in texts for ngram in ngrams(normalize(text), n)} if found else set()
    return sum(ngram in known for ngram in found), len(found)
