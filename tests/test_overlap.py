"""Overlap metrics against hand-worked cases, sacrebleu's own corpus call, and a published constant."""

import math
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from evaluation.overlap import bleu, bleu_from_statistics, bleu_per_reply, bleu_statistics, f1, normalize, rouge

CONVAI2 = Path(__file__).parents[2] / "shared/data/convai2_personachat/valid_self_original.txt"


def test_normalize_is_parlai():
    assert normalize("I don't have THE cat_food, a dog-bed ... an  Apple!") == [
        *("i", "don", "t", "have", "cat", "food", "dog", "bed", "apple")
    ]
    assert normalize(" ... ?") == []


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("i have a dog", "I have the dog!", 100.0),  # articles and punctuation do not count
        ("i like big dogs", "i like cats", 100 * 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
        ("dog dog dog", "dog", 100 * 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # multiset: one dog matches one dog
        ("no", "yes", 0.0),
        ("", "i have a dog", 0.0),
        ("a the", "a the", 0.0),  # nothing is left after normalisation
    ],
)
def test_f1_by_hand(response, reference, expected):
    assert f1(response, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.skipif(not CONVAI2.exists(), reason="ConvAI2 validation data is not beside the checkout")
@pytest.mark.parametrize(
    ("reply", "expected"), [("i am you to do and your is like", 20.49), ("i do not know .", 12.91)]
)
def test_f1_of_constant_replies_on_convai2(reply, expected):
    lines = CONVAI2.read_text(encoding="utf-8").splitlines()
    references = [line.split("\t")[1] for line in lines if "\t" in line]
    assert len(references) == 7801  # all of it
    values = [f1(reply, reference) for reference in references]
    assert np.mean(values) == pytest.approx(expected, abs=0.005)  # published to two places


def test_rouge_by_hand():
    # the cat sat / the cat lay down: 2 of 3 and 2 of 4 words, 1 of 2 and 1 of 3 pairs, common subsequence 2
    scores = rouge("The cat sat", "the cat lay down")
    assert scores["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert scores["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert scores["rougeL"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert rouge("running", "run")["rouge1"] == 0
    assert rouge("running", "run", use_stemmer=True)["rouge1"] == 1
    assert rouge("", "run") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


RESPONSES = ["I have a big dog at home .", "", "yes , i really like to eat pizza every day .", "no"]
REFERENCES = [
    "i have a big dog , and a cat .",
    "hello there .",
    "i really like to eat pizza with cheese .",
    "no way !",
]


def test_bleu_is_sacrebleu_and_its_statistics_add_up():
    value, signature = bleu(RESPONSES, REFERENCES)
    upstream = sacrebleu.corpus_bleu(RESPONSES, [REFERENCES], lowercase=True, force=True).score
    assert value == pytest.approx(upstream, abs=1e-9)
    assert 5 < value < 95
    assert signature.startswith("nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:")
    totals = sum(bleu_statistics(*pair) for pair in zip(RESPONSES, REFERENCES, strict=True))
    assert bleu_from_statistics(totals) == pytest.approx(upstream, abs=1e-9)


def test_rouge_is_rouge_score():
    for stemmer in (False, True):
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
        for response, reference in zip(RESPONSES, REFERENCES, strict=True):
            theirs = scorer.score(target=reference, prediction=response)
            assert rouge(response, reference, stemmer) == {name: score.fmeasure for name, score in theirs.items()}


@pytest.mark.skipif(not CONVAI2.exists(), reason="ConvAI2 validation data is not beside the checkout")
def test_bleu_of_summed_statistics_is_sacrebleu_on_convai2():
    lines = [line.split("\t") for line in CONVAI2.read_text(encoding="utf-8").splitlines() if "\t" in line][:1500]
    replies, references = [cells[0].partition(" ")[2] for cells in lines], [cells[1] for cells in lines]
    upstream = sacrebleu.corpus_bleu(replies, [references], lowercase=True, force=True).score
    totals = sum(bleu_statistics(*pair) for pair in zip(replies, references, strict=True))
    assert upstream > 0.1
    assert bleu_from_statistics(totals) == upstream  # the same integers into the same formula
    assert bleu(replies, references)[0] == upstream
    # several decodings of a prompt are averaged before they are summed: means of counts need not be whole
    assert bleu_from_statistics(np.stack([totals, totals + 0.25])) == pytest.approx([upstream] * 2)


def test_bleu_by_hand():
    # 5 of 5 words, 2 of 4 pairs, 1 of 3 triples, no 4-gram of 2: smoothed to 1 / (2 * 2); no brevity penalty
    value, _ = bleu(["a b c d x"], ["a b c x d"])
    precisions = [5 / 5, 2 / 4, 1 / 3, 1 / (2 * 2)]
    assert value == pytest.approx(100 * math.exp(sum(map(math.log, precisions)) / 4), abs=1e-9)
    assert bleu(["", ""], ["a b", "c"])[0] == 0


def test_bleu_per_reply_has_effective_order():
    assert bleu_per_reply("no way", "no way") == pytest.approx(100)  # order 4 would have no n-gram
    assert bleu_per_reply("", "no way") == 0


def test_bleu_wants_pairs():
    with pytest.raises(ValueError, match=r"`responses` \(2\) and `references` \(1\)"):
        bleu(["a", "b"], ["a"])
