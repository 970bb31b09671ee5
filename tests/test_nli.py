"""C-score with a tiny classifier built here, in every order of the labels that there is."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from evaluation.nli import LABELS, c_scores, label_columns, load_nli, probabilities

ROWS = [
    {"persona": ["i have a dog .", "i like pizza .", "i am a teacher ."], "response": "i have two dogs and a cat ."},
    {"persona": ["i live in a city ."], "response": "no , i have a dog ."},
    {"persona": ["i have a dog ."], "response": " "},
    {"persona": [], "response": "hello"},
]


@pytest.fixture(scope="module")
def save(tiny_llama, tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def build(labels, bias=(0.0, 0.0, 0.0), weight=1.0):
        """A folder with one classifier; its outputs, and the bias of contradiction, neutral, entailment, in this order."""
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            pad_token_id=tokenizer.pad_token_id, id2label=dict(enumerate(labels)), num_labels=3,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        order = [[name[:7] for name in LABELS].index(label.lower()[:7]) for label in labels]
        with torch.no_grad():
            model.classifier.weight.copy_(30 * weight * torch.randn(3, 16)[order])
            model.classifier.bias.copy_(torch.tensor(bias)[order])
        folder = tmp_path_factory.mktemp("nli")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return build


def test_every_order_of_labels_gives_the_same_scores(save):
    found = []
    for order in itertools.permutations(LABELS):
        nli = load_nli(save(order))
        assert [order[column] for column in nli.columns] == list(LABELS)
        found.append((c_scores(nli, ROWS), probabilities(nli, ["i have a dog ."], ["i like pizza ."])))
    scores, rows = zip(*found, strict=True)
    assert all(score == scores[0] for score in scores)
    np.testing.assert_allclose(np.concatenate(rows), np.repeat(rows[0], 6, axis=0), atol=1e-6)
    assert rows[0].sum() == pytest.approx(1) and len({tuple(np.argsort(row[0])) for row in rows}) == 1
    assert scores[0][2:] == [0.0, None]  # an empty reply says nothing; no persona, no score


@pytest.mark.parametrize(("label", "value"), [(0, -1), (1, 0), (2, 1)])
def test_paml_by_hand(save, label, value):
    """A classifier that always says one label: the sum over persona sentences is their number times its worth."""
    bias = [5.0 if index == label else 0.0 for index in range(3)]
    nli = load_nli(save(("entailment", "neutral", "contradiction"), bias, weight=0.0))
    assert c_scores(nli, ROWS) == [3 * value, 1 * value, 0, None]
    assert probabilities(nli, ["a"], ["b"])[0, label] == pytest.approx(np.exp(5) / (np.exp(5) + 2), rel=1e-5)


def test_batches_do_not_matter(save):
    nli = load_nli(save(LABELS))
    texts = ["i have a dog .", "no .", "i live in a city by the sea . i like pizza .", "yes"]
    one, all_at_once = (probabilities(nli, texts, texts[::-1], size) for size in (1, 4))
    np.testing.assert_allclose(one, all_at_once, atol=1e-5)  # padding, float32


@pytest.mark.parametrize(
    "labels",
    [
        {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"},
        {0: "entailment", 1: "not_entailment"},
        {0: "entailment", 1: "neutral", 2: "neutral_2"},
    ],
)
def test_unknown_labels_are_refused(labels):
    with pytest.raises(ValueError, match="`nli_model`: its config.id2label is"):
        label_columns(labels)


def test_spellings_of_labels():
    assert label_columns({0: "ENTAILMENT", 1: "Neutral", 2: "CONTRADICTION"}) == [2, 1, 0]
    assert label_columns({0: "contradictory", 1: "entail", 2: "neutral"}) == [0, 2, 1]


def test_an_absent_model_is_a_named_error(tmp_path):
    with pytest.raises(OSError, match="`nli_model`: cannot load '.*nowhere'"):
        load_nli(str(tmp_path / "nowhere"))


def test_pairs_must_pair_up(save):
    with pytest.raises(ValueError, match="`premises` has 1 entries, `hypotheses` 2"):
        probabilities(load_nli(save(LABELS)), ["a"], ["b", "c"])
